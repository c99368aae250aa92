"""Synthetic co-visitation chains over sessions.

All categories lie on one chain, the same for everybody, in which each follows another. A session is
`session_rows` rows, each of another category, the popular ones more often. A user takes a row's
category (the action `taken`) with probability .8 if they took the one before it in the chain when
it was last shown to them, in an earlier session, and with .2 if they did not. What they would have
done before its first showing is a coin, each.

    chain      … → 7 → 3 → …
    session 4   7 taken            session 9   7 not taken        from here on 3 is taken with .2,
    session 5   3 taken with .8    session 12  3 taken with .2    until 7 is shown again

Popular categories were shown a session or two ago, rare ones hundreds of sessions ago: so what
tells the outcome is of every age.
"""

import numpy as np

from pipeline.config import ChainsConfig
from pipeline.logs.shown import ShownRows

ACTION = "taken"
FOLLOWS = 0.8  # chance of the action after a category that was taken; 1 - it after one that was not
ONE_ROW = np.log(FOLLOWS / (1 - FOLLOWS))  # log-odds


def chain_before(num_categories: int) -> np.ndarray:
    """The category before each in the chain, int64 [categories]: one cycle through all of them."""
    cycle = np.random.default_rng(num_categories).permutation(num_categories)
    before = np.empty(num_categories, np.int64)
    before[cycle] = np.roll(cycle, 1)
    return before


def plant(
    cfg: ChainsConfig,
    lengths: np.ndarray,
    owner: np.ndarray,
    place: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Category and action of the rows at `place` of their `owner`, one of `lengths`: int64 and int8
    [rows].

    Session by session, all users at once: what a session shows decides on the later ones.
    """
    before = chain_before(cfg.categories)
    share = 1 / np.arange(1, cfg.categories + 1) ** cfg.popularity_exponent
    begin = np.cumsum(lengths) - lengths
    category = np.empty(len(owner), np.int64)
    action = np.empty(len(owner), np.int8)

    # what each user did with each category when it was last shown, a coin before that
    took = rng.random((len(lengths), cfg.categories)) < 0.5
    for first in range(0, int(lengths.max()), cfg.session_rows):
        users = np.flatnonzero(lengths > first)

        # the largest of log(share) + Gumbel noise: a draw without repeats
        noise = rng.gumbel(size=(len(users), cfg.categories))
        drawn = np.argsort(-(np.log(share) + noise), axis=1)[:, : cfg.session_rows]
        chance = np.where(took[users[:, None], before[drawn]], FOLLOWS, 1 - FOLLOWS)
        taken = rng.random(drawn.shape) < chance
        took[users[:, None], drawn] = taken

        # a user's last session may be a part of one
        rows = begin[users, None] + first + np.arange(cfg.session_rows)
        inside = rows < (begin + lengths)[users, None]
        category[rows[inside]] = drawn[inside]
        action[rows[inside]] = taken[inside]
    return category, action


def best_log_odds(
    cfg: ChainsConfig, rows: ShownRows, request_begin: np.ndarray, oldest: np.ndarray
) -> np.ndarray:
    """By the newest outcome of the category before, of an earlier session and from place `oldest`
    on. Where that was not shown, by what the row's own category told of it: it has been the same
    since.
    """
    # an earlier session is an earlier request, too
    session_begin = rows.place // cfg.session_rows * cfg.session_rows
    end = np.minimum(request_begin, session_begin)
    order = np.lexsort((rows.place, rows.category, rows.user))
    sign = np.where(rows.action[order] > 0, 1.0, -1.0)

    # a key that ascends with user, category and place
    span = int(rows.place.max(initial=0)) + 1

    def key(category: np.ndarray, place: np.ndarray) -> np.ndarray:
        return (rows.user * cfg.categories + category) * span + place

    keys = key(rows.category, rows.place)[order]
    before = chain_before(cfg.categories)[rows.category]
    last = np.searchsorted(keys, key(before, end)) - 1
    is_shown = (last >= 0) & (keys[last] >= key(before, oldest))
    known = np.where(is_shown, sign[last], 0.0)

    # the rows of the same category in the window: each .8 to .2 for what came before it
    total = np.r_[0.0, np.cumsum(sign)]
    seen_from = np.searchsorted(keys, key(rows.category, oldest))
    seen_to = np.searchsorted(keys, key(rows.category, end))
    hidden = (total[seen_to] - total[np.minimum(seen_from, seen_to)]) * ONE_ROW
    took = 1 / (1 + np.exp(-hidden))
    guessed = (1 - FOLLOWS) + (2 * FOLLOWS - 1) * took

    unknown = np.log(guessed) - np.log1p(-guessed)
    return np.where(is_shown, known * ONE_ROW, unknown)
