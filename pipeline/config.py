"""One configuration for the whole chain: frozen dataclasses, read from YAML, changed with `--set a.b=c`.

An unknown key, a value of the wrong type or out of range is a `ConfigError` naming the key and the value. The whole
`RunConfig` is saved beside the weights and the server builds the model from that file alone.
"""

import dataclasses
import json
import math
import types
import typing
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import yaml


class UserError(ValueError):
    """A mistake of the user's: jobs print its one message and exit with code 2, the server answers 4xx."""


class ConfigError(UserError):
    """The configuration does not say something we can run."""


def _require(condition: bool, key: str, value: Any, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{key} must be {rule}, got {value!r}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SideTable:
    """A USER or ITEM table: Parquet with an id column and categorical or numeric columns."""

    path: str
    id_column: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Dirichlet-process logs (HSTU, arXiv:2402.17152, appendix C) with times, requests, actions and long histories."""

    num_users: int = 2000
    num_items: int = 20_000
    num_categories: int = 100
    max_history: int = 256  # rows of the longest user; up to 16,384
    length_exponent: float = 1.0  # Zipf: the user of rank r has about max_history / r**exponent rows
    min_history: int = 8
    candidates_per_request: int = 4
    num_days: int = 12
    start: str = "2022-04-24T00:00:00+08:00"
    rows_per_file: int = 1_000_000

    def __post_init__(self) -> None:
        _require(1 <= self.max_history <= 16_384, "source.synthetic.max_history", self.max_history, "1 to 16384 rows")
        _require(
            1 <= self.min_history <= self.max_history,
            "source.synthetic.min_history",
            self.min_history,
            "1 to max_history",
        )
        for name in ("num_users", "num_items", "num_categories", "candidates_per_request", "num_days", "rows_per_file"):
            _require(getattr(self, name) >= 1, f"source.synthetic.{name}", getattr(self, name), "1 or more")
        parse_time("source.synthetic.start", self.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where the logs are and what their columns are called."""

    kind: Literal["parquet", "kuairand", "synthetic"] = "parquet"
    path: str | None = None  # a Parquet file or folder; the data folder of a public dataset; unused for synthetic
    columns: dict[str, str] = field(default_factory=dict)  # LOG column -> name in the user's files, where they differ
    actions: tuple[str, ...] = ("is_click",)  # bit i of the action mask
    request_columns: tuple[str, ...] = ()  # int32 columns known when a request is made; they ride on every row
    users: SideTable | None = None
    items: SideTable | None = None
    order_only_end_is_real: bool = False  # the last order_only row of a user carries a real time (KuaiRand: yes)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        _require(len(self.actions) > 0, "source.actions", self.actions, "at least one action column")
        _require(len(self.actions) <= 31, "source.actions", self.actions, "at most 31 action columns")
        names = [*self.actions, *self.request_columns]
        _require(len(set(names)) == len(names), "source.actions + source.request_columns", names, "free of repeats")
        if self.kind != "synthetic":
            _require(self.path is not None, "source.path", self.path, f"a path when source.kind is {self.kind}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig:
    """How LOG rows become one row per user."""

    num_buckets: int = 16  # hash buckets of users = partitions of the store
    max_rows_per_user: int = 16_384  # the newest kept; older ones counted in first_position
    max_quarantined_share: float = 0.1  # above it the job fails
    earliest_time: str = "2000-01-01T00:00:00+00:00"  # an earlier event_time is quarantined (seconds read as ms, say)
    latest_time: str | None = None  # a later one is quarantined; None: one day after the clock when the job starts

    def __post_init__(self) -> None:
        _require(self.num_buckets >= 1, "sequences.num_buckets", self.num_buckets, "1 or more")
        _require(self.max_rows_per_user >= 1, "sequences.max_rows_per_user", self.max_rows_per_user, "1 or more")
        share = self.max_quarantined_share
        _require(0 <= share <= 1, "sequences.max_quarantined_share", share, "between 0 and 1")
        parse_time("sequences.earliest_time", self.earliest_time)
        if self.latest_time is not None:
            parse_time("sequences.latest_time", self.latest_time)


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Global split by the request's event_time: train < t_val <= validation < t_test <= test < t_end."""

    t_val: str = "2022-05-01T00:00:00+08:00"
    t_test: str = "2022-05-03T00:00:00+08:00"
    t_end: str | None = None  # None: to the end of the logs
    refit: bool = False  # train the frozen settings up to t_test instead of t_val

    def __post_init__(self) -> None:
        _require(self.val_ms < self.test_ms, "split.t_test", self.t_test, f"later than split.t_val {self.t_val}")
        if self.t_end is not None:
            _require(self.end_ms > self.test_ms, "split.t_end", self.t_end, f"later than split.t_test {self.t_test}")

    @property
    def val_ms(self) -> int:
        return parse_time("split.t_val", self.t_val)

    @property
    def test_ms(self) -> int:
        return parse_time("split.t_test", self.t_test)

    @property
    def end_ms(self) -> int:
        return 2**62 if self.t_end is None else parse_time("split.t_end", self.t_end)

    @property
    def train_end_ms(self) -> int:
        """Whatever is learned across users comes from rows strictly before this."""
        return self.test_ms if self.refit else self.val_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnFeature:
    """One column as an embedding. Code 0 is "missing or not seen in the training period"."""

    dim: int = 8
    kind: Literal["categorical", "quantile"] = "categorical"
    buckets: int = 16  # of quantile: edges from the training period

    def __post_init__(self) -> None:
        _require(self.dim >= 1, "features.*.dim", self.dim, "1 or more")
        _require(self.buckets >= 2, "features.*.buckets", self.buckets, "2 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """What the model sees of items, users and requests."""

    item_id_dim: int = 16
    item: dict[str, ColumnFeature] = field(default_factory=dict)  # columns of the ITEM table
    user: dict[str, ColumnFeature] = field(default_factory=dict)  # columns of the USER table
    user_tokens: dict[str, tuple[str, ...]] = field(default_factory=dict)  # context token -> the user columns in it
    request: dict[str, ColumnFeature] = field(default_factory=dict)  # request columns, and the derived "hour"
    hour_utc_offset: float = 0.0  # hours; "hour" is the hour of day of event_time at this offset

    def __post_init__(self) -> None:
        _require(self.item_id_dim >= 1, "features.item_id_dim", self.item_id_dim, "1 or more")
        grouped = [name for names in self.user_tokens.values() for name in names]
        for name in grouped:
            _require(name in self.user, "features.user_tokens", name, "a column listed in features.user")
        for name in self.user:
            _require(name in grouped, "features.user", name, "part of a token in features.user_tokens")
        for name, feature in self.request.items():
            _require(feature.kind == "categorical", f"features.request.{name}.kind", feature.kind, "categorical")


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionConfig:
    """The semi-local mask (ULTRA-HSTU, arXiv:2602.16986, eq. 6-7) and the score scale."""

    window: int | None = 256  # K1: the largest distance q - k a row sees; None is plain causal
    full_rows: int = 256  # K2: the newest history rows that see everything before them
    extra_prefix: int = 0  # oldest events that every row sees, beside the context
    attn_alpha: float | None = None  # None: 1 / d_qk
    scaling_seq_len: int = 4096  # fixed divisor of the scores; the batch's longest would differ in serving

    def __post_init__(self) -> None:
        window = self.window
        _require(window is None or window >= 0, "model.attention.window", window, "a distance of 0 or more, or null")
        for name in ("full_rows", "extra_prefix"):
            _require(getattr(self, name) >= 0, f"model.attention.{name}", getattr(self, name), "0 or more")
        _require(self.scaling_seq_len >= 1, "model.attention.scaling_seq_len", self.scaling_seq_len, "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChannelConfig:
    """One transducer of a mixture: which history rows it reads, how many, and how."""

    actions: tuple[str, ...] = ()  # rows on which any of these is known and set; empty: every row
    max_len: int | None = None  # the newest of those rows; None: all
    num_layers: int = 2
    attention: AttentionConfig = field(default_factory=AttentionConfig)  # distances count the channel's own rows
    truncate_after_layer: int | None = None
    truncate_to: int = 1024

    def __post_init__(self) -> None:
        _require(self.max_len is None or self.max_len >= 1, "model.channels.*.max_len", self.max_len, "1 or more")
        _require_depth("model.channels.*", self.num_layers, self.truncate_after_layer, self.truncate_to)

    @property
    def depends_on_later_rows(self) -> bool:
        """Whether what a row sees, or whether it is kept, depends on how many rows of the channel follow."""
        full = self.attention.window is not None and self.attention.full_rows > 0
        return full or self.max_len is not None or self.truncate_after_layer is not None


def _require_depth(section: str, num_layers: int, truncate_after_layer: int | None, truncate_to: int) -> None:
    _require(num_layers >= 1, f"{section}.num_layers", num_layers, "1 or more")
    _require(truncate_to >= 1, f"{section}.truncate_to", truncate_to, "1 or more")
    after = truncate_after_layer
    rule = f"between 1 and num_layers - 1 = {num_layers - 1}, or null"
    _require(after is None or 1 <= after < num_layers, f"{section}.truncate_after_layer", after, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """ULTRA-HSTU: tokens, stack of STU layers with truncation, one head per task."""

    d_model: int = 64
    num_layers: int = 2
    num_heads: int = 2
    d_qk: int = 32
    d_v: int = 32
    dropout: float = 0.1
    norm_eps: float = 1e-6
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    truncate_after_layer: int | None = None  # N1: later layers keep the context, the newest events and the candidates
    truncate_to: int = 1024  # L': newest events kept
    channels: dict[str, ChannelConfig] = field(default_factory=dict)
    # Mixture of transducers: one per channel, each with its own depth, mask and truncation in the place of
    # num_layers, attention, truncate_after_layer and truncate_to here. Empty: one transducer over every row.
    silu_qkv: bool = True  # False: SiLU on U only, the authors' production form
    concat_ua: bool = False  # the output layer reads concat[U, A, Norm(A) * U] instead of Norm(A) * U
    candidate_action: Literal["none", "learned"] = "none"  # learned: one constant where an event has its actions
    action_dim: int = 8  # learned row per action, and as many for "unknown"
    position_buckets: int = 8192
    time_buckets: int = 64  # log buckets of the gap to the previous row, bucket 0 for "no real gap"
    head_hidden: int = 64
    attention_backend: Literal["auto", "triton", "torch", "reference"] = "auto"

    def __post_init__(self) -> None:
        for name in (
            "d_model",
            "num_heads",
            "d_qk",
            "d_v",
            "action_dim",
            "position_buckets",
            "head_hidden",
        ):
            _require(getattr(self, name) >= 1, f"model.{name}", getattr(self, name), "1 or more")
        _require(self.time_buckets >= 2, "model.time_buckets", self.time_buckets, "2 or more")
        _require(0 <= self.dropout < 1, "model.dropout", self.dropout, "in [0, 1)")
        _require_depth("model", self.num_layers, self.truncate_after_layer, self.truncate_to)


@dataclass(frozen=True, kw_only=True, slots=True)
class StochasticLengthConfig:
    """HSTU, arXiv:2402.17152, eq. 4: longer histories are mostly cut to max_len**(alpha/2), in training only."""

    alpha: float = 2.0  # 2.0 keeps everything
    max_len: int = 256

    def __post_init__(self) -> None:
        _require(1 < self.alpha <= 2, "train.stochastic_length.alpha", self.alpha, "in (1, 2]")
        _require(self.max_len >= 1, "train.stochastic_length.max_len", self.max_len, "1 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    epochs: int = 2
    batch_users: int = 32  # sequences of one rank in one step
    layout: Literal["user", "request"] = "user"  # one pass per user (target_visible), or one sequence per request
    max_targets_per_sequence: int = 64  # the user layout cuts a user's rows into passes of at most so many targets
    task_weights: dict[str, float] = field(default_factory=dict)  # task -> factor of its loss, 1 where not named
    history_label_weight: float = 0.3  # loss weight of order_only rows' known labels; 0 leaves them out
    stochastic_length: StochasticLengthConfig = field(default_factory=StochasticLengthConfig)
    lr: float = 2e-3
    embedding_lr: float = 2e-3
    weight_decay: float = 0.0
    warmup_steps: int = 100
    grad_clip: float = 1.0  # largest norm of the dense gradients
    num_workers: int = 1
    threads_per_worker: int = 1
    use_gpu: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: int = 20  # steps
    checkpoint_every: int = 200  # steps
    keep_checkpoints: int = 2
    max_failures: int = 2  # worker crashes survived

    def __post_init__(self) -> None:
        positive = (
            "epochs",
            "batch_users",
            "max_targets_per_sequence",
            "num_workers",
            "threads_per_worker",
            "log_every",
        )
        for name in (*positive, "checkpoint_every", "keep_checkpoints"):
            _require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        for name in ("lr", "embedding_lr", "grad_clip"):
            _require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "greater than 0")
        for name in ("history_label_weight", "weight_decay", "warmup_steps", "max_failures"):
            _require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        for task, factor in self.task_weights.items():
            _require(factor > 0, f"train.task_weights.{task}", factor, "greater than 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    batch_tokens: int = 8192  # tokens of one forward pass
    calibration_bins: int = 20

    def __post_init__(self) -> None:
        _require(self.batch_tokens >= 1, "evaluate.batch_tokens", self.batch_tokens, "1 or more")
        _require(self.calibration_bins >= 2, "evaluate.calibration_bins", self.calibration_bins, "2 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    uri: str | None = None  # None: start an MLflow server over runs_dir/mlflow on a free port for the job's time
    experiment: str = "ultra-hstu"
    model_name: str = "ultra_hstu"
    gate_max_ne: dict[str, float] = field(
        default_factory=dict
    )  # task -> the highest validation NE that may be promoted
    gate_max_regression: float = 0.002  # by how much the mean validation NE may exceed the champion's


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeConfig:
    host: str = "127.0.0.1"
    port: int = 8000  # 0: any free port
    num_replicas: int = 1
    max_candidates: int = 10_000
    max_body_bytes: int = 2_000_000
    max_history: int = 16_384
    max_events: int = 1_000  # of one POST /v1/events
    api_keys_file: str | None = None  # lines of sha256 and name; None: whoever reaches the port may ask
    client_key_file: str | None = None  # one of those keys in the clear, for the requests that jobs.pipeline sends
    rate_limit_per_s: float | None = None  # requests of one API key, or of all together without keys; None: no limit
    demo_candidates: int = 50
    parity_requests: int = 200
    parity_candidates: int = 20  # a request's own rows filled up with popular items

    def __post_init__(self) -> None:
        _require(0 <= self.port < 65536, "serve.port", self.port, "a port number, or 0 for any free one")
        counts = ("num_replicas", "max_candidates", "max_body_bytes", "max_history", "max_events", "demo_candidates")
        for name in counts:
            _require(getattr(self, name) >= 1, f"serve.{name}", getattr(self, name), "1 or more")
        rate = self.rate_limit_per_s
        _require(rate is None or 0 < rate < math.inf, "serve.rate_limit_per_s", rate, "greater than 0, or null")
        for name in ("api_keys_file", "client_key_file"):
            _require(getattr(self, name) != "", f"serve.{name}", getattr(self, name), "a path, or null")


@dataclass(frozen=True, kw_only=True, slots=True)
class RayConfig:
    address: str | None = None  # None: join RAY_ADDRESS where a job was submitted to a cluster, else start a local one
    num_cpus: int = 4  # logical CPUs of a local cluster; two workers and Ray Data need more than two
    object_store_mb: int = 512


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything a run depends on. Files of a run lie under runs_dir/name."""

    name: str = "run"
    seed: int = 0
    runs_dir: str = "runs"
    source: SourceConfig = field(default_factory=lambda: SourceConfig(kind="synthetic"))
    sequences: SequenceConfig = field(default_factory=SequenceConfig)
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
        _require(len(self.tasks) > 0, "tasks", self.tasks, "at least one action")
        for task in self.tasks:
            _require(task in self.source.actions, "tasks", task, f"one of source.actions {list(self.source.actions)}")
        for name in self.features.request:
            known = (*self.source.request_columns, "hour")
            _require(name in known, "features.request", name, f"one of source.request_columns or hour {list(known)}")
        for side, columns, known in (
            ("item", self.features.item, self.items_known),
            ("user", self.features.user, self.users_known),
        ):
            rule = f"empty without a table of {side}s (source.{side}s)"
            _require(not columns or known, f"features.{side}", list(columns), rule)
        for name, channel in self.model.channels.items():
            self._check_channel(f"model.channels.{name}", channel)
        for task in self.train.task_weights:
            _require(task in self.tasks, "train.task_weights", task, f"one of tasks {list(self.tasks)}")
        for task in self.tracking.gate_max_ne:
            _require(task in self.tasks, "tracking.gate_max_ne", task, f"one of tasks {list(self.tasks)}")
        _require(
            "/" not in self.name and self.name not in ("", ".", "..", "mlflow"), "name", self.name, "a folder name"
        )

    def _check_channel(self, key: str, channel: ChannelConfig) -> None:
        for action in channel.actions:
            rule = f"one of source.actions {list(self.source.actions)}"
            _require(action in self.source.actions, f"{key}.actions", action, rule)
        # In the user layout a candidate's own row, and later ones, lie further on in the same pass. How many of them
        # pass the filter is known from their labels alone, so nothing before them may depend on that number.
        leaks = bool(channel.actions) and channel.depends_on_later_rows
        rule = f"request where {key} filters by actions and has full_rows under a window, max_len or truncation"
        _require(not leaks or self.train.layout == "request", "train.layout", self.train.layout, rule)

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


def parse_time(key: str, value: str) -> int:
    """An ISO 8601 time with its offset, in milliseconds since 1970 UTC."""
    try:
        moment = datetime.fromisoformat(value)
    except (TypeError, ValueError):
        raise ConfigError(f"{key} must be an ISO 8601 time such as 2022-05-01T00:00:00+08:00, got {value!r}") from None
    if moment.tzinfo is None:
        raise ConfigError(f"{key} must carry its offset from UTC (2022-05-01T00:00:00+08:00), got {value!r}")
    return int(moment.timestamp() * 1000)


def from_dict(raw: dict[str, Any]) -> RunConfig:
    return _build(RunConfig, raw, "")


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


def load(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunConfig:
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


def _build(cls: type, raw: Any, path: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{path or 'the configuration'} must be a mapping, got {raw!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in raw:
        if key not in names:
            where = f"{path}.{key}" if path else str(key)
            raise ConfigError(
                f"unknown configuration key {where!r} (value {raw[key]!r}); {path or 'the top level'} has {names}"
            )
    return cls(**{key: _convert(hints[key], value, f"{path}.{key}" if path else key) for key, value in raw.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    """`value` from YAML as the type `hint` of a field, or a ConfigError naming `path`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, path)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in args:
            return None
        return _convert(next(a for a in args if a is not type(None)), value, path)
    if origin is Literal:
        _require(value in args, path, value, f"one of {list(args)}")
        return value
    if origin is tuple:
        _require(isinstance(value, list | tuple), path, value, "a list")
        return tuple(_convert(args[0], item, f"{path}[{i}]") for i, item in enumerate(value))
    if origin is dict:
        _require(isinstance(value, dict), path, value, "a mapping")
        return {str(key): _convert(args[1], item, f"{path}.{key}") for key, item in value.items()}
    if hint is float and not isinstance(value, bool):
        try:  # YAML 1.1 reads 2e-3 as text
            return float(value)
        except (TypeError, ValueError):
            raise ConfigError(f"{path} must be a number, got {value!r}") from None
    if hint is str and isinstance(value, datetime):  # YAML reads an unquoted ISO time as one
        return value.isoformat()
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise ConfigError(f"{path} must be {hint.__name__}, got {value!r}")
    return value
