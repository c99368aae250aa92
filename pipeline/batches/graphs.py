"""What is done with a batch, as a CUDA graph: launching hundreds of kernels one by one takes the
host longer than the device needs to run them.

    a filled batch ──copy──▶ the graph's own buffer ──replay──▶ results

A graph has fixed sizes and addresses. So batches are filled up to one of few sizes (`filling.py`),
each is copied to where the graph reads, and dropout draws from generators whose state the replay
looks up. What a batch's own lengths decide, the lists of tiles for one, is made on the device and
so inside the graph.
"""

import gc
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pipeline.batches.collate import Filling, SequenceBatch
from pipeline.batches.packing import Packed

Results = tuple[Tensor, ...]

# batches without use, for each graph that is kept, after which one makes room for another
IDLE_BATCHES = 8

_ONE_RECORDING = threading.Lock()


@contextmanager
def record_graph(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Record what is launched inside as `graph`, in the memory of `pool`; one at a time.

    No garbage is collected meanwhile: graphs of an earlier model that lie in a cycle would be
    destroyed in the middle, which CUDA does not permit to the thread that records. It spoils the
    recording, and after that the process.
    """
    # thread-local: the loader's thread may pin memory meanwhile
    captured = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
    with _ONE_RECORDING:
        collects = gc.isenabled()
        gc.disable()
        try:
            with captured:
                yield
        finally:
            if collects:
                gc.enable()


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class BatchGraph:
    """What was recorded of one batch: what it reads and what it leaves."""

    graph: torch.cuda.CUDAGraph
    packed: Packed  # the batch
    batch: SequenceBatch  # of views of it
    results: Results

    def replay(self, batch: SequenceBatch) -> Results:
        """Run it on another batch of its sizes, on the device or the CPU, some item ids of which
        may have been left out. The next replay writes over the results.
        """
        assert batch.packed is not None
        # from pinned memory, which PyTorch gives to nobody else before it was read
        self.packed.buffer.copy_(batch.packed.buffer, non_blocking=True)
        if not batch.packed.holds(batch.tensors):
            self.batch.item_codes.copy_(batch.item_codes)
        self.graph.replay()
        return self.results


class BatchGraphs:
    """Graphs of `work` by the sizes of batches, at most `limit`: the one that was not needed for
    longest makes room, if that was long ago.

    Recording takes longer than launching, so it has to pay: a size that comes for the first time is
    launched, and recorded when it comes again. So no recording has a kernel to compile, which it
    could not, or a library's workspace to make. Where there are more sizes than can be kept, those
    of the others are launched as well.

    The graphs share one pool of memory, since one runs at a time: together they take what the
    largest does, and their results. It is not free for anything else, validation say.
    """

    def __init__(self, work: Callable[[SequenceBatch], Results], limit: int) -> None:
        self.work, self.limit = work, limit
        self.graphs: OrderedDict[tuple, BatchGraph] = OrderedDict()
        self.last_used: dict[tuple, int] = {}  # the number of the batch
        self.seen: set[Filling] = set()  # sizes that have come
        self.batches = self.captured = self.replayed = 0  # since the beginning
        self.pool: Any = None  # the handle of PyTorch's graph memory, whose type is its own

    def find(self, batch: SequenceBatch) -> BatchGraph | None:
        """The graph of a filled batch, recorded if it is the second of its sizes; None for the
        first, for a batch that was not filled, and where there is no room. Then the caller does the
        work on this very batch.

        A recording may move the random generators on.
        """
        packed = batch.packed
        if batch.filling is None or packed is None or not packed.holds(batch.tensors):
            return None

        self.batches += 1
        sizes = batch.filling.sizes
        key = sizes, packed.columns
        if key not in self.graphs:
            is_new = sizes not in self.seen
            self.seen.add(sizes)
            if is_new or not self._make_room():
                return None
            self.graphs[key] = self._capture(batch, packed)
            self.captured += 1

        self.graphs.move_to_end(key)
        self.last_used[key] = self.batches
        self.replayed += 1
        return self.graphs[key]

    def _make_room(self) -> bool:
        """Tell whether one graph more may be kept."""
        if len(self.graphs) < self.limit:
            return True
        oldest = next(iter(self.graphs))
        if self.batches - self.last_used[oldest] <= IDLE_BATCHES * self.limit:
            return False
        del self.graphs[oldest], self.last_used[oldest]
        return True

    def _capture(self, batch: SequenceBatch, packed: Packed) -> BatchGraph:
        device = packed.buffer.device if packed.buffer.is_cuda else torch.device("cuda")
        own = Packed(packed.columns, packed.buffer.to(device, copy=True))

        graph = torch.cuda.CUDAGraph()
        # new ones: a plan of attention is kept with the tensor that it was made of, and this one's
        # has to be made in the graph
        host = batch.host if batch.position.is_cuda else batch
        views = replace(batch, **own.views(), packed=own, host=host)
        with record_graph(graph, self.pool):
            results = self.work(views)
        self.pool = graph.pool()

        # without what lies on the host: pinned memory, and of no use any more
        return BatchGraph(graph, own, replace(views, host=None), results)
