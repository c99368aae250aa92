"""Items that were not observed, drawn beside each positive: for logs that hold positives only
(`examples.negatives`).

    rows of the logs, all positive → each followed by its drawn items → labels 1, 0, 0, …

An item is drawn by its rows in the training period. It is none that the user has a row of up to the
request; one that the user comes to later may be drawn, since leaving it out would tell what is to
come. What is drawn depends on the row, on the seed and, in training, on the epoch: not on the
batch, the process or the number of workers. In validation and test it depends on the row alone, so
that all models are measured on the same items.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.batches.events import UserEvents, ranges
from pipeline.batches.features import FeatureMaps
from pipeline.batches.labels import label_counts
from pipeline.logs.cleaning import mix

SALT = np.uint64(0x9E3779B97F4A7C15)  # so that zeros are mixed too
TRIES = 8  # of drawing an item that the user has no row of; then the place has no known label


@dataclass(frozen=True, slots=True)
class Candidates:
    """What is asked of B sequences: rows of the logs, and items drawn beside them."""

    rows: np.ndarray  # int64 [C]: the row itself, or the one that an item was drawn beside
    offsets: np.ndarray  # int64 [B + 1]
    item_id: np.ndarray  # int64 [C]
    drawn: np.ndarray  # bool [C]
    usable: np.ndarray  # bool [C], False: no item was found for this place


def own_candidates(users: UserEvents, rows: np.ndarray, offsets: np.ndarray) -> Candidates:
    """The rows alone."""
    item_id = users.events.item_id[rows]
    nothing = np.zeros(len(rows), bool)
    return Candidates(rows, offsets, item_id, drawn=nothing, usable=~nothing)


def with_negatives(
    users: UserEvents,
    rows: np.ndarray,
    offsets: np.ndarray,
    maps: FeatureMaps,
    task_bits: tuple[int, ...],
    per_positive: int,
    seed: tuple[int, ...],
) -> Candidates:
    """Each positive row followed by `per_positive` drawn items; the other rows as they are.

    rows        4    5    6        5 is positive in no task, per_positive = 2
    candidates  4 a b    5    6 c d
    drawn       . x x    .    . x x
    """
    events = users.events
    labels = label_counts(events.action_mask[rows], events.known_mask[rows], task_bits)
    positive = labels[:, len(task_bits) :].any(axis=1)

    # the row of every candidate, and its number among those of that row: 0 for the row itself
    num_places = np.where(positive, 1 + per_positive, 1)
    number, begin = ranges(np.zeros_like(num_places), num_places)
    row = np.repeat(rows, num_places)
    drawn = number > 0

    item_id = events.item_id[row]
    usable = np.ones(len(row), bool)
    if drawn.any() and maps.item_count.sum() > 0:
        item_id[drawn], usable[drawn] = _draw_items(users, row[drawn], number[drawn], maps, seed)
    return Candidates(row, begin[offsets], item_id, drawn, usable)


def _draw_items(
    users: UserEvents, row: np.ndarray, number: np.ndarray, maps: FeatureMaps, seed: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """An item for each place, int64 [n], and where one was found that the user has no row of."""
    ends = np.cumsum(maps.item_count[1:])
    observed = _ObservedItems.of(users, row, maps)
    state = _hash_places(users, row, number, seed)

    item_row = np.zeros(len(row), np.int64)
    left = np.arange(len(row))
    for _ in range(TRIES):
        state[left] = mix(state[left])
        place = (state[left] % np.uint64(ends[-1])).astype(np.int64)
        item_row[left] = 1 + np.searchsorted(ends, place, side="right")
        left = left[observed.has(row[left], item_row[left])]
        if len(left) == 0:
            break

    usable = np.ones(len(row), bool)
    usable[left] = False
    return maps.item_ids[item_row - 1], usable


def _hash_places(
    users: UserEvents, row: np.ndarray, number: np.ndarray, seed: tuple[int, ...]
) -> np.ndarray:
    """uint64 [n] that the place alone decides, wherever its row lies in the batch."""
    events = users.events
    state = np.zeros(len(row), np.uint64)
    facts = (users.user_id[users.users_of(row)], events.event_time[row], events.item_id[row])
    for values in (*facts, number, *(np.array([value]) for value in seed)):
        state = mix(state ^ mix(values.astype(np.uint64) + SALT))
    return state


@dataclass(frozen=True, slots=True)
class _ObservedItems:
    """The first row that a user has of an item, for the users of some rows."""

    users: UserEvents
    size: int  # of the item table; a key is user * size + item
    keys: np.ndarray  # int64, ascending
    first_row: np.ndarray  # int64, of each key

    @classmethod
    def of(cls, users: UserEvents, row: np.ndarray, maps: FeatureMaps) -> "_ObservedItems":
        chosen = np.unique(users.users_of(row))
        offsets = users.events.offsets
        theirs, _ = ranges(offsets[chosen], offsets[chosen + 1])

        size = len(maps.item_ids) + 1
        item = maps.item_rows(users.events.item_id[theirs])
        keys, first = np.unique(users.users_of(theirs) * size + item, return_index=True)
        return cls(users, size, keys, theirs[first])

    def has(self, row: np.ndarray, item_row: np.ndarray) -> np.ndarray:
        """bool [n]: the user of the row has a row of the item, before its request or in it."""
        asked = self.users.users_of(row) * self.size + item_row
        place = np.searchsorted(self.keys, asked).clip(0, len(self.keys) - 1)
        first = self.first_row[place]

        earlier = first < self.users.visible_end[row]
        same_request = self.users.request_begin[first] == self.users.request_begin[row]
        return (self.keys[place] == asked) & (earlier | same_request)


def negative_labels(
    candidates: Candidates, labels: np.ndarray, weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and weights, float32 [C, tasks], where drawn items have those of their rows.

    A drawn item is a negative of the tasks in which its row is a positive.

        labels, weight   1 0   1 1     of the row
        of a drawn item  0 0   1 0
    """
    drawn = candidates.drawn[:, None]
    weight = np.where(drawn, weight * labels * candidates.usable[:, None], weight)
    return np.where(drawn, 0, labels).astype(np.float32), weight.astype(np.float32)
