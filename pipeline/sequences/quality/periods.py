"""How many rows, labels and items the training, validation and test periods of a store hold."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SplitConfig
from pipeline.sequences.arrow_lists import flat_column
from pipeline.sequences.store import Bucket

COLUMNS = ["event_time", "order_only", "action_mask", "known_mask"]
PERIODS = ("train", "val", "test")
LARGEST_MARKED = 2**25  # bytes of a bitmap
READERS = 2  # files that are decoded at a time, for speed at little memory


@dataclass(frozen=True)
class PeriodCounts:
    """Rows with a real time of each period, int64 [3], and their labels, int64 [3, actions]."""

    rows: np.ndarray
    known: np.ndarray
    positive: np.ndarray

    def by_name(self, actions: Sequence[str], names: Sequence[str]) -> dict[str, dict[str, int]]:
        """As a report has them: {"val": {"rows": 9, "is_click known": 7, "is_click": 2}}."""
        found = {}
        for number, period in enumerate(PERIODS):
            counts = {"rows": int(self.rows[number])}
            for name in names:
                place = actions.index(name)
                counts[f"{name} known"] = int(self.known[number, place])
                counts[name] = int(self.positive[number, place])
            found[period] = counts
        return found


@dataclass(frozen=True)
class BucketPeriods:
    """The counts of one bucket as its record keeps them, in what JSON knows."""

    edges: list[int]  # where the periods end, ms
    # of each period: its rows, the rows where each action is known, and those where it happened
    counts: list[list[int]]


def period_edges(split: SplitConfig) -> list[int]:
    """Where training, validation and test end, in ms."""
    return [split.val_ms, split.test_ms, split.end_ms]


def count_bucket_periods(
    sequences: pa.Table, edges: Sequence[int], num_actions: int
) -> BucketPeriods:
    """The counts over rows of sequences.

    event_time      1  4  5  9  12      edges 5, 9, 12
    rows before     2, 3, 4
    of the periods  2, 1, 1             a row at 12 is in none
    """
    timed = ~flat_column(sequences, "order_only")
    time = flat_column(sequences, "event_time")
    known = flat_column(sequences, "known_mask")
    positive = flat_column(sequences, "action_mask") & known

    before = np.zeros((len(edges), 1 + 2 * num_actions), np.int64)
    for place, edge in enumerate(edges):
        chosen = timed & (time < edge)
        before[place, 0] = np.count_nonzero(chosen)
        for bit in range(num_actions):
            for column, mask in ((bit, known), (num_actions + bit, positive)):
                happened = (mask & mask.dtype.type(1 << bit)) != 0
                before[place, 1 + column] = np.count_nonzero(happened & chosen)

    counts = np.diff(before, axis=0, prepend=0)
    return BucketPeriods(list(edges), counts.tolist())


def count_periods(
    folder: Path, buckets: Sequence[Bucket], edges: Sequence[int], num_actions: int
) -> list[BucketPeriods]:
    """The counts of each of these files of sequences."""

    def count(bucket: Bucket) -> BucketPeriods:
        table = pq.read_table(folder / bucket.file, columns=COLUMNS, use_threads=False)
        return count_bucket_periods(table, edges, num_actions)

    with ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(count, buckets))


def add_periods(parts: Sequence[BucketPeriods], num_actions: int) -> PeriodCounts:
    """The counts of all these buckets together."""
    total = np.zeros((len(PERIODS), 1 + 2 * num_actions), np.int64)
    for part in parts:
        total += np.array(part.counts)
    known_from, positive_from = 1, 1 + num_actions
    return PeriodCounts(
        rows=total[:, 0],
        known=total[:, known_from:positive_from],
        positive=total[:, positive_from:],
    )


def distinct_items(folder: Path, buckets: Sequence[Bucket]) -> np.ndarray:
    """The items of files of sequences, int64, each once, ascending."""

    def items_of(bucket: Bucket) -> np.ndarray:
        table = pq.read_table(folder / bucket.file, columns=["item_id"], use_threads=False)
        return distinct_ids(flat_column(table, "item_id"))

    found = np.zeros(0, np.int64)
    with ThreadPoolExecutor(READERS) as pool:
        for items in pool.map(items_of, buckets):
            found = distinct_ids(np.concatenate([found, items]))
    return found


def distinct_ids(values: np.ndarray) -> np.ndarray:
    """Each value once, ascending, of those that are 0 or more.

    Small ids are marks in a bitmap. Others are sorted by NumPy's vectorised sort, which takes a
    fraction of the time of a hash table.
    """
    if len(values) and values.max() < LARGEST_MARKED:
        marks = np.zeros(values.max() + 1, bool)
        marks[values] = True
        return np.flatnonzero(marks)
    ascending = np.sort(values)
    first = np.ones(len(ascending), bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return ascending[first]
