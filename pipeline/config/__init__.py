"""One configuration for the whole chain: frozen dataclasses, read from YAML, changed with `--set
a.b=c`.

An unknown key, a value of the wrong type or out of range is a `ConfigError` naming the key and the
value. The whole `RunConfig` is saved beside the weights and the server builds the model from that
file alone.
"""

from pipeline.config.cluster import RayConfig
from pipeline.config.errors import ConfigError, Outage, UserError
from pipeline.config.examples import ExampleConfig
from pipeline.config.features import (
    ColumnFeature,
    DenseFeature,
    FeatureConfig,
    HistoryFeature,
    SplitConfig,
)
from pipeline.config.folders import RunFolders
from pipeline.config.index import FollowedConfig, IndexConfig
from pipeline.config.inputs import InputConfig
from pipeline.config.logs import (
    ColumnReading,
    FileFormat,
    Impressions,
    SideTable,
    SourceConfig,
)
from pipeline.config.model import AttentionConfig, ChannelConfig, LoopConfig, ModelConfig
from pipeline.config.reading import parse_time
from pipeline.config.retrieval import RetrievalConfig
from pipeline.config.run import RunConfig, flatten, from_dict, load, to_dict
from pipeline.config.sequences import CheckConfig, DriftConfig, SequenceConfig
from pipeline.config.serving import CanaryConfig, ExposureConfig, ServeConfig
from pipeline.config.synthetic import ChainsConfig, DriftingConfig, SyntheticConfig
from pipeline.config.tracking import TrackingConfig
from pipeline.config.train import EvaluateConfig, StochasticLengthConfig, TrainConfig

__all__ = [
    "AttentionConfig",
    "CanaryConfig",
    "ChainsConfig",
    "ChannelConfig",
    "CheckConfig",
    "ColumnFeature",
    "ColumnReading",
    "ConfigError",
    "DenseFeature",
    "DriftConfig",
    "DriftingConfig",
    "EvaluateConfig",
    "ExampleConfig",
    "ExposureConfig",
    "FeatureConfig",
    "FileFormat",
    "FollowedConfig",
    "HistoryFeature",
    "Impressions",
    "IndexConfig",
    "InputConfig",
    "LoopConfig",
    "ModelConfig",
    "Outage",
    "RayConfig",
    "RetrievalConfig",
    "RunConfig",
    "RunFolders",
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
