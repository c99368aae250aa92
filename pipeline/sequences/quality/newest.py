"""The time of the newest event, from which ages and newest days are counted: never that of a few
stray rows, and never after the clock.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.sequences.arrow_lists import flat_column
from pipeline.sequences.store import Manifest

HOUR_MS = 3600 * 1000
SUSPECT_SHARE = 0.001  # of the rows: the newest ones, which count only if they follow on the others
LARGEST_GAP = 24  # hours without a row, up to which they do


@dataclass(frozen=True, slots=True)
class HourCounts:
    """Rows by hour since 1970: `hours` int64, ascending, `rows` int64, and the time of the last row
    of each, int64 ms.
    """

    hours: np.ndarray
    rows: np.ndarray
    last_ms: np.ndarray

    @classmethod
    def count_times(cls, times_ms: np.ndarray) -> "HourCounts":
        return cls._gather(times_ms // HOUR_MS, np.ones_like(times_ms), times_ms)

    @classmethod
    def add_parts(cls, parts: Sequence["HourCounts"]) -> "HourCounts":
        hours = np.concatenate([part.hours for part in parts])
        rows = np.concatenate([part.rows for part in parts])
        last_ms = np.concatenate([part.last_ms for part in parts])
        return cls._gather(hours, rows, last_ms)

    @classmethod
    def _gather(cls, hours: np.ndarray, rows: np.ndarray, last_ms: np.ndarray) -> "HourCounts":
        unique, place = np.unique(hours, return_inverse=True)
        total = np.zeros(len(unique), np.int64)
        np.add.at(total, place, rows)
        last = np.zeros(len(unique), np.int64)
        np.maximum.at(last, place, last_ms)
        return cls(unique, total, last)


def find_newest(folder: Path, manifest: Manifest, now_ms: int) -> int:
    """The time of a version's newest event, in ms, at most `now_ms`; one bucket's times in memory
    at a time.

    Rows of an `order_only` time count only where there are no others.
    """
    counted = []
    for bucket in manifest.buckets:
        columns = ["event_time", "order_only"]
        rows = pq.read_table(folder / bucket.file, columns=columns)
        times = flat_column(rows, "event_time")
        real = ~flat_column(rows, "order_only")
        counted.append(HourCounts.count_times(times[real & (times <= now_ms)]))

    hours = HourCounts.add_parts(counted)
    if len(hours.hours) == 0:
        return min(manifest.last_event_ms, now_ms)
    return newest_of_hours(hours)


def newest_of_hours(counts: HourCounts) -> int:
    """The time of the last row that is no stray.

    The newest 0.1 % of the rows, one at least, are suspects. From the hour of the newest row that
    is none, each later hour counts while no more than a day lies between it and the one before.

        hour            0     1     2     20    700000
        rows            900   800   300   1     1           2002 rows, 2 suspects
        counts          x     x     x     x                 18 hours after the one before
    """
    suspects = max(1, int(counts.rows.sum() * SUSPECT_SHARE))
    not_older = np.cumsum(counts.rows[::-1])[::-1]  # rows of this hour and of all later ones
    beyond_suspicion = np.flatnonzero(not_older > suspects)
    place = int(beyond_suspicion[-1]) if len(beyond_suspicion) else 0

    gaps = np.diff(counts.hours)
    while place < len(gaps) and gaps[place] <= LARGEST_GAP:
        place += 1
    return int(counts.last_ms[place])
