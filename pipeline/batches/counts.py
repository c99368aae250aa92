"""How often labels were known and positive in a group of rows, as of any time.

Smoothed rates (rates.py) are made of these counts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

EVER = -(2**62)  # a start before every time
SHORT = 256  # below it, sorting what is looked up costs more than it saves


@dataclass(frozen=True, slots=True)
class LabelCounts:
    """Counts of K labels by group and time. Rows of one group and one time are one cell.

    A group is any integer from 0 on; times are of any unit. With K = 1, five rows and what is kept
    of them (`start` is 10, `span` is 3: times 10, 11 and 12):

        group               7    7    7    9    9
        time                10   12   12   10   11
        known, positive     1 1  1 0  1 1  1 1  0 0

        groups              7            9
        cells               0       2    3    4            number of the group * 3 + time - 10
        before              0 0     1 1  3 2  4 3  4 3     the last row: the sum of all
        first_cells         0            2         4
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
    def from_rows(cls, group: np.ndarray, time: np.ndarray, counts: np.ndarray) -> "LabelCounts":
        """Count rows that come in any order: int64 [N] each, and `counts` [N, 2 K], known and
        positive labels of each row.
        """
        nothing = np.zeros((1, counts.shape[1]), np.int64)
        if len(group) == 0:
            empty = np.zeros(0, np.int64)
            return cls(empty, empty, nothing, 0, 1)

        start = int(time.min())
        span = int(time.max()) - start + 1

        # rows by group and time
        groups, number = np.unique(group, return_inverse=True)
        key = number * span + (time - start)
        order = np.argsort(key, kind="stable")

        # one cell per key, and the sums up to each
        cells, first = np.unique(key[order], return_index=True)
        sums = np.concatenate([nothing, np.cumsum(counts[order], 0, np.int64)])
        before = sums[np.append(first, len(key))]

        return cls(groups, cells, before, start, span)

    @classmethod
    def merge_parts(cls, parts: Sequence["LabelCounts"]) -> "LabelCounts":
        """The counts of all parts' rows."""
        group, time, counts = [], [], []
        for part in parts:
            group.append(part.groups[part.cells // part.span])
            time.append(part.cells % part.span + part.start)
            counts.append(np.diff(part.before, axis=0))

        return cls.from_rows(np.concatenate(group), np.concatenate(time), np.concatenate(counts))

    def count_earlier(self, group: np.ndarray, time: np.ndarray) -> np.ndarray:
        """Sums over the rows of each `group` strictly earlier than `time`, int64 [n, 2 K]; 0 for a
        group not seen.

        Of the rows above:

            group, time         7, 12    7, 13    9, 10    8, 99
            known, positive     1 1      3 2      0 0      0 0
        """
        # where each group stands, if anywhere
        number = search_sorted(self.groups, group)
        seen = number < len(self.groups)
        seen[seen] = self.groups[number[seen]] == group[seen]

        # its cells from the first up to the time
        begin = self.first_cells[number]
        elapsed = np.clip(time - self.start, 0, self.span)
        end = search_sorted(self.cells, number * self.span + elapsed)
        end = np.where(seen, end, begin)

        return self.before.take(end, axis=0) - self.before.take(begin, axis=0)

    def whole_period(self) -> "LabelCounts":
        """The counts of all rows, whatever the time asked for."""
        cells = np.arange(len(self.groups))
        return LabelCounts(self.groups, cells, self.before[self.first_cells], EVER, 1)


def search_sorted(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`np.searchsorted(values, wanted)`, int64 [n], several times as fast where both are long.

    The wanted are looked up in rising order: neighbours then touch the same memory, and sorting
    them costs less than that saves.
    """
    if len(values) < SHORT or len(wanted) < SHORT:
        return np.searchsorted(values, wanted)

    order = np.argsort(wanted)
    found = np.empty(len(wanted), np.int64)
    found[order] = np.searchsorted(values, wanted[order])
    return found


def distinct_values(values: np.ndarray) -> np.ndarray:
    """The different ones of integers, ascending, as `np.unique` gives them.

    NumPy 2.4 puts them into a hash table for that: of a million that mostly differ it takes a
    hundred times as long as sorting them.
    """
    ordered = np.sort(values)
    is_first = np.append(True, ordered[1:] != ordered[:-1])[: len(ordered)]
    return ordered[is_first]
