"""What a batch holds: the split by time, and the columns that become features."""

import itertools
import math
from dataclasses import dataclass, field
from typing import Literal

from pipeline.config.errors import require
from pipeline.config.reading import parse_time
from pipeline.config.setting import check_ranges, describe, setting
from pipeline.schema import WATCH_MS


@dataclass(frozen=True, kw_only=True, slots=True)
class SplitConfig:
    """One split for all users, by the request's event_time: train < t_val <= validation < t_test
    <= test < t_end.
    """

    t_val: str = setting(
        "2022-05-01T00:00:00+08:00",
        doc="Start of the validation period, ISO 8601 with its UTC offset.",
    )
    t_test: str = setting(
        "2022-05-03T00:00:00+08:00",
        doc="Start of the test period, ISO 8601 with its UTC offset; later than split.t_val.",
    )
    t_end: str | None = setting(
        None,
        doc="End of the test period, ISO 8601 with its UTC offset; later than split.t_test. Null: "
        "to the end of the logs.",
    )
    refit: bool = setting(
        False, doc="Train the frozen settings up to split.t_test instead of split.t_val."
    )

    def __post_init__(self) -> None:
        self._refuse_periods_out_of_order()

    def _refuse_periods_out_of_order(self) -> None:
        later = f"later than split.t_val {self.t_val}"
        require(self.val_ms < self.test_ms, "split.t_test", self.t_test, later)

        if self.t_end is not None:
            later = f"later than split.t_test {self.t_test}"
            require(self.end_ms > self.test_ms, "split.t_end", self.t_end, later)

    @property
    def val_ms(self) -> int:
        """Start of the validation period, in milliseconds since 1970 UTC."""
        return parse_time("split.t_val", self.t_val)

    @property
    def test_ms(self) -> int:
        """Start of the test period, in milliseconds since 1970 UTC."""
        return parse_time("split.t_test", self.t_test)

    @property
    def end_ms(self) -> int:
        """End of the test period, in milliseconds since 1970 UTC; later than all time for null."""
        return 2**62 if self.t_end is None else parse_time("split.t_end", self.t_end)

    @property
    def train_end_ms(self) -> int:
        """Whatever is learned across users comes from rows strictly before this."""
        return self.test_ms if self.refit else self.val_ms


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnFeature:
    """One column as an embedding. Code 0 is "missing or not seen in the training period"."""

    dim: int = setting(8, at_least=1, doc="Width of the embedding.")
    kind: Literal["categorical", "quantile", "list"] = setting(
        "categorical",
        doc="categorical: one row per value. quantile: a number, a date or a time, one row per "
        "bucket of its quantiles in the training period. list: a list, or text with a separator; "
        "the mean of its values' rows.",
    )
    buckets: int = setting(16, at_least=2, doc="Number of buckets of a quantile column.")
    most_values: int | None = setting(
        None,
        at_least=1,
        doc="Of a categorical column or a list: number of values with a row of their own, those of "
        "the most items or users; the others are as missing. Null: all.",
    )
    list_length: int = setting(
        8, at_least=1, doc="Values of a list that are read of an item or user; later ones are not."
    )
    separator: str = setting("|", doc="Text between the values of a list that is text.")

    def __post_init__(self) -> None:
        check_ranges(self, "features.*")
        require(self.separator != "", "features.*.separator", self.separator, "a text")
        has_values = self.most_values is None or self.kind != "quantile"
        rule = "null where kind is quantile"
        require(has_values, "features.*.most_values", self.most_values, rule)

    @property
    def num_codes(self) -> int:
        """Codes that an item or user has of the column."""
        return self.list_length if self.kind == "list" else 1


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryFeature:
    """An outcome column of the history, as an embedding of the bucket that its value lies in.

    An unknown value has an embedding of its own.
    """

    edges: tuple[float, ...] = field(
        metadata=describe(
            "Rising numbers: one bucket below the first edge, one from each edge to the next, and "
            "one from the last edge on."
        )
    )

    def __post_init__(self) -> None:
        rising = all(low < high for low, high in itertools.pairwise(self.edges))
        finite = all(math.isfinite(edge) for edge in self.edges)
        usable = len(self.edges) > 0 and rising and finite
        require(usable, "features.history.*.edges", self.edges, "rising numbers, at least one")


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseFeature:
    """Smoothed rates of every task, and a count, over the rows that agree with a candidate in some
    columns.
    """

    by: tuple[str, ...] = field(
        metadata=describe(
            "Columns in which the rows agree with the candidate: item_id, columns of features.item "
            "or features.request; user means the user's own earlier rows."
        )
    )
    rows: Literal["timed", "order_only", "all"] = setting(
        "timed", doc="Rows that count: those with a real time, those with an order alone, or all."
    )
    prior: float = setting(
        20.0, above=0, doc="Number of rows at the base rate from which every rate starts."
    )
    within_minutes: float | None = setting(
        None,
        above=0,
        doc="Only rows of the user at most so many minutes before the request count. Null: no "
        "limit.",
    )

    def __post_init__(self) -> None:
        require(len(self.by) > 0, "features.dense.*.by", self.by, "at least one column")
        check_ranges(self, "features.dense.*")

        self._refuse_age_of_rows_without_a_time()

    def _refuse_age_of_rows_without_a_time(self) -> None:
        """The age at a request is known of a user's own timed rows alone."""
        known = self.live and self.rows == "timed"
        require(
            self.within_minutes is None or known,
            "features.dense.*.within_minutes",
            self.within_minutes,
            'null unless "user" is in by and rows is timed',
        )

    @property
    def live(self) -> bool:
        """True if it is counted over the user's own past, which grows with every event; else it is
        counted over the training period.
        """
        return "user" in self.by


