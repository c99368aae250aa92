"""Histories of users as of a time each, cut from their published rows."""

from dataclasses import dataclass

import numpy as np

from pipeline.batches.events import Events
from pipeline.batches.examples import UserEvents


@dataclass(frozen=True, slots=True)
class PastRows:
    """What B users did before their times."""

    events: Events
    first_position: np.ndarray  # int64 [B], older rows that are not in `events`


def history_before(
    users: UserEvents, time_ms: np.ndarray, max_history: int | None = None
) -> PastRows:
    """The newest `max_history` rows (None: all) of each user strictly earlier than `time_ms`, int64
    [B].

    Times do not fall within a user.

        event_time of a user   10 20 20 30      time_ms 30, max_history 2
        rows                       x  x         one older row is counted in `first_position`
    """
    events = users.events
    earlier = events.event_time < np.repeat(time_ms, events.lengths)
    before = np.concatenate([[0], np.cumsum(earlier)])
    begin = events.offsets[:-1]
    end = begin + before[events.offsets[1:]] - before[begin]

    newest = begin if max_history is None else np.maximum(begin, end - max_history)
    first_position = users.first_position + newest - begin
    return PastRows(events.take(newest, end), first_position)
