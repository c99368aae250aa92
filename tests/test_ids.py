"""Ids as people have them: what each form of a column becomes, and the dictionaries of text ids."""

import json
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import FileFormat, RunConfig, UserError
from pipeline.logs import ids
from pipeline.logs.cleaning import mix
from pipeline.logs.ids import LONGEST_ID, code_column, id_code, id_codes, own_values, text_codes
from pipeline.logs.rows import open_rows
from pipeline.sequences import build, dictionary, parts, store
from pipeline.sequences.build import build_sequences
from pipeline.sequences.dictionary import merge_pairs, own_ids, read_dictionary
from pipeline.sequences.store import Manifest
from pipeline.sequences.upkeep import maintenance
from tests.worlds.logs import config_for, here, log

__all__ = ["here"]  # a fixture
FIRST, SECOND = uuid.UUID(int=7), uuid.UUID("c56a4180-65aa-42ec-a945-5fd21dec0538")


# One column ------------------------------------------------------------------


def siphash(text: bytes, key: bytes) -> int:
    """SipHash-2-4 as its paper has it (Aumasson and Bernstein, 2012)."""
    all_ones = 2**64 - 1

    def turn(x: int, by: int) -> int:
        return (x << by | x >> (64 - by)) & all_ones

    def rounds(v: list[int], num: int) -> None:
        for _ in range(num):
            v[0] = (v[0] + v[1]) & all_ones
            v[2] = (v[2] + v[3]) & all_ones
            v[1], v[3] = turn(v[1], 13) ^ v[0], turn(v[3], 16) ^ v[2]
            v[0] = turn(v[0], 32)
            v[2] = (v[2] + v[1]) & all_ones
            v[0] = (v[0] + v[3]) & all_ones
            v[1], v[3] = turn(v[1], 17) ^ v[2], turn(v[3], 21) ^ v[0]
            v[2] = turn(v[2], 32)

    k0, k1 = (int.from_bytes(key[i : i + 8], "little") for i in (0, 8))
    v = [k0 ^ 0x736F6D6570736575, k1 ^ 0x646F72616E646F6D]
    v += [k0 ^ 0x6C7967656E657261, k1 ^ 0x7465646279746573]
    padded = text + bytes(7 - len(text) % 8) + bytes([len(text) % 256])
    for begin in range(0, len(padded), 8):
        word = int.from_bytes(padded[begin : begin + 8], "little")
        v[3] ^= word
        rounds(v, 2)
        v[0] ^= word
    v[2] ^= 0xFF
    rounds(v, 4)
    return v[0] ^ v[1] ^ v[2] ^ v[3]


@pytest.mark.parametrize("text", ["", "7", "user-007", str(SECOND), "日本語", "x" * 300])
def test_a_code_is_the_documented_hash(text: str) -> None:
    assert siphash(bytes(range(15)), bytes(range(16))) == 0xA129CA6149BE45E5  # the paper's vector
    hashed = np.array([siphash(text.encode(), b"0123456789123456")], np.uint64)
    assert text_codes([text]).tolist() == (mix(hashed) >> np.uint64(1)).tolist()


def test_codes_of_ids_as_requests_bring_them() -> None:
    assert id_codes([5, 2**62]).tolist() == [5, 2**62]
    assert id_codes(["a", "b"]).tolist() == [id_code("a"), id_code("b")]
    assert id_codes([]).tolist() == []
    assert id_code(5) == 5 != id_code("5")


TEXTS: list[tuple[pa.Array, list[str | None], list[bool]]] = [
    (pa.array(["007", "7", "", None]), ["007", "7", None, None], [False] * 4),
    (pa.array(["ä", "Ä", " a"], pa.large_string()), ["ä", "Ä", " a"], [False] * 3),
    (pa.array(["a", None], pa.string_view()), ["a", None], [False] * 2),
    (pa.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"], [False] * 3),
    (
        pa.DictionaryArray.from_arrays(pa.array([2, 0, None]), pa.array(["a", "of no row", "c"])),
        ["c", "a", None],
        [False] * 3,
    ),
    (pa.array(["ä" * LONGEST_ID, "ä" * (LONGEST_ID + 1)]), ["ä" * LONGEST_ID, None], [False, True]),
    (pa.array(["a" * LONGEST_ID, "a" * (LONGEST_ID + 1)]), ["a" * LONGEST_ID, None], [False, True]),
    (pa.array([b"a", b"\xff", b""]), ["a", None, None], [False, True, False]),
    (pa.array([FIRST.bytes, None], pa.uuid()), [str(FIRST), None], [False] * 2),
    (pa.array([SECOND.bytes, FIRST.bytes], pa.binary(16))[:1], [str(SECOND)], [False]),
    (pa.array([b"\x0f\xa0"], pa.binary(2)), ["0fa0"], [False]),
    (pa.array([-5, 2**62]), ["-5", str(2**62)], [False] * 2),
    (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)], [False]),
    (pa.array([1.0, float("nan"), 2.5]), ["1", None, None], [False, False, True]),
    (pa.array([Decimal("12.00"), Decimal("0.50")]), ["12", None], [False, True]),
]


