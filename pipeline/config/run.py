"""A whole run: the sections together, and its way from and to plain values."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import rules
from pipeline.config.cluster import RayConfig
from pipeline.config.errors import require
from pipeline.config.examples import ExampleConfig
from pipeline.config.features import FeatureConfig, SplitConfig
from pipeline.config.folders import RunFolders
from pipeline.config.index import IndexConfig
from pipeline.config.inputs import InputConfig
from pipeline.config.logs import SourceConfig
from pipeline.config.model import ModelConfig
from pipeline.config.reading import apply_overrides, build_section, read_yaml
from pipeline.config.retrieval import RetrievalConfig
from pipeline.config.sequences import CheckConfig, DriftConfig, SequenceConfig
from pipeline.config.serving import ServeConfig
from pipeline.config.setting import check_ranges, setting
from pipeline.config.tracking import TrackingConfig
from pipeline.config.train import EvaluateConfig, TrainConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything a run depends on. The files of a run lie under runs_dir/name."""

    name: str = setting("run", doc="Name of the run, and of its folder.")
    seed: int = setting(
        0,
        at_least=0,
        below=2**32,
        rule="between 0 and 4294967295",
        doc="Seed of everything that is drawn at random.",
    )
    runs_dir: str = setting("runs", doc="Folder of all runs.")
    source: SourceConfig = field(default_factory=lambda: SourceConfig(kind="synthetic"))
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    checks: CheckConfig = field(default_factory=CheckConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    tasks: tuple[str, ...] = setting(
        ("is_click",),
        doc="Actions to predict; each gets a head of the model. Empty only with retrieval.enabled.",
    )
    examples: ExampleConfig = field(default_factory=ExampleConfig)
    features: FeatureConfig = field(default_factory=FeatureConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    index: IndexConfig = field(default_factory=IndexConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        check_ranges(self, "")
        source, features, train = self.source, self.features, self.train

        needs_tasks = not self.retrieval.enabled
        rule = "at least one action without retrieval.enabled"
        require(len(self.tasks) > 0 or not needs_tasks, "tasks", self.tasks, rule)
        rules.refuse_unknown_actions("tasks", self.tasks, source)
        require(len(set(self.tasks)) == len(self.tasks), "tasks", self.tasks, "free of repeats")
        rules.refuse_names_that_tracking_refuses(self.tasks)
        rules.refuse_unknown_tasks("train.task_weights", train.task_weights, self.tasks)
        rules.refuse_unknown_tasks("tracking.gate_max_ne", self.tracking.gate_max_ne, self.tasks)
        for name, channel in self.model.channels.items():
            key = f"model.channels.{name}.actions"
            rules.refuse_unknown_actions(key, channel.actions, source)

        rules.refuse_unknown_actions("index.popular_actions", self.index.popular_actions, source)
        if self.index.followed is not None:
            followed = self.index.followed.action
            rules.refuse_unknown_actions("index.followed.action", [followed], source)

        rules.refuse_checks_of_unknown_columns(self.checks, source)
        rules.refuse_features_of_unknown_columns(features, source)
        rules.refuse_more_bits_than_the_mask_has(self.num_action_bits)
        rules.refuse_unknown_tables(train, features)
        rules.refuse_cut_histories_that_others_count(self.examples, features, self.retrieval)

        rules.refuse_query_anchor_in_shared_passes(self.model, train)
        rules.refuse_label_leak_of_filtered_channels(self.model.channels, train)
        rules.refuse_validation_on_trained_rows(self.split, train)
        rules.refuse_name_that_is_no_folder("name", self.name)
        require(self.runs_dir.strip() != "", "runs_dir", self.runs_dir, "a path")
        if self.sequences.from_run is not None:
            rules.refuse_name_that_is_no_folder("sequences.from_run", self.sequences.from_run)
        if self.serve.exposures is not None:
            posted = self.serve.exposures.actions or ()
            rules.refuse_unknown_actions("serve.exposures.actions", posted, source)
        if self.retrieval.enabled:
            rules.refuse_unknown_actions("retrieval.positives", self.retrieval.positives, source)
            rules.refuse_impossible_retrieval(self.retrieval, self.model, train)
        if not self.tasks:
            rules.refuse_settings_of_missing_tasks(features, train)

    @property
    def task_bits(self) -> tuple[int, ...]:
        """The bit of each task in an action mask."""
        return tuple(self.source.actions.index(task) for task in self.tasks)

    @property
    def positive_bits(self) -> int:
        """The bits of `retrieval.positives` in an action mask; 0 for every event."""
        actions = self.source.actions
        return sum(1 << actions.index(action) for action in set(self.retrieval.positives))

    @property
    def inputs(self) -> InputConfig:
        """What batches are made by."""
        return InputConfig(
            source=self.source,
            features=self.features,
            model=self.model,
            task_bits=self.task_bits,
        )

    @property
    def num_action_bits(self) -> int:
        return self.inputs.num_action_bits

    @property
    def feature_tables(self) -> tuple[str, ...]:
        """The embedding tables that grow with the data, as `train.tables` names them."""
        return self.features.tables

    @property
    def items_known(self) -> bool:
        return self.source.items_known

    @property
    def users_known(self) -> bool:
        return self.source.users_known

    @property
    def folders(self) -> RunFolders:
        """Where the files of this run lie."""
        return RunFolders(self.runs_dir, self.name, self.sequences.from_run or self.name)

    @property
    def run_dir(self) -> Path:
        return self.folders.run_dir

    def with_absolute_folders(self) -> "RunConfig":
        """The same run for a worker, which has a current folder of its own."""
        return dataclasses.replace(self, runs_dir=str(self.run_dir.parent))

    @property
    def model_name(self) -> str:
        """Name of the registered model: versions of one name compete to be its champion."""
        return self.tracking.model_name or self.source.data_name

    @property
    def log_dir(self) -> Path:
        return self.folders.log_dir

    @property
    def sequence_dir(self) -> Path:
        return self.folders.sequence_dir

    @property
    def train_dir(self) -> Path:
        return self.folders.train_dir

    @property
    def model_dir(self) -> Path:
        return self.folders.model_dir


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The preset at `path` with `a.b=c` overrides, values in YAML syntax.

    Channels among the overrides take the place of the preset's one transducer.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or a value out of range, a
        setting that the channels beside it do not read.
    """
    preset, raw = read_yaml(path), read_yaml(path, overrides)
    given = raw
    if not _channels_of(preset) and _channels_of(raw):
        given = apply_overrides({}, overrides)
        for key in rules.OF_EACH_CHANNEL:
            raw["model"].pop(key, None)

    cfg = from_dict(raw)
    rules.refuse_settings_beside_channels(given, cfg.model.channels)
    return cfg


def _channels_of(raw: dict[str, Any]) -> Any:
    model = raw.get("model")
    return model.get("channels") if isinstance(model, dict) else None


def from_dict(raw: dict[str, Any]) -> RunConfig:
    """The configuration from nested mappings, as YAML and `to_dict` give them."""
    return build_section(RunConfig, raw, "")


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain lists, dicts and scalars, fit for JSON and YAML; `from_dict` reads it back.

    Of a mixture without the settings that its channels have in their place.
    """
    raw = json.loads(json.dumps(dataclasses.asdict(cfg)))
    if isinstance(cfg, RunConfig) and cfg.model.channels:
        for key in rules.OF_EACH_CHANNEL:
            del raw["model"][key]
    return raw


def flatten(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dotted keys: {"train": {"lr": 1}} as {"train.lr": 1}."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
