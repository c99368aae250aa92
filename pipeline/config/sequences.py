"""From logs to sequences: a row per user, and what a version must show to be published."""

from dataclasses import dataclass
from typing import Literal

from pipeline.config.errors import require
from pipeline.config.reading import parse_time
from pipeline.config.setting import check_ranges, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceConfig:
    """How log rows become one row per user."""

    from_run: str | None = setting(
        None,
        doc="Another run of the same runs_dir whose published sequences this one reads: one build "
        "serves many trainings. Null: its own.",
    )
    num_buckets: int | None = setting(
        None,
        at_least=1,
        doc="Hash buckets of users, which are the partitions of the store. Null: as many as the "
        "first build's logs need to build one in about 256 MiB of memory. Kept when logs are "
        "appended.",
    )
    max_rows_per_user: int = setting(
        16_384,
        at_least=1,
        doc="Newest rows of a user that are kept; older ones are counted in first_position.",
    )
    repeats: Literal["merge", "first"] = setting(
        "merge",
        doc="What becomes of rows of one user, item and time. merge: they become one row, where an "
        "action is true if it is true in any of them, and unknown if it is unknown in all. first: "
        "the first by tie_breaker stays, the others are quarantined.",
    )
    repeated_outcomes: Literal["largest", "last_file"] = setting(
        "largest",
        doc="Number that merged rows keep of watch_ms and of each of source.outcome_columns: the "
        "largest, or that of the file whose path sorts last.",
    )
    keep_days: int | None = setting(
        None,
        at_least=1,
        doc="Age in days, counted back from the newest event, above which jobs.compact_sequences "
        "drops events. Null: it drops none.",
    )
    max_dropped_share: float = setting(
        0.5,
        at_least=0,
        at_most=1,
        doc="Largest share of the rows that one run of jobs.compact_sequences may drop for their "
        "age; it refuses to drop more.",
    )
    earliest_time: str = setting(
        "2000-01-01T00:00:00+00:00",
        doc="Earliest event_time, ISO 8601 with its UTC offset. An earlier one, seconds read as "
        "milliseconds for instance, is quarantined.",
    )
    latest_time: str | None = setting(
        None,
        doc="Latest event_time, ISO 8601 with its UTC offset; a later one is quarantined. Null: "
        "one day after the clock when the job starts.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "sequences")

        earliest_ms = parse_time("sequences.earliest_time", self.earliest_time)
        if self.latest_time is not None:
            latest_ms = parse_time("sequences.latest_time", self.latest_time)
            later = f"later than sequences.earliest_time {self.earliest_time}"
            require(latest_ms > earliest_ms, "sequences.latest_time", self.latest_time, later)


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckConfig:
    """What a build must show to be published. The sequences do not depend on these settings."""

    min_users: int = setting(1, at_least=1, doc="Fewest users.")
    min_rows: int = setting(1, at_least=1, doc="Fewest rows that are kept.")
    max_quarantined_share: float = setting(
        0.1, at_least=0, at_most=1, doc="Largest share of the rows read that are quarantined."
    )
    min_joined_share: float = setting(
        0.0,
        at_least=0,
        at_most=1,
        doc="Smallest share of the users and of the items in the logs that their side tables have; "
        "a table that has none is refused in any case.",
    )
    max_capped_share: float = setting(
        1.0,
        at_least=0,
        at_most=1,
        doc="Largest share of the good rows that are older than a user's newest "
        "sequences.max_rows_per_user.",
    )
    max_user_share: float = setting(
        1.0,
        at_least=0,
        at_most=1,
        doc="Largest share of the good rows that one user has, before the cap.",
    )
    max_null_share: dict[str, float] = setting(
        {}, at_least=0, at_most=1, doc="Log column: largest share of its rows that are null."
    )
    max_unknown_share: dict[str, float] = setting(
        {},
        at_least=0,
        at_most=1,
        doc="Action: largest share of the rows with a real time where it is unknown.",
    )
    action_rate: dict[str, tuple[float, ...]] = setting(
        {}, doc="Action: [lowest, highest] share of ones among its known rows, both from 0 to 1."
    )
    drift: bool = setting(
        False,
        doc="Also hold the new version against the one that it replaces, by the limits of "
        "section drift.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "checks")
        self._refuse_rates_out_of_order()

    def _refuse_rates_out_of_order(self) -> None:
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
    """How far a version may be from another one. A limit of null is not checked; the distance is
    shown all the same.

    All distances run from 0 to 1. The distance of two numbers is |after - before| over the larger
    one. A divergence is Jensen-Shannon's to base 2: 0 for equal shares, 1 where nothing is common.
    """

    users: float | None = setting(
        0.5, at_least=0, at_most=1, doc="Largest distance of the numbers of users."
    )
    rows: float | None = setting(
        0.5, at_least=0, at_most=1, doc="Largest distance of the numbers of rows."
    )
    action_rate: float | None = setting(
        0.3,
        at_least=0,
        at_most=1,
        doc="Largest distance of an action's rates, over the rows where it is known.",
    )
    known_share: float | None = setting(
        0.1,
        at_least=0,
        at_most=1,
        doc="Largest |after - before| of the share of rows where an action is known.",
    )
    lengths: float | None = setting(
        0.1,
        at_least=0,
        at_most=1,
        doc="Largest divergence of the users over rows per user, in powers of 2.",
    )
    request_values: float | None = setting(
        0.1,
        at_least=0,
        at_most=1,
        doc="Largest divergence of the rows over a request column's values.",
    )
    new_item_rows: float | None = setting(
        0.5,
        at_least=0,
        at_most=1,
        doc="Largest share of the later version's rows whose item the earlier one lacks.",
    )
    gone_item_rows: float | None = setting(
        None,
        at_least=0,
        at_most=1,
        doc="Largest share of the earlier version's rows whose item the later one lacks.",
    )
    items: float | None = setting(
        None, at_least=0, at_most=1, doc="Largest divergence of the rows over items."
    )

    def __post_init__(self) -> None:
        check_ranges(self, "drift")
