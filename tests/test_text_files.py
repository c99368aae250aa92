"""CSV, JSON lines, patterns and home folders: the same rows as Parquet, or one message."""

import gzip
import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import config
from pipeline.batches.features import fit_features
from pipeline.config import FileFormat, RunConfig, UserError
from pipeline.logs import text_files
from pipeline.logs.files import find_files, list_files
from pipeline.logs.rows import count_rows, open_rows, read_schema, read_table
from pipeline.logs.text_files import UNIT_SEPARATOR, _Replaced, text_kind
from pipeline.sequences import build, store
from pipeline.sequences.dictionary import read_dictionary
from tests.worlds.logs import config_for, here, log

__all__ = ["here"]


def as_csv(rows: pa.Table, separator: str = ",", *, header: bool = True) -> str:
    lines = [separator.join(rows.column_names)] if header else []
    for row in rows.to_pylist():
        values = ["" if value is None else str(value) for value in row.values()]
        lines.append(separator.join(values))
    return "\n".join(lines) + "\n"


def as_json(rows: pa.Table) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows.to_pylist())


def of_files(folder: Path, files: dict[str, bytes | str], **source: object) -> RunConfig:
    """The configuration of logs in these files, which are all in one folder."""
    folder.mkdir()
    cfg = config_for(folder, **source)
    for name, content in files.items():
        path = folder / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content.encode() if isinstance(content, str) else content
        path.write_bytes(data)
    return cfg


def sequences(cfg: RunConfig) -> list[dict]:
    build.build_sequences(cfg)
    return store.read_sequences(cfg.sequence_dir).sort_by("user_id").to_pylist()


ROWS = log(rows=120)
NAMES = ROWS.column_names
FIRST, SECOND = ROWS.slice(0, 50), ROWS.slice(50)
OBJECT_ACTIONS = {"click": {"column": "done.click"}, "like": {"column": "done.more.like"}}


