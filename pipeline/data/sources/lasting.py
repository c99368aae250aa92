"""Synthetic tastes that a user shows early and is asked for after long, when nothing newer tells them.

A user likes each lasting category or not, by a coin. The rows of a user are

    early   `early_rows` of them, all of lasting categories, in turn
    quiet   `quiet_rows` of them, none
    late    in turn requests without, a *cue*, a request that *answers* it, and one that *returns* to a category; as
            many as it takes to spread them to the end

A cue is of one lasting category and stands in a thread, a value of `tab` that the user sees in it and its answer only.
Each category is cued or returned to at most once. Two actions tell the taste, wrong one time in ten:

    lasting  in the early rows and the returns, of the row's own category: a candidate has to find those early rows
    cued     in the answers, whose categories have nothing to do with it, of the cue's: candidate → cue → early rows.
             Either the cue's row has looked back by itself, or a candidate that has read the cue looks back once more

Elsewhere both are unknown, so that what is scored is what was planted.
"""

from dataclasses import dataclass

import numpy as np

from pipeline.config import SyntheticConfig

ACTIONS = ("lasting", "cued")
CYCLE = 4  # requests at least, from one cue to the next
PLAIN, CUE, ANSWER, RETURN = range(CYCLE)
TOLD_RIGHT = 0.9


@dataclass(frozen=True)
class Planted:
    """Of every row, [rows] each."""

    category: np.ndarray  # int64, -1 where it is an everyday one
    thread: np.ndarray  # int64, -1 where there is none
    actions: dict[str, np.ndarray]  # int8, masked where unknown


def plant(
    cfg: SyntheticConfig,
    categories: np.ndarray,
    lengths: np.ndarray,
    owner: np.ndarray,
    place: np.ndarray,
    rng: np.random.Generator,
) -> Planted:
    """For the rows at `place` of their `owner`, one of `lengths`; `categories`, int64 [n]: the lasting ones."""
    num = len(categories)
    order, threads = (_permutations(len(lengths), n, rng) for n in (num, num // 2))
    likes = rng.random(order.shape) < 0.5  # by place in the user's order
    begin = cfg.early_rows + cfg.quiet_rows
    request = (place - begin) // cfg.candidates_per_request
    spread = np.maximum((lengths - begin) // cfg.candidates_per_request // (num // 2), CYCLE)[owner]
    cycle, kind = request // spread, request % spread
    early = place < cfg.early_rows
    late = (request >= 0) & (cycle < num // 2)
    cue, answer, back = (late & (kind == one) for one in (CUE, ANSWER, RETURN))
    about = np.where(early, place % num, np.where(back, 2 * cycle + 1, 2 * cycle).clip(0, num - 1))
    category = np.where(early | cue | back, categories[order[owner, about]], -1)
    thread = np.where(cue | answer, threads[owner, cycle.clip(0, num // 2 - 1)], -1)
    told = (likes[owner, about] == (rng.random(len(place)) < TOLD_RIGHT)).astype(np.int8)
    known = dict(zip(ACTIONS, (early | back, answer), strict=True))
    return Planted(category, thread, {name: np.ma.masked_array(told, ~rows) for name, rows in known.items()})


def _permutations(num_rows: int, num: int, rng: np.random.Generator) -> np.ndarray:
    return rng.permuted(np.broadcast_to(np.arange(num), (num_rows, num)), axis=1)
