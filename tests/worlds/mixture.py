"""A small mixture of two transducers over channels of the history."""

from pipeline import config
from pipeline.config import RunConfig
from pipeline.config.rules import OF_EACH_CHANNEL
from tests.worlds.model import make_config

SEMI_LOCAL = {"window": 2, "full_rows": 0, "scaling_seq_len": 16}
ENGAGED = {
    "actions": ["is_like", "is_hate"],
    "num_layers": 1,
    "attention": {**SEMI_LOCAL, "window": 1},
}
EVERY_ROW = {"num_layers": 2, "attention": SEMI_LOCAL}


def make_mixture(layout: str = "user", **channels: dict) -> RunConfig:
    raw = config.to_dict(make_config())
    for key in OF_EACH_CHANNEL:
        del raw["model"][key]
    raw["model"]["channels"] = channels or {"engaged": ENGAGED, "all": EVERY_ROW}
    raw["train"]["layout"] = layout
    return config.from_dict(raw)
