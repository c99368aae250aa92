"""Multi-task log loss over the labels that are known."""

from torch import Tensor, nn


def task_losses(logits_CT: Tensor, labels_CT: Tensor, weight_CT: Tensor) -> tuple[Tensor, Tensor]:
    """Per task the weighted sum of log losses and the sum of weights: sums add over ranks, means
    would not.
    """
    losses = nn.functional.binary_cross_entropy_with_logits(logits_CT, labels_CT, reduction="none")
    return (losses * weight_CT).sum(0), weight_CT.sum(0)
