"""How often labels were known and positive in a group of rows, as of any time: what smoothed rates
are made of.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.batches.search import places

EVER = -(2**62)  # a start before every time


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """Counts of K labels by group and time. Rows of one group and one time are one cell.

    A group is any integer from 0 on; times are of any unit.
    """

    groups: np.ndarray  # int64 [G], sorted
    cells: np.ndarray  # int64 [M], sorted: number of the group * span + time - start
    # int64 [M + 1, 2 K]: sums over the earlier cells, known labels and then positive ones
    before: np.ndarray
    start: int  # the earliest time
    span: int  # of times: start..start + span - 1
    first_cells: np.ndarray = field(init=False)  # int64 [G + 1], where each group's cells begin

    def __post_init__(self) -> None:
        first = np.searchsorted(self.cells, np.arange(len(self.groups) + 1) * self.span)
        object.__setattr__(self, "first_cells", first)

    @classmethod
    def of(cls, group: np.ndarray, time: np.ndarray, counts: np.ndarray) -> "LabelCounts":
        """Rows in any order: int64 [N] each, and `counts` [N, 2 K], known and positive labels of
        each row.
        """
        if len(group) == 0:
            empty = np.zeros(0, np.int64)
            return cls(empty, empty, np.zeros((1, counts.shape[1]), np.int64), 0, 1)
        start = int(time.min())
        span = int(time.max()) - start + 1
        groups, number = np.unique(group, return_inverse=True)
        key = number * span + (time - start)
        order = np.argsort(key, kind="stable")
        cells, first = np.unique(key[order], return_index=True)
        sums = np.concatenate(
            [np.zeros((1, counts.shape[1]), np.int64), np.cumsum(counts[order], 0, np.int64)]
        )
        return cls(groups, cells, sums[np.append(first, len(key))], start, span)

    @classmethod
    def merged(cls, parts: Sequence["LabelCounts"]) -> "LabelCounts":
        """The counts of all parts' rows."""
        group = np.concatenate([part.groups[part.cells // part.span] for part in parts])
        time = np.concatenate([part.cells % part.span + part.start for part in parts])
        return cls.of(group, time, np.concatenate([np.diff(part.before, axis=0) for part in parts]))

    def earlier(self, group: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Sums over the rows of each `group` strictly earlier than `time`, int64 [n, 2 K]; 0 for a
        group not seen.
        """
        number = places(self.groups, group)
        seen = number < len(self.groups)
        seen[seen] = self.groups[number[seen]] == group[seen]
        begin = self.first_cells[number]
        end = places(self.cells, number * self.span + np.clip(time - self.start, 0, self.span))
        return self.before.take(np.where(seen, end, begin), axis=0) - self.before.take(
            begin, axis=0
        )

    def frozen(self) -> "LabelCounts":
        """The counts of all rows, whatever the time asked for."""
        return LabelCounts(
            self.groups, np.arange(len(self.groups)), self.before[self.first_cells], EVER, 1
        )
