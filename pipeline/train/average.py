"""The mean of the weights at evenly spaced steps of a run's last part: what it ends with under
`train.average_from`.

A mean of few snapshots, not a moving average of every step: a table's rows that a step does not
touch then cost nothing, and with the rate falling to 0 it is the same model but for noise
(arXiv:1803.05407, stochastic weight averaging).
"""

import math

import torch
from torch import Tensor, nn

from pipeline.config import TrainConfig


class WeightAverage:
    """`tensors`: the mean so far by name, in float32 at least; of a sharded table this rank's
    block.
    """

    def __init__(self, model: nn.Module, cfg: TrainConfig) -> None:
        assert cfg.average_from is not None
        self.begin, self.every = cfg.average_from, cfg.average_every
        self.weights = model.state_dict()  # the live tensors
        self.tensors: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            dtype = torch.promote_types(weight.dtype, torch.float32)
            self.tensors[name] = weight.to(dtype, copy=True)

    @torch.no_grad()
    def add_snapshot(self, step: int, total_steps: int) -> None:
        """Take the weights after `step` steps into the mean, if they are of the snapshots: every so
        many to the end.
        """
        number = snapshot_number(step, total_steps, self.begin, self.every)
        if number is None:
            return
        for name, mean in self.tensors.items():
            mean.lerp_(self.weights[name].to(mean.dtype), 1 / number)

    @torch.no_grad()
    def publish_mean(self) -> None:
        """Put the mean in the place of the weights."""
        for name, mean in self.tensors.items():
            self.weights[name].copy_(mean)


def snapshot_number(step: int, total_steps: int, begin: float, every: int) -> int | None:
    """The snapshot, from 1, that the weights after `step` steps are; None if they are not one.

    The last is the end's.

        10 steps, begin 0.5, every 2      steps 6, 8 and 10 are snapshots 1, 2 and 3
    """
    first = max(math.ceil(begin * total_steps), 1)
    left, between = divmod(total_steps - step, every)
    if between or step < first:
        return None

    number_of_all = (total_steps - first) // every + 1
    return number_of_all - left
