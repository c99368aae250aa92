"""Sequence encoders by the name that `model.encoder` has: same tokens, heads, loss, data, trainer.

docs/extend/encoder.md adds one: a file here, its entry in `ENCODERS`, its name in
pipeline/config/model.py.
"""

from pipeline.config import ModelConfig, RunConfig
from pipeline.config.errors import require
from pipeline.model.encoders.din import DIN
from pipeline.model.encoders.encoder import Encoder
from pipeline.model.encoders.fuxi import FuXiAlpha, FuXiBeta
from pipeline.model.encoders.hstu import HSTU, MergedHSTU
from pipeline.model.encoders.lares import LARES
from pipeline.model.encoders.sasrec import SASRec
from pipeline.model.encoders.transformer import Transformer
from pipeline.model.encoders.ultra_hstu import UltraHSTU

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


def check_run(cfg: RunConfig) -> None:
    """`check_model`, and that the encoder has the rows that retrieval reads."""
    check_model(cfg.model)
    if cfg.retrieval.enabled:
        rule = f"an encoder with history rows where retrieval.enabled: {cfg.model.encoder} has none"
        found = ENCODERS[cfg.model.encoder].has_history_rows
        require(found, "model.encoder", cfg.model.encoder, rule)
