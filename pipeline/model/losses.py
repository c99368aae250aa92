"""Multi-task log loss over the labels that are known."""

import math
from collections.abc import Sequence

from torch import Tensor, nn


def task_losses(logits_CT: Tensor, labels_CT: Tensor, weight_CT: Tensor) -> tuple[Tensor, Tensor]:
    """Per task the weighted sum of log losses and the sum of weights: sums add over ranks, means would not."""
    losses = nn.functional.binary_cross_entropy_with_logits(logits_CT, labels_CT, reduction="none")
    return (losses * weight_CT).sum(0), weight_CT.sum(0)


def task_weights(base_rates: dict[str, float], tasks: Sequence[str]) -> list[float]:
    """One over the entropy of each task's positive rate: a rare action counts like a common one, in units of its NE."""
    return [1 / _entropy(min(max(base_rates[task], 1e-3), 1 - 1e-3)) for task in tasks]


def _entropy(rate: float) -> float:
    return -rate * math.log(rate) - (1 - rate) * math.log(1 - rate)
