"""Sequence encoders by the name that `model.encoder` has: same tokens, heads, loss, data, trainer.

docs/extend/encoder.md adds one: a file here, its entry in `ENCODERS`, its name in
pipeline/config/model.py.
"""

from pipeline.config import ModelConfig, TrainConfig
from pipeline.config.errors import require
from pipeline.model.encoders.din import DIN
from pipeline.model.encoders.encoder import Encoder
from pipeline.model.encoders.fuxi import FuXiAlpha, FuXiBeta
from pipeline.model.encoders.hstu import HSTU, MergedHSTU
from pipeline.model.encoders.lares import LARES
from pipeline.model.encoders.sasrec import SASRec
from pipeline.model.encoders.transformer import Transformer
from pipeline.model.encoders.ultra_hstu import UltraHSTU, model_sharing

ENCODERS: dict[str, type[Encoder]] = {
    "ultra_hstu": UltraHSTU,
    "hstu": HSTU,
    "hstu_merged": MergedHSTU,
    "transformer": Transformer,
    "sasrec": SASRec,
    "din": DIN,
    "fuxi_alpha": FuXiAlpha,
    "fuxi_beta": FuXiBeta,
    "lares": LARES,
}


def check_model(cfg: ModelConfig) -> None:
    """Raises ConfigError for a setting that the encoder of `cfg` does not know.

    The configuration cannot check it by itself, since it must not import the model. Jobs call this
    before they start anything.
    """
    ENCODERS[cfg.encoder].check(cfg)


def check_run(model: ModelConfig, train: TrainConfig, *, retrieval: bool) -> None:
    """`check_model`, that the encoder has the view of the targets that training asks for, and with
    `retrieval` that it has the rows which that reads.
    """
    check_model(model)
    _check_target_view(model, train, retrieval=retrieval)
    if retrieval:
        rule = f"an encoder with history rows where retrieval.enabled: {model.encoder} has none"
        found = ENCODERS[model.encoder].has_history_rows
        require(found, "model.encoder", model.encoder, rule)


def _check_target_view(model: ModelConfig, train: TrainConfig, *, retrieval: bool) -> None:
    """An exact view of a shared history takes rows that at most two forms are enough for."""
    view = train.target_view
    if view == "covering" or train.layout == "request":
        return

    sharing = model_sharing(model)
    rule = (
        "covering, or train.layout request, where a transducer of more than two layers, or one "
        "with max_len or without model.merge, has full rows under a window or truncation: the rows "
        "of one request are not those of another"
    )
    require(sharing != "none", "train.target_view", view, rule)

    rule = (
        "covering, or train.layout request, where retrieval.enabled and there are full rows under "
        "a window or truncation: next items are asked for from the shared rows"
    )
    apart = sharing == "layers" and retrieval
    require(not apart, "train.target_view", view, rule)
