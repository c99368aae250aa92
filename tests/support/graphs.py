"""What stands in a CUDA graph's place where there is no GPU."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.graphs import BatchGraphs, Results
from pipeline.batches.packing import Packed
from pipeline.model.inference.cuda_graph import candidate_logits
from pipeline.model.inference.rooms import Room
from pipeline.model.ranker import RankingModel


@dataclass(eq=False)
class Again:
    """In a graph's place: does the work itself, on the batch in its own buffer, and leaves the
    results in the same memory each time.
    """

    packed: Packed
    batch: SequenceBatch
    work: Callable[[SequenceBatch], Results]
    results: Results

    def replay(self, batch: SequenceBatch) -> Results:
        assert batch.packed is not None
        self.packed.buffer.copy_(batch.packed.buffer)
        self.batch.item_codes.copy_(batch.item_codes)
        found = self.work(replace(self.batch, host=batch))
        for kept, new in zip(self.results, found, strict=True):
            kept.copy_(new)
        return self.results


def capture_none(self: BatchGraphs, batch: SequenceBatch, packed: Packed) -> Again:
    """In place of `BatchGraphs._capture`."""
    own = Packed(packed.columns, packed.buffer.clone())
    results = self.work(batch)  # as a warm-up, whose draws must not show
    return Again(own, replace(batch, **own.views(), packed=own), self.work, results)


@dataclass
class CandidatesAgain:
    """In a graph's place: scores the candidates again, by what lies in its room."""

    model: RankingModel
    room: Room
    packed: Packed
    logits: Tensor
    replayed: int = 0

    @property
    def graph(self) -> "CandidatesAgain":
        return self

    def replay(self) -> None:
        self.replayed += 1
        self.logits.copy_(candidate_logits(self.model, self.room, self.packed))


def capture_no_candidates(
    model: RankingModel, room: Room, packed: Packed, like: CandidatesAgain | None
) -> CandidatesAgain:
    """In place of `cuda_graph._capture`."""
    own = Packed(packed.columns, packed.buffer.clone())
    return CandidatesAgain(model, room, own, candidate_logits(model, room, own).clone())