@pytest.mark.parametrize("times", [1, 3])  # values that repeat are coded once
@pytest.mark.parametrize(("column", "wanted", "unreadable"), TEXTS)
def test_every_form_of_text(
    column: pa.Array, wanted: list, unreadable: list[bool], times: int
) -> None:
    column = pa.concat_arrays([column] * times)
    found = code_column(pa.chunked_array([column]), text=True)
    codes = [None if text is None else id_code(text) for text in wanted]
    assert found.codes.to_pylist() == codes * times
    assert found.unreadable.tolist() == unreadable * times

    assert found.pairs is not None
    pairs = zip(found.pairs["code"].to_pylist(), found.pairs["id"].to_pylist(), strict=True)
    assert set(pairs) == {(id_code(text), text) for text in wanted if text is not None}
    assert own_values(pa.chunked_array([column]), text=True) == wanted * times


NUMBERS: list[tuple[pa.Array, list[int | None], list[bool]]] = [
    (pa.array([7, None, -1], pa.int32()), [7, None, -1], [False] * 3),
    (pa.array([7, 2**63], pa.uint64()), [7, None], [False, True]),
    (pa.array([7, None]).dictionary_encode(), [7, None], [False] * 2),
    (pa.array([1.0, float("nan"), None, 2.5]), [1, None, None, None], [False, False, False, True]),
    (pa.array([float("inf"), 2.0**53, 2.0**60]), [None, 2**53, None], [True, False, True]),
    (pa.array([Decimal("7.0"), Decimal("7.5")]), [7, None], [False, True]),
    (pa.array([Decimal(2**63), Decimal(9)], pa.decimal128(20, 0)), [None, 9], [True, False]),
]


@pytest.mark.parametrize(("column", "wanted", "unreadable"), NUMBERS)
def test_every_form_of_a_number(column: pa.Array, wanted: list, unreadable: list[bool]) -> None:
    found = code_column(pa.chunked_array([column]), text=False)
    assert found.codes.to_pylist() == wanted
    assert found.unreadable.tolist() == unreadable
    assert found.pairs is None


def test_text_that_is_no_utf8_is_no_text() -> None:
    """Parquet does not check what it calls a string."""
    offsets, raw = pa.array([0, 1, 2], pa.int32()).buffers()[1], pa.py_buffer(b"a\xff")
    column = pa.Array.from_buffers(pa.string(), 2, [None, offsets, raw])
    found = code_column(pa.chunked_array([column]), text=True)
    assert found.codes.to_pylist() == [id_code("a"), None]
    assert found.unreadable.tolist() == [False, True]


# Whole builds ----------------------------------------------------------------


def as_text(table: pa.Table, *names: str) -> pa.Table:
    """A log whose ids, integers, are text: item 7 is "item 7"."""
    for name in names or ("user_id", "item_id"):
        texts = [f"{name[:4]} {number}" for number in table[name].to_pylist()]
        table = table.set_column(table.column_names.index(name), name, pa.array(texts))
    return table


def distinct_log(rows: int = 400, seed: int = 0) -> pa.Table:
    """No two rows of one time: their order does not depend on the ids."""
    times = 1_650_000_000_000 + 1000 * np.random.default_rng(seed).permutation(rows)
    return log(rows=rows, seed=seed, event_time=times)


