"""Rows of one user, item and time: actions merge, labels that come late reach their rows, and what
contradicts is told.
"""

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import RunConfig
from pipeline.logs.cleaning import normalise
from pipeline.sequences import store
from pipeline.sequences.build import build_sequences
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.upkeep.maintenance import compact_sequences
from pipeline.sequences.users import BuiltBucket, build_bucket
from tests.worlds.logs import MERGE, NOON, RULES, config_for, here, log

__all__ = ["here"]  # a fixture

NAMES = {
    name: name for name in ("user_id", "item_id", "event_time", "click", "like", "tab", "watch_ms")
}
MAPPED = dataclasses.replace(
    RULES,
    columns=NAMES
    | dict.fromkeys(("request_id", "order_only", "known_mask", "tie_breaker"), "")
    | {"row_digest": "row_digest"},
)


def built_from(
    rows: list[dict], rule: RepeatRule = MERGE, files: list[int] | None = None
) -> BuiltBucket:
    """One event's rows, each in a file of its own."""
    types = {"click": pa.int8(), "like": pa.int8(), "tab": pa.int32(), "watch_ms": pa.int64()}
    blocks = []
    for row, file in zip(rows, files or range(len(rows)), strict=True):
        key = {"user_id": [1], "item_id": [2], "event_time": [NOON]}
        values = {name: pa.array([row.get(name)], kind) for name, kind in types.items()}
        blocks.append(normalise(pa.table(key | values), MAPPED, file))
    return build_bucket(pa.concat_tables(blocks), MAPPED, 100, rule)


def event_of(built: BuiltBucket) -> tuple:
    (row,) = built.sequences.to_pylist()
    names = ("known_mask", "action_mask", "tab", "watch_ms")
    return tuple(value for name in names for value in row[name])


@pytest.mark.parametrize(
    ("rows", "event", "merged", "reasons"),
    [
        # a purchase beside its click
        ([{"click": 1}, {"like": 1}], (3, 3, -1, -1), 1, []),
        # "no" gives way to "yes", unknown to both
        ([{"click": 0, "like": 0}, {"click": 1}, {}], (3, 1, -1, -1), 2, []),
        # the largest number, from whichever row
        ([{"watch_ms": 0}, {"watch_ms": 900}, {"watch_ms": 700}], (0, 0, -1, 900), 2, []),
        # another tab is another event: left alone, and said
        (
            [{"tab": 1, "click": 0}, {"tab": 2, "click": 1}, {"watch_ms": 5}],
            (1, 0, 1, 5),
            1,
            ["contradicts_its_event"],
        ),
        ([{"click": 1}, {"click": 1}], (1, 1, -1, -1), 0, ["exact_duplicate"]),
    ],
)
def test_what_the_rows_of_an_event_come_to(
    rows: list[dict], event: tuple, merged: int, reasons: list[str]
):
    for some in (rows, rows[::-1]):
        built = built_from(some)
        assert event_of(built) == event
        assert built.rows_merged == merged
        assert built.quarantine["reason"].to_pylist() == reasons


def test_a_number_of_the_last_file_may_be_smaller():
    last = RepeatRule(file_order={10: 0, 11: 1, 12: 2})
    rows = [{"watch_ms": 900}, {"watch_ms": 700}, {"click": 1}]
    assert event_of(built_from(rows, last, files=[10, 11, 12])) == (1, 1, -1, 700)
    assert event_of(built_from(rows, last, files=[11, 10, 12])) == (1, 1, -1, 900)


def with_rows(folder: Path, *tables: pa.Table) -> RunConfig:
    cfg = config_for(folder, *tables)
    return dataclasses.replace(
        cfg, checks=dataclasses.replace(cfg.checks, max_quarantined_share=0.0)
    )


def clicks_of(cfg: RunConfig) -> tuple[int, int]:
    """Rows where the click is known, and where it happened."""
    table = store.read_sequences(cfg.sequence_dir)
    known, did = (np.concatenate(table[name].to_pylist()) for name in ("known_mask", "action_mask"))
    return int((known & 1).sum()), int((did & 1).sum())


def test_labels_that_arrive_late_reach_their_rows(here: None, tmp_path: Path):
    """The same digest whichever file came first, by --append too, and after a compaction."""
    early = log(rows=300, click=pa.array(np.zeros(300, np.int8)))
    _, first = np.unique(
        [f"{row['user_id']} {row['item_id']} {row['event_time']}" for row in early.to_pylist()],
        return_index=True,
    )
    early = early.take(pa.array(first))
    num = len(early)
    late = early.set_column(3, "click", pa.array(np.ones(num, np.int8)))

    whole, appended, other_way = (tmp_path / name for name in ("whole", "appended", "other_way"))
    for folder in (whole, appended, other_way):
        folder.mkdir()

    manifest = build_sequences(with_rows(whole, early, late))
    assert (manifest.rows_in, manifest.num_rows, manifest.rows_merged) == (2 * num, num, num)
    assert manifest.quarantined == {}
    assert clicks_of(with_rows(whole)) == (num, num)

    for folder, tables in ((appended, (early, late)), (other_way, (late, early))):
        cfg = with_rows(folder, tables[0])
        build_sequences(cfg)
        pq.write_table(tables[1], folder / "in" / "1.parquet")
        added = build_sequences(cfg, append=True)
        assert added.digest == manifest.digest

    cfg = with_rows(appended)
    assert compact_sequences(cfg).digest == manifest.digest
