"""Sequence encoders by the name that `model.encoder` has: same tokens, heads, loss, data, trainer.

docs/extend/encoder.md adds one: a file here, its entry in `ENCODERS`, its name in
pipeline/config/model.py.
"""

from pipeline.config import ModelConfig
from pipeline.model.encoders.din import DIN
from pipeline.model.encoders.encoder import Encoder
from pipeline.model.encoders.hstu import HSTU, MergedHSTU
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
}


def check_model(cfg: ModelConfig) -> None:
    """Raises ConfigError for a setting that the encoder of `cfg` does not know.

    The configuration cannot check it by itself, since it must not import the model. Jobs call this
    before they start anything.
    """
    ENCODERS[cfg.encoder].check(cfg)
