"""Stochastic length, and equal loads of the ranks under it.

Stochastic length (HSTU, arXiv:2402.17152, eq. 4) trains on the newest part of most long histories. What a rank draws
then weighs more or less than what its neighbours drew, and all wait for the heaviest. Two remedies, neither of which
talks to another rank, since every rank draws the plan of a whole pool of examples:

- `sampling`, load-balanced stochastic length (ULTRA-HSTU, arXiv:2602.16986, section 4.1): each rank turns its own draws
  round, one after another, while that brings its load nearer to the mean. The paper estimates that mean in warm-up
  steps and renews it every so many steps by a message; here it is the plan's own, exact from a pool's first step.
- `dealing`: the draws stay, the step's examples go to the ranks by load, the heaviest first.
"""

import heapq
import math
from dataclasses import dataclass

import numpy as np

from pipeline.config import StochasticLengthConfig


def threshold(cfg: StochasticLengthConfig) -> int:
    return math.floor(cfg.max_len ** (cfg.alpha / 2))


def stochastic_cuts(lengths: np.ndarray, cfg: StochasticLengthConfig, rng: np.random.Generator) -> np.ndarray:
    """bool [n]: which histories keep only their newest `threshold(cfg)` rows.

    One of n rows, n above thr = floor(max_len^(alpha/2)), is cut with probability 1 - max_len^alpha / n^2, so that
    attention costs O(max_len^alpha) on average; inference never cuts.
    """
    draw = rng.random(len(lengths))  # one draw per history, whatever its length: the plan of a step never shifts
    if cfg.alpha == 2.0:
        return np.zeros(len(lengths), bool)
    keep_all = cfg.max_len**cfg.alpha / np.maximum(lengths, 1).astype(np.float64) ** 2
    return (lengths > threshold(cfg)) & (draw >= keep_all)


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """The examples of a pool: which histories are drawn to be cut, and what an example weighs whole and cut, [n] each.

    The load of an example is its number of tokens to the power `load_exponent`.
    """

    cut: np.ndarray  # bool
    whole: np.ndarray  # float64
    short: np.ndarray  # float64, at most `whole`

    @property
    def drawn(self) -> np.ndarray:
        return np.where(self.cut, self.short, self.whole)

    def share(
        self, step: np.ndarray, rank: int, world_size: int, target: float, balance: str, seed: list[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """One rank's part of a step.

        Args:
            step: int64, the examples of the step over all ranks.
            target: the load that every rank should come to, under `balance` sampling.
            seed: of the order in which that looks at the examples; another for every rank and step.

        Returns:
            The rank's examples, and which of their histories to cut.
        """
        if balance == "dealing":
            rows = step[deal(self.drawn[step], world_size)[rank]]
            return rows, self.cut[rows]
        rows = np.array_split(step, world_size)[rank]
        if balance == "none":
            return rows, self.cut[rows]
        order = np.random.default_rng(seed).permutation(len(rows))
        return rows, balanced_cuts(self.cut[rows], self.whole[rows], self.short[rows], target, order)


def balanced_cuts(
    cut: np.ndarray, whole: np.ndarray, short: np.ndarray, target: float, order: np.ndarray
) -> np.ndarray:
    """`cut` with those draws turned round that, taken in `order`, bring the sum of loads nearer to `target`."""
    cut = cut.copy()
    total = float(np.where(cut, short, whole).sum())
    for i in order[whole[order] > short[order]]:
        turned = total + (whole[i] - short[i] if cut[i] else short[i] - whole[i])
        if abs(turned - target) < abs(total - target):
            total, cut[i] = turned, not cut[i]
    return cut


def deal(load: np.ndarray, num_ranks: int) -> list[np.ndarray]:
    """The indices of `load` for each rank, in rising order: the heaviest first, each to the lightest rank so far.

    With as many examples as ranks or more, and loads above 0, no rank comes away empty.
    """
    ranks = [(0.0, rank) for rank in range(num_ranks)]
    dealt: list[list[int]] = [[] for _ in range(num_ranks)]
    for i in np.argsort(-load, kind="stable").tolist():
        total, rank = ranks[0]
        heapq.heapreplace(ranks, (total + float(load[i]), rank))
        dealt[rank].append(i)
    return [np.sort(np.array(rows, np.int64)) for rows in dealt]
