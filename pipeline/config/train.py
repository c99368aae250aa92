"""Training and evaluation."""

from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.errors import require
from pipeline.config.reading import parse_time
from pipeline.config.setting import check_ranges, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class StochasticLengthConfig:
    """Stochastic length (HSTU, arXiv:2402.17152, eq. 4): longer histories are mostly cut to
    max_len**(alpha/2) rows, in training only.
    """

    alpha: float = setting(
        2.0, above=1, at_most=2, doc="Exponent of the rule; 2.0 keeps everything."
    )
    max_len: int = setting(256, at_least=1, doc="Base of the rule, in rows.")
    rows: Literal["newest", "weighted"] = setting(
        "newest",
        doc="Rows that a cut history keeps of those that its first target sees. weighted: a draw "
        "without replacement, a row's weight being 1 less its share of the sum of all ages, as in "
        "HSTU's table 13; the age is the time to the newest row.",
    )
    balance: Literal["none", "sampling", "dealing"] = setting(
        "none",
        doc="How the loads of the workers are evened out. dealing: the examples of a step go to "
        "workers by load, and with train.batch_tokens those of 16 steps to steps by tokens, so "
        "that steps too are alike. sampling: keep and cut decisions are first flipped until the "
        "step has the mean load, as in load-balanced stochastic length (ULTRA-HSTU, "
        "arXiv:2602.16986).",
    )
    load_exponent: float = setting(
        1.0,
        at_least=1,
        at_most=2,
        doc="The load of an example is its tokens to this power: about 1 with a window and full "
        "rows far below the length, 2 under full attention.",
    )

    load_times: tuple[float, ...] | None = setting(
        None,
        at_least=0,
        doc="In place of the exponent, the time of an example in any unit: for itself, for each "
        "token, and for each of its tokens times their number. `python -m "
        "benchmarks.training.example_time` measures them. Null: load_exponent decides.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "train.stochastic_length")

        self._refuse_sampling_without_draws()
        self._refuse_weights_without_cuts()
        self._refuse_loads_of_two_kinds()

    def _refuse_loads_of_two_kinds(self) -> None:
        """One of them alone is read."""
        times = self.load_times
        if times is None:
            return
        key = "train.stochastic_length.load_times"
        require(len(times) == 3 and sum(times) > 0, key, times, "three numbers, not all 0, or null")
        require(
            self.load_exponent == 1.0,
            "train.stochastic_length.load_exponent",
            self.load_exponent,
            "1.0 with load_times, which takes its place",
        )

    def _refuse_sampling_without_draws(self) -> None:
        """Where everything is kept there is no decision to flip."""
        require(
            self.alpha < 2 or self.balance != "sampling",
            "train.stochastic_length.alpha",
            self.alpha,
            "below 2 where balance is sampling",
        )

    def _refuse_weights_without_cuts(self) -> None:
        """Where everything is kept there is nothing to draw."""
        require(
            self.alpha < 2 or self.rows == "newest",
            "train.stochastic_length.rows",
            self.rows,
            "newest where alpha is 2",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """The training loop: batches, optimisers, workers, checkpoints, and what ends it early."""

    init: Literal["random", "champion"] = setting(
        "random",
        doc="Weights to begin with. champion: those of the registered champion, embedding rows by "
        "id, and of the rows that it has learned a train.replay_share only; jobs.pipeline --append "
        "does so by itself.",
    )
    targets_since: str | None = setting(
        None,
        doc="ISO 8601 time with its UTC offset: of the rows before it a train.replay_share only is "
        "trained on, and all of them stay history. Null: with init champion the end of the "
        "champion's training period, else all rows are trained on.",
    )
    replay_share: float = setting(
        0.1,
        at_least=0,
        at_most=1,
        doc="Share of the sequences before train.targets_since that are trained on again.",
    )
    epochs: int = setting(2, at_least=1, doc="Number of passes over the training period.")
    champion_epochs: int = setting(
        1,
        at_least=1,
        doc="The same with init champion, which has had its passes over the older rows: on few new "
        "ones several soon learn them by heart.",
    )
    batch_users: int | None = setting(
        32,
        at_least=1,
        doc="Sequences of a step, over all workers. Null where train.batch_tokens is given.",
    )
    batch_tokens: int | None = setting(
        None,
        at_least=1,
        doc="Tokens of a step, over all workers, in the place of train.batch_users: about equally "
        "many in every step, and at most so many and one sequence more of each reader.",
    )
    pool_buckets: int = setting(
        4,
        at_least=1,
        doc="Files of the store that a reader shuffles together, with those of the other readers. "
        "Twice as many are in memory.",
    )
    readers: int | None = setting(
        None,
        at_least=1,
        doc="Parts of the store, each read by one worker alone. The order of the examples depends "
        "on their number, not on that of the workers. Null: as many as train.num_workers when the "
        "run begins, and no others when it goes on with more workers or fewer.",
    )
    loader_threads: int = setting(
        1, at_least=1, doc="Threads of each worker that prefetch batches."
    )
    loader_process: bool = setting(
        False,
        doc="Each worker's batches are made in a process of their own, which starts in some "
        "seconds. False: in threads of the worker, whose Python waits for theirs.",
    )
    layout: Literal["user", "request"] = setting(
        "user",
        doc="One training sequence per pass over a user's rows, in which each target sees its own "
        "past (user), or one per request (request).",
    )
    target_view: Literal["covering", "exact"] = setting(
        "covering",
        doc="What a target of the user layout sees of the history that its pass shares. covering: "
        "at least what it would see as a request of its own; full rows, truncation and stochastic "
        "length leave it up to the rows of one pass more. exact: the same rows; costs a second "
        "form of each row that is a full one, and takes transducers of at most two layers where "
        "there are full rows or truncation.",
    )
    max_targets_per_sequence: int = setting(
        64,
        at_least=1,
        doc="The user layout cuts a user's rows into passes of at most so many targets.",
    )
    task_weights: dict[str, float] = setting(
        {}, above=0, doc="Task: factor of its loss; 1 where a task is not named."
    )
    history_label_weight: float = setting(
        0.3,
        at_least=0,
        doc="Weight in the loss of the known labels of order_only rows; 0 leaves them out.",
    )
    stochastic_length: StochasticLengthConfig = field(default_factory=StochasticLengthConfig)
    lr: float = setting(2e-3, above=0, doc="Learning rate of the dense weights.")
    embedding_lr: float = setting(2e-3, above=0, doc="Learning rate of the embedding tables.")
    weight_decay: float = setting(
        0.0, at_least=0, doc="Weight decay of AdamW, for dense weights and embedding rows."
    )
    warmup_steps: int | None = setting(
        None,
        at_least=0,
        doc="Steps over which the learning rates rise; then they fall to 0 by a cosine. At most a "
        "tenth of the run's steps. Null, and with init champion: 100, or a tenth of a run of fewer "
        "than 1000 steps.",
    )
    grad_clip: float = setting(
        1.0, above=0, doc="Largest norm of the dense gradients; a larger one is scaled down."
    )
    gradient_part_mb: float = setting(
        16.0,
        above=0,
        doc="Dense gradients go over the workers in parts of at least so many MiB, each as soon as "
        "backward has made it.",
    )
    average_from: float | None = setting(
        None,
        at_least=0,
        below=1,
        doc="Share of all steps after which the weights are averaged; the model is their mean. "
        "Null: the model has the last weights.",
    )
    average_every: int = setting(
        20, at_least=1, doc="Steps between two weights that enter the average."
    )
    num_workers: int = setting(1, at_least=1, doc="Number of training processes.")
    min_workers: int | None = setting(
        None,
        at_least=1,
        doc="Number of training processes to begin with where a cluster has no room for "
        "train.num_workers yet; it takes more as there is room, up to those, from the newest "
        "checkpoint on. Null: it waits for all of them.",
    )
    tables: dict[str, Literal["replicated", "sharded", "auto"]] = setting(
        {},
        doc="Embedding table (item_id, item.COLUMN, user.COLUMN, request.COLUMN, or default for "
        "all others): where it lives. auto shards a table above train.shard_above_mb when there "
        "are several workers.",
    )
    shard_above_mb: int = setting(
        512, at_least=0, doc="Size of a table in float32, in MiB, above which auto shards it."
    )
    bf16_tables: tuple[str, ...] = setting(
        (),
        doc="Embedding tables kept in bfloat16 and rounded stochastically; they are always "
        "sharded.",
    )
    host_state_tables: tuple[str, ...] = setting(
        (),
        doc="Embedding tables whose optimizer moments are in the host's pinned memory; only used "
        "rows move.",
    )
    threads_per_worker: int = setting(1, at_least=1, doc="Threads of PyTorch in each worker.")
    use_gpu: bool = setting(False, doc="Each worker has one GPU.")
    precision: Literal["fp32", "bf16"] = setting(
        "fp32", doc="Number format of the layers' products; the weights stay in float32."
    )
    cuda_graphs: Literal["auto", "on", "off"] = setting(
        "auto",
        doc="Forward and backward of a step are recorded as CUDA graphs and replayed, so that the "
        "device does not wait for the host to launch them. Batches are filled up to one of few "
        "sizes. auto: where it can be, with one worker on a GPU. on: with several as well, whose "
        "gradients then go over after backward; an error where it cannot be.",
    )
    graph_sizes: int = setting(
        16,
        at_least=1,
        doc="Numbers of tokens, from a power of two to the next, that batches are filled up to. "
        "More of them fill less, and record more graphs; many suit batches of nearly one size.",
    )
    max_cuda_graphs: int = setting(
        64,
        at_least=1,
        doc="Graphs that are kept, one for each size of batches. Where there are more sizes, one "
        "that was not used for long makes room; else a step is launched kernel by kernel.",
    )
    log_every: int = setting(20, at_least=1, doc="Steps between two lines of the log.")
    checkpoint_every: int = setting(200, at_least=1, doc="Steps between two checkpoints.")
    keep_checkpoints: int = setting(
        2, at_least=1, doc="Number of newest checkpoints kept; with validation also the best one."
    )
    max_failures: int = setting(2, at_least=0, doc="Number of worker crashes that are survived.")
    stop_timeout_s: float = setting(
        60.0,
        at_least=0,
        doc="Longest wait for a last checkpoint when the job is asked to end (SIGTERM, Ctrl-C), in "
        "seconds.",
    )
    validate_every: int = setting(0, at_least=0, doc="Steps between two validations; 0: never.")
    validate_requests: int = setting(
        2000,
        at_least=1,
        doc="Number of the validation period's requests that are scored, the same ones each time.",
    )
    best_metric: Literal["ne", "auc", "gauc"] = setting(
        "ne",
        doc="Metric of these requests, as a mean over tasks, that makes a checkpoint the best.",
    )
    publish: Literal["last", "best"] = setting("last", doc="Checkpoint that becomes the model.")
    patience: int | None = setting(
        None,
        at_least=1,
        doc="Number of validations in a row without a better one after which training ends. Null: "
        "it does not end early.",
    )
    max_bad_steps: int = setting(
        10,
        at_least=1,
        doc="Number of steps in a row, left out because loss or gradient is not finite, after "
        "which training fails.",
    )
    max_loss_ratio: float | None = setting(
        4.0,
        above=1,
        doc="Ratio of the loss in the log to its running median; above it for 3 lines, training "
        "fails. Null: it is not checked.",
    )
    profile_steps: tuple[int, ...] | None = setting(
        None,
        doc="First and last step of which worker 0 leaves a trace in train/profile. Null: no "
        "trace.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "train")
        if self.targets_since is not None:
            parse_time("train.targets_since", self.targets_since)

        self._refuse_exact_view_of_drawn_rows()
        self._refuse_more_workers_to_begin_with()
        self._refuse_two_sizes_of_a_step()
        self._refuse_replicated_bf16_tables()
        self._refuse_settings_of_missing_validations()
        self._refuse_average_of_a_checkpoint_on_the_way()
        self._refuse_profile_out_of_order()

    @property
    def since_ms(self) -> int | None:
        """`targets_since` in ms since 1970, UTC."""
        if self.targets_since is None:
            return None
        return parse_time("train.targets_since", self.targets_since)

    @property
    def fewest_workers(self) -> int:
        """The training processes that it cannot begin without."""
        return self.min_workers or self.num_workers

    def _refuse_exact_view_of_drawn_rows(self) -> None:
        """The exact view says where what a target sees begins, and drawn rows have no beginning."""
        rule = "newest with train.target_view exact"
        rows = self.stochastic_length.rows
        allowed = rows == "newest" or self.target_view != "exact"
        require(allowed, "train.stochastic_length.rows", rows, rule)

    def _refuse_more_workers_to_begin_with(self) -> None:
        rule = f"at most train.num_workers, {self.num_workers}, or null"
        in_order = self.fewest_workers <= self.num_workers
        require(in_order, "train.min_workers", self.min_workers, rule)

    def _refuse_two_sizes_of_a_step(self) -> None:
        one_given = (self.batch_users is None) != (self.batch_tokens is None)
        require(
            one_given,
            "train.batch_users",
            self.batch_users,
            "null where train.batch_tokens is given, and only there",
        )

    def _refuse_replicated_bf16_tables(self) -> None:
        for name in self.bf16_tables:
            placement = self.tables.get(name, self.tables.get("default", "auto"))
            require(
                placement != "replicated",
                f"train.tables.{name}",
                placement,
                "sharded or auto for a bf16_tables one",
            )

    def _refuse_settings_of_missing_validations(self) -> None:
        if self.validate_every > 0:
            return

        rule = "null without validate_every"
        require(self.patience is None, "train.patience", self.patience, rule)

        rule = "last without validate_every"
        require(self.publish == "last", "train.publish", self.publish, rule)

    def _refuse_average_of_a_checkpoint_on_the_way(self) -> None:
        """A checkpoint on the way holds the weights themselves, so only the last one is a mean."""
        ends_as_planned = self.patience is None and self.publish == "last"
        require(
            ends_as_planned or self.average_from is None,
            "train.average_from",
            self.average_from,
            "null with train.patience or publish: best",
        )

    def _refuse_profile_out_of_order(self) -> None:
        steps = self.profile_steps
        in_order = steps is None or (len(steps) == 2 and 1 <= steps[0] <= steps[1])

        rule = "a first step of 1 or more and a last one not before it, or null"
        require(in_order, "train.profile_steps", steps, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateConfig:
    """How a trained model is scored on validation and test requests."""

    batch_tokens: int = setting(8192, at_least=1, doc="Tokens of one forward pass.")
    device: Literal["auto", "cpu", "cuda"] = setting(
        "auto", doc="Device of the model. auto: a GPU where there are any, else the CPU."
    )
    precision: Literal["fp32", "bf16"] = setting("fp32", doc="Number format of the layers.")
    int4_tables: bool = setting(
        False, doc="Score with the embedding tables that serve.int4_tables would serve."
    )
    sample: float | None = setting(
        None,
        above=0,
        below=1,
        doc="Share of the users to score for a quick look, drawn by the seed. Its metrics are kept "
        "beside those of the whole, never in their place.",
    )
    calibration_bins: int = setting(20, at_least=2, doc="Number of bins of the calibration curve.")
    retrieval_protocol: Literal["global_time", "leave_one_out"] = setting(
        "global_time",
        doc="What a retrieval model is asked for. global_time: all items that a user took in the "
        "period, from the history before it. leave_one_out: the last of them, from the history "
        "before its request.",
    )
    remove_seen: bool = setting(
        True, doc="Items of a user's history are neither listed nor asked for."
    )
    cutoffs: tuple[int, ...] = setting(
        (10, 50), at_least=1, doc="Lengths K of the lists: hr_K, recall_K, ndcg_K and so on."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "evaluate")
        rule = "at least one length, each once"
        is_list = len(self.cutoffs) == len(set(self.cutoffs)) > 0
        require(is_list, "evaluate.cutoffs", self.cutoffs, rule)
