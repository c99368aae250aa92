"""One configuration for the whole chain: frozen dataclasses, read from YAML, changed with `--set
a.b=c`.

An unknown key, a value of the wrong type or out of range is a `ConfigError` naming the key and the
value. The whole `RunConfig` is saved beside the weights and the server builds the model from that
file alone.
"""

from pipeline.config.data import (
    CheckConfig,
    ColumnFeature,
    DenseFeature,
    DriftConfig,
    FeatureConfig,
    SequenceConfig,
    SideTable,
    SourceConfig,
    SplitConfig,
    SyntheticConfig,
)
from pipeline.config.model import AttentionConfig, ChannelConfig, ModelConfig
from pipeline.config.operate import CanaryConfig, RayConfig, ServeConfig, TrackingConfig
from pipeline.config.run import RunConfig, flatten, from_dict, load, to_dict
from pipeline.config.train import EvaluateConfig, StochasticLengthConfig, TrainConfig
from pipeline.config.values import ConfigError, UserError, parse_time

__all__ = [
    "AttentionConfig",
    "CanaryConfig",
    "ChannelConfig",
    "CheckConfig",
    "ColumnFeature",
    "ConfigError",
    "DenseFeature",
    "DriftConfig",
    "EvaluateConfig",
    "FeatureConfig",
    "ModelConfig",
    "RayConfig",
    "RunConfig",
    "SequenceConfig",
    "ServeConfig",
    "SideTable",
    "SourceConfig",
    "SplitConfig",
    "StochasticLengthConfig",
    "SyntheticConfig",
    "TrackingConfig",
    "TrainConfig",
    "UserError",
    "flatten",
    "from_dict",
    "load",
    "parse_time",
    "to_dict",
]
