"""Lists for many users as columns: the body and the answer of `/v1/recommend/arrow`.

The body is one Arrow IPC stream: a column `user_id` (int64, or string) and a column per request
feature that differs between users (int32, or text; null: as in the options); in the schema's
metadata, under `recommend`, the JSON of `ArrowOptions`.

The answer has a row per item: `user_id`, `place` (int32, 0 is best), `item_id`, `score`,
`retrieval_score` (float32) and `source`; under `recommend` the other fields of each user's answer.
"""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.recommend.tables import lists_table
from serve_app.columns import (
    BadBody,
    read_ids,
    read_object,
    read_stream,
    refuse_many_users,
    write_stream,
)
from serve_app.ids import own_id, read_id
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import ArrowOptions, ListOptions, RecommendRequest
from serve_app.schemas import Refusal, TextValue

OPTIONS = b"recommend"  # the metadata key
USER_ID = "user_id"


def read_requests(body: bytes, most_users: int) -> list[RecommendRequest]:
    """The request of each user of the body.

    Raises:
        BadBody: not an Arrow stream, a column or type that does not belong there, bad options, or
        more than `most_users`.
    """
    table = read_stream(body, USER_ID)
    options = _read_options(table.schema.metadata or {})
    if table.num_rows == 0:
        raise BadBody([Refusal.of(["body", USER_ID], "at least one user", 0)])
    refuse_many_users(table.num_rows, most_users)

    # what all users have in common
    shared = {name: getattr(options, name) for name in ListOptions.model_fields}
    shared |= {"request_time_ms": options.request_time_ms, "order_by": options.order_by}

    own_features = _features_by_row(table)
    requests = []
    for user_id, own in zip(read_users(table), own_features, strict=True):
        features = options.request_features | own
        request = RecommendRequest.model_construct(  # validated already
            user_id=user_id, request_features=features, **shared
        )
        requests.append(request)
    return requests


def read_users(table: pa.Table) -> list[int]:
    """The column `user_id` as a request has it: integers, or codes that have their text along.

    Raises:
        BadBody: one is negative, empty or too long.
    """
    codes, texts = read_ids(table, USER_ID)
    users: list[int] = []
    for row, code in enumerate(codes.tolist()):
        users.append(read_id(code, None if texts is None else texts[row]))
    return users


def _features_by_row(table: pa.Table) -> list[dict[str, int]]:
    """The request features that each row has of its own; a null is none.

    tab    1   null  2
    rows   {tab: 1}  {}  {tab: 2}
    """
    rows: list[dict[str, int]] = [{} for _ in range(table.num_rows)]
    for name in table.column_names:
        if name == USER_ID:
            continue
        for row, value in enumerate(_values_of(table[name])):
            if value is not None:
                rows[row][name] = value
    return rows


def _values_of(column: pa.ChunkedArray) -> list[int | None]:
    """A request feature's value for each user, None where it is the options'."""
    if column.type == pa.int32():
        return column.to_pylist()
    return [TextValue(text) if text else None for text in column.to_pylist()]


def _read_options(metadata: dict[bytes, bytes]) -> ArrowOptions:
    """The options of the schema's metadata; all defaults where it has none.

    Raises:
        BadBody: one is wrong.
    """
    return read_object(metadata.get(OPTIONS, b"{}"), ArrowOptions, ["body", OPTIONS.decode()])


def write_lists(requests: Sequence[RecommendRequest], lists: Sequence[RecommendedList]) -> bytes:
    """The lists, one behind the other."""
    users = []
    for request in requests:
        assert request.user_id is not None, "the body has a column of them"
        users.append(own_id(request.user_id))

    is_text = isinstance(users[0], str)
    table = lists_table(np.array(users, object if is_text else np.int64), lists)

    heads = []
    for user, one in zip(users, lists, strict=True):
        heads.append({"user_id": user} | one.head)
    return write_stream(table.replace_schema_metadata({OPTIONS: json.dumps(heads)}))
