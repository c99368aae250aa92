"""Rows of several sequences as flat columns, and the arithmetic of their bounds and gaps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

NO_GAP = -1  # gap_ms where there is no earlier row or the time between is not real


@dataclass(frozen=True, slots=True)
class Events:
    """Rows of B sequences as flat NumPy columns, oldest first.

    A request column or an outcome that is not known has its `schema.Column.unknown`.

        sequences   [a b c] [] [d e]
        rows         a b c      d e      N = 5
        offsets     0     3  3     5     sequence b is the rows offsets[b]:offsets[b + 1]
    """

    offsets: np.ndarray  # int64 [B + 1]
    item_id: np.ndarray  # int64 [N]
    event_time: np.ndarray  # int64 [N], ms UTC; of a candidate: its request's time
    order_only: np.ndarray  # bool [N]
    action_mask: np.ndarray  # int32 [N]
    known_mask: np.ndarray  # int32 [N]
    position: np.ndarray  # int64 [N]
    gap_ms: np.ndarray  # int64 [N]
    request: dict[str, np.ndarray]  # int32 [N] per request column
    # int64 or float64 [N] per outcome that the model reads; of candidates none
    outcomes: dict[str, np.ndarray]
    dense: np.ndarray | None = None  # float32 [N, F], `features.dense`; candidates only

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, begin: np.ndarray, end: np.ndarray) -> "Events":
        """The rows `begin[i]:end[i]` as sequence i, int64 [n] each.

        rows      0 1 2 3 4 5     begin = 4 1 2     end = 6 1 4
        taken     4 5 | | 2 3     offsets = 0 2 2 4
        """
        index, offsets = ranges(begin, end)
        return self._pick(index, offsets)

    def slice(self, begin: int, end: int) -> "Events":
        """The rows `begin..end-1` as one sequence, whose columns are views."""
        rows = np.s_[begin:end]
        columns = {name: getattr(self, name)[rows] for name in PLAIN}
        return Events(
            offsets=np.array([0, end - begin], np.int64),
            request=_take_each(self.request, rows),
            outcomes=_take_each(self.outcomes, rows),
            dense=None if self.dense is None else self.dense[rows],
            **columns,
        )

    def keep(self, kept: np.ndarray) -> "Events":
        """The rows where `kept`, bool [N], each in the sequence it was in.

        rows      0 1 2 | 3 4 5     kept = 1 0 1 0 0 1
        before    0 1 1   2 2 2 3   kept rows before each row, and all of them
        left      0 2 | 5           offsets = 0 2 3
        """
        num_before = offsets_of(kept)
        return self._pick(np.flatnonzero(kept), num_before[self.offsets])

    def _pick(self, index: np.ndarray, offsets: np.ndarray) -> "Events":
        """The rows `index`, as sequences with these bounds."""
        columns = {name: getattr(self, name)[index] for name in PLAIN}
        return Events(
            offsets=offsets,
            request=_take_each(self.request, index),
            outcomes=_take_each(self.outcomes, index),
            dense=None if self.dense is None else self.dense[index],
            **columns,
        )


@dataclass(frozen=True, slots=True)
class UserEvents:
    """All rows of some users, and for each row the request it belongs to."""

    events: Events
    user_id: np.ndarray  # int64 [B]
    first_position: np.ndarray  # int64 [B]
    request_begin: np.ndarray  # int64 [N], first row of the row's request
    # int64 [N], rows begin..visible_end-1 of the user are strictly earlier than the request
    visible_end: np.ndarray

    @property
    def row_user(self) -> np.ndarray:
        """Which user each row is of, int64 [N]."""
        return np.repeat(np.arange(len(self.user_id)), self.events.lengths)

    def users_of(self, rows: np.ndarray) -> np.ndarray:
        """Which user each of these rows is of, int64 [n]."""
        return np.searchsorted(self.events.offsets, rows, side="right") - 1

    @property
    def request_time(self) -> np.ndarray:
        """When each row's request was made, int64 [N], ms UTC."""
        return self.events.event_time[self.request_begin]


# the fields that are one column each, of every row
PLAIN = (
    "item_id",
    "event_time",
    "order_only",
    "action_mask",
    "known_mask",
    "position",
    "gap_ms",
)


def _take_each(columns: dict[str, np.ndarray], index: np.ndarray | slice) -> dict[str, np.ndarray]:
    return {name: column[index] for name, column in columns.items()}


def concatenate(parts: Sequence[Events]) -> Events:
    """The sequences of all parts, which agree in what columns they have."""
    if len(parts) == 1:
        return parts[0]

    lengths = np.concatenate([part.lengths for part in parts])
    columns = {}
    for name in PLAIN:
        columns[name] = np.concatenate([getattr(part, name) for part in parts])

    dense = [part.dense for part in parts if part.dense is not None]
    return Events(
        offsets=offsets_of(lengths),
        request=_concatenate_each([part.request for part in parts]),
        outcomes=_concatenate_each([part.outcomes for part in parts]),
        dense=np.concatenate(dense) if dense else None,
        **columns,
    )


def _concatenate_each(parts: Sequence[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    joined = {}
    for name in parts[0]:
        joined[name] = np.concatenate([part[name] for part in parts])
    return joined


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    """int64 [n + 1], where each of n rows of these lengths begins, and where the last one ends."""
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


def ranges(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers of `begin[i]..end[i]-1` one range after another, and the offsets [n + 1] of the
    ranges.

        begin, end   4..6   1..1   2..4
        integers     4 5           2 3         offsets = 0 2 2 4
    """
    lengths = end - begin
    offsets = offsets_of(lengths)

    # a range begins at its offset, and should at `begin`
    shift = np.repeat(begin - offsets[:-1], lengths)
    integers = np.arange(offsets[-1]) + shift
    return integers, offsets


def row_gaps(
    event_time: np.ndarray, order_only: np.ndarray, offsets: np.ndarray, end_is_real: bool
) -> np.ndarray:
    """ms from the previous row of the sequence to each row, int64 [N], NO_GAP where that is not a
    real time.

    An order_only row has no gap. The first timed row after such rows has one only if `end_is_real`:
    the last of them then carries a real time.

        event_time    10  20  50  90    7        order_only: the first two
        end_is_real   -1  -1  30  40   -1        offsets = 0 4 5
        otherwise     -1  -1  -1  40   -1
    """
    gap = np.diff(event_time, prepend=event_time[:1])

    after_order_only = np.concatenate([[False], order_only[:-1]])
    unreal = order_only if end_is_real else order_only | after_order_only
    gap[unreal] = NO_GAP

    starts = offsets[:-1][np.diff(offsets) > 0]
    gap[starts] = NO_GAP
    return gap


def request_gaps(
    history: Events,
    last: np.ndarray,
    first: np.ndarray,
    request_time: np.ndarray,
    end_is_real: bool,
) -> np.ndarray:
    """ms from the last visible event to the request, int64 [n], NO_GAP where that is not a real
    time.

    That event is row `last`; none if `last < first`.

        event_time     10  20  50      order_only: the first two
        first, last    0 2    0 1    0 -1      request_time = 60 each
        end_is_real     10     40     -1
        otherwise       10     -1     -1
    """
    if len(history.event_time) == 0:
        return np.full(len(last), NO_GAP, np.int64)

    row = np.maximum(last, 0)  # of a request without events any row will do
    has_events = last >= first
    has_time = end_is_real | ~history.order_only[row]
    gap = request_time - history.event_time[row]
    return np.where(has_events & has_time, gap, NO_GAP)