def read_named(cfg: RunConfig) -> dict:
    """The sequences by the users' own ids, their items by theirs."""
    manifest = store.read_manifest(cfg.sequence_dir)
    found = {}
    for row in store.read_sequences(cfg.sequence_dir).to_pylist():
        (user,) = own_ids(
            cfg.sequence_dir, manifest, "user_id", np.array([row.pop("user_id")])
        ).to_pylist()
        items = np.array(row.pop("item_id"), np.int64)
        row["items"] = own_ids(cfg.sequence_dir, manifest, "item_id", items).to_pylist()
        del row["user_bucket"]
        found[user] = row
    return found


def test_the_sequences_of_text_are_those_of_numbers(here: None, tmp_path: Path) -> None:
    for name in ("numbers", "texts"):
        (tmp_path / name).mkdir()
    rows = distinct_log()
    numbers = config_for(tmp_path / "numbers", rows)
    texts = config_for(tmp_path / "texts", as_text(rows))
    assert build_sequences(numbers).text_ids == ()
    manifest = build_sequences(texts)
    assert manifest.text_ids == ("user_id", "item_id")

    wanted = {}
    for user, row in read_named(numbers).items():
        items = [f"item {item}" for item in row.pop("items")]
        wanted[f"user {user}"] = row | {"items": items}
    assert read_named(texts) == wanted

    # chunk by chunk, in the order of codes
    codes, names = read_dictionary(texts.sequence_dir, manifest, "item_id")
    assert len(manifest.dictionaries["item_id"]) == 3
    assert (np.diff(codes) > 0).all()
    assert set(names.to_pylist()) == {f"item {item}" for item in range(50)}
    assert text_codes(names.to_pylist()).tolist() == codes.tolist()


def test_texts_are_read_once_where_the_file_has_them_once(here: None, tmp_path: Path) -> None:
    digests = set()
    for packed in (True, False):
        folder = tmp_path / str(packed)
        folder.mkdir()
        rows = as_text(distinct_log())
        cfg = config_for(folder, rows)
        file = folder / "in" / "0.parquet"
        pq.write_table(rows, file, use_dictionary=packed, row_group_size=150)

        with open_rows(str(file), FileFormat(), texts=["user_id", "none"]) as opened:
            (block, *_) = opened.blocks(150, [1])
        assert pa.types.is_dictionary(block["user_id"].type) == packed
        assert block["item_id"].type == pa.string()
        digests.add(build_sequences(cfg).digest)
    assert len(digests) == 1


def test_a_task_writes_several_chunks(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"a": 2**29, "b": 2**29}
    work = dictionary.plan_chunks("item_id", files, {}, 100)
    assert [number for task in work for number in task.numbers] == list(range(100))
    assert {len(task.numbers) for task in work} == {6, 4}
    few = dictionary.plan_chunks("item_id", {"a": 40 * 2**20}, {}, 100)
    assert [len(task.numbers) for task in few] == [100]

    digests = set()
    for most in (dictionary.TASK_BYTES, 1):
        monkeypatch.setattr(dictionary, "TASK_BYTES", most)
        (tmp_path / str(most)).mkdir()
        digests.add(build_sequences(config_for(tmp_path / str(most), as_text(log()))).digest)
    assert len(digests) == 1


def test_integers_have_no_dictionary_and_no_word_of_it(here: None, tmp_path: Path) -> None:
    cfg = config_for(tmp_path, log())
    manifest = build_sequences(cfg)
    raw = json.loads((cfg.sequence_dir / store.MANIFEST).read_text())
    assert {"text_ids", "dictionaries"} & raw.keys() == set()
    assert not (cfg.sequence_dir / "ids").exists()
    part = json.loads((cfg.sequence_dir / f"parts/{manifest.parts[0]}.json").read_text())
    assert "ids" not in part
    assert own_ids(tmp_path, manifest, "user_id", np.array([5, 3])).to_pylist() == [5, 3]


Form = Callable[[pa.Table], pa.Table]
FORMS: dict[str, Form] = {
    "float": lambda table: retyped(table, pa.float64()),
    "decimal": lambda table: retyped(table, pa.decimal128(20, 0)),
    "uint64": lambda table: retyped(table, pa.uint64()),
}


def retyped(table: pa.Table, dtype: pa.DataType) -> pa.Table:
    for name in ("user_id", "item_id"):
        column = table[name].cast(dtype)
        table = table.set_column(table.column_names.index(name), name, column)
    return table


