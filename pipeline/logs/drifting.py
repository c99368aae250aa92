"""Synthetic tastes that drift and come back.

A user's rows are phases of `phase_rows`. A phase shows one interest: a group of categories of which
the user likes each or not, by a coin of their own. Which interest is drawn by shares 1, 1/2, 1/3, …
in an order of the user's own, so some return after a few phases and some after hundreds. Whenever
an interest returns, each of its tastes is another one with probability `changed_share`. The action
`taste` tells the taste for a row's category, wrong one time in ten.

    phase       0     1     2     3          interest b returns in phase 3: what phase 1 showed of
    interest    a     b     a     b          it is worth something, less by one change

So what counts for the first rows of a phase is as old as the interest's last phase, and what counts
for its last rows is mostly in the phase itself.
"""

import numpy as np

from pipeline.config import DriftingConfig
from pipeline.logs.shown import ShownRows

ACTION = "taste"
TOLD_RIGHT = 0.9


def plant(
    cfg: DriftingConfig, owner: np.ndarray, place: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Category and action of the rows at `place` of their `owner`, int64 and int8 [rows]."""
    num_users = int(owner[-1]) + 1
    is_first = place % cfg.phase_rows == 0
    phase = np.cumsum(is_first) - 1  # of the chunk, by row
    phase_owner = owner[is_first]

    # each user's own order of interests, and the phases by it
    order = rng.permuted(np.tile(np.arange(cfg.interests), (num_users, 1)), axis=1)
    shares = 1 / np.arange(1, cfg.interests + 1)
    rank = rng.choice(cfg.interests, len(phase_owner), p=shares / shares.sum())
    interest = order[phase_owner, rank]

    tastes = _tastes(cfg, phase_owner, interest, rng)
    within = rng.integers(cfg.categories_per_interest, size=len(owner))
    category = interest[phase] * cfg.categories_per_interest + within
    is_told = rng.random(len(owner)) < TOLD_RIGHT
    action = tastes[phase, within] == is_told
    return category, action.astype(np.int8)


def _tastes(
    cfg: DriftingConfig, owner: np.ndarray, interest: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """bool [phases, categories of an interest]: the tastes that hold in each phase.

    An interest's first phase draws its tastes, which is a change with probability one half; every
    later one changes them with `changed_share`. A taste is the parity of its changes.
    """
    order, first = _by_interest(owner, interest)
    chance = np.where(first, 0.5, cfg.changed_share)[:, None]
    changed = rng.random((len(owner), cfg.categories_per_interest)) < chance

    total = np.cumsum(changed, axis=0)
    begin = np.maximum.accumulate(np.where(first, np.arange(len(owner)), 0))
    before = total[begin] - changed[begin]
    tastes = np.empty_like(changed)
    tastes[order] = (total - before) % 2 == 1
    return tastes


def _by_interest(owner: np.ndarray, interest: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of phases by user, interest and time, and where in it an interest begins."""
    order = np.lexsort((interest, owner))  # stable: time stays
    same = (np.diff(owner[order]) == 0) & (np.diff(interest[order]) == 0)
    return order, np.r_[True, ~same]


def best_log_odds(
    cfg: DriftingConfig, rows: ShownRows, request_begin: np.ndarray, oldest: np.ndarray
) -> np.ndarray:
    """The predictive log-odds of a two-state chain that is seen through noise: forward over the
    rows of the same user and category from place `oldest` up to `request_begin`.

    A state that is liked with probability p is so with 1/2 + (p - 1/2)(1 - 2 changed_share)^n
    after n more phases of its interest.
    """
    order = np.lexsort((rows.place, rows.category, rows.user))
    user, place = rows.user[order], rows.place[order]
    category, liked = rows.category[order], rows.action[order] > 0
    begin, oldest = request_begin[order], oldest[order]
    visit = _visits(cfg, user, place, category)

    # where the rows of each row's user and category begin, and how many of them lie before it
    starts = np.r_[True, (np.diff(user) != 0) | (np.diff(category) != 0)]
    number = np.arange(len(user))
    first = np.maximum.accumulate(np.where(starts, number, 0))
    key = np.cumsum(starts) * (int(place.max(initial=0)) + 2)
    seen_from = np.searchsorted(key + place, key + oldest)
    seen_to = np.searchsorted(key + place, key + begin)
    seen_from = np.maximum(seen_from, first)

    liked_now = np.full(len(user), 0.5)
    last_visit = visit.copy()
    keep = 1 - 2 * cfg.changed_share
    for back in range(int((seen_to - seen_from).max(initial=0)), 0, -1):
        active = np.flatnonzero(seen_to - back >= seen_from)
        row = seen_to[active] - back
        is_fresh = row == seen_from[active]
        passed = np.where(is_fresh, 0, visit[row] - last_visit[active])
        prior = 0.5 + (liked_now[active] - 0.5) * keep**passed

        told = np.where(liked[row], TOLD_RIGHT, 1 - TOLD_RIGHT)
        liked_now[active] = prior * told / (prior * told + (1 - prior) * (1 - told))
        last_visit[active] = visit[row]

    has_seen = seen_to > seen_from
    passed = np.where(has_seen, visit - last_visit, 0)
    liked_now = 0.5 + (liked_now - 0.5) * keep**passed
    chance = (1 - TOLD_RIGHT) + (2 * TOLD_RIGHT - 1) * liked_now
    found = np.empty(len(user))
    found[order] = np.log(chance) - np.log1p(-chance)
    return found


def _visits(
    cfg: DriftingConfig, user: np.ndarray, place: np.ndarray, category: np.ndarray
) -> np.ndarray:
    """Number of the phase among those of its interest and user, int64 [rows]."""
    interest = category // cfg.categories_per_interest
    phase = place // cfg.phase_rows
    order = np.lexsort((phase, interest, user))
    is_new = np.r_[
        True,
        (np.diff(user[order]) != 0)
        | (np.diff(interest[order]) != 0)
        | (np.diff(phase[order]) != 0),
    ]
    visits = np.empty(len(user), np.int64)
    visits[order] = np.cumsum(is_new)
    return visits
