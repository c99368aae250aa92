"""Forward and backward of a training step as a CUDA graph (`pipeline/batches/graphs.py`): some 500
kernels, launched at once.

    a filled batch ──copy──▶ the graph's own buffer ──replay──▶ losses, gradients
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.graphs import BatchGraph, BatchGraphs, Results
from pipeline.config import ModelConfig, TrainConfig
from pipeline.config.errors import require
from pipeline.model.encoders import ENCODERS

# → sums of losses and of weights, [L] each; gradients are left with the parameters
Backward = Callable[[SequenceBatch], tuple[Tensor, Tensor]]


def uses_graphs(
    model: ModelConfig,
    train: TrainConfig,
    device: torch.device | str,
    world_size: int,
    *,
    retrieval: bool = False,
    sharded: bool = False,
) -> bool:
    """Tell whether steps of a run are CUDA graphs (`train.cuda_graphs`).

    Args:
        retrieval: its loss has next items, whose number is the batch's.
        sharded: rows of some table come from other ranks in the middle of a step.

    Raises:
        ConfigError: it is `on` where they cannot be.
    """
    if train.cuda_graphs == "off":
        return False

    on_gpu = torch.device(device).type == "cuda"
    fixed_sizes = ENCODERS[model.encoder].has_fixed_sizes(model)
    fixed_views = train.target_view == "covering"
    possible = on_gpu and fixed_sizes and fixed_views and not sharded and not retrieval
    if train.cuda_graphs == "auto":
        return possible and world_size == 1

    rule = (
        "auto or off, but on a GPU, without retrieval, model.channels and sharded tables, with "
        "train.target_view covering and an encoder whose sizes follow from those of the batch "
        "(ultra_hstu, hstu_merged)"
    )
    require(possible, "train.cuda_graphs", "on", rule)
    return True


class StepGraphs:
    """The graphs of a run's steps, at most `limit`."""

    def __init__(self, backward: Backward, tables: Mapping[str, nn.Parameter], limit: int) -> None:
        self.backward, self.tables = backward, tables
        self.of_batches = BatchGraphs(self._step, limit)

    def _step(self, batch: SequenceBatch) -> Results:
        """Losses, weights, and the sparse gradient of each table; those of all other parameters lie
        where they always do.
        """
        loss, weight = self.backward(batch)
        grads = []
        for table in self.tables.values():
            assert table.grad is not None
            grads.append(table.grad)
        return loss, weight, *grads

    def find(self, batch: SequenceBatch) -> BatchGraph | None:
        """The graph of a batch's step, if there is one: `BatchGraphs.find`."""
        return self.of_batches.find(batch)

    def replay(self, graph: BatchGraph, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Losses and weights of the batch's step; its gradients are left with the parameters."""
        loss, weight, *grads = graph.replay(batch)
        for table, grad in zip(self.tables.values(), grads, strict=True):
            table.grad = grad
        return loss, weight
