"""A whole run: the sections together, read from YAML and changed with `--set a.b=c`."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.config.data import (
    CheckConfig,
    DriftConfig,
    FeatureConfig,
    SequenceConfig,
    SourceConfig,
    SplitConfig,
)
from pipeline.config.model import ChannelConfig, ModelConfig
from pipeline.config.operate import RayConfig, ServeConfig, TrackingConfig
from pipeline.config.train import EvaluateConfig, TrainConfig
from pipeline.config.values import ConfigError, build, require
from pipeline.schema import LOG_OPTIONAL, LOG_REQUIRED, MAX_ACTIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything a run depends on. Files of a run lie under runs_dir/name."""

    name: str = "run"
    seed: int = 0
    runs_dir: str = "runs"
    source: SourceConfig = field(default_factory=lambda: SourceConfig(kind="synthetic"))
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
    checks: CheckConfig = field(default_factory=CheckConfig)
    drift: DriftConfig = field(default_factory=DriftConfig)
    split: SplitConfig = field(default_factory=SplitConfig)
    tasks: tuple[str, ...] = ("is_click",)  # the actions that get a head
    features: FeatureConfig = field(default_factory=FeatureConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    ray: RayConfig = field(default_factory=RayConfig)

    def __post_init__(self) -> None:
        require(len(self.tasks) > 0, "tasks", self.tasks, "at least one action")
        for task in self.tasks:
            require(
                task in self.source.actions,
                "tasks",
                task,
                f"one of source.actions {list(self.source.actions)}",
            )
        columns = [*LOG_REQUIRED, *LOG_OPTIONAL, *self.source.actions, *self.source.request_columns]
        for name in self.checks.max_null_share:
            require(
                name in columns, "checks.max_null_share", name, f"one of the LOG columns {columns}"
            )
        for key in ("max_unknown_share", "action_rate"):
            for name in getattr(self.checks, key):
                rule = f"one of source.actions {list(self.source.actions)}"
                require(name in self.source.actions, f"checks.{key}", name, rule)
        for name in self.features.request:
            known = (*self.source.request_columns, "hour")
            require(
                name in known,
                "features.request",
                name,
                f"one of source.request_columns or hour {list(known)}",
            )
        for side, columns, known in (
            ("item", self.features.item, self.items_known),
            ("user", self.features.user, self.users_known),
        ):
            rule = f"empty without a table of {side}s (source.{side}s)"
            require(not columns or known, f"features.{side}", list(columns), rule)
        bits, most = self.num_action_bits, MAX_ACTIONS
        require(
            bits <= most,
            "features.watch_seconds + features.watch_shares",
            bits,
            f"{most} bits with the actions",
        )
        anchored = self.model.time_anchor == "query"
        rule = (
            "request where model.time_anchor is query: a row of a shared pass has one place, "
            "not one per request"
        )
        require(
            not anchored or self.train.layout == "request", "train.layout", self.train.layout, rule
        )
        for name, channel in self.model.channels.items():
            self._check_channel(f"model.channels.{name}", channel)
        duration = self.features.duration_ms_column
        rule = "null without a table of items (source.items)"
        require(duration is None or self.items_known, "features.duration_ms_column", duration, rule)
        rule = "0 with split.refit, which trains on the validation period"
        require(
            not (self.split.refit and self.train.validate_every),
            "train.validate_every",
            self.train.validate_every,
            rule,
        )
        for task in self.train.task_weights:
            require(
                task in self.tasks, "train.task_weights", task, f"one of tasks {list(self.tasks)}"
            )
        placeable = self.feature_tables
        for name in self.train.tables.keys() - {"default"}:
            require(
                name in placeable,
                "train.tables",
                name,
                f"default or one of the tables {list(placeable)}",
            )
        for key in ("bf16_tables", "host_state_tables"):
            for name in getattr(self.train, key):
                require(
                    name in placeable, f"train.{key}", name, f"one of the tables {list(placeable)}"
                )
        for task in self.tracking.gate_max_ne:
            require(
                task in self.tasks, "tracking.gate_max_ne", task, f"one of tasks {list(self.tasks)}"
            )
        require(
            "/" not in self.name and self.name not in ("", ".", "..", "mlflow"),
            "name",
            self.name,
            "a folder name",
        )

    def _check_channel(self, key: str, channel: ChannelConfig) -> None:
        for action in channel.actions:
            rule = f"one of source.actions {list(self.source.actions)}"
            require(action in self.source.actions, f"{key}.actions", action, rule)
        # In the user layout a candidate's own row, and later ones, lie further on in the same pass.
        # How many of them pass the filter is known from their labels alone, so nothing before them
        # may depend on that number.
        leaks = bool(channel.actions) and channel.depends_on_later_rows
        rule = (
            f"request where {key} filters by actions and has full_rows under a window, max_len "
            "or truncation"
        )
        require(
            not leaks or self.train.layout == "request", "train.layout", self.train.layout, rule
        )

    @property
    def num_action_bits(self) -> int:
        """Bits of a history row's action mask: source.actions, then the watch-time thresholds."""
        features = self.features
        return len(self.source.actions) + len(features.watch_seconds) + len(features.watch_shares)

    @property
    def feature_tables(self) -> tuple[str, ...]:
        """The embedding tables that grow with the data, as `train.tables` names them."""
        features = self.features
        sides = (("item", features.item), ("request", features.request), ("user", features.user))
        return "item_id", *(f"{side}.{name}" for side, columns in sides for name in columns)

    @property
    def items_known(self) -> bool:
        return self.source.items is not None or self.source.kind != "parquet"

    @property
    def users_known(self) -> bool:
        return self.source.users is not None or self.source.kind != "parquet"

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir).absolute() / self.name

    @property
    def log_dir(self) -> Path:
        """LOG, USER and ITEM Parquet written by an adapter or generator."""
        return self.run_dir / "logs"

    @property
    def sequence_dir(self) -> Path:
        return self.run_dir / "sequences"

    @property
    def model_dir(self) -> Path:
        """What the registry holds: model.safetensors, config.json, features.*, metrics.json."""
        return self.run_dir / "model"


def from_dict(raw: dict[str, Any]) -> RunConfig:
    return build(RunConfig, raw, "")


def to_dict(cfg: Any) -> dict[str, Any]:
    """Plain lists, dicts and scalars, fit for JSON and YAML; `from_dict` reads it back."""
    return json.loads(json.dumps(dataclasses.asdict(cfg)))


def flatten(raw: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}: the params of an MLflow run."""
    flat: dict[str, Any] = {}
    for key, value in raw.items():
        nested = isinstance(value, dict) and value
        flat |= flatten(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return flat


def load(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The preset at `path` with `a.b=c` overrides, values in YAML syntax.

    Raises:
        ConfigError: no such file, not YAML, an unknown key, a wrong type or a value out of range.
    """
    try:
        raw = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"--config {path} is not YAML: {error}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"--config {path} must hold a mapping, got {type(raw).__name__}")
    for override in overrides:
        _apply(raw, override)
    return from_dict(raw)


def _apply(raw: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set takes key=value, got {override!r}")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f"--set {key}: {text!r} is not a YAML value") from None
    *parents, last = key.split(".")
    node = raw
    for parent in parents:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ConfigError(f"--set {key}: {parent} is not a section")
    node[last] = value