@pytest.mark.parametrize("form", FORMS)
def test_whole_numbers_of_any_type_are_integers(here: None, tmp_path: Path, form: str) -> None:
    """To the same buckets, and beside a file of plain integers."""
    for name in ("plain", "mixed"):
        (tmp_path / name).mkdir()
    first, second = distinct_log(), distinct_log(seed=1)
    plain = build_sequences(config_for(tmp_path / "plain", first, second))
    mixed = build_sequences(config_for(tmp_path / "mixed", first, FORMS[form](second)))
    assert mixed.digest == plain.digest


def test_hashes_are_text_by_a_setting(here: None, tmp_path: Path) -> None:
    """Where they are refused as negative, a message names the setting."""
    hashes = log()
    signed = hashes["user_id"].to_numpy() * -(2**57) - 1
    hashes = hashes.set_column(0, "user_id", pa.array(signed))
    with pytest.raises(UserError, match=r"negative_user_id (.|\n)*hint: .*columns.user_id={"):
        build_sequences(config_for(tmp_path, hashes))

    cfg = config_for(tmp_path, hashes, columns={"user_id": {"column": "user_id", "text": True}})
    manifest = build_sequences(cfg)
    assert manifest.text_ids == ("user_id",)
    assert set(read_named(cfg)) == {str(number) for number in signed.tolist()}


def test_files_that_disagree_are_one_message(tmp_path: Path) -> None:
    cfg = config_for(tmp_path, log(), as_text(log(seed=1), "item_id"))
    rule = r"item_id is text in .*1.parquet \(string\) and a number in .*0.parquet \(int64\): .*"
    with pytest.raises(UserError, match=rule + r"source.columns.item_id={"):
        build_sequences(cfg)


def test_files_that_disagree_can_all_be_text(here: None, tmp_path: Path) -> None:
    first, second = log(), log(seed=1)
    digits = second.set_column(1, "item_id", second["item_id"].cast(pa.string()))
    cfg = config_for(
        tmp_path, first, digits, columns={"item_id": {"column": "item_id", "text": True}}
    )
    manifest = build_sequences(cfg)
    _, names = read_dictionary(cfg.sequence_dir, manifest, "item_id")
    assert set(names.to_pylist()) == set(map(str, range(50)))


def test_rows_without_a_usable_id_are_quarantined(here: None, tmp_path: Path) -> None:
    rows = as_text(log())
    users = rows["user_id"].to_pylist()
    users[:3] = ["", None, "x" * (LONGEST_ID + 1)]
    cfg = config_for(tmp_path, rows.set_column(0, "user_id", pa.array(users)))
    manifest = build_sequences(cfg)
    assert manifest.quarantined["null_user_id"] == 2
    assert manifest.quarantined["user_id_unreadable"] == 1


def test_a_session_of_text_is_a_request(here: None, tmp_path: Path) -> None:
    rows = distinct_log(rows=4)
    same = pa.array([1_650_000_000_000] * 4)
    rows = rows.set_column(2, "event_time", same).set_column(0, "user_id", pa.array(["u"] * 4))
    rows = rows.append_column("session", pa.array(["a", "b", "a", None]))
    cfg = config_for(tmp_path, rows, columns={"request_id": "session"})
    manifest = build_sequences(cfg)
    assert manifest.text_ids == ("user_id", "request_id")
    assert "request_id" not in manifest.dictionaries
    (row,) = store.read_sequences(cfg.sequence_dir).to_pylist()
    assert np.bincount(row["request_index"]).tolist().count(2) == 1


# Over many parts -------------------------------------------------------------


def build_appended(folder: Path, *tables: pa.Table, **source: object) -> tuple[RunConfig, Manifest]:
    """The tables one after the other, each appended to what was published."""
    cfg = config_for(folder, **source)
    manifest = None
    for number, table in enumerate(tables):
        pq.write_table(table, folder / "in" / f"{number}.parquet")
        manifest = build_sequences(cfg, append=number > 0)
    assert manifest is not None
    return cfg, manifest