@dataclass(frozen=True, kw_only=True, slots=True)
class FeatureConfig:
    """What the model sees of items, users and requests."""

    item_id_dim: int = setting(16, at_least=1, doc="Width of the embedding of an item id.")
    item_id_dropout: float = setting(
        0.0, at_least=0, below=1, doc="Share of the item ids that training reads as unknown."
    )
    item: dict[str, ColumnFeature] = setting(
        {}, doc="Column of the item table: how it becomes an embedding."
    )
    user: dict[str, ColumnFeature] = setting(
        {}, doc="Column of the user table: how it becomes an embedding."
    )
    user_tokens: dict[str, tuple[str, ...]] = setting(
        {}, doc="Context token: the columns of features.user that it holds."
    )
    request: dict[str, ColumnFeature] = setting(
        {},
        doc='Column of source.request_columns, or the derived "hour": how it becomes an embedding.',
    )
    hour_utc_offset: float = setting(
        0.0,
        at_least=-14,
        at_most=14,
        doc='Offset from UTC, in hours, at which "hour" is the hour of day of event_time.',
    )
    watch_seconds: tuple[float, ...] = setting(
        (),
        above=0,
        doc="Thresholds of watch time, in seconds. Each adds a bit to the history's action mask: "
        "watched at least so long. Unknown where the watch time is.",
    )
    watch_shares: tuple[float, ...] = setting(
        (),
        above=0,
        doc="Thresholds of watch time as a share of the item's duration. Each adds a bit to the "
        "history's action mask. Unknown where watch time or duration is.",
    )
    duration_ms_column: str | None = setting(
        None,
        doc="Column of the item table with the duration in milliseconds, for "
        "features.watch_shares.",
    )
    history: dict[str, HistoryFeature] = setting(
        {},
        doc="Outcome column, watch_ms or one of source.outcome_columns: the buckets in which the "
        "model reads it on history rows.",
    )
    dense: dict[str, DenseFeature] = setting(
        {}, doc="Name of your own: rates that the candidates carry."
    )
    dense_step_minutes: int = setting(
        60,
        at_least=1,
        doc="Step in minutes: a training row reads the training period's counts as of the last "
        "full step before it.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "features")

        self._refuse_shares_of_an_unknown_duration()
        self._refuse_rates_by_unknown_columns()
        self._refuse_user_columns_without_a_token()
        self._refuse_numbers_as_request_columns()

    def _refuse_shares_of_an_unknown_duration(self) -> None:
        known = self.duration_ms_column is not None
        require(
            known == bool(self.watch_shares),
            "features.duration_ms_column",
            self.duration_ms_column,
            "a column of the ITEM table where features.watch_shares are given, and only there",
        )

    def _refuse_rates_by_unknown_columns(self) -> None:
        request = [name for name in self.request if name != "hour"]
        single = [name for name, column in self.item.items() if column.num_codes == 1]
        columns = ["user", "item_id", *single, *request]

        for name, feature in self.dense.items():
            for column in feature.by:
                require(column in columns, f"features.dense.{name}.by", column, f"one of {columns}")

    def _refuse_user_columns_without_a_token(self) -> None:
        grouped = [name for names in self.user_tokens.values() for name in names]
        for name in grouped:
            rule = "a column listed in features.user"
            require(name in self.user, "features.user_tokens", name, rule)

        for name in self.user:
            rule = "part of a token in features.user_tokens"
            require(name in grouped, "features.user", name, rule)

    def _refuse_numbers_as_request_columns(self) -> None:
        for name, feature in self.request.items():
            require(
                feature.kind == "categorical",
                f"features.request.{name}.kind",
                feature.kind,
                "categorical",
            )

    @property
    def outcomes(self) -> tuple[str, ...]:
        """The outcome columns of the history that the model reads."""
        names = list(self.history)
        if self.watch_seconds or self.watch_shares:
            names.append(WATCH_MS.name)
        return tuple(dict.fromkeys(names))

    @property
    def tables(self) -> tuple[str, ...]:
        """The embedding tables that grow with the data, as `train.tables` names them."""
        names = ["item_id"]
        names += [f"item.{name}" for name in self.item]
        names += [f"request.{name}" for name in self.request]
        names += [f"user.{name}" for name in self.user]
        return tuple(names)
