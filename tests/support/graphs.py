"""What stands in a CUDA graph's place where there is no GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.graphs import BatchGraphs, Results
from pipeline.batches.packing import Packed
from pipeline.model.inference.cached_scoring import HistoryCache, layer_outputs
from pipeline.model.ranker import RankingModel


@dataclass
class Again:
    """In a graph's place: does the work itself, on the batch in its own buffer."""

    packed: Packed
    batch: SequenceBatch
    work: Callable[[SequenceBatch], Results]

    def replay(self, batch: SequenceBatch) -> Results:
        assert batch.packed is not None
        self.packed.buffer.copy_(batch.packed.buffer)
        self.batch.item_codes.copy_(batch.item_codes)
        return self.work(replace(self.batch, host=batch))


def capture_none(self: BatchGraphs, batch: SequenceBatch, packed: Packed) -> Again:
    """In place of `BatchGraphs._capture`."""
    own = Packed(packed.columns, packed.buffer.clone())
    self.work(batch)  # as a warm-up, whose draws must not show
    return Again(own, replace(batch, **own.views(), packed=own), self.work)


@dataclass
class CandidatesAgain:
    """In a graph's place: does the candidates' layers again, on what lies in its room."""

    model: RankingModel
    room: HistoryCache
    x_CE: Tensor
    row_offsets: Tensor
    out_CE: Tensor
    replayed: int = 0

    @property
    def graph(self) -> "CandidatesAgain":
        return self

    def replay(self) -> None:
        self.replayed += 1
        self.out_CE.copy_(layer_outputs(self.model, self.room, self.x_CE, self.row_offsets))


def capture_no_candidates(model: RankingModel, room: HistoryCache, x_CE: Tensor) -> CandidatesAgain:
    """In place of `cuda_graph._capture`."""
    offsets = torch.tensor([0, len(x_CE)])
    out_CE = torch.empty_like(layer_outputs(model, room, x_CE, offsets))
    return CandidatesAgain(model, room, x_CE, offsets, out_CE)
