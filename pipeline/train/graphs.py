"""Forward and backward of a training step as a CUDA graph: launching some 500 kernels one by one
takes the host longer than the device needs to run them.

    a filled batch ──copy──▶ the graph's own buffer ──replay──▶ losses, gradients

A graph has fixed sizes and addresses. So batches are filled up to one of few sizes
(`pipeline/batches/filling.py`), each is copied to where the graph reads, and dropout draws from
generators whose state the replay looks up. What a batch's own lengths decide, the lists of tiles
for one, is made on the device and so inside the graph.
"""

from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.packing import Packed
from pipeline.config import RunConfig
from pipeline.config.errors import require
from pipeline.model.encoders import ENCODERS

# → sums of losses and of weights, [L] each; gradients are left with the parameters
Backward = Callable[[SequenceBatch], tuple[Tensor, Tensor]]

WARM_UPS = 2  # before a capture: they compile kernels, and libraries make their workspaces
# steps without use, for each graph that is kept, after which one makes room for another
IDLE_STEPS = 8


def uses_graphs(
    cfg: RunConfig, device: torch.device | str, world_size: int, *, sharded: bool = False
) -> bool:
    """Tell whether steps of this run are CUDA graphs (`train.cuda_graphs`); `sharded`: some table
    is, whose rows come from other ranks in the middle of a step.

    Raises:
        ConfigError: it is `on` where they cannot be.
    """
    if cfg.train.cuda_graphs == "off":
        return False

    on_gpu = torch.device(device).type == "cuda"
    encoder = ENCODERS[cfg.model.encoder]
    fixed = encoder.has_fixed_sizes(cfg.model) and cfg.train.target_view == "covering"
    possible = on_gpu and fixed and not sharded and not cfg.retrieval.enabled
    if cfg.train.cuda_graphs == "auto":
        return possible and world_size == 1

    rule = (
        "auto or off, but on a GPU, without retrieval, model.channels and sharded tables, with "
        "train.target_view covering and an encoder whose sizes follow from those of the batch "
        "(ultra_hstu, hstu_merged)"
    )
    require(possible, "train.cuda_graphs", "on", rule)
    return True


@dataclass(frozen=True, slots=True)
class StepGraph:
    """One recorded step, what it reads and what it leaves."""

    graph: torch.cuda.CUDAGraph
    packed: Packed  # the batch
    batch: SequenceBatch  # of views of it
    loss: Tensor
    weight: Tensor
    table_grads: dict[str, Tensor]  # sparse

    def replay(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Run it on another batch of its sizes, some item ids of which may have been left out."""
        assert batch.packed is not None
        self.packed.buffer.copy_(batch.packed.buffer)
        if not batch.packed.holds(batch.tensors):
            self.batch.item_codes.copy_(batch.item_codes)
        self.graph.replay()
        return self.loss, self.weight


class StepGraphs:
    """The graphs of a run, at most `limit`: the one that was not needed for longest makes room, if
    that was long ago. Recording takes as long as many steps, so batches of more sizes than can be
    kept are launched kernel by kernel.

    They share one pool of memory, since one runs at a time: together they take what the largest
    does, and their results. It is not free for anything else, validation say.
    """

    def __init__(self, backward: Backward, tables: Mapping[str, nn.Parameter], limit: int) -> None:
        self.backward, self.tables, self.limit = backward, tables, limit
        self.graphs: OrderedDict[tuple, StepGraph] = OrderedDict()
        self.last_used: dict[tuple, int] = {}  # the number of the step
        self.steps = self.captured = 0  # since the run began
        self.pool: Any = None  # the handle of PyTorch's graph memory, whose type is its own

    def find(self, batch: SequenceBatch) -> StepGraph | None:
        """The graph of a filled batch, recorded if it is the first of its sizes; None for a batch
        that was not filled, and where there is no room.

        A recording runs the step a few times over, which moves the random generators on.
        """
        packed = batch.packed
        if batch.filling is None or packed is None or not packed.holds(batch.tensors):
            return None

        self.steps += 1
        key = batch.filling.sizes, packed.columns
        if key not in self.graphs:
            if not self._make_room():
                return None
            self.graphs[key] = self._capture(batch, packed)
            self.captured += 1
        self.graphs.move_to_end(key)
        self.last_used[key] = self.steps
        return self.graphs[key]

    def _make_room(self) -> bool:
        """Tell whether one graph more may be kept."""
        if len(self.graphs) < self.limit:
            return True
        oldest = next(iter(self.graphs))
        if self.steps - self.last_used[oldest] <= IDLE_STEPS * self.limit:
            return False
        del self.graphs[oldest], self.last_used[oldest]
        return True

    def replay(self, graph: StepGraph, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Losses and weights of the batch's step; its gradients are left with the parameters."""
        sums = graph.replay(batch)
        for name, grad in graph.table_grads.items():
            self.tables[name].grad = grad
        return sums

    def _capture(self, batch: SequenceBatch, packed: Packed) -> StepGraph:
        own = Packed(packed.columns, packed.buffer.clone())

        # New views each time: a plan of attention is kept with the tensor that it was made of, and
        # one of the warm-up would be found again in place of one that the graph makes.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self.backward(replace(batch, **own.views(), packed=own))
        torch.cuda.current_stream().wait_stream(stream)

        graph = torch.cuda.CUDAGraph()
        views = replace(batch, **own.views(), packed=own)
        # thread-local: the loader's thread may pin memory meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            loss, weight = self.backward(views)
        self.pool = graph.pool()

        table_grads = {}
        for name, table in self.tables.items():
            assert table.grad is not None
            table_grads[name] = table.grad
        # without what lies on the host: pinned memory, and of no use any more
        return StepGraph(graph, own, replace(views, host=None), loss, weight, table_grads)
