"""Training and evaluation."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.values import require


@dataclass(frozen=True, kw_only=True, slots=True)
class StochasticLengthConfig:
    """HSTU, arXiv:2402.17152, eq. 4: longer histories are mostly cut to max_len**(alpha/2), in
    training only.
    """

    alpha: float = 2.0  # 2.0 keeps everything
    max_len: int = 256
    # How the loads of the ranks are evened out. dealing: a step's examples go to ranks by load;
    # sampling: the draws of each step are first turned round to bring it to the mean load, as in
    # load-balanced stochastic length, arXiv:2602.16986. The load of an example is its tokens to the
    # power load_exponent: about 1 with a window and full rows far below the length, 2 under full
    # attention.
    balance: Literal["none", "sampling", "dealing"] = "none"
    load_exponent: float = 1.0

    def __post_init__(self) -> None:
        require(1 < self.alpha <= 2, "train.stochastic_length.alpha", self.alpha, "in (1, 2]")
        require(self.max_len >= 1, "train.stochastic_length.max_len", self.max_len, "1 or more")
        cuts = self.alpha < 2 or self.balance != "sampling"
        require(
            cuts, "train.stochastic_length.alpha", self.alpha, "below 2 where balance is sampling"
        )
        exponent = self.load_exponent
        require(
            1 <= exponent <= 2, "train.stochastic_length.load_exponent", exponent, "between 1 and 2"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    epochs: int = 2
    # What one step holds over all workers, one of the two: so many sequences, or tokens, about
    # equally many in every step and at most so many and one sequence more.
    batch_users: int | None = 32
    batch_tokens: int | None = None
    # files of the store that are shuffled together; twice as many are in memory
    pool_buckets: int = 4
    loader_threads: int = 1  # of each worker, making batches ahead
    # one pass per user (target_visible), or one sequence per request
    layout: Literal["user", "request"] = "user"
    # the user layout cuts a user's rows into passes of at most so many targets
    max_targets_per_sequence: int = 64
    # task -> factor of its loss, 1 where not named
    task_weights: dict[str, float] = field(default_factory=dict)
    # loss weight of order_only rows' known labels; 0 leaves them out
    history_label_weight: float = 0.3
    stochastic_length: StochasticLengthConfig = field(default_factory=StochasticLengthConfig)
    lr: float = 2e-3
    embedding_lr: float = 2e-3
    weight_decay: float = 0.0
    warmup_steps: int = 100
    grad_clip: float = 1.0  # largest norm of the dense gradients
    # The model is the mean of its weights after this share of all steps, every so many of them;
    # null: the last weights.
    average_from: float | None = None
    average_every: int = 20
    num_workers: int = 1
    # Where embedding tables live: table (item_id, item.COLUMN, user.COLUMN, request.COLUMN, or
    # default for all others) -> placement. auto shards a table of more than shard_above_mb, in
    # float32, when there are several workers.
    tables: dict[str, Literal["replicated", "sharded", "auto"]] = field(default_factory=dict)
    shard_above_mb: int = 512
    # rows in bfloat16, rounded by chance; these tables are always sharded
    bf16_tables: tuple[str, ...] = ()
    # the optimizer's moments in the host's memory, pinned; only used rows move
    host_state_tables: tuple[str, ...] = ()
    threads_per_worker: int = 1
    use_gpu: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    log_every: int = 20  # steps
    checkpoint_every: int = 200  # steps
    keep_checkpoints: int = 2  # the newest; with validation the best one too
    max_failures: int = 2  # worker crashes survived
    validate_every: int = 0  # steps; 0: never
    validate_requests: int = 2000  # of the validation period, the same ones each time
    # of these requests, mean over tasks: what makes a checkpoint best
    best_metric: Literal["ne", "auc", "gauc"] = "ne"
    publish: Literal["last", "best"] = "last"  # which checkpoint becomes the model
    # validations in a row without a better one, after which training ends; null: never
    patience: int | None = None
    # in a row, left out since loss or gradient is not finite, after which training fails
    max_bad_steps: int = 10
    # of a line's loss to the running median: above it for 3 lines, training fails
    max_loss_ratio: float | None = 4.0
    # first and last step of which rank 0 leaves a trace in train/profile
    profile_steps: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        positive = (
            "epochs",
            "pool_buckets",
            "loader_threads",
            "max_targets_per_sequence",
            "num_workers",
            "threads_per_worker",
            "log_every",
            "average_every",
        )
        for name in (
            *positive,
            "checkpoint_every",
            "keep_checkpoints",
            "validate_requests",
            "max_bad_steps",
        ):
            require(getattr(self, name) >= 1, f"train.{name}", getattr(self, name), "1 or more")
        one = (self.batch_users is None) != (self.batch_tokens is None)
        require(
            one,
            "train.batch_users",
            self.batch_users,
            "null where train.batch_tokens is given, and only there",
        )
        for name in ("batch_users", "batch_tokens"):
            size = getattr(self, name)
            require(size is None or size >= 1, f"train.{name}", size, "1 or more")
        for name in ("lr", "embedding_lr", "grad_clip"):
            require(getattr(self, name) > 0, f"train.{name}", getattr(self, name), "greater than 0")
        zero_or_more = (
            "history_label_weight",
            "weight_decay",
            "warmup_steps",
            "max_failures",
            "shard_above_mb",
        )
        for name in (*zero_or_more, "validate_every"):
            require(getattr(self, name) >= 0, f"train.{name}", getattr(self, name), "0 or more")
        for name in self.bf16_tables:
            placement = self.tables.get(name, self.tables.get("default", "auto"))
            require(
                placement != "replicated",
                f"train.tables.{name}",
                placement,
                "sharded or auto for a bf16_tables one",
            )
        for task, factor in self.task_weights.items():
            require(factor > 0, f"train.task_weights.{task}", factor, "greater than 0")
        ratio = self.max_loss_ratio
        require(
            ratio is None or ratio > 1, "train.max_loss_ratio", ratio, "greater than 1, or null"
        )
        require(
            self.patience is None or self.patience >= 1,
            "train.patience",
            self.patience,
            "1 or more, or null",
        )
        validates = self.validate_every > 0
        require(
            validates or self.patience is None,
            "train.patience",
            self.patience,
            "null without validate_every",
        )
        require(
            validates or self.publish == "last",
            "train.publish",
            self.publish,
            "last without validate_every",
        )
        begin = self.average_from
        require(
            begin is None or 0 <= begin < 1,
            "train.average_from",
            begin,
            "0 or more and below 1, or null",
        )
        # a checkpoint on the way holds the weights themselves
        ends = self.patience is None and self.publish == "last"
        require(
            ends or begin is None,
            "train.average_from",
            begin,
            "null with train.patience or publish: best",
        )
        steps = self.profile_steps
        rule = "a first step of 1 or more and a last one not before it, or null"
        require(
            steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1]),
            "train.profile_steps",
            steps,
            rule,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    batch_tokens: int = 8192  # tokens of one forward pass
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
    int4_tables: bool = False  # score with the embedding tables that serve.int4_tables would serve
    calibration_bins: int = 20

    def __post_init__(self) -> None:
        require(self.batch_tokens >= 1, "evaluate.batch_tokens", self.batch_tokens, "1 or more")
        require(
            self.calibration_bins >= 2,
            "evaluate.calibration_bins",
            self.calibration_bins,
            "2 or more",
        )
