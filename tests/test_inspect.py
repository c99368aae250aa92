"""`jobs.inspect` on small look-alikes of public logs: each builds by what it writes and at most
three edits.
"""

import gzip
import json
import re
import zoneinfo
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, date, datetime, time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs import inspect
from pipeline import config
from pipeline.batches.features import fit_features
from pipeline.config import ColumnReading
from pipeline.logs.columns import time_values
from pipeline.logs.ids import id_code
from pipeline.logs.looking import listing, sample
from pipeline.logs.looking.guess import guess_columns, time_option
from pipeline.logs.times import read_times, show_time
from pipeline.sequences import build, store
from pipeline.sequences.dictionary import read_dictionary
from tests.worlds.logs import here

__all__ = ["here"]

START = int(datetime(2020, 3, 1, tzinfo=UTC).timestamp())
ROWS = 400


class Draw:
    """The columns that most logs have, drawn with one seed."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.user = self.rng.integers(1, 30, ROWS)
        self.item = self.rng.integers(100, 160, ROWS)
        self.seconds = START + np.sort(self.rng.integers(0, 10 * 86_400, ROWS))

    def choice(self, *values: object) -> list:
        return self.rng.choice(np.array(values, object), ROWS).tolist()

    def local(self, form: str) -> list[str]:
        return [datetime.fromtimestamp(int(s), UTC).strftime(form) for s in self.seconds]


def write_csv(path: Path, columns: dict, separator: str = ",", *, header: bool = True) -> None:
    lines = [separator.join(columns)] if header else []
    for row in zip(*columns.values(), strict=True):
        lines.append(separator.join("" if value is None else str(value) for value in row))
    path.write_text("\n".join(lines) + "\n")


def retail_rocket(folder: Path, draw: Draw) -> None:
    events = draw.choice("view", "addtocart", "transaction")
    bought = [7 if event == "transaction" else None for event in events]
    columns = {"timestamp": draw.seconds * 1000, "visitorid": draw.user, "event": events}
    write_csv(folder / "events.csv", columns | {"itemid": draw.item, "transactionid": bought})


def rees46(folder: Path, draw: Draw) -> None:
    columns = {
        "event_time": draw.local("%Y-%m-%d %H:%M:%S UTC"),
        "event_type": draw.choice("view", "cart", "remove_from_cart", "purchase"),
        "product_id": draw.item,
        "category_id": draw.item * 10**15,
        "category_code": draw.choice("electronics.phone", None),
        "brand": draw.choice("acme", None),
        "price": np.round(draw.rng.random(ROWS) * 100, 2),
        "user_id": draw.user,
        "user_session": draw.choice("a-1", "b-2"),
    }
    write_csv(folder / "2020-Mar.csv", columns)


def taobao(folder: Path, draw: Draw) -> None:
    category = draw.item % 7 + 2_000_000
    event = draw.choice("pv", "buy", "cart", "fav")
    columns = dict(zip("abcde", (draw.user, draw.item, category, event, draw.seconds), strict=True))
    write_csv(folder / "UserBehavior.csv", columns, header=False)


def mind(folder: Path, draw: Draw) -> None:
    """MIND's behaviors.tsv: a row holds what was clicked before, and a list of four impressions."""
    shown = [f"N{item}-{click}" for item, click in zip(draw.item, draw.choice(0, 1), strict=True)]
    draw.user = np.repeat(draw.user[::4], 4)
    columns = {
        "impression": np.arange(ROWS // 4) + 1,
        "user": [f"U{user}" for user in draw.user[::4]],
        "time": [time.replace("/0", "/") for time in draw.local("%m/%d/%Y %I:%M:%S %p")[::4]],
        "history": [f"N{item} N7" if item % 3 else "" for item in draw.item[::4]],
        "impressions": [" ".join(shown[begin : begin + 4]) for begin in range(0, ROWS, 4)],
    }
    write_csv(folder / "behaviors.tsv", columns, "\t", header=False)


def yambda(folder: Path, draw: Draw) -> None:
    """Times are seconds from the log's own beginning."""
    columns = {
        "uid": pa.array(draw.user, pa.uint32()),
        "timestamp": pa.array(draw.seconds - START, pa.uint32()),
        "item_id": pa.array(draw.item, pa.uint32()),
        "is_organic": pa.array(draw.choice(0, 1), pa.uint8()),
        "played_ratio_pct": pa.array(draw.rng.integers(0, 101, ROWS), pa.uint16()),
        "track_length_seconds": pa.array(draw.rng.integers(60, 300, ROWS), pa.uint32()),
    }
    pq.write_table(pa.table(columns), folder / "listens.parquet")


def lastfm(folder: Path, draw: Draw) -> None:
    columns = {
        "userid": [f"user_{user:06}" for user in draw.user],
        "timestamp": draw.local("%Y-%m-%dT%H:%M:%SZ"),
        "artid": draw.choice("f1b1cf71-bd35-4e99-8624-24a6e15f133a", ""),
        "artname": [f'The 12" {item // 2}' for item in draw.item],
        "traid": ["" if item % 5 == 0 else f"track-{item}" for item in draw.item],
        "traname": [f"Song {item}" for item in draw.item],
    }
    write_csv(
        folder / "userid-timestamp-artid-artname-traid-traname.tsv", columns, "\t", header=False
    )


def criteo(folder: Path, draw: Draw) -> None:
    """The attribution set: seconds from the beginning, -1 for what never happened."""
    columns = {
        "timestamp": draw.seconds - START,
        "uid": draw.user,
        "campaign": draw.item,
        "conversion": draw.choice(0, 1),
        "conversion_timestamp": draw.choice(-1, 100),
        "click": draw.choice(0, 1),
        "cost": np.round(draw.rng.random(ROWS), 4),
        "cat1": draw.rng.integers(0, 9, ROWS),
    }
    write_csv(folder / "criteo.tsv", columns, "\t")


def amazon(folder: Path, draw: Draw) -> None:
    lines = []
    for user, item, seconds in zip(draw.user, draw.item, draw.seconds, strict=True):
        row = {"reviewerID": f"A{user}", "asin": f"{item:010}", "overall": float(user % 5 + 1)}
        row |= {"reviewText": "good", "unixReviewTime": int(seconds), "helpful": [2, 3]}
        row |= {"style": {"Color:": "red"}} if item % 2 else {}
        lines.append(json.dumps(row))
    (folder / "reviews.json").write_text("\n".join(lines))


# what is looked at · the edits · the actions, and how many of the rows each has
SHAPES: dict[str, tuple[Callable[[Path, Draw], None], list[str], set[str]]] = {
    "retail_rocket": (retail_rocket, [], {"view", "addtocart", "transaction"}),
    "rees46": (rees46, [], {"view", "cart", "remove_from_cart", "purchase"}),
    "taobao": (taobao, [], {"pv", "buy", "cart", "fav"}),
    "mind": (mind, [], {"clicked"}),
    "yambda": (yambda, [], {"long"}),
    "lastfm": (lastfm, ["source.columns.item_id=column_6"], {"happened"}),
    "criteo": (criteo, [], {"conversion", "click"}),
    "amazon": (amazon, [], {"liked"}),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_a_public_log_builds_by_what_is_written(
    here: None, tmp_path: Path, shape: str, capsys: pytest.CaptureFixture[str]
):
    write, edits, actions = SHAPES[shape]
    assert len(edits) <= 3
    (tmp_path / "logs").mkdir()
    draw = Draw()
    write(tmp_path / "logs", draw)
    preset = tmp_path / "preset.yaml"
    inspect.main([str(tmp_path / "logs"), "-o", str(preset)])
    assert f"wrote {preset}" in capsys.readouterr().out

    cfg = config.load(preset, [f"runs_dir={tmp_path}", "sequences.num_buckets=2", *edits])
    assert set(cfg.source.actions) == actions
    manifest = build.build_sequences(cfg)
    lost = sum(rows for why, rows in manifest.quarantined.items() if why != "null_item_id")
    assert manifest.rows_in == ROWS
    assert manifest.num_rows > 0.9 * (ROWS - manifest.quarantined.get("null_item_id", 0))
    assert lost < 0.05 * ROWS
    assert manifest.num_users == len(np.unique(draw.user))
    assert cfg.split.val_ms < cfg.split.test_ms < manifest.last_event_ms
    fit_features(cfg)

    # every action of the logs is there, and not in all rows, but where there is no other kind
    rows = store.read_sequences(cfg.sequence_dir)
    masks = rows["action_mask"].combine_chunks().flatten().to_numpy()
    for bit, action in enumerate(cfg.source.actions):
        share = ((masks >> bit) & 1).mean()
        assert share == 1 if action == "happened" else 0 < share < 1


def test_side_tables_are_joined_and_their_features_written(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    draw = Draw()
    (tmp_path / "logs").mkdir()
    retail_rocket(tmp_path / "logs", draw)
    number = np.arange(120)
    items = {
        "id": 100 + number,
        "genre": [f"g{i % 3}" for i in number],
        "length": number / 7,
        "title": [f"t{i}" for i in number],  # each its own: nothing to learn
        "author_id": number // 3 * 999_983 % 83,  # an id: its order means nothing
        "musicId": number * 7,  # an id of one item each
        "plays": number * 3,
    }
    pq.write_table(pa.table(items), tmp_path / "items.parquet")
    write_csv(
        tmp_path / "users.csv", {"visitorid": range(1000, 1030), "country": ["de", "fr"] * 15}
    )
    preset = tmp_path / "preset.yaml"
    where = ["--items", str(tmp_path / "items.parquet"), "--users", str(tmp_path / "users.csv")]
    inspect.main([str(tmp_path / "logs"), *where, "-o", str(preset)])
    out = capsys.readouterr().out
    assert "100% of the logs' ids are in 'id'" in out
    assert "0% of the logs' ids are in 'visitorid': is it the right table" in out
    cfg = config.load(preset, [f"runs_dir={tmp_path}"])
    assert {name: kind.kind for name, kind in cfg.features.item.items()} == {
        "genre": "categorical",
        "length": "quantile",
        "author_id": "categorical",
        "plays": "quantile",
    }
    assert cfg.features.item["author_id"].most_values is not None
    by_user = [rate.by for name, rate in cfg.features.dense.items() if name.startswith("user_")]
    assert by_user == [("user", "genre"), ("user", "author_id")]
    assert cfg.source.users is not None
    assert cfg.source.users.id_column == "visitorid"


def test_an_item_s_column_that_is_named_as_a_request_s_gets_no_rate(
    here: None, tmp_path: Path
) -> None:
    """`by: [user, hour]` means the hour of the request."""
    draw = Draw()
    (tmp_path / "logs").mkdir()
    plays = {"user_id": draw.user, "item_id": draw.item, "timestamp": draw.seconds}
    clicks = {"device": draw.choice("ios", "web"), "clicked": draw.choice(0, 1)}
    write_csv(tmp_path / "logs" / "plays.csv", plays | clicks)
    number = np.arange(60)
    words = {name: [f"{name}{i % 3}" for i in number] for name in ("hour", "device", "genre")}
    pq.write_table(pa.table({"item_id": 100 + number} | words), tmp_path / "items.parquet")

    cfg = looked_at(tmp_path, "--items", str(tmp_path / "items.parquet"))
    assert cfg.source.request_columns == ("device",)
    assert set(cfg.features.item) == set(words)
    by_user = [rate.by for name, rate in cfg.features.dense.items() if name.startswith("user_")]
    assert by_user == [("user", "genre")]


def test_a_line_that_the_first_bytes_cut_off_has_no_say(tmp_path: Path) -> None:
    """Of long lines the last one read has none of the signs that come after its text."""
    file = tmp_path / "reviews.csv"
    words = "good, long, and " + "so on " * 800
    file.write_text("text;user;item;time\n" + f"{words};7;8;{START}\n" * 20)
    assert file.stat().st_size > sample.FIRST_BYTES
    assert sample.guess_format(str(file)).separator == ";"


def test_examples_of_a_column_are_different_values() -> None:
    assert listing.first_values(pa.array([7, 7, None, 3, 7, 5, 4])) == [7, 3, 5]
    assert listing.first_values(pa.array([[1], None, [1], [2], [3]])) == [[1], [1], [2]]


# how a user's text file is written: the whole of it, and the options of its times
ODD_FILES: dict[str, tuple[Callable[[str], bytes], dict[str, str]]] = {
    "pandas_index": (lambda text: add_index(text).encode(), {"zone": "UTC"}),
    "gzip.csv.gz": (lambda text: gzip.compress(text.encode()), {"zone": "UTC"}),
    "utf16": (lambda text: text.encode("utf-16"), {"zone": "UTC"}),
    "byte_order_mark": (lambda text: text.encode("utf-8-sig"), {"zone": "UTC"}),
    "windows": (lambda text: text.replace("\n", "\r\n").encode(), {"zone": "UTC"}),
    "days": (
        lambda text: re.sub(r"2020-03-(\d\d) \d\d:\d\d", r"\1.03.2020", text).encode(),
        {"zone": "UTC", "format": "%d.%m.%Y"},
    ),
    "european": (
        lambda text: re.sub(r"2020-03-(\d\d)", r"\1/03/2020", text).encode(),
        {"zone": "UTC", "format": "%d/%m/%Y %H:%M"},
    ),
    "american": (
        lambda text: re.sub(r"2020-03-(\d\d)", r"03/\1/2020", text).encode(),
        {"zone": "UTC", "format": "%m/%d/%Y %H:%M"},
    ),
}


def add_index(text: str) -> str:
    """The column without a name that pandas' `to_csv` begins with."""
    head, *lines = text.splitlines()
    return "\n".join([f",{head}", *(f"{place},{line}" for place, line in enumerate(lines))]) + "\n"


@pytest.mark.parametrize("name", ODD_FILES)
def test_a_text_file_as_people_have_it_is_looked_at(tmp_path: Path, name: str) -> None:
    """Beside an empty one, with ids with spaces and a column of text that looks like numbers."""
    written, times = ODD_FILES[name]
    draw = Draw()
    draw.seconds = START + 15 * 86_400 + np.arange(ROWS) * 60
    columns = {
        "user": [f"Ann Lee {user}" for user in draw.user],
        "item": draw.item,
        "ts": draw.local("%Y-%m-%d %H:%M"),
        "clicked": draw.choice(0, 1),
        "ip": [f"10.0.0.{item}" for item in draw.item],
    }
    folder = tmp_path / "logs"
    folder.mkdir()
    file = folder / (name if name.endswith(".gz") else f"{name}.csv")
    write_csv(tmp_path / "plain.csv", columns)
    file.write_bytes(written((tmp_path / "plain.csv").read_text()))
    (folder / "empty.csv").touch()

    inspect.main([str(folder), "-o", str(tmp_path / "preset.yaml")])
    cfg = config.load(tmp_path / "preset.yaml", [f"runs_dir={tmp_path}"])
    reading = cfg.source.readings["event_time"]
    assert {key: getattr(reading, key) for key in ("zone", "format") if getattr(reading, key)} == (
        times
    )
    plan = build.plan_build(cfg)
    assert (plan["rows"], plan["files"], plan["files_left_out"]) == (ROWS, 1, 1)


def looked_at(tmp_path: Path, *arguments: str, edits: tuple[str, ...] = ()) -> config.RunConfig:
    inspect.main([str(tmp_path / "logs"), *arguments, "-o", str(tmp_path / "preset.yaml")])
    return config.load(tmp_path / "preset.yaml", [f"runs_dir={tmp_path}", *edits])


def test_lists_are_not_ordered_by_what_nobody_wants(here: None, tmp_path: Path) -> None:
    draw = Draw()
    people = {"user_id": draw.user, "item_id": draw.item, "timestamp": draw.seconds}
    answers = {name: draw.choice(0, 1) for name in ("skipped", "liked", "is_hate", "saved")}
    (tmp_path / "logs").mkdir()
    write_csv(tmp_path / "logs" / "plays.csv", people | answers)
    cfg = looked_at(tmp_path)
    assert cfg.tasks == ("liked", "saved", "skipped", "is_hate")
    assert list(cfg.source.actions) == list(answers)


def test_a_shop_in_germany(here: None, tmp_path: Path) -> None:
    """Semicolons, decimal commas, local times over the end of summer time, exports joined with
    their lines of names, a byte order mark, gzip, and items that stand twice in their table.
    """
    people = ["00123", "123", "c-7", "\U0001f469\u200d\U0001f680", "x" * 300, "O'Brien"]
    berlin = zoneinfo.ZoneInfo("Europe/Berlin")
    last_of_summer = int(datetime(2026, 10, 25, 0, 59, tzinfo=UTC).timestamp())
    rng = np.random.default_rng(0)
    lines, expected = [], {}
    for number in range(ROWS):
        # an hour that comes twice is read as the first: none of it here
        moment = last_of_summer + (number - ROWS // 2) * 60 + 3720 * (number >= ROWS // 2)
        local = datetime.fromtimestamp(moment, berlin).strftime("%d.%m.%Y %H:%M:%S")
        person, item = people[rng.integers(6)], f"SKU{rng.integers(40)}"
        kind = ["view", "purchase"][number % 2]
        lines.append(f"{local};{person};{item};{kind};{number % 40},{number % 90 + 10}")
        price = round(number % 40 + (number % 90 + 10) / 100, 2)
        expected.setdefault(person, []).append((moment * 1000, price, number % 2))

    names = "Zeitpunkt;Kundennummer;Artikel;event_type;Preis"
    folder = tmp_path / "logs"
    folder.mkdir()
    first = "\r\n".join([names, *lines[:100], names, *lines[100:200]]) + "\r\n"
    (folder / "1.csv").write_bytes(first.encode("utf-8-sig"))
    (folder / "2.csv.gz").write_bytes(gzip.compress("\n".join([names, *lines[200:]]).encode()))
    items = [f"SKU{item};{item},5;Kat {item % 3}" for item in range(40)]
    (tmp_path / "items.csv").write_text("\n".join(["Artikel;Preis;Kategorie", *items, items[7]]))

    edit = "source.columns.event_time.zone=Europe/Berlin"
    cfg = looked_at(tmp_path, "--items", str(tmp_path / "items.csv"), edits=(edit,))
    assert cfg.features.item["Preis"].kind == "quantile"
    assert cfg.tasks == ("view", "purchase")
    manifest = build.build_sequences(cfg)
    assert manifest.quarantined == {"event_time_unreadable": 1}
    assert manifest.num_users == 6
    fit_features(cfg)

    _, texts = read_dictionary(cfg.sequence_dir, manifest, "user_id")
    people_of = {id_code(text): text for text in texts.to_pylist()}
    for user in store.read_sequences(cfg.sequence_dir).to_pylist():
        bought = [mask >> 1 & 1 for mask in user["action_mask"]]
        rows = list(zip(user["event_time"], np.round(user["preis"], 2), bought, strict=True))
        assert rows == expected[people_of[user["user_id"]]]


def test_a_grocer_with_tills(here: None, tmp_path: Path) -> None:
    """Baskets without a card, returns below 0, the time of day in a column of its own, and a name
    of two lines.
    """
    rows = {
        "ticket": np.repeat(np.arange(1000, 1000 + ROWS // 4), 4),
        "card": [70 + row // 16 if row % 8 else None for row in range(ROWS)],
        "date": [f"2026-01-{1 + row // 20:02}" for row in range(ROWS)],
        "time": [f"{9 + row // 4 % 5}:{row // 4 % 60:02}" for row in range(ROWS)],
        "sku": [f"{row % 60:06}" for row in range(ROWS)],
        "qty": [-1 if row % 50 == 1 else 1 + row % 3 for row in range(ROWS)],
    }
    rows["amount"] = np.array(rows["qty"]) * 1.25
    (tmp_path / "logs").mkdir()
    write_csv(tmp_path / "logs" / "tickets.csv", rows)
    items = [f'{item:06},"Rice\nlong grain",D{item % 3}' for item in range(60)]
    (tmp_path / "items.csv").write_text("\n".join(["sku,name,dept", *items]))

    cfg = looked_at(tmp_path, "--items", str(tmp_path / "items.csv"))
    event_time = cfg.source.columns["event_time"]
    assert isinstance(event_time, ColumnReading)
    assert (event_time.column, event_time.clock) == ("date", "time")
    assert cfg.source.columns["user_id"] == "card"
    assert cfg.examples.negatives > 0
    cfg = replace(cfg, checks=replace(cfg.checks, max_quarantined_share=0.2))
    manifest = build.build_sequences(cfg)
    assert manifest.quarantined == {"null_user_id": ROWS // 8}

    expected = set()
    for row in range(ROWS):
        if rows["card"][row] is not None:
            local = datetime.strptime(f"{rows['date'][row]} {rows['time'][row]}", "%Y-%m-%d %H:%M")
            moment = int(local.replace(tzinfo=UTC).timestamp()) * 1000
            bought, amount = rows["qty"][row] > 0, float(rows["amount"][row])
            expected.add((rows["card"][row], moment, bought, amount))
    found = set()
    for user in store.read_sequences(cfg.sequence_dir).to_pylist():
        actions = [bool(mask) for mask in user["action_mask"]]
        for event in zip(user["event_time"], actions, user["amount"], strict=True):
            found.add((user["user_id"], *event))
    assert found == expected


def test_a_job_board(here: None, tmp_path: Path) -> None:
    """Candidates, whose name holds a date; searches, more of them than jobs; a state for what was
    done; and descriptions of many lines.
    """
    draw = Draw()
    rows = {
        "candidate": [f"cand-{user}" for user in draw.user],
        "job": [f"JOB/{item}" for item in draw.item],
        "seen_at": draw.local("%d.%m.%Y %H:%M:%S"),
        "search": [f"s{row // 2}" for row in range(ROWS)],
        "status": draw.choice("seen", "seen", "opened", "applied"),
    }
    (tmp_path / "logs").mkdir()
    write_csv(tmp_path / "logs" / "week1.csv", rows, ";")
    text = "We look for;\n" * 30 + 'a ""great"" person'
    jobs = [f'JOB/{item};sql|py{item % 4};"{text}";C{item % 3}' for item in range(100, 160)]
    (tmp_path / "jobs.csv").write_text("\n".join(["job;skills;description;city", *jobs]))

    cfg = looked_at(tmp_path, "--items", str(tmp_path / "jobs.csv"))
    columns = cfg.source.columns
    assert (columns["user_id"], columns["item_id"]) == ("candidate", "job")
    assert set(cfg.source.actions) == {"seen", "opened", "applied"}
    assert set(cfg.tasks) == {"opened", "applied"}
    assert cfg.features.item["skills"].kind == "list"
    assert build.build_sequences(cfg).quarantined == {}


def test_a_table_of_items_tells_which_column_is_the_item(here: None, tmp_path: Path) -> None:
    """Neither name is known, and another column has more values."""
    draw = Draw()
    rows = {"cid": draw.item, "who": draw.user, "t": draw.seconds, "shared": draw.choice(0, 1)}
    rows["batch"] = [f"b{row // 2}" for row in range(ROWS)]
    (tmp_path / "logs").mkdir()
    write_csv(tmp_path / "logs" / "plays.csv", rows)
    write_csv(tmp_path / "clips.csv", {"cid": list(range(100, 160)), "topic": ["a", "b"] * 30})

    cfg = looked_at(tmp_path, "--items", str(tmp_path / "clips.csv"))
    assert cfg.source.columns["user_id"] == "who"
    assert cfg.source.columns["item_id"] == "cid"


def test_a_session_is_a_user_where_nobody_else_is() -> None:
    draw = Draw()
    some = {"session": [f"s{user}" for user in draw.user], "film": draw.item, "ts": draw.seconds}
    assert guess_columns(pa.table(some)).columns["user_id"] == "session"
    assert guess_columns(pa.table({"person": draw.user, **some})).columns["user_id"] == "person"
    some.pop("film")
    assert guess_columns(pa.table({"person": draw.user, **some})).missing == ["item_id"]


def test_a_table_among_the_logs_is_named(
    here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    draw = Draw()
    plays = {"user_id": draw.user, "track_id": draw.item, "ts": draw.seconds}
    pq.write_table(pa.table(plays), tmp_path / "plays.parquet")
    inspect.main([str(tmp_path)])
    assert "has no column" not in capsys.readouterr().out

    pq.write_table(pa.table({"track_id": [1, 2], "title": ["a", "b"]}), tmp_path / "tracks.parquet")
    inspect.main([str(tmp_path)])
    assert f"{tmp_path}/tracks.parquet has no column 'user_id'" in capsys.readouterr().out


def test_a_music_service_with_hashes_of_64_bits(
    here: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    draw = Draw()
    listener = draw.rng.integers(-(2**63), 2**63 - 1, 30)[draw.user]
    plays = {
        "listener": pa.array(listener),
        "track_uri": [f"track:{item}" for item in draw.item],
        "ts": pa.array(draw.seconds * 1_000_000),
        "ms_played": pa.array(draw.rng.integers(100, 1500, ROWS)),
        "event": ["play"] * ROWS,
    }
    (tmp_path / "logs").mkdir()
    pq.write_table(pa.table(plays), tmp_path / "logs" / "plays.parquet")
    cfg = looked_at(tmp_path)
    assert cfg.source.columns["watch_ms"] == "ms_played"
    assert cfg.examples.negatives > 0, "every row is a play"

    numbers = replace(cfg.source, columns={**cfg.source.columns, "user_id": "listener"})
    build.plan_build(replace(cfg, source=numbers))
    assert "user_id is a hash of 64 bits" in caplog.text
    assert build.build_sequences(cfg).quarantined == {}


@pytest.mark.parametrize(
    ("date", "clock", "option"),
    [
        (20260105, 905, {"format": "%Y%m%d %H%M"}),
        (20260105.0, 90500, {"format": "%Y%m%d %H%M%S"}),
        ("05.01.2026", "9:05", {"format": "%d.%m.%Y %H:%M"}),
        (date(2026, 1, 5), time(9, 5), {}),
        (datetime(2026, 1, 5), "09:05:00.0", {}),
        (20260105, time(9, 5), {"format": "%Y%m%d %H:%M:%S"}),
        ("05.01.2026", time(9, 5), {"format": "%d.%m.%Y %H:%M"}),
        ("05.01.2026", "9:05", {"format": "%d.%m.%Y %H:%M:%S"}),
        # a date alone that was written as a time
        ("2026-01-05T00:00:00", "9:05", {}),
        ("1/5/2026 12:00:00 AM", "9:05", {"format": "%m/%d/%Y %H:%M"}),
    ],
)
def test_a_date_and_a_time_of_day_in_two_columns(
    date: object, clock: object, option: dict[str, str]
) -> None:
    reading = ColumnReading(column="day", clock="clock", zone="UTC", **option)
    block = pa.table({"day": [date, date, None], "clock": [clock, None, clock]})
    found = read_times(time_values(block, reading), reading).to_pylist()
    assert found == [int(datetime(2026, 1, 5, 9, 5, tzinfo=UTC).timestamp()) * 1000, None, None]


def test_seconds_that_a_format_does_not_have_are_not_lost_in_silence() -> None:
    reading = ColumnReading(column="day", clock="clock", zone="UTC", format="%Y%m%d %H:%M")
    block = pa.table({"day": [20260105], "clock": [time(9, 5, 30)]})
    assert read_times(time_values(block, reading), reading).to_pylist() == [None]


@pytest.mark.parametrize(
    ("date", "values", "form"),
    [
        ("2026-01-05 00:00:00", {"time": "9:05"}, None),
        ("05/01/2026 00:00", {"time": "9:05"}, "%d/%m/%Y %H:%M"),
        ("05.01.2026", {"time": time(9, 5, 0, 250_000)}, "%d.%m.%Y %H:%M:%S.%f"),
        ("05.01.2026", {"duration": "3:45", "clock": "9:05:00"}, "%d.%m.%Y %H:%M:%S"),
        ("1/5/2026 12:00:00 AM", {"time": "9:05 am"}, "%m/%d/%Y %I:%M %p"),
        ("01/05/2026", {"time": "09:05:00AM"}, "%m/%d/%Y %I:%M:%S%p"),
        ("2026-01-05", {"time": "9:05 AM"}, "%Y-%m-%d %I:%M %p"),
        (date(2026, 1, 5), {"time": "9:05 AM"}, "%Y-%m-%d %I:%M %p"),
        (datetime(2026, 1, 5), {"time": "9:05 AM"}, "%Y-%m-%d %I:%M %p"),
    ],
)
def test_the_time_of_day_beside_a_date_is_found(
    date: object, values: dict[str, object], form: str | None
) -> None:
    guess = guess_columns(
        pa.table({"date": [date] * 20} | {k: [v] * 20 for k, v in values.items()})
    )
    option = {"column": "date", "clock": list(values)[-1], "zone": "UTC"}
    assert guess.columns["event_time"] == option | ({} if form is None else {"format": form})
    assert guess.times is not None
    found = {show_time(moment) for moment in guess.times.to_pylist()}
    assert found == {"2026-01-05T09:05:00+00:00"}


def test_halves_of_a_day_are_told_apart() -> None:
    """Some of the times have seconds."""
    clocks = ["12:05 AM", "9:05:07 am", "12:05 PM", "9:05 pm"]
    guess = guess_columns(pa.table({"day": ["05/31/2026"] * 4, "time": clocks}))
    assert guess.columns["event_time"]["format"] == "%m/%d/%Y %I:%M:%S %p"
    assert guess.times is not None
    found = [show_time(moment)[11:19] for moment in guess.times.to_pylist()]
    assert found == ["00:05:00", "09:05:07", "12:05:00", "21:05:00"]


@pytest.mark.parametrize("length", ["3:45", "70:12"])
def test_a_song_s_length_is_no_time_of_day(length: str) -> None:
    guess = guess_columns(pa.table({"date": ["2026-01-05"] * 20, "length": [length] * 20}))
    assert guess.columns["event_time"] == {"column": "date", "zone": "UTC"}


def test_days_as_numbers_are_times() -> None:
    days = pa.array([20260105, 20260228])
    option = time_option("day_date", days)
    assert option == {"format": "%Y%m%d", "zone": "UTC"}
    read = read_times(days, ColumnReading(column="day_date", **option))
    assert [show_time(moment)[:10] for moment in read.to_pylist()] == ["2026-01-05", "2026-02-28"]
    assert time_option("day_date", pa.array([20261305])) is None, "there is no 13th month"
    assert time_option("item_id", days) is None


def test_an_app_with_objects_in_its_lines(here: None, tmp_path: Path) -> None:
    """Ids that are numbers in one file and text in another, and a field that is anything."""
    draw = Draw()
    (tmp_path / "logs").mkdir()
    for name, rows in (("a", range(200)), ("b", range(200, ROWS))):
        lines = []
        for row in rows:
            item = int(draw.item[row])
            line = {"ts": draw.local("%Y-%m-%dT%H:%M:%S.123Z")[row], "payload": {"n": 1}}
            line |= {"user": {"id": f"u{draw.user[row]}"}, "clicked": row % 3 == 0}
            line |= {"article_id": item if name == "a" else str(item)}
            line |= {"context": {"device": ["ios", "web"][row % 2]}}
            if row % 50 == 7:
                line["payload"] = "none"
            lines.append(json.dumps(line))
        (tmp_path / "logs" / f"{name}.jsonl").write_text("\n".join(lines))

    articles = []
    for item in range(100, 160):
        article = {"published": f"2020-03-01T00:{item - 100:02}:00", "words": item % 37}
        articles.append(json.dumps(article | {"article_id": item}))
    (tmp_path / "articles.jsonl").write_text("\n".join(articles))
    cfg = looked_at(tmp_path, "--items", str(tmp_path / "articles.jsonl"))
    assert cfg.source.columns["user_id"] == "user.id"
    assert cfg.source.request_columns == ("context_device",)
    assert cfg.source.items is not None
    assert cfg.source.items.id_column == "article_id"
    manifest = build.build_sequences(cfg)
    assert manifest.num_rows == ROWS - manifest.rows_merged
    assert manifest.text_ids == ("user_id", "item_id")
    assert not manifest.quarantined
    fit_features(cfg)


def test_dates_and_times_of_day_within_objects(here: None, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    lines, expected = [], []
    for row in range(40):
        day, clock = f"2026-01-{1 + row // 4:02}", f"{8 + row % 4}:{row:02}"
        when = {"day": day, "clock": clock}
        line = {"user": {"id": 7}, "what": {"sku": f"s{row}"}, "when": when, "click": row % 2}
        lines.append(json.dumps(line))
        local = datetime.strptime(f"{day} {clock}", "%Y-%m-%d %H:%M")
        expected.append(int(local.replace(tzinfo=UTC).timestamp()) * 1000)
    (tmp_path / "logs" / "a.jsonl").write_text("\n".join(lines))

    cfg = looked_at(tmp_path)
    assert cfg.source.columns["item_id"] == "what.sku"
    build.build_sequences(cfg)
    (user,) = store.read_sequences(cfg.sequence_dir).to_pylist()
    assert user["event_time"] == expected


def test_a_player_with_gaps_and_types_that_change(here: None, tmp_path: Path) -> None:
    """Ids as floats, flags as booleans and as numbers, a name that says nothing of a user."""
    draw = Draw()
    for day in range(4):
        rows = slice(day * 100, day * 100 + 100)
        listener = draw.user[rows].astype(float)
        listener[0] = np.nan
        flags = draw.rng.integers(0, 2, 100)
        columns = {
            "played_s": draw.rng.random(100) * 200,
            "track_seconds": draw.rng.random(100) * 200,
            "who": listener,
            "track": draw.item[rows] * 7_000_000_003,
            "started_at": pa.array(draw.seconds[rows], pa.timestamp("s")),
            "skipped": pa.array(flags, pa.int8()) if day % 2 else flags == 1,
        }
        folder = tmp_path / "logs" / f"day={day}"
        folder.mkdir(parents=True)
        table = pa.table(columns).to_pandas()
        table.sample(frac=1, random_state=0).to_parquet(folder / "part-0.parquet")
    listeners = {"id": np.arange(30), "country": ["se", "no"] * 15}
    pq.write_table(pa.table(listeners), tmp_path / "listeners.parquet")

    cfg = looked_at(tmp_path, "--users", str(tmp_path / "listeners.parquet"))
    assert cfg.source.columns["user_id"] == "who"
    assert cfg.source.columns["item_id"] == "track"
    assert set(cfg.source.actions) == {"skipped"}
    assert set(cfg.features.user) == {"country"}
    manifest = build.build_sequences(cfg)
    assert manifest.quarantined == {"null_user_id": 4}


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_split_is_of_the_whole_span(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Of one large file that is sorted by time not the beginning alone is looked at."""
    monkeypatch.setattr(sample, "SAMPLE_ROWS", 400)
    monkeypatch.setattr(sample, "PLACE_BYTES", 4000)
    rows = 40_000
    days = np.arange(rows) / rows * 100
    columns = {"user": np.arange(rows) % 50, "item": np.arange(rows) % 70}
    columns |= {"ts": START + (days * 86_400).astype(int), "clicked": np.arange(rows) % 2}
    (tmp_path / "logs").mkdir()
    file = tmp_path / "logs" / f"a.{kind}"
    if kind == "csv":
        write_csv(file, columns)
    else:
        pq.write_table(pa.table(columns), file, row_group_size=1000)

    cfg = looked_at(tmp_path)
    day_ms = 86_400_000
    assert 70 < (cfg.split.val_ms - START * 1000) / day_ms < 90
    assert 80 < (cfg.split.test_ms - START * 1000) / day_ms < 100


def test_the_split_of_a_file_a_day_leaves_days_to_test(tmp_path: Path) -> None:
    """Of eight files of ninety the last tenth would be the last day."""
    (tmp_path / "logs").mkdir()
    for day in range(90):
        seconds = START + day * 86_400 + np.arange(40) * 2000
        plays = {"user_id": np.arange(40) % 9, "track_id": np.arange(40), "ts": seconds}
        pq.write_table(pa.table(plays), tmp_path / "logs" / f"{day:02}.parquet")

    cfg = looked_at(tmp_path)
    days = [
        (moment - START * 1000) / 86_400_000 for moment in (cfg.split.val_ms, cfg.split.test_ms)
    ]
    assert 68 < days[0] < 76, "90 times .8"
    assert 77 < days[1] < 85, "90 times .9"


def test_a_single_user_is_trained_on_without_a_warm_up(tmp_path: Path) -> None:
    """Which may be no more than a tenth of so few steps."""
    draw = Draw()
    columns = {"user": [7] * ROWS, "item": draw.item, "time": draw.seconds}
    write_csv(tmp_path / "one.csv", columns | {"clicked": draw.choice(0, 1)})
    inspect.main([str(tmp_path / "one.csv"), "-o", str(tmp_path / "preset.yaml")])
    cfg = config.load(tmp_path / "preset.yaml", [f"runs_dir={tmp_path}"])
    assert cfg.train.warmup_steps == 0
    assert build.plan_build(cfg)["rows_of_largest_user"] == ROWS


def test_what_cannot_be_looked_at_is_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "notes.csv").write_text("name,note\na,b\nc,d\n")
    (tmp_path / "there.yaml").write_text("name: x\n")
    (tmp_path / "head.csv").write_text("user,item,time\n")
    pq.write_table(pa.table({"user": pa.array([], pa.int64())}), tmp_path / "no_rows.parquet")
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.csv").touch()
    write_csv(tmp_path / "logs.csv", {"user": [1, 2], "item": [3, 4], "time": [START, START]})
    no_folder = tmp_path / "logs.csv" / "preset.yaml"
    (tmp_path / "torn.csv.gz").write_bytes(gzip.compress(b"user,item,time\n" * 999)[:-30])
    lists = {"user": [{"id": 7}], "item": {"name": [9]}, "time": 1583020800, "click": 1}
    (tmp_path / "lists.jsonl").write_text(f"{json.dumps(lists)}\n" * 3)
    for arguments, message in (
        ([str(tmp_path / "head.csv")], "have no rows"),
        ([str(tmp_path / "no_rows.parquet")], "have no rows"),
        ([str(tmp_path / "empty")], "left out: 1 (empty, 0 bytes: "),
        ([str(tmp_path / "lists.jsonl")], "looks like user_id or item_id: copy"),
        ([str(tmp_path / "nowhere")], "PATH: no Parquet, CSV or JSON lines at"),
        ([str(tmp_path / "notes.csv")], "looks like event_time or user_id or item_id"),
        ([str(tmp_path), "-o", str(tmp_path / "there.yaml")], "is there already"),
        ([str(tmp_path / "logs.csv"), "-o", str(no_folder)], "preset.yaml cannot be written: "),
        ([str(tmp_path / "torn.csv.gz")], "torn.csv.gz cannot be read: "),
    ):
        with pytest.raises(SystemExit) as stopped:
            inspect.main(arguments)
        assert stopped.value.code == 2
        err = capsys.readouterr().err
        assert err.startswith("error: ")
        assert message in err