def test_an_id_that_a_side_table_had_stays_in_the_dictionary(here: None, tmp_path: Path) -> None:
    """So that all that was ever published can be named: users and lists are those of one build."""
    days = [as_text(distinct_log(seed=seed)) for seed in range(2)]
    seen = sorted(set(days[0]["item_id"].to_pylist()))
    table = {"path": str(tmp_path / "items.parquet"), "id_column": "id"}
    write_items = lambda ids: pq.write_table(pa.table({"id": ids}), tmp_path / "items.parquet")

    (tmp_path / "a").mkdir()
    write_items([*seen, "only in the table"])
    cfg = config_for(tmp_path / "a", days[0], items=table)
    build_sequences(cfg)
    write_items(seen)
    pq.write_table(days[1], tmp_path / "a/in/1.parquet")
    appended = build_sequences(cfg, append=True)
    _, names = read_dictionary(cfg.sequence_dir, appended, "item_id")
    assert "only in the table" in names.to_pylist()

    (tmp_path / "b").mkdir()
    cfg = config_for(tmp_path / "b", *days, items=table)
    once = build_sequences(cfg)
    _, of_one_build = read_dictionary(cfg.sequence_dir, once, "item_id")
    assert set(names.to_pylist()) - set(of_one_build.to_pylist()) == {"only in the table"}
    assert appended.buckets == once.buckets
    assert appended.side_tables == once.side_tables
    assert appended.digest != once.digest  # it names the dictionary too


def test_appended_dictionaries_are_those_of_one_build(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "RUN_ROWS", 100)  # several batches of ids in a part
    monkeypatch.setattr(parts, "BATCH_ROWS", 64)
    for name in ("once", "day by day"):
        (tmp_path / name).mkdir()
    days = [as_text(distinct_log(seed=seed)) for seed in range(3)]
    once = build_sequences(config_for(tmp_path / "once", *days))
    cfg, appended = build_appended(tmp_path / "day by day", *days)
    assert appended.digest == once.digest
    assert appended.dictionaries == once.dictionaries

    # a compaction leaves parts without ids; what comes later finds the published ones
    compacted = maintenance.compact_sequences(cfg)
    assert compacted.digest == once.digest
    pq.write_table(as_text(distinct_log(seed=3)), tmp_path / "day by day" / "in" / "3.parquet")
    later = build_sequences(cfg, append=True)
    _, users = read_dictionary(cfg.sequence_dir, later, "user_id")
    assert set(users.to_pylist()) == {f"user {number}" for number in range(30)}


def test_numbers_after_text_are_refused(here: None, tmp_path: Path) -> None:
    cfg, _ = build_appended(tmp_path, as_text(log()))
    (tmp_path / "in" / "0.parquet").unlink()
    pq.write_table(log(seed=1), tmp_path / "in" / "1.parquet")
    with pytest.raises(UserError, match=r"user_id: the new files have numbers, .* have text"):
        build_sequences(cfg, append=True)


