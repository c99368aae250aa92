"""How many rows, labels and items the training, validation and test periods of a store hold."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
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
    """Rows with a real time of each period, int64 [3], their labels, int64 [3, actions], and the
    items of all rows, int64, each once.
    """

    rows: np.ndarray
    known: np.ndarray
    positive: np.ndarray
    items: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

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


def count_periods(
    folder: Path,
    buckets: Sequence[Bucket],
    split: SplitConfig,
    num_actions: int,
    *,
    with_items: bool = False,
) -> PeriodCounts:
    """The counts over files of sequences; items where they are asked for."""
    edges = np.array([split.val_ms, split.test_ms, split.end_ms])

    def count(bucket: Bucket) -> PeriodCounts:
        return _count_file(folder / bucket.file, edges, num_actions, with_items=with_items)

    with ThreadPoolExecutor(READERS) as pool:
        return _added(pool.map(count, buckets), num_actions)


def _added(parts: Iterator[PeriodCounts], num_actions: int) -> PeriodCounts:
    rows = np.zeros(len(PERIODS), np.int64)
    known = np.zeros((len(PERIODS), num_actions), np.int64)
    positive, items = known.copy(), np.zeros(0, np.int64)
    for part in parts:
        rows += part.rows
        known += part.known
        positive += part.positive
        items = _distinct(np.concatenate([items, part.items]))
    return PeriodCounts(rows, known, positive, items)


def _distinct(values: np.ndarray) -> np.ndarray:
    """Each value once, of those that are 0 or more.

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


def _count_file(
    file: Path, edges: np.ndarray, num_actions: int, *, with_items: bool
) -> PeriodCounts:
    wanted = [*COLUMNS, "item_id"] if with_items else COLUMNS
    table = pq.read_table(file, columns=wanted, use_threads=False)
    items = np.zeros(0, np.int64)
    if with_items:
        items = _distinct(flat_column(table, "item_id"))

    # 0 training, 1 validation, 2 test, 3 from split.t_end on
    timed = ~flat_column(table, "order_only")
    period = np.searchsorted(edges, flat_column(table, "event_time")[timed], side="right")
    known = flat_column(table, "known_mask")[timed]
    positive = flat_column(table, "action_mask")[timed] & known

    counts = [np.bincount(period, minlength=len(edges) + 1)]
    for mask in (known, positive):
        for bit in range(num_actions):
            chosen = period[(mask >> bit & 1) == 1]
            counts.append(np.bincount(chosen, minlength=len(edges) + 1))

    table_of_counts = np.stack(counts, axis=1)[: len(PERIODS)].astype(np.int64)
    rows, labels = table_of_counts[:, 0], table_of_counts[:, 1:]
    return PeriodCounts(rows, labels[:, :num_actions], labels[:, num_actions:], items)
