"""Synthetic tastes that a user shows early and is asked for after long, when nothing newer tells
them.

A user likes each lasting category or not, by a coin. The rows of a user are

    early   `early_rows` of them, all of lasting categories, in turn
    quiet   `quiet_rows` of them, none
    late    every so many requests one that *asks* for a lasting category, all its candidates; each
    category once

The action `lasting` tells the taste for a row's category, wrong one time in ten, in the early and
the asking rows, and is unknown in all others: what is scored is what was planted, and no answer
helps with another.
"""

import numpy as np

from pipeline.config import SyntheticConfig

ACTION = "lasting"
TOLD_RIGHT = 0.9


def plant(
    cfg: SyntheticConfig,
    categories: np.ndarray,
    lengths: np.ndarray,
    owner: np.ndarray,
    place: np.ndarray,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """For the rows at `place` of their `owner`, one of `lengths`: category, -1 where it is an
    everyday one, and action, masked where unknown. `categories`, int64 [n]: the lasting ones.
    """
    num = len(categories)
    shape = len(lengths), num
    order = rng.permuted(np.broadcast_to(categories, shape), axis=1)
    likes = rng.random(shape) < 0.5  # by place in the user's order
    begin = cfg.early_rows + cfg.quiet_rows
    request = (place - begin) // cfg.candidates_per_request
    apart = np.maximum((lengths - begin) // cfg.candidates_per_request // num, 1)[owner]
    early = place < cfg.early_rows
    asks = (request >= 0) & (request % apart == apart - 1) & (request // apart < num)
    about = np.where(early, place, request // apart) % num
    told = likes[owner, about] == (rng.random(len(place)) < TOLD_RIGHT)
    known = early | asks
    category = np.where(known, order[owner, about], -1)
    return category, np.ma.masked_array(told.astype(np.int8), ~known)
