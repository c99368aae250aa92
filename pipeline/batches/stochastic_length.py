"""Stochastic length, and equal loads of the ranks under it.

Stochastic length (HSTU, arXiv:2402.17152, eq. 4) trains on the newest part of most long histories.
What a rank draws then weighs more or less than what its neighbours drew, and all wait for the
heaviest. Two remedies, neither of which talks to another rank, since every rank draws the plan of a
whole pool of examples:

- `dealing`: the draws stay, a step's examples go to the ranks by load, the heaviest first.
- `sampling`: as load-balanced stochastic length (ULTRA-HSTU, arXiv:2602.16986, section 4.1) does,
  draws are flipped, one after another, while that brings a load nearer to the mean; here the load
  of a whole step, whose examples are then dealt. So steps are alike too, and what a step holds
  does not depend on the number of ranks. In the paper each rank does so with what it happens to
  hold, and the mean is an estimate from warm-up steps, renewed by a message.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from pipeline.config import StochasticLengthConfig


def cut_threshold(cfg: StochasticLengthConfig) -> int:
    """The rows that are left of a history that is cut: floor(max_len^(alpha/2))."""
    return math.floor(cfg.max_len ** (cfg.alpha / 2))


def stochastic_cuts(
    lengths: np.ndarray, cfg: StochasticLengthConfig, rng: np.random.Generator
) -> np.ndarray:
    """bool [n]: the histories that keep only their newest `cut_threshold(cfg)` rows.

    One of n rows, n above the threshold, is cut with probability 1 - max_len^alpha / n^2, so that
    attention costs O(max_len^alpha) on average; inference never cuts. With a max_len of 16 and an
    alpha of 1, the threshold is 4:

        length              4       5       8       16
        probability         0       0.36    0.75    0.94
    """
    # one draw per history, whatever its length: the plan of a step never shifts
    draw = rng.random(len(lengths))
    if cfg.alpha == 2.0:
        return np.zeros(len(lengths), bool)

    keep_all = cfg.max_len**cfg.alpha / np.maximum(lengths, 1).astype(np.float64) ** 2
    return (lengths > cut_threshold(cfg)) & (draw >= keep_all)


def weighted_rows(event_time: np.ndarray, num_kept: int, rng: np.random.Generator) -> np.ndarray:
    """bool [n]: `num_kept` of a history's n rows, drawn without replacement, old ones less often.

    A row weighs 1 less its share of the sum of all ages, its age being the time to the newest row
    (HSTU, arXiv:2402.17152, table 13, feature-weighted). Each draw goes by those weights
    (Efraimidis and Spirakis, 2006).

        event_time   0    6    9    10
        age         10    4    1     0
        weight      .33  .73  .93    1
    """
    draw = rng.random(len(event_time))
    if num_kept >= len(event_time):
        return np.ones(len(event_time), bool)

    age = (event_time[-1] - event_time).astype(np.float64)
    weight = 1 - age / max(age.sum(), 1.0)
    key = np.full(len(age), -np.inf)  # a row that has all the age is kept last
    np.divide(np.log1p(-draw), weight, out=key, where=weight > 0)

    kept = np.zeros(len(age), bool)
    kept[np.argsort(-key, kind="stable")[:num_kept]] = True
    return kept


def example_loads(num_tokens: np.ndarray, cfg: StochasticLengthConfig) -> np.ndarray:
    """What examples of so many tokens weigh, float64 [n]: tokens to the power `load_exponent`, or
    the predicted time by `load_times`.

        tokens      10      load_times 5, 2, 0.1
        load        5 + 2 * 10 + 0.1 * 100 = 35
    """
    tokens = num_tokens.astype(np.float64)
    if cfg.load_times is None:
        return tokens**cfg.load_exponent
    once, each, squared = cfg.load_times
    return once + each * tokens + squared * tokens**2


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The examples of a pool: which histories are drawn to be cut, and what an example weighs whole
    and cut (`example_loads`), [n] each.
    """

    cut: np.ndarray  # bool
    whole: np.ndarray  # float64
    short: np.ndarray  # float64, at most `whole`

    @property
    def drawn_loads(self) -> np.ndarray:
        return np.where(self.cut, self.short, self.whole)

    def share_step(
        self, step: np.ndarray, world_size: int, target: float, balance: str, seed: list[int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """The examples of a step that each rank takes. What the ranks take together does not depend
        on how many they are.

        Args:
            step: int64 [n], the examples of the step over all ranks.
            target: the load that every step should come to, under `balance` sampling.
            seed: of the order in which that looks at the examples; another for every step, the same
                on all ranks.

        Returns:
            For each rank its places in `step`, none where there are more ranks than examples; and
            bool [n], which histories of `step` to cut.
        """
        cut, whole, short = self.cut[step], self.whole[step], self.short[step]
        if balance == "none":
            return np.array_split(np.arange(len(step)), world_size), cut

        if balance == "sampling":
            order = np.random.default_rng(seed).permutation(len(step))
            cut = balanced_cuts(cut, whole, short, target, order)

        load = np.where(cut, short, whole)
        return deal_examples(load, world_size), cut


def balanced_cuts(
    cut: np.ndarray, whole: np.ndarray, short: np.ndarray, target: float, order: np.ndarray
) -> np.ndarray:
    """`cut` with those draws flipped that, taken in `order`, bring the sum of loads nearer to
    `target`.

    Nothing is cut, the sum is 27 and the target 19; the first flip reaches it, no other helps:

        whole           10  8   6   3
        short           2   2   2   3
        sum if flipped  19  13  15  .       in this order; the last cannot be cut
        cut             x
    """
    cut = cut.copy()
    total = float(np.where(cut, short, whole).sum())

    for i in order[whole[order] > short[order]]:
        change = whole[i] - short[i] if cut[i] else short[i] - whole[i]
        flipped = total + change
        if abs(flipped - target) < abs(total - target):
            total = flipped
            cut[i] = not cut[i]
    return cut


def deal_examples(load: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """The indices of `load` for each rank, in rising order: the heaviest first, each to the
    lightest rank so far.

    With as many examples as ranks or more, and loads above 0, no rank comes away empty.

        load            9   1   1   1       num_ranks = 2
        rank            0   1   1   1
    """
    ranks = [(0.0, rank) for rank in range(num_ranks)]  # a heap: the lightest comes first
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]

    for i in np.argsort(-load, kind="stable").tolist():
        total, rank = ranks[0]
        heapq.heapreplace(ranks, (total + float(load[i]), rank))
        dealt[rank].append(i)

    return [np.sort(np.array(rows, np.int64)) for rows in dealt]
