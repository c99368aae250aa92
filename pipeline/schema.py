"""The columns of an event, once, and the tables that pass between the stages.

LOG (what happened), SEQUENCE (one row per user), USER and ITEM. The rules of cleaning, the flat
columns of a batch and the rows of the server's event logs follow from the same `Column`s.

Definitions: `event_time` is in milliseconds since 1970, UTC. An *action mask* is an int32 with one
bit per action of `SourceConfig.actions`, in that order; a *known mask* has the same bits, 0 where
the action of a row is not known (then it is neither a negative in the history nor a label).
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa

MAX_ACTIONS = 31  # bits of an int32 action mask, the sign bit left alone
MAX_INT32 = 2**31 - 1
MAX_EXACT = 2**53  # whole numbers up to here are the same as JSON numbers and as float64
DAY_MS = 24 * 3600 * 1000

# key: names the event · action: yes or no · request: known when the items are asked for, rides on
# candidates too · outcome: a number that comes with the event, seen in the history only · mark: how
# the row is to be read
Role = Literal["key", "action", "request", "outcome", "mark"]


@dataclass(frozen=True, slots=True)
class Column:
    """A column of LOG."""

    name: str
    dtype: pa.DataType
    role: Role
    unknown: float | None = None  # stands in SEQUENCE for a value that a row does not have
    at_least: float | None = None  # a smaller value breaks a rule
    at_most: float | None = None

    @property
    def is_float(self) -> bool:
        return pa.types.is_floating(self.dtype)

    def is_unknown(self, value: float) -> bool:
        """True for what stands in SEQUENCE for a value that a row does not have."""
        return math.isnan(value) if self.is_float else value == self.unknown

    def refusal(self, value: float) -> str | None:
        """The rule that a posted value breaks, None where it breaks none."""
        if not math.isfinite(value):
            return "a finite number"
        if not self.is_float and (value != int(value) or abs(value) > MAX_EXACT):
            return f"a whole number up to {MAX_EXACT}"
        if self.at_least is not None and value < self.at_least:
            return f"{self.at_least:g} or more"
        return None


LOG_KEYS = (
    Column("user_id", pa.int64(), "key", at_least=0),
    Column("item_id", pa.int64(), "key", at_least=0),
    Column("event_time", pa.int64(), "key"),  # its range is `sequences.earliest_time` and the clock
)
# ids that may be text in the logs (pipeline/logs/ids.py); request_id is nobody's to see again
NAMED_IDS = ("user_id", "item_id")
TEXT_IDS = (*NAMED_IDS, "request_id")
WATCH_MS = Column("watch_ms", pa.int64(), "outcome", unknown=-1, at_least=0)
LOG_OPTIONAL_COLUMNS = (
    # rows shown together; absent: rows of one user with equal event_time
    Column("request_id", pa.int64(), "mark"),
    WATCH_MS,
    # event_time gives an order, not a time
    Column("order_only", pa.bool_(), "mark", unknown=False),
    # bit per action, default all known
    Column("known_mask", pa.int32(), "mark"),
    # orders rows of equal event_time
    Column("tie_breaker", pa.int64(), "mark"),
)
LOG_REQUIRED = {column.name: column.dtype for column in LOG_KEYS}
LOG_OPTIONAL = {column.name: column.dtype for column in LOG_OPTIONAL_COLUMNS}

# uint64 over all columns of the source row, mapped or not: exact duplicates agree in it
ROW_DIGEST = "row_digest"
# names that are taken, in LOG, in SEQUENCE or among the features
RESERVED = frozenset(
    {*LOG_REQUIRED, *LOG_OPTIONAL, ROW_DIGEST, "user_bucket", "reason", "source_row", "hour"}
    | {"source_file", "first_position", "action_mask", "request_index"}
)


def outcome_column(name: str, kind: str, at_least: float | None) -> Column:
    """A number that the user's configuration declares, `kind` "int" or "float".

    A float that is not known is NaN in SEQUENCE; an int, which is 0 or more, is -1.
    """
    if kind == "float":
        return Column(name, pa.float64(), "outcome", unknown=math.nan, at_least=at_least)
    return Column(name, pa.int64(), "outcome", unknown=-1, at_least=at_least)


@dataclass(frozen=True)
class EventColumns:
    """The columns of one source's events: those of every source, and those that it declares."""

    actions: tuple[str, ...] = ()
    request: tuple[str, ...] = ()
    declared: tuple[Column, ...] = ()  # outcomes beside watch_ms
    # of TEXT_IDS those that are text in the logs; here their codes stand for them, int64
    text_ids: tuple[str, ...] = ()
    text_request: tuple[str, ...] = ()  # of `request` those that are text, with a code for each

    @property
    def request_columns(self) -> tuple[Column, ...]:
        return tuple(
            Column(name, pa.int32(), "request", unknown=-1, at_least=0, at_most=MAX_INT32)
            for name in self.request
        )

    @property
    def outcomes(self) -> tuple[Column, ...]:
        return WATCH_MS, *self.declared

    @property
    def log_columns(self) -> tuple[Column, ...]:
        """All of LOG but the row's digest, in LOG's order."""
        actions = (Column(name, pa.int8(), "action") for name in self.actions)
        return (
            *LOG_KEYS,
            *actions,
            *self.request_columns,
            *LOG_OPTIONAL_COLUMNS,
            *self.declared,
        )

    @property
    def required(self) -> tuple[str, ...]:
        """What every file of the logs must have."""
        declared = (column.name for column in self.declared)
        return (*LOG_REQUIRED, *self.actions, *self.request, *declared)

    def log_schema(self) -> pa.Schema:
        """LOG as the builder sees it, with every optional column."""
        fields = [
            pa.field(column.name, column.dtype, nullable=column.role != "key")
            for column in self.log_columns
        ]
        return pa.schema([*fields, pa.field(ROW_DIGEST, pa.uint64())])

    def sequence_lists(self) -> dict[str, pa.DataType]:
        """The list columns of SEQUENCE and their element types.

        All lists of a user have one length, oldest event first. `request_index` numbers a user's
        requests from 0 (first_position does not shift it): rows of one request share it. What is
        not known of a row is its column's `unknown`.
        """
        lists = {
            "item_id": pa.int64(),
            "event_time": pa.int64(),
            "action_mask": pa.int32(),
            "known_mask": pa.int32(),
            WATCH_MS.name: WATCH_MS.dtype,
            "request_index": pa.int32(),
            "order_only": pa.bool_(),
        }
        more = (*self.request_columns, *self.declared)
        return lists | {column.name: column.dtype for column in more}

    def sequence_schema(self) -> pa.Schema:
        """SEQUENCE: one row per user.

        `first_position` counts older rows dropped by a cap or by retention.
        """
        scalars = [
            pa.field("user_id", pa.int64()),
            pa.field("user_bucket", pa.int32()),
            pa.field("first_position", pa.int64()),
        ]
        lists = [
            pa.field(name, pa.large_list(dtype)) for name, dtype in self.sequence_lists().items()
        ]
        return pa.schema([*scalars, *lists])

    def unknown_values(self) -> dict[str, Any]:
        """What stands in SEQUENCE for a value that a row does not have, by list column."""
        unknown = {column.name: column.unknown for column in self.log_columns}
        found = {}
        for name in self.sequence_lists():
            value = unknown.get(name)
            found[name] = 0 if value is None else value
        return found
