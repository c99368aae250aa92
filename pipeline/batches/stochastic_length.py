"""Stochastic length, and equal loads of the ranks under it.

Stochastic length (HSTU, arXiv:2402.17152, eq. 4) trains on the newest part of most long histories.
What a rank draws then weighs more or less than what its neighbours drew, and all wait for the
heaviest. Two remedies, neither of which talks to another rank, since every rank draws the plan of a
whole pool of examples:

- `dealing`: the draws stay, a step's examples go to the ranks by load, the heaviest first.
- `sampling`: as load-balanced stochastic length (ULTRA-HSTU, arXiv:2602.16986, section 4.1) does,
  draws are turned round, one after another, while that brings a load nearer to the mean; here the
  load of a whole step, whose examples are then dealt. So steps are alike too, and what a step holds
  does not depend on the number of ranks. In the paper each rank does so with what it happens to
  hold, and the mean is an estimate from warm-up steps, renewed by a message.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from pipeline.config import StochasticLengthConfig


def threshold(cfg: StochasticLengthConfig) -> int:
    return math.floor(cfg.max_len ** (cfg.alpha / 2))


def stochastic_cuts(
    lengths: np.ndarray, cfg: StochasticLengthConfig, rng: np.random.Generator
) -> np.ndarray:
    """bool [n]: which histories keep only their newest `threshold(cfg)` rows.

    One of n rows, n above thr = floor(max_len^(alpha/2)), is cut with probability 1 - max_len^alpha
    / n^2, so that attention costs O(max_len^alpha) on average; inference never cuts.
    """
    # one draw per history, whatever its length: the plan of a step never shifts
    draw = rng.random(len(lengths))
    if cfg.alpha == 2.0:
        return np.zeros(len(lengths), bool)
    keep_all = cfg.max_len**cfg.alpha / np.maximum(lengths, 1).astype(np.float64) ** 2
    return (lengths > threshold(cfg)) & (draw >= keep_all)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The examples of a pool: which histories are drawn to be cut, and what an example weighs whole
    and cut, [n] each.

    The load of an example is its number of tokens to the power `load_exponent`.
    """

    cut: np.ndarray  # bool
    whole: np.ndarray  # float64
    short: np.ndarray  # float64, at most `whole`

    @property
    def drawn(self) -> np.ndarray:
        return np.where(self.cut, self.short, self.whole)

    def shares(
        self, step: np.ndarray, world_size: int, target: float, balance: str, seed: list[int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """Who takes which examples of a step. What the ranks take together does not depend on how
        many they are.

        Args:
            step: int64 [n], the examples of the step over all ranks.
            target: the load that every step should come to, under `balance` sampling.
            seed: of the order in which that looks at the examples; another for every step, the same
            on all ranks.

        Returns:
            For each rank its places in `step`, none where there are more ranks than examples; and
            bool [n], which histories of `step` to cut.
        """
        cut = self.cut[step]
        if balance == "none":
            return np.array_split(np.arange(len(step)), world_size), cut
        if balance == "sampling":
            order = np.random.default_rng(seed).permutation(len(step))
            cut = balanced_cuts(cut, self.whole[step], self.short[step], target, order)
        return deal(np.where(cut, self.short[step], self.whole[step]), world_size), cut


def balanced_cuts(
    cut: np.ndarray, whole: np.ndarray, short: np.ndarray, target: float, order: np.ndarray
) -> np.ndarray:
    """`cut` with those draws turned round that, taken in `order`, bring the sum of loads nearer to
    `target`.
    """
    cut = cut.copy()
    total = float(np.where(cut, short, whole).sum())
    for i in order[whole[order] > short[order]]:
        turned = total + (whole[i] - short[i] if cut[i] else short[i] - whole[i])
        if abs(turned - target) < abs(total - target):
            total, cut[i] = turned, not cut[i]
    return cut


def deal(load: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """The indices of `load` for each rank, in rising order: the heaviest first, each to the
    lightest rank so far.

    With as many examples as ranks or more, and loads above 0, no rank comes away empty.
    """
    ranks = [(0.0, rank) for rank in range(num_ranks)]
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for i in np.argsort(-load, kind="stable").tolist():
        total, rank = ranks[0]
        heapq.heapreplace(ranks, (total + float(load[i]), rank))
        dealt[rank].append(i)
    return [np.sort(np.array(rows, np.int64)) for rows in dealt]
