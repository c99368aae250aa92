"""The tables that pass between the stages: LOG (what happened), SEQUENCE (one row per user), USER
and ITEM.

Definitions: `event_time` is in milliseconds since 1970, UTC. An *action mask* is an int32 with one
bit per action of `SourceConfig.actions`, in that order; a *known mask* has the same bits, 0 where
the action of a row is not known (then it is neither a negative in the history nor a label).
"""

from collections.abc import Sequence

import pyarrow as pa

MAX_ACTIONS = 31  # bits of an int32 action mask, the sign bit left alone
DAY_MS = 24 * 3600 * 1000

LOG_REQUIRED: dict[str, pa.DataType] = {
    "user_id": pa.int64(),
    "item_id": pa.int64(),
    "event_time": pa.int64(),
}
LOG_OPTIONAL: dict[str, pa.DataType] = {
    "request_id": pa.int64(),  # rows shown together; absent: rows of one user with equal event_time
    "watch_ms": pa.int64(),  # outcome: history only
    "order_only": pa.bool_(),  # event_time gives an order, not a time
    "known_mask": pa.int32(),  # bit per action, default all known
    "tie_breaker": pa.int64(),  # orders rows of equal event_time
}
# uint64 over all columns of the source row, mapped or not: exact duplicates agree in it
ROW_DIGEST = "row_digest"


def log_schema(actions: Sequence[str], request_columns: Sequence[str]) -> pa.Schema:
    """LOG as the builder sees it, with every optional column: required, actions (int8), request
    columns, optional.
    """
    fields = [pa.field(name, dtype, nullable=False) for name, dtype in LOG_REQUIRED.items()]
    fields += [pa.field(name, pa.int8()) for name in actions]
    fields += [pa.field(name, pa.int32()) for name in request_columns]
    fields += [pa.field(name, dtype) for name, dtype in LOG_OPTIONAL.items()]
    return pa.schema([*fields, pa.field(ROW_DIGEST, pa.uint64())])


def sequence_lists(request_columns: Sequence[str]) -> dict[str, pa.DataType]:
    """The list columns of SEQUENCE, all of one length per user, oldest event first, and their
    element types.

    `request_index` numbers a user's requests from 0 (first_position does not shift it): rows of one
    request share it. `watch_ms` is -1 where unknown; a request column is -1 where unknown.
    """
    lists = {
        "item_id": pa.int64(),
        "event_time": pa.int64(),
        "action_mask": pa.int32(),
        "known_mask": pa.int32(),
        "watch_ms": pa.int64(),
        "request_index": pa.int32(),
        "order_only": pa.bool_(),
    }
    return lists | {name: pa.int32() for name in request_columns}


def sequence_schema(request_columns: Sequence[str]) -> pa.Schema:
    """SEQUENCE: one row per user.

    `first_position` counts older rows dropped by a cap or by retention.
    """
    scalars = [
        pa.field("user_id", pa.int64()),
        pa.field("user_bucket", pa.int32()),
        pa.field("first_position", pa.int64()),
    ]
    return pa.schema(
        [
            *scalars,
            *(pa.field(n, pa.large_list(t)) for n, t in sequence_lists(request_columns).items()),
        ]
    )