def test_two_texts_of_one_code_are_an_error(
    here: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one file or in two: the hash is made to let "item 3" and "item 4" meet."""
    right = ids.text_codes

    def few_bits(texts) -> np.ndarray:
        same = [b"item 3" if text == b"item 4" else text for text in texts]
        return right(np.array(same, object))

    monkeypatch.setattr(ids, "text_codes", few_bits)
    message = "item_id: 'item [34]' and 'item [34]' have the same code of 63 bits"
    with pytest.raises(UserError, match=message):
        build_sequences(config_for(tmp_path, as_text(log())))

    only = [as_text(log().filter(pa.compute.equal(log()["item_id"], item))) for item in (3, 4)]
    (tmp_path / "two").mkdir()
    cfg = config_for(tmp_path / "two", only[0])
    build_sequences(cfg)
    pq.write_table(only[1], tmp_path / "two" / "in" / "1.parquet")
    with pytest.raises(UserError, match=message):
        build_sequences(cfg, append=True)


def test_merged_pairs_are_found_once() -> None:
    pairs = pa.table({"code": [7, 3, 7], "id": ["b", "a", "b"]}, schema=dictionary.PAIRS)
    assert merge_pairs("user_id", pairs).to_pydict() == {"code": [3, 7], "id": ["a", "b"]}
    assert merge_pairs("user_id", pairs.slice(0, 0)).num_rows == 0


# Side tables -----------------------------------------------------------------


@pytest.mark.parametrize("dtype", [pa.string(), pa.large_string()])
def test_a_side_table_meets_the_logs(here: None, tmp_path: Path, dtype: pa.DataType) -> None:
    items = pa.table({"sku": pa.array(["item 3", "new"], dtype), "author": ["x", "y"]})
    pq.write_table(items, tmp_path / "items.parquet")
    side = {"path": str(tmp_path / "items.parquet"), "id_column": "sku"}
    cfg = config_for(tmp_path, as_text(log()), items=side)
    manifest = build_sequences(cfg)

    table = store.read_side_table(cfg.sequence_dir, "items")
    assert table is not None
    named = own_ids(cfg.sequence_dir, manifest, "item_id", table["item_id"].to_numpy())
    rows = zip(named.to_pylist(), table["author"].to_pylist(), strict=True)
    assert dict(rows) == {"item 3": "x", "new": "y"}
    assert not list((cfg.sequence_dir / "parts").glob("side-*"))


@pytest.mark.parametrize(
    ("sku", "message"),
    [
        (["a", "a"], "sku a stands in several rows"),
        (["a", ""], "'sku' .* is null in 1 rows"),
        (["a", "x" * 600], "'sku' .* must be text of at most 512 characters, and is not in 1 rows"),
        ([True, False], "'sku' .* must be whole numbers or text, found bool"),
    ],
)
def test_what_is_wrong_with_a_side_table(
    here: None, tmp_path: Path, sku: list, message: str
) -> None:
    pq.write_table(pa.table({"sku": sku}), tmp_path / "items.parquet")
    side = {"path": str(tmp_path / "items.parquet"), "id_column": "sku"}
    with pytest.raises(UserError, match=message):
        build_sequences(config_for(tmp_path, as_text(log()), items=side))


def test_a_side_table_of_floats_meets_logs_of_integers(here: None, tmp_path: Path) -> None:
    pq.write_table(pa.table({"sku": [3.0, 4.0], "tag": [1, 2]}), tmp_path / "items.parquet")
    side = {"path": str(tmp_path / "items.parquet"), "id_column": "sku"}
    cfg = config_for(tmp_path, log(), items=side)
    build_sequences(cfg)
    table = store.read_side_table(cfg.sequence_dir, "items")
    assert table is not None
    assert table["item_id"].to_pylist() == [3, 4]


# The report and deletion -----------------------------------------------------


def test_the_report_names_people(here: None, tmp_path: Path) -> None:
    rows = as_text(log())
    doubled = pa.concat_tables([rows, rows.slice(0, 1)])
    cfg = config_for(tmp_path, doubled)
    build_sequences(cfg)
    report = json.loads((cfg.run_dir / "report" / "validation.json").read_text())
    assert all(user.startswith("user ") for user in report["heaviest"])
    (sample,) = report["samples"]["exact_duplicate"]
    assert sample["row"]["user_id"] == rows["user_id"][0].as_py()
    assert sample["row"]["item_id"] == rows["item_id"][0].as_py()


def test_a_forgotten_user_is_in_no_file(here: None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(maintenance, "workers", build.workers)
    who = "user 7"
    users = pa.table({"uid": [who, "user 8"], "city": ["x", "y"]})
    pq.write_table(users, tmp_path / "users.parquet")
    side = {"path": str(tmp_path / "users.parquet"), "id_column": "uid"}
    cfg, before = build_appended(
        tmp_path, as_text(distinct_log()), as_text(distinct_log(seed=1)), users=side
    )
    removed = maintenance.forget_users(cfg, id_codes([who]))
    assert removed["ids"] == removed["users"] == 1
    assert removed["parts"] > 0

    manifest = store.read_manifest(cfg.sequence_dir)
    _, names = read_dictionary(cfg.sequence_dir, manifest, "user_id")
    assert who not in names.to_pylist()
    assert len(names) == 29
    for file in cfg.sequence_dir.rglob("*"):
        assert file.is_dir() or texts_in(file).isdisjoint({who}), file

    # nor does a later build take the user in again
    pq.write_table(as_text(distinct_log(seed=2)), tmp_path / "in" / "2.parquet")
    later = build_sequences(cfg, append=True)
    _, names = read_dictionary(cfg.sequence_dir, later, "user_id")
    assert who not in names.to_pylist()
    assert build_sequences(cfg, overwrite=True).digest == later.digest
    assert before.digest != manifest.digest


def texts_in(file: Path) -> set[str]:
    """All texts of a file's columns."""
    if file.suffix == ".parquet":
        table = pq.read_table(file)
    elif file.suffix == ".arrow":
        with pa.OSFile(str(file)) as opened:
            table = pa.ipc.open_file(opened).read_all()
    else:
        return set(file.read_text().split('"'))
    found: set[str] = set()
    for column in table.columns:
        if pa.types.is_string(column.type):
            found |= set(column.to_pylist())
    return found