def parquet_bytes(rows: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(rows, sink)
    return sink.getvalue()


def nested(rows: pa.Table) -> list[dict]:
    """The rows with their users and actions within objects, one of them in another."""
    found = []
    for row in rows.to_pylist():
        inner = {"click": row.pop("click"), "more": {"like": row.pop("like")}, "why": None}
        found.append({"user": {"id": row.pop("user_id"), "plan": "free"}, "done": inner} | row)
    return found


def names_again(rows: pa.Table) -> str:
    """CSV with the line of names among the rows, as where exports were joined by hand."""
    first, *lines = as_csv(rows).splitlines()
    return "\n".join([first, *lines[:9], first, *lines[9:]]) + "\n"


TEXTS = {
    "names again": (
        {"a.csv": names_again(FIRST), "b.csv": names_again(SECOND)},
        {},
    ),
    "ids with gaps": (
        {
            "a.csv": as_csv(FIRST.set_column(0, "user_id", FIRST["user_id"].cast("double"))),
            "b.csv": as_csv(SECOND),
        },
        {},
    ),
    "objects": (
        {"a.jsonl": "".join(json.dumps(row) + "\n" for row in nested(ROWS))},
        {"format": {"flatten": True}, "columns": {"user_id": "user.id"}, "actions": OBJECT_ACTIONS},
    ),
    "structs": (
        {"a.parquet": parquet_bytes(pa.Table.from_pylist(nested(ROWS)))},
        {"format": {"flatten": True}, "columns": {"user_id": "user.id"}, "actions": OBJECT_ACTIONS},
    ),
    "csv": ({"a.csv": as_csv(FIRST), "b.csv": as_csv(SECOND.select(NAMES[::-1]))}, {}),
    "tsv, packed": ({"a.tsv.gz": gzip.compress(as_csv(ROWS, "\t").encode())}, {}),
    "separator of two": (
        {"ratings.dat": as_csv(ROWS, "::", header=False), "README": "no log"},
        {"format": {"separator": "::", "names": NAMES}},
    ),
    "json": ({"a.jsonl": as_json(FIRST), "b.json": as_json(SECOND)}, {}),
    "partitions": (
        {f"day={day}/part.parquet": b"" for day in (1, 2)},
        {},
    ),
}


@pytest.mark.parametrize("form", TEXTS)
def test_text_makes_the_sequences_that_parquet_makes(here: None, tmp_path: Path, form: str):
    (tmp_path / "plain").mkdir()
    expected = sequences(config_for(tmp_path / "plain", ROWS))
    files, source = TEXTS[form]
    for name, rows in zip(files, (FIRST, SECOND), strict=False):
        if form == "partitions":
            files[name] = parquet_bytes(rows)
    assert sequences(of_files(tmp_path / "text", files, **source)) == expected


def test_later_rows_of_a_text_file_fail_no_build(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What the first block promises need not hold for all: such rows are quarantined."""
    monkeypatch.setattr(text_files, "FIRST_BYTES", 500)
    text = as_csv(ROWS)
    text += "7,1,noon,1,0,0\n7,1,1650000000000,1,0,0.5\n7,,1650000000000,1,0,0\n"
    cfg = of_files(tmp_path / "a", {"a.csv": text})
    manifest = build.build_sequences(cfg)
    bad = {reason: rows for reason, rows in manifest.quarantined.items() if "dupl" not in reason}
    assert len(bad) == 3
    assert bad["event_time_unreadable"] == bad["tab_unreadable"] == 1
    assert manifest.rows_in == 123


@pytest.mark.parametrize("later", ["x7", "007"])
def test_ids_are_text_if_one_of_them_is(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, later: str
):
    """Far behind what the first block shows, and in a later file of a side table too."""
    monkeypatch.setattr(text_files, "FIRST_BYTES", 500)
    text = as_csv(ROWS) + f"{later},1,1650000000000,1,0,0\n"
    users = "id,country\n" + "".join(f"{user},de\n" for user in range(200)) + f"{later},fr\n"
    (tmp_path / "users.csv").write_text(users)
    table = {"path": str(tmp_path / "users.csv"), "id_column": "id"}
    cfg = of_files(tmp_path / "a", {"a.csv": text}, users=table)
    manifest = build.build_sequences(cfg)
    assert manifest.text_ids == ("user_id",)
    _, names = read_dictionary(cfg.sequence_dir, manifest, "user_id")
    assert {later, "7"} <= set(names.to_pylist())
    assert manifest.num_users == len(ROWS["user_id"].unique()) + 1


def test_a_number_that_does_not_fit_makes_ids_text(here: None, tmp_path: Path):
    """2**63 - 1 is the last that is one; it once was a traceback beyond."""
    largest = 2**63 - 1
    for id_, kind in ((largest, pa.int64()), (largest + 1, pa.string()), (10**19, pa.string())):
        text = as_csv(ROWS) + f"{id_},1,1650000000000,1,0,0\n"
        cfg = of_files(tmp_path / str(id_), {"a.csv": text})
        (file,) = list_files(str(cfg.source.path))
        assert read_schema(file, ids=("user_id",)).field("user_id").type == kind
        assert build.build_sequences(cfg).num_users == len(ROWS["user_id"].unique()) + 1


@pytest.mark.parametrize(
    ("text", "is_whole"),
    [
        ("0", True),
        ("-7", True),
        ("7.0", True),
        ("9223372036854775807", True),
        ("9199999999999999999", True),
        ("9223372036854775808", False),
        ("0123456789012345678", False),
        ("007", False),
        ("7.5", False),
        ("", False),
    ],
)
def test_whole_numbers_of_64_bits_are_known_by_their_digits(text: str, is_whole: bool) -> None:
    """Leading zeros are kept by text alone."""
    assert bool(re.match(text_files.WHOLE, text)) == is_whole


def test_decimal_commas_and_text_among_numbers(here: None, tmp_path: Path):
    """An outcome of a European export; what is no number keeps its commas."""
    price = [f"{number},{number % 100:02}" for number in range(119)] + ["n,a"]
    title = pa.array([f"a,{number}" for number in range(120)])
    rows = ROWS.append_column("price", pa.array(price)).append_column("title", title)
    of_price = {"outcome_columns": {"price": {}}}
    cfg = of_files(
        tmp_path / "a", {"a.csv": as_csv(rows, ";")}, format={"separator": ";"}, **of_price
    )
    with pytest.raises(UserError, match=r"'price' must be a number; .*source.format.decimal=','"):
        build.plan_build(cfg)

    how = {"separator": ";", "decimal": ","}
    known = {"price": {"column": "price", "unknown": "n,a"}}
    cfg = of_files(
        tmp_path / "b", {"a.csv": as_csv(rows, ";")}, format=how, columns=known, **of_price
    )
    found = []
    for user in sequences(cfg):
        found += user["price"]
    wanted = [number + number % 100 / 100 for number in range(119)]
    assert np.sum(np.isnan(found)) == 1
    assert np.allclose(sorted(np.array(found)[~np.isnan(found)]), wanted)
    with open_rows(list_files(str(cfg.source.path))[0], cfg.source.format) as opened:
        (block,) = opened.blocks(200, [0])
    assert block["title"].to_pylist() == title.to_pylist()


def test_a_field_of_an_object_is_named_with_what_reads_it(tmp_path: Path):
    text = "".join(json.dumps(row) + "\n" for row in nested(ROWS))
    cfg = of_files(tmp_path / "a", {"a.jsonl": text}, columns={"user_id": "user.id"})
    with pytest.raises(UserError, match=r"'user.id' for user_id .*set|flatten=true"):
        build.plan_build(cfg)


@pytest.mark.parametrize(("repeats", "country"), [("first", ["de", "at"]), ("last", ["fr", "at"])])
def test_repeated_ids_of_a_side_table(here: None, tmp_path: Path, repeats: str, country: list[str]):
    (tmp_path / "users.csv").write_text("id;country\n7;de\n8;at\n7;fr\n")
    table = {"path": str(tmp_path / "users.csv"), "id_column": "id", "format": {"separator": ";"}}
    cfg = of_files(tmp_path / "a", {"a.csv": as_csv(ROWS)}, users=table)
    with pytest.raises(UserError, match=r"id 7 stands in .*; source.users.repeats=last"):
        build.build_sequences(cfg)
    cfg = of_files(tmp_path / "b", {"a.csv": as_csv(ROWS)}, users=table | {"repeats": repeats})
    manifest = build.build_sequences(cfg)
    users = pq.read_table(cfg.sequence_dir / manifest.side_tables["users"].file)
    assert users["user_id"].to_pylist() == [7, 8]
    assert users["country"].to_pylist() == country


def test_json_fields_that_nobody_asked_for_may_be_anything(here: None, tmp_path: Path):
    lines = []
    for number, row in enumerate(ROWS.to_pylist()):
        extra = {"style": {"size": number}} if number % 2 else {"style": "large", "image": [1]}
        lines.append(json.dumps(row | extra))
    cfg = of_files(tmp_path / "a", {"a.jsonl": "\n".join(lines)})
    manifest = build.build_sequences(cfg)
    assert manifest.rows_in == 120
    assert not manifest.quarantined
    (block,) = open_rows_of(cfg.source.path)
    assert block.column_names == [*NAMES, "image"]

    # one that is asked for is refused, and so is a line that is none
    style = {"item_id": "style"}
    cfg = of_files(tmp_path / "b", {"a.jsonl": "\n".join(lines)}, columns=style)
    with pytest.raises(UserError, match=r"a.jsonl cannot be read as JSON lines \(.*style"):
        build.plan_build(cfg)
    cfg = of_files(tmp_path / "c", {"a.jsonl": "\n".join([*lines, "{no json}", lines[0]])})
    with pytest.raises(UserError, match=r"a.jsonl cannot be read as JSON lines"):
        build.plan_build(cfg)


def open_rows_of(path: str | None) -> list[pa.Table]:
    assert path is not None
    with open_rows(list_files(path)[0], FileFormat()) as rows:
        return list(rows.blocks(1000, [0]))


def test_ids_keep_their_leading_zeros(tmp_path: Path):
    file = tmp_path / "a.csv"
    file.write_text("user,asin,time\n1,0000013714,5\n2,B000,6\n")
    schema = read_schema(str(file), ids=("user", "asin"))
    assert schema.field("user").type == pa.int64()
    assert schema.field("asin").type == pa.string()
    file.write_text("user,asin,time\n1,0000013714,5\n2,7,6\n")
    assert read_schema(str(file), ids=("user", "asin")).field("asin").type == pa.string()
    with open_rows(str(file), FileFormat(), ("user", "asin")) as rows:
        (block,) = rows.blocks(10, [0])
    assert block.to_pylist()[0] == {"user": 1, "asin": "0000013714", "time": "5"}


def test_quotes_and_encodings(tmp_path: Path):
    film = tmp_path / "movies.dat"
    film.write_bytes('1::Amélie (2001)::a|b\n2::12" Angry: Men::c\n'.encode("latin-1"))
    form = FileFormat(separator="::", names=("id", "title", "genres"), encoding="latin-1")
    table = read_table(str(film), form, "id")
    assert table["title"].to_pylist() == ["Amélie (2001)", '12" Angry: Men']
    assert table["id"].type == pa.int64()
    comma = tmp_path / "a.csv"
    comma.write_text('id,title\n1,"Yes, Minister"\n')
    assert read_table(str(comma), FileFormat(), "id")["title"].to_pylist() == ["Yes, Minister"]
    with pytest.raises(UserError, match=r"movies.dat cannot be read as CSV .*source.format"):
        read_table(str(film), FileFormat(separator="::", names=("id",)), "id")


def test_rows_of_two_lines_may_lie_in_two_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_files, "BLOCK_BYTES", 1000)
    monkeypatch.setattr(text_files, "FIRST_BYTES", 1000)
    lines = [f'{row},"clear, and\n{"x" * (row % 50)}"' for row in range(500)]
    file = tmp_path / "items.csv"
    file.write_text("\n".join(["item_id,title", *lines]))
    assert count_rows([str(file)]) == 500
    table = read_table(str(file), FileFormat(), "item_id")
    assert table["item_id"].to_pylist() == list(range(500))
    assert table["title"][7].as_py() == "clear, and\nxxxxxxx"


def test_a_quote_that_is_not_closed_swallows_no_rows(here: None, tmp_path: Path):
    file = tmp_path / "items.csv"
    lines = [f"{row},drama,title {row}" for row in range(500)]
    prose = '"one, two,\nthree, four,\nfive,\nsix"'
    file.write_text("\n".join(["item_id,genre,title", f"900,x,{prose}", *lines]) + "\n")
    assert read_table(str(file), FileFormat(), "item_id").num_rows == 501

    lines[7] = '7,drama,"Heroes'
    file.write_text("\n".join(["item_id,genre,title", *lines]) + "\n")
    told = "a value of 'title' has 49. rows in it, from 'Heroes"
    with pytest.raises(UserError, match=told):
        read_table(str(file), FileFormat(), "item_id")
    with pytest.raises(UserError, match=told):
        count_rows([str(file)])
    unquoted = FileFormat(quote="")
    assert read_table(str(file), unquoted, "item_id")["title"][7].as_py() == '"Heroes'
    assert count_rows([str(file)], unquoted) == 500


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", as_csv(ROWS, ";"), r"set source\.format\.separator=';'$"),
        ("a.csv", as_csv(ROWS, header=False), r"without a header set source\.format\.names"),
        ("a.json", json.dumps(ROWS.slice(0, 3).to_pylist()), r"a\.json holds one JSON list"),
        ("a.txt", "no log", r"no Parquet files at '[^']*', nor CSV or JSON lines; left out: 1"),
    ],
)
def test_a_form_that_is_not_asked_for_is_named(tmp_path: Path, name: str, text: str, message: str):
    cfg = of_files(tmp_path / "logs", {name: text})
    with pytest.raises(UserError, match=message):
        build.plan_build(cfg)


# preset · its ratings · separator · their first day and last
MOVIELENS = {
    "ml_1m": ("ratings.dat", "::", "2000-04-26", "2001-02-01"),
    "ml_100k": ("u.data", "\t", "1997-09-20", "1998-04-22"),
}


@pytest.mark.parametrize("preset", MOVIELENS)
def test_movielens_as_it_is_unpacked_builds_by_its_preset(here: None, tmp_path: Path, preset: str):
    name, separator, first, last = MOVIELENS[preset]
    rng = np.random.default_rng(0)
    days = np.array([first, last], "datetime64[s]").astype(np.int64)
    columns = [rng.integers(1, 41, 500), rng.integers(1, 31, 500), rng.integers(1, 6, 500)]
    lines = []
    for row in zip(*columns, rng.integers(*days, 500), strict=True):
        lines.append(separator.join(map(str, row)))
    (tmp_path / name).write_text("\n".join(lines) + "\n")
    films = [f"{film}::Amélie, {film}: 100% (2001)::Comedy|Drama's" for film in range(1, 31)]
    (tmp_path / "movies.dat").write_bytes("\n".join(films).encode("latin-1"))

    changes = [f"source.path={tmp_path / name}", f"runs_dir={tmp_path}"]
    if preset == "ml_1m":
        changes.append(f"source.items.path={tmp_path / 'movies.dat'}")
    yaml = Path(__file__).parents[1] / f"configs/{preset}.yaml"
    assert len(yaml.read_text().splitlines()) <= 16
    cfg = config.load(yaml, changes)

    manifest = build.build_sequences(cfg)
    assert manifest.rows_in == 500
    assert manifest.num_rows + manifest.rows_merged == 500
    assert manifest.num_users == 40
    maps = fit_features(cfg)
    assert ("item.genres" in maps.vocab_sizes) == (preset == "ml_1m")
    if preset == "ml_1m":
        assert maps.vocab_sizes["item.genres"] == 3
        titles = store.read_side_table(cfg.sequence_dir, "items")
        assert titles is not None
        assert titles["title"][0].as_py() == "Amélie, 1: 100% (2001)"


@pytest.mark.parametrize("size", [2, 3, 7, 1000])
def test_a_separator_is_found_wherever_blocks_break(size: int):
    text = b"a::b:c::d\n:::\n::::"
    stream = _Replaced(io.BytesIO(text), b"::", UNIT_SEPARATOR)
    found = b""
    while piece := stream.read(size):
        assert len(piece) <= size
        found += piece
    assert found == text.replace(b"::", UNIT_SEPARATOR)


@pytest.mark.parametrize(
    ("name", "form", "kind"),
    [
        ("a.parquet", {}, None),
        ("a.dat", {}, None),
        ("a.csv.gz", {}, "csv"),
        ("s3://b/a.tsv?region=x", {}, "csv"),
        ("a.ndjson", {}, "json"),
        ("a.dat", {"separator": "::"}, "csv"),
        ("a.dat", {"names": ["a"]}, "csv"),
        ("a.txt", {"kind": "json"}, "json"),
        ("a.csv", {"kind": "parquet"}, None),
        ("a.parquet", {"kind": "csv"}, None),  # of posted events
    ],
)
def test_what_a_file_is_by_name_and_format(name: str, form: dict, kind: str | None):
    given = {**form, "names": tuple(form.get("names", ()))}
    assert text_kind(name, FileFormat(**given)) == kind


def test_patterns_and_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("day=1/a.csv", "day=1/.b.csv", "day=2/a.csv", "other/a.csv", "day=1/a.txt"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("a,b\n1,2\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    relative = [Path(file).relative_to(tmp_path) for file in list_files("~/day=*/*.csv")]
    assert [str(path) for path in relative] == ["day=1/a.csv", "day=2/a.csv"]
    assert len(list_files(f"{tmp_path}/**/a.csv")) == 3
    assert len(list_files("~/day=1")) == 1
    assert count_rows(list_files("~")) == 3
    (tmp_path / "a.jsonl").write_text("{}")
    with pytest.raises(UserError, match=r"files of CSV and of JSON lines.*kind to csv or json"):
        list_files(tmp_path)
    found = find_files(tmp_path, FileFormat(kind="json"))
    assert [Path(file).name for file in found.files] == ["a.jsonl", "a.txt"]
    pq.write_table(pa.table({"a": np.arange(3)}), tmp_path / "p.parquet")
    assert [Path(file).name for file in list_files(tmp_path)] == ["p.parquet"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ({"separator": ""}, "source.format.separator must be a text"),
        ({"quote": '""'}, "source.format.quote must be one character"),
        ({"encoding": "latin-99"}, "source.format.encoding must be an encoding"),
        ({"kind": "xml"}, "source.format.kind must be one of"),
        ({"names": ["a", "a"]}, "source.format.names must be free of repeats"),
    ],
)
def test_formats_that_cannot_be(form: dict, message: str):
    with pytest.raises(config.ConfigError, match=message):
        config.from_dict({"source": {"kind": "parquet", "path": "x", "format": form}})
