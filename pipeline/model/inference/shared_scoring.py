"""All requests of a user at once: each history row is encoded once, not once for every request.

    user's rows + the candidates of many requests → `score_shared` → logits

The scores are those that `RankingModel.forward` gives to each request alone in its sequence
(pipeline/model/encoders/own_view.py says how). Where no shared form is exact, the evaluation scores
request by request.
"""

import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.encoders.own_view import Sharing, own_view_rows
from pipeline.model.encoders.ultra_hstu import UltraHSTU, model_sharing
from pipeline.model.ranker import RankingModel


def shared_form(cfg: ModelConfig) -> Sharing:
    """How requests of one user may share an encoded history without another score."""
    return "none" if cfg.time_anchor == "query" else model_sharing(cfg)


def score_shared(model: RankingModel, batch: SequenceBatch, cfg: ModelConfig) -> Tensor:
    """Logits, float32 [C, tasks], of candidates that see `batch.target_visible` of their user's
    rows. Call it without gradients, in evaluation mode, where `shared_form(cfg)` is not none.
    """
    form = shared_form(cfg)
    assert form != "none" and batch.target_visible is not None
    if form == "forward":
        return model(batch)

    assert isinstance(model.transducer, UltraHSTU)  # `ModelConfig.cacheable`
    tokens = model.encoder(batch)
    outputs = []
    for stack, rows in model.transducer.channel_rows(tokens, batch):
        outputs.append(stack.norm_out(own_view_rows(stack, rows)))
    return model.score_rows(torch.cat(outputs, dim=1), batch)
