"""The columns of an event, once, and the tables that pass between the stages.

LOG (what happened), SEQUENCE (one row per user), USER and ITEM. The rules of cleaning, the flat
columns of a batch and the rows of the server's event logs follow from the same `Column`s.

    LOG        user_id  item_id  event_time  click  like  tab          a row for each event
               U1       N7       1000        1      0     2
               U1       N9       2000        0      1     null

    SEQUENCE   user_id  item_id   event_time    action_mask  tab       a row for each user
               U1       [N7, N9]  [1000, 2000]  [0b01, 0b10] [2, -1]

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

Role = Literal[
    "key",  # names the event
    "action",  # yes or no
    "request",  # known when the items are asked for: rides on candidates too
    "outcome",  # a number that comes with the event: seen in the history only
    "mark",  # how the row is to be read
]


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

# ids that people see again, and those that may be text in the logs (pipeline/logs/ids.py)
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

# names that a user's configuration cannot give to a column of its own
_OF_SEQUENCE = {"user_bucket", "first_position", "action_mask", "request_index"}
_OF_QUARANTINE = {"reason", "source_file", "source_row"}
_OF_FEATURES = {"hour"}
RESERVED = frozenset(
    {*LOG_REQUIRED, *LOG_OPTIONAL, ROW_DIGEST} | _OF_SEQUENCE | _OF_QUARANTINE | _OF_FEATURES
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
    """The columns of one source's events: those of every source, and those that it declares.

    What is text in the logs is a code in all tables: int64 of an id, int32 of a request column.
    """

    actions: tuple[str, ...] = ()
    request: tuple[str, ...] = ()
    declared: tuple[Column, ...] = ()  # outcomes beside watch_ms
    text_ids: tuple[str, ...] = ()  # of TEXT_IDS those that are text in the logs
    text_request: tuple[str, ...] = ()  # of `request` those that are text in the logs

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
        """Names of the columns that every file of the logs must have."""
        declared = [column.name for column in self.declared]
        return (*LOG_REQUIRED, *self.actions, *self.request, *declared)

    def log_schema(self) -> pa.Schema:
        """LOG as the builder sees it, with every optional column."""
        fields = []
        for column in self.log_columns:
            is_key = column.role == "key"
            fields.append(pa.field(column.name, column.dtype, nullable=not is_key))

        fields.append(pa.field(ROW_DIGEST, pa.uint64()))
        return pa.schema(fields)

    def sequence_lists(self) -> dict[str, pa.DataType]:
        """The list columns of SEQUENCE and their element types.

        All lists of a user have one length, oldest event first. `request_index` numbers a user's
        requests from 0 (first_position does not shift it): rows of one request share it. What is
        not known of a row is its column's `unknown`.
        """
        of_every_source = {
            "item_id": pa.int64(),
            "event_time": pa.int64(),
            "action_mask": pa.int32(),
            "known_mask": pa.int32(),
            WATCH_MS.name: WATCH_MS.dtype,
            "request_index": pa.int32(),
            "order_only": pa.bool_(),
        }
        of_this_source = (*self.request_columns, *self.declared)
        return of_every_source | {column.name: column.dtype for column in of_this_source}

    def sequence_schema(self) -> pa.Schema:
        """SEQUENCE: one row per user.

        `first_position` counts older rows dropped by a cap or by retention.
        """
        fields = [
            pa.field("user_id", pa.int64()),
            pa.field("user_bucket", pa.int32()),
            pa.field("first_position", pa.int64()),
        ]
        for name, dtype in self.sequence_lists().items():
            fields.append(pa.field(name, pa.large_list(dtype)))
        return pa.schema(fields)

    def unknown_values(self) -> dict[str, Any]:
        """What stands in SEQUENCE for a value that a row does not have, by list column."""
        declared = {column.name: column.unknown for column in self.log_columns}

        unknown = {}
        for name in self.sequence_lists():
            value = declared.get(name)
            unknown[name] = 0 if value is None else value  # keys, masks, request_index
        return unknown
