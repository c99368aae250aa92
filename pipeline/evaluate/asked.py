"""What users are asked for in an evaluation of retrieval: the items that they took in a period, and
the histories from which these are to be found.

    rows of some users + a period → `asked_items` → `Asked`
"""

from dataclasses import dataclass

import numpy as np

from pipeline.batches.counts import distinct_values, search_sorted
from pipeline.batches.events import offsets_of, ranges
from pipeline.batches.examples import Examples, UserEvents
from pipeline.batches.features import FeatureMaps
from pipeline.batches.labels import positive_rows
from pipeline.config import EvaluateConfig


@dataclass(frozen=True, slots=True)
class Asked:
    """U users with their histories, and the items that are asked for: item numbers from 0 in the
    order of `FeatureMaps.item_ids`, −1 for an unknown one.
    """

    examples: Examples  # without targets
    offsets: np.ndarray  # int64 [U + 1], of the users among the items
    item: np.ndarray  # int64 [P]

    def __getitem__(self, index: np.ndarray) -> "Asked":
        begin, end = self.offsets[index], self.offsets[index + 1]
        chosen, offsets = ranges(begin, end)
        return Asked(self.examples[index], offsets, self.item[chosen])


def asked_items(
    users: UserEvents,
    period: tuple[int, int],
    cfg: EvaluateConfig,
    bits: int,
    maps: FeatureMaps,
) -> Asked:
    """Those of the users who took an item in the period, [from, to) in ms UTC, and the items.

    `bits` are those of the events that count, `RunConfig.positive_bits` of the model.
    """
    taken = taken_rows(users, *period, bits)
    if cfg.retrieval_protocol == "global_time":
        asked = all_of_period(users, taken, period[0], maps)
    else:
        asked = last_of_period(users, taken, maps)
    if cfg.remove_seen:
        asked = without_repeats(users, asked, maps)
    return asked


def taken_rows(users: UserEvents, begin: int, end: int, bits: int) -> np.ndarray:
    """int64: the rows of requests in [begin, end) ms that count as next items."""
    events, time = users.events, users.request_time
    inside = (time >= begin) & (time < end) & ~events.order_only
    return np.flatnonzero(inside & positive_rows(events.action_mask, events.known_mask, bits))


def all_of_period(users: UserEvents, taken: np.ndarray, begin: int, maps: FeatureMaps) -> Asked:
    """Each user's different items among the rows `taken`, after all that lies before `begin`.

    items of a user   4 7 | 9 7 9      the period begins at |
    history           4 7
    asked for         7 9
    """
    user, item = users.row_user[taken], maps.item_rows(users.events.item_id[taken]) - 1
    num_items = len(maps.item_ids) + 1
    pairs = distinct_values(user * num_items + item + 1)
    user, item = np.divmod(pairs, num_items)
    who, counts = np.unique(user, return_counts=True)

    first = users.events.offsets[who]
    earlier = offsets_of(users.request_time < begin)
    history_end = first + earlier[users.events.offsets[who + 1]] - earlier[first]
    return Asked(_histories(users, who, history_end), offsets_of(counts), item - 1)


def last_of_period(users: UserEvents, taken: np.ndarray, maps: FeatureMaps) -> Asked:
    """Each user's last of the rows `taken`, after all that lies before its request."""
    user = users.row_user[taken]
    is_last = np.append(user[1:] != user[:-1], True)[: len(user)]
    rows = taken[is_last]
    item = maps.item_rows(users.events.item_id[rows]) - 1
    examples = _histories(users, user[is_last], users.visible_end[rows])
    return Asked(examples, np.arange(len(rows) + 1), item)


def _histories(users: UserEvents, user: np.ndarray, history_end: np.ndarray) -> Examples:
    return Examples(user, users.events.offsets[user], history_end, history_end, history_end)


def without_repeats(users: UserEvents, asked: Asked, maps: FeatureMaps) -> Asked:
    """Without the items that are in the user's history already, and without users that have no
    other.
    """
    num_items = len(maps.item_ids)
    user, seen = seen_items(users, asked.examples, maps)
    owner = np.repeat(np.arange(len(asked.examples)), np.diff(asked.offsets))
    pairs, known = owner * num_items + asked.item, np.sort(user * num_items + seen)
    place = search_sorted(known, pairs)
    is_seen = np.append(known, -1)[place] == pairs
    is_new = (asked.item < 0) | ~is_seen

    counts = np.bincount(owner[is_new], minlength=len(asked.examples))
    left = Asked(asked.examples, offsets_of(counts), asked.item[is_new])
    return left[np.flatnonzero(counts)]


def seen_items(
    users: UserEvents, examples: Examples, maps: FeatureMaps
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of an example's number and an item of its history that the model knows, int64 [S]."""
    rows, offsets = ranges(examples.history_begin, examples.history_end)
    item = maps.item_rows(users.events.item_id[rows]) - 1
    user = np.repeat(np.arange(len(examples)), np.diff(offsets))
    known = item >= 0
    return user[known], item[known]
