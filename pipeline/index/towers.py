"""Vectors of items and of users from a model's retrieval head: their product is the score."""

import numpy as np
import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch, collate
from pipeline.batches.events import Events
from pipeline.batches.features import FeatureMaps
from pipeline.config import InputConfig
from pipeline.model.ranker import RankingModel
from pipeline.model.retrieval import RetrievalHead

ITEMS_AT_ONCE = 8192


@torch.no_grad()
def item_vectors(model: RankingModel, head: RetrievalHead, item_codes: np.ndarray) -> Tensor:
    """float32 [N, d] on the model's device, from codes int32 [N, 1 + item columns]."""
    device = next(model.parameters()).device
    codes = torch.from_numpy(np.ascontiguousarray(item_codes)).to(device)
    parts = [head.item_vectors(part) for part in codes.split(ITEMS_AT_ONCE)]
    return torch.cat(parts).float()


@torch.no_grad()
def user_vectors(model: RankingModel, head: RetrievalHead, batch: SequenceBatch) -> Tensor:
    """float32 [B, d] on the model's device, from histories without candidates.

    Of a user without history it says nothing: such users are recommended what is popular.
    """
    device = next(model.parameters()).device
    encoded = model.encode(batch.to(device), last_history=True)
    assert encoded.last_history_row is not None, "a model with the head has such rows"
    return head.user_vectors(encoded.last_history_row).float()


def history_batch(
    history: Events, user_id: np.ndarray, maps: FeatureMaps, inputs: InputConfig
) -> SequenceBatch:
    """The histories of B users without candidates, as `user_vectors` reads them."""
    begin = history.offsets[:-1]
    return collate(history, history.take(begin, begin), user_id, maps, inputs)
