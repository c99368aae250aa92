"""Cross-batch memory: item vectors of earlier steps as further negatives of in-batch training.

The vectors were made with older weights, so they drift away from what the model would make of their
items now. Four ways to deal with that (`retrieval.memory`):

    none   no memory
    xbm    as they were (arXiv:1912.06798)
    xbn    each step moves them so that their mean and spread are those of its own vectors
    axbn   the same towards a mean and a spread that a Kalman filter follows from step to step

At first vectors drift fastest, so that a run may take `retrieval.memory_warmup` steps before it
begins to keep them.

The equations of AXBN are not public. What stands here is our reconstruction from its abstract: per
number of a vector a scalar filter of a random walk for the mean, and one for the spread.

    predict   p⁻ = p + q
    gain      g = p⁻ / (p⁻ + r)
    update    m = m + g (μ_batch − m);   p = (1 − g) p⁻

q is `retrieval.memory_noise` and r is 1 / vectors of the step. q = 0 gives the running average of
all steps' moments, q → ∞ gives xbn.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.config import RetrievalConfig

EPS = 1e-6  # added to a spread that is divided by


@dataclass(slots=True)
class MomentFilter:
    """Mean and spread of vectors, [dim] each, as a Kalman filter follows them."""

    noise: float  # q
    mean: Tensor | None = None
    spread: Tensor | None = None
    variance: float = 0.0  # p
    gain: float = 1.0  # of the last update

    def update(self, mean: Tensor, spread: Tensor, num_vectors: int) -> tuple[Tensor, Tensor]:
        """The filtered moments after a step of `num_vectors` vectors with these moments."""
        measured = 1 / num_vectors
        if self.mean is None or self.spread is None:
            self.mean, self.spread, self.variance = mean, spread, measured
            return mean, spread

        predicted = self.variance + self.noise
        self.gain = predicted / (predicted + measured)
        self.mean = torch.lerp(self.mean, mean, self.gain)
        self.spread = torch.lerp(self.spread, spread, self.gain)
        self.variance = (1 - self.gain) * predicted
        return self.mean, self.spread


class CrossBatchMemory:
    """The newest `retrieval.memory_size` vectors with their items' codes and how many next items
    each stood for.

    It isn't part of a checkpoint: a run that goes on fills it anew.
    """

    def __init__(self, cfg: RetrievalConfig, device: torch.device | str) -> None:
        self.kind, self.size, self.unit = cfg.memory, cfg.memory_size, cfg.score == "cosine"
        self.filter = MomentFilter(cfg.memory_noise)
        self.warmup = cfg.memory_warmup  # steps left of it
        self.vectors = torch.zeros(0, cfg.dim, device=device)
        self.codes = torch.zeros(0, dtype=torch.int64, device=device)
        self.counts = torch.zeros(0, dtype=torch.int64, device=device)

    @torch.no_grad()
    def match_moments(self, vectors: Tensor) -> None:
        """Move what is kept towards the moments of this step's `vectors`, [n, dim]."""
        if self.kind == "xbm" or len(vectors) == 0:
            return

        mean, spread = vectors.mean(0), vectors.std(0, correction=0)
        if self.kind == "axbn":
            mean, spread = self.filter.update(mean, spread, len(vectors))
        if len(self.vectors) == 0:
            return

        moved = move_moments(self.vectors, mean, spread)
        if self.unit:
            moved = torch.nn.functional.normalize(moved, dim=1)
        self.vectors = moved

    @torch.no_grad()
    def keep_vectors(self, vectors: Tensor, codes: Tensor, counts: Tensor) -> None:
        """Add a step's vectors; the oldest make room. A step of the warm-up adds none."""
        if self.warmup > 0:
            self.warmup -= 1
            return
        self.vectors = torch.cat([self.vectors, vectors.detach()])[-self.size :]
        self.codes = torch.cat([self.codes, codes])[-self.size :]
        self.counts = torch.cat([self.counts, counts])[-self.size :]


def move_moments(vectors: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    """[n, dim]: vectors shifted and scaled, number by number, to this mean and spread."""
    own_spread = vectors.std(0, correction=0)
    return (vectors - vectors.mean(0)) / (own_spread + EPS) * spread + mean
