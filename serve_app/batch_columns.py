"""Candidates of several users as columns: the body and the answer of `/v1/rank/batch/arrow`.

The body is one Arrow IPC stream: columns `user_id` and `item_id` (int64, or string), and a column
per request feature (int32 or text, null where the head's own holds); in the schema's metadata,
under `rank`, the JSON of `RankBatchHead`. Rows of one user that follow each other are one request:

    user_id    3 3 3 5 5 3      three requests, of 3, 2 and 1 candidates

The answer has `user_id` before the columns of a `RankedColumns`, and under `rank` the other fields
of each answer, and the rows (requests) that have none.
"""

import json
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
from pydantic import Field

from serve_app.columns import (
    HEAD,
    BadBody,
    RankColumns,
    RankedColumns,
    read_features,
    read_head,
    read_ids,
    read_stream,
    refuse_many_users,
    write_stream,
)
from serve_app.ids import own_id, read_id
from serve_app.schemas import (
    Name,
    RankHead,
    Refusal,
    RefusedRow,
    RequestFeatures,
    StrictModel,
    TimeMs,
    now_ms,
)

USER_ID, ITEM_ID = "user_id", "item_id"


class RankBatchHead(StrictModel):
    """What the users of an Arrow body have in common."""

    request_time_ms: TimeMs = Field(default_factory=now_ms)
    request_features: RequestFeatures = Field(default_factory=dict)
    order_by: Name | None = None
    top_k: int | None = Field(default=None, ge=1)


def read_batch(body: bytes, most_users: int) -> list[RankColumns]:
    """The request of each user of the body.

    Raises:
        BadBody: not an Arrow stream, a column or type that does not belong there, a bad head, or
        more than `most_users`.
    """
    table = read_stream(body, USER_ID, ITEM_ID)
    head = read_head(table.schema.metadata or {}, RankBatchHead)
    if table.num_rows == 0:
        raise BadBody([Refusal.of(["body", ITEM_ID], "at least one candidate", 0)])

    user_codes, user_texts = read_ids(table, USER_ID)
    item_codes, item_texts = read_ids(table, ITEM_ID)
    ids = (USER_ID, ITEM_ID)
    features, texts = read_features(table, ids, head.request_features)

    # a request begins where the user changes
    begins = np.flatnonzero(np.diff(user_codes, prepend=user_codes[0] - 1))
    refuse_many_users(len(begins), most_users)
    ends = np.append(begins[1:], len(user_codes))
    requests = []
    for begin, end in zip(begins.tolist(), ends.tolist(), strict=True):
        user_id = read_id(int(user_codes[begin]), None if user_texts is None else user_texts[begin])
        requests.append(
            RankColumns(
                head=RankHead.model_construct(user_id=user_id, **dict(head)),  # validated already
                item_id=item_codes[begin:end],
                features={name: column[begin:end] for name, column in features.items()},
                item_text=None if item_texts is None else item_texts[begin:end],
                feature_texts=texts,
            )
        )
    return requests


def write_batch(
    requests: Sequence[RankColumns],
    answers: Sequence[RankedColumns | None],
    refused: Sequence[RefusedRow],
) -> bytes:
    """The answers one behind the other; None is a request that is among `refused`."""
    parts, heads = [], []
    for request, answer in zip(requests, answers, strict=True):
        if answer is None:
            continue
        assert request.user_id is not None, "the body has a column of them"
        user = own_id(request.user_id)
        heads.append({USER_ID: user} | answer.head)

        table = answer.table()
        kind = pa.string() if isinstance(user, str) else pa.int64()
        users = pa.array([user] * table.num_rows, kind)
        parts.append(table.add_column(0, USER_ID, users))

    # versions of a trial may have other tasks: their scores are null in the rest
    together = pa.concat_tables(parts, promote_options="default")
    head = {"answers": heads, "refused": [one.model_dump(mode="json") for one in refused]}
    return write_stream(together.replace_schema_metadata({HEAD: json.dumps(head)}))
