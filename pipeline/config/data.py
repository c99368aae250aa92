"""Logs, sequences, splits and features."""

from dataclasses import dataclass, field, fields
from typing import Literal

from pipeline.config.values import S3, parse_time, require, split_s3
from pipeline.schema import MAX_ACTIONS


@dataclass(frozen=True, kw_only=True, slots=True)
class SideTable:
    """A USER or ITEM table: Parquet with an id column and categorical or numeric columns."""

    path: str  # a file or folder, or s3://bucket/prefix
    id_column: str


@dataclass(frozen=True, kw_only=True, slots=True)
class SyntheticConfig:
    """Dirichlet-process logs (HSTU, arXiv:2402.17152, appendix C) with times, requests, actions and
    long histories.
    """

    num_users: int = 2000
    num_items: int = 20_000
    num_categories: int = 100
    max_history: int = 256  # rows of the longest user; up to 16,384
    # Zipf: the user of rank r has about max_history / r**exponent rows
    length_exponent: float = 1.0
    min_history: int = 8
    candidates_per_request: int = 4
    num_days: int = 12
    start: str = "2022-04-24T00:00:00+08:00"
    rows_per_file: int = 1_000_000  # by_day: rows that are made, and held in memory, at a time
    by_day: bool = False  # one file per day, as logs grow, instead of files of whole users
    # Tastes that show early and are asked after long, each once: so many categories, beside
    # num_categories; 0: none.
    lasting_categories: int = 0
    early_rows: int = 1024  # of a user, the first ones, in which the tastes show
    quiet_rows: int = 1280  # after these, without any sign of them

    def __post_init__(self) -> None:
        require(
            1 <= self.max_history <= 16_384,
            "source.synthetic.max_history",
            self.max_history,
            "1 to 16384 rows",
        )
        require(
            1 <= self.min_history <= self.max_history,
            "source.synthetic.min_history",
            self.min_history,
            "1 to max_history",
        )
        lasting = self.lasting_categories
        require(lasting >= 0, "source.synthetic.lasting_categories", lasting, "0 or more")
        for name in ("early_rows", "quiet_rows") if lasting else ():
            rows, rule = getattr(self, name), "a multiple of candidates_per_request above 0"
            whole = rows > 0 and rows % self.candidates_per_request == 0
            require(whole, f"source.synthetic.{name}", rows, rule)
        for name in (
            "num_users",
            "num_items",
            "num_categories",
            "candidates_per_request",
            "num_days",
            "rows_per_file",
        ):
            require(
                getattr(self, name) >= 1,
                f"source.synthetic.{name}",
                getattr(self, name),
                "1 or more",
            )
        parse_time("source.synthetic.start", self.start)


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where the logs are and what their columns are called."""

    kind: Literal["parquet", "kuairand", "synthetic"] = "parquet"
    # A Parquet file or folder, or s3://bucket/prefix (docs/data.md); the data folder of a public
    # dataset; unused for synthetic.
    path: str | None = None
    # LOG column -> name in the user's files, where they differ
    columns: dict[str, str] = field(default_factory=dict)
    actions: tuple[str, ...] = ("is_click",)  # bit i of the action mask
    # int32 columns known when a request is made; they ride on every row
    request_columns: tuple[str, ...] = ()
    users: SideTable | None = None
    items: SideTable | None = None
    # the last order_only row of a user carries a real time (KuaiRand: yes)
    order_only_end_is_real: bool = False
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        require(len(self.actions) > 0, "source.actions", self.actions, "at least one action column")
        most = f"at most {MAX_ACTIONS} action columns"
        require(len(self.actions) <= MAX_ACTIONS, "source.actions", self.actions, most)
        names = [*self.actions, *self.request_columns]
        require(
            len(set(names)) == len(names),
            "source.actions + source.request_columns",
            names,
            "free of repeats",
        )
        if self.kind != "synthetic":
            require(
                self.path is not None,
                "source.path",
                self.path,
                f"a path when source.kind is {self.kind}",
            )
        sides = {"users": self.users, "items": self.items}
        paths = {"source.path": self.path} | {
            f"source.{name}.path": side.path for name, side in sides.items() if side
        }
        for key, path in paths.items():
            if path is not None and "://" in path:
                require(
                    path.startswith(S3),
                    key,
                    path,
                    "a path of the file system, or s3://bucket/prefix",
                )
                split_s3(key, path)


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig:
    """How LOG rows become one row per user."""

    # Hash buckets of users = partitions of the store. None: as many as the first build's logs need
    # for building one in about 256 MiB of memory; kept when logs are appended.
    num_buckets: int | None = None
    max_rows_per_user: int = 16_384  # the newest kept; older ones counted in first_position
    # jobs.compact_sequences drops events older than so many days before the newest
    keep_days: int | None = None
    # an earlier event_time is quarantined (seconds read as ms, say)
    earliest_time: str = "2000-01-01T00:00:00+00:00"
    # a later one is quarantined; None: one day after the clock when the job starts
    latest_time: str | None = None

    def __post_init__(self) -> None:
        require(
            self.num_buckets is None or self.num_buckets >= 1,
            "sequences.num_buckets",
            self.num_buckets,
            "1 or more",
        )
        require(
            self.max_rows_per_user >= 1,
            "sequences.max_rows_per_user",
            self.max_rows_per_user,
            "1 or more",
        )
        days = self.keep_days
        require(days is None or days >= 1, "sequences.keep_days", days, "1 or more, or null")
        parse_time("sequences.earliest_time", self.earliest_time)
        if self.latest_time is not None:
            parse_time("sequences.latest_time", self.latest_time)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """What a build must show to be published; whoever changes it builds the same sequences."""

    min_users: int = 1
    min_rows: int = 1  # kept
    max_quarantined_share: float = 0.1  # of the rows read
    # of the good rows: older than a user's newest sequences.max_rows_per_user
    max_capped_share: float = 1.0
    max_user_share: float = 1.0  # of the good rows that one user has, before the cap
    max_null_share: dict[str, float] = field(default_factory=dict)  # by LOG column
    # by action, of the rows with a real time
    max_unknown_share: dict[str, float] = field(default_factory=dict)
    # by action: [lowest, highest]
    action_rate: dict[str, tuple[float, ...]] = field(default_factory=dict)
    # also hold the new version against the one it replaces, by the limits of `drift`
    drift: bool = False

    def __post_init__(self) -> None:
        for name in ("min_users", "min_rows"):
            require(getattr(self, name) >= 1, f"checks.{name}", getattr(self, name), "1 or more")
        shares = {
            name: getattr(self, name)
            for name in ("max_quarantined_share", "max_capped_share", "max_user_share")
        }
        for name in ("max_null_share", "max_unknown_share"):
            shares |= {f"{name}.{column}": share for column, share in getattr(self, name).items()}
        for name, share in shares.items():
            require(0 <= share <= 1, f"checks.{name}", share, "between 0 and 1")
        for action, bounds in self.action_rate.items():
            in_order = len(bounds) == 2 and 0 <= bounds[0] <= bounds[1] <= 1
            require(
                in_order,
                f"checks.action_rate.{action}",
                list(bounds),
                "[lowest, highest], both between 0 and 1",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DriftConfig:
    """How far a version may be from another one. A limit of null is not checked, the distance is
    shown all the same.

    All distances run from 0 to 1. Of two numbers it is |after - before| over the larger one; a
    divergence is Jensen-Shannon's to base 2: 0 for equal shares, 1 where nothing is common.
    """

    users: float | None = 0.5
    rows: float | None = 0.5
    action_rate: float | None = 0.3  # of each action, over the rows where it is known
    # |after - before| of each action's share of rows where it is known
    known_share: float | None = 0.1
    lengths: float | None = 0.1  # divergence of the users over rows per user, in powers of 2
    request_values: float | None = 0.1  # divergence of the rows over each request column's values
    # share of the later version's rows whose item the earlier one does not have
    new_item_rows: float | None = 0.5
    # share of the earlier version's rows whose item the later one does not have
    gone_item_rows: float | None = None
    items: float | None = None  # divergence of the rows over items

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            require(
                value is None or 0 <= value <= 1,
                f"drift.{limit.name}",
                value,
                "between 0 and 1, or null",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """Global split by the request's event_time: train < t_val <= validation < t_test <= test <
    t_end.
    """

    t_val: str = "2022-05-01T00:00:00+08:00"
    t_test: str = "2022-05-03T00:00:00+08:00"
    t_end: str | None = None  # None: to the end of the logs
    refit: bool = False  # train the frozen settings up to t_test instead of t_val

    def __post_init__(self) -> None:
        require(
            self.val_ms < self.test_ms,
            "split.t_test",
            self.t_test,
            f"later than split.t_val {self.t_val}",
        )
        if self.t_end is not None:
            require(
                self.end_ms > self.test_ms,
                "split.t_end",
                self.t_end,
                f"later than split.t_test {self.t_test}",
            )

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
        require(self.dim >= 1, "features.*.dim", self.dim, "1 or more")
        require(self.buckets >= 2, "features.*.buckets", self.buckets, "2 or more")


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseFeature:
    """Smoothed rates of every task, and a count, over the rows that agree with a candidate in some
    columns.
    """

    # "item_id", features.item or features.request columns; "user": the user's own earlier rows
    by: tuple[str, ...]
    rows: Literal["timed", "order_only", "all"] = "timed"  # which rows count
    prior: float = 20.0  # rows at the base rate that every rate starts from
    # of a user's own timed rows those at most so long before the request
    within_minutes: float | None = None

    def __post_init__(self) -> None:
        require(len(self.by) > 0, "features.dense.*.by", self.by, "at least one column")
        require(self.prior > 0, "features.dense.*.prior", self.prior, "greater than 0")
        minutes = self.within_minutes
        require(
            minutes is None or minutes > 0,
            "features.dense.*.within_minutes",
            minutes,
            "greater than 0, or null",
        )
        # only such rows have a time that a request's can be held against
        recent = self.live and self.rows == "timed"
        rule = 'null unless "user" is in by and rows is timed'
        require(minutes is None or recent, "features.dense.*.within_minutes", minutes, rule)

    @property
    def live(self) -> bool:
        """Counted over the user's own past, which grows with every event, not over the training
        period.
        """
        return "user" in self.by


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """What the model sees of items, users and requests."""

    item_id_dim: int = 16
    item_id_dropout: float = 0.0  # share of the item ids that training reads as unknown
    item: dict[str, ColumnFeature] = field(default_factory=dict)  # columns of the ITEM table
    user: dict[str, ColumnFeature] = field(default_factory=dict)  # columns of the USER table
    # context token -> the user columns in it
    user_tokens: dict[str, tuple[str, ...]] = field(default_factory=dict)
    # request columns, and the derived "hour"
    request: dict[str, ColumnFeature] = field(default_factory=dict)
    hour_utc_offset: float = 0.0  # hours; "hour" is the hour of day of event_time at this offset
    # Watch time as further bits of the history's action mask: watched at least so many seconds, or
    # at least that share of the item's duration. Where watch time or duration is unknown, so is the
    # bit.
    watch_seconds: tuple[float, ...] = ()
    watch_shares: tuple[float, ...] = ()
    duration_ms_column: str | None = None  # of the ITEM table
    # rates that candidates carry, by a name of your own
    dense: dict[str, DenseFeature] = field(default_factory=dict)
    # a training row reads the training period's counts as of the last full step before it
    dense_step_minutes: int = 60

    def __post_init__(self) -> None:
        for name in ("watch_seconds", "watch_shares"):
            require(
                all(x > 0 for x in getattr(self, name)),
                f"features.{name}",
                getattr(self, name),
                "greater than 0",
            )
        known = self.duration_ms_column is not None
        rule = "a column of the ITEM table where features.watch_shares are given, and only there"
        require(
            known == bool(self.watch_shares),
            "features.duration_ms_column",
            self.duration_ms_column,
            rule,
        )
        require(
            self.dense_step_minutes >= 1,
            "features.dense_step_minutes",
            self.dense_step_minutes,
            "1 or more",
        )
        columns = [
            "user",
            "item_id",
            *self.item,
            *(name for name in self.request if name != "hour"),
        ]
        for name, feature in self.dense.items():
            for column in feature.by:
                require(column in columns, f"features.dense.{name}.by", column, f"one of {columns}")
        require(self.item_id_dim >= 1, "features.item_id_dim", self.item_id_dim, "1 or more")
        require(
            0 <= self.item_id_dropout < 1,
            "features.item_id_dropout",
            self.item_id_dropout,
            "in [0, 1)",
        )
        grouped = [name for names in self.user_tokens.values() for name in names]
        for name in grouped:
            require(
                name in self.user, "features.user_tokens", name, "a column listed in features.user"
            )
        for name in self.user:
            require(
                name in grouped, "features.user", name, "part of a token in features.user_tokens"
            )
        for name, feature in self.request.items():
            require(
                feature.kind == "categorical",
                f"features.request.{name}.kind",
                feature.kind,
                "categorical",
            )
