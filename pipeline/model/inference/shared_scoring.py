"""All requests of a user at once: each history row is encoded once, not once for every request.

    user's rows + the candidates of many requests → `encode_shared` → rows → logits
                                                                     └─▶ a user's vector, at any
                                                                         place of the history

The scores are those that `RankingModel.forward` gives to each request alone in its sequence
(pipeline/model/encoders/own_view.py says how). Where no shared form is exact, the evaluation scores
request by request.
"""

from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.encoders.encoder import Encoded, side_by_side
from pipeline.model.encoders.own_view import Sharing, own_view_encoded
from pipeline.model.encoders.ultra_hstu import UltraHSTU, channel_parts, model_sharing
from pipeline.model.ranker import RankingModel


def shared_form(cfg: ModelConfig) -> Sharing:
    """How requests of one user may share an encoded history without another score."""
    return "none" if cfg.time_anchor == "query" else model_sharing(cfg)


def shares_history_rows(cfg: ModelConfig) -> bool:
    """True where the row at which a history ends comes of the same encoding too.

    As a candidate it sees everything before it in layer 1, as the newest rows of a history do; not
    where a window limits these.
    """
    form = shared_form(cfg)
    if form == "layers":
        for _, model in channel_parts(cfg):
            limited = model.attention.window is not None and model.attention.full_rows == 0
            if limited and model.num_layers > 1:
                return False
    return form != "none"


def encode_shared(model: RankingModel, batch: SequenceBatch, cfg: ModelConfig) -> Encoded:
    """Rows of candidates that see `batch.target_visible` of their user's rows, and where
    `shares_history_rows(cfg)` those before the batch's next items.

    Call it without gradients, in evaluation mode, where `shared_form(cfg)` is not none.
    """
    form = shared_form(cfg)
    assert form != "none" and batch.target_visible is not None
    if form == "forward":
        return model.encode(batch)

    assert isinstance(model.transducer, UltraHSTU)  # `ModelConfig.cacheable`
    tokens = model.encoder(batch)
    parts = []
    for stack, rows in model.transducer.channel_rows(tokens, batch):
        parts.append(own_view_encoded(stack, rows, stack.norm_out))
    return side_by_side(parts)
