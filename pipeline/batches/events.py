"""Rows of several sequences as flat columns, and the arithmetic of their bounds and gaps."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

NO_GAP = -1  # gap_ms where there is no earlier row or the time between is not real


@dataclass(frozen=True, slots=True)
class Events:
    """Rows of B sequences as flat NumPy columns, oldest first; sequence b is `offsets[b]:offsets[b
    + 1]`.

    Request columns are -1 where unknown.
    """

    offsets: np.ndarray  # int64 [B + 1]
    item_id: np.ndarray  # int64 [N]
    event_time: np.ndarray  # int64 [N], ms UTC; of a candidate: its request's time
    order_only: np.ndarray  # bool [N]
    action_mask: np.ndarray  # int32 [N]
    known_mask: np.ndarray  # int32 [N]
    position: np.ndarray  # int64 [N]
    gap_ms: np.ndarray  # int64 [N]
    watch_ms: np.ndarray  # int64 [N], -1 where unknown
    request: dict[str, np.ndarray]  # int32 [N] per request column
    dense: np.ndarray | None = None  # float32 [N, F], `features.dense`; candidates only

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def take(self, begin: np.ndarray, end: np.ndarray) -> "Events":
        """The rows `begin[i]:end[i]` as sequence i, int64 [n] each."""
        index, offsets = ranges(begin, end)
        names = [f.name for f in fields(self) if f.name not in ("offsets", "request", "dense")]
        columns = {name: getattr(self, name)[index] for name in names}
        return Events(
            offsets=offsets,
            request={n: column[index] for n, column in self.request.items()},
            dense=None if self.dense is None else self.dense[index],
            **columns,
        )


def concatenate(parts: Sequence[Events]) -> Events:
    """The sequences of all parts, which agree in what columns they have."""
    if len(parts) == 1:
        return parts[0]
    lengths = np.concatenate([part.lengths for part in parts])
    names = [f.name for f in fields(Events) if f.name not in ("offsets", "request", "dense")]
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    request = {
        name: np.concatenate([part.request[name] for part in parts]) for name in parts[0].request
    }
    dense = [part.dense for part in parts if part.dense is not None]
    return Events(
        offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        request=request,
        dense=np.concatenate(dense) if dense else None,
        **columns,
    )


def ranges(begin: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The integers of `begin[i]..end[i]-1` one range after another, and the offsets [n + 1] of the
    ranges.
    """
    lengths = end - begin
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return np.arange(offsets[-1]) + np.repeat(begin - offsets[:-1], lengths), offsets


def row_gaps(
    event_time: np.ndarray, order_only: np.ndarray, offsets: np.ndarray, end_is_real: bool
) -> np.ndarray:
    """ms from the previous row of the sequence to each row, int64 [N], NO_GAP where that is not a
    real time.

    An order_only row has no gap. The first timed row after such rows has one only if `end_is_real`:
    the last of them then carries a real time.
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
    """ms from the last visible event to the request, int64 [n].

    That event is row `last`; none if `last < first`.
    """
    if len(history.event_time) == 0:
        return np.full(len(last), NO_GAP, np.int64)
    row = np.maximum(last, 0)
    real = (last >= first) & (end_is_real | ~history.order_only[row])
    return np.where(real, request_time - history.event_time[row], NO_GAP)
