"""What makes a model's input of events: the part of a run that serving has in common with it."""

from dataclasses import dataclass

from pipeline.config.features import FeatureConfig
from pipeline.config.logs import SourceConfig
from pipeline.config.model import ModelConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class InputConfig:
    """The sections that training, evaluation and serving make batches by (`RunConfig.inputs`).

    Two runs of equal inputs give a model the same tensors for the same events and maps.
    """

    source: SourceConfig  # the actions, and whether a time is more than an order
    features: FeatureConfig
    model: ModelConfig  # what positions and times are counted from
    task_bits: tuple[int, ...]  # of each task in an action mask; rates are counted of these

    @property
    def num_action_bits(self) -> int:
        """Bits of a history row's action mask: source.actions, then the watch-time thresholds."""
        features = self.features
        return len(self.source.actions) + len(features.watch_seconds) + len(features.watch_shares)
