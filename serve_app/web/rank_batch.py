"""`/v1/rank/batch` and its Arrow form: candidates of several users in one call.

A row that has no answer does not fail the others: it is named in `refused`.
"""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from fastapi import APIRouter, Request, Response

from serve_app import columns
from serve_app.batch_columns import read_batch, write_batch
from serve_app.columns import BadBody, RankColumns, RankedColumns
from serve_app.schemas import RankBatchRequest, RankBatchResponse, Refusal, RefusedRow
from serve_app.web.bodies import BodyRoute
from serve_app.web.errors import refused
from serve_app.web.rank import rank_columns
from serve_app.web.replica import Overloaded, Replica, RunningReplica, Unavailable
from serve_app.web.responses import ARROW_ANSWER, ARROW_REQUEST, CHECKED

ROWS_TOGETHER = 16  # of one request: others get in between

router = APIRouter(tags=["rank"], route_class=BodyRoute)


@router.post(
    "/v1/rank/batch", name="rank_batch", response_model=RankBatchResponse, responses=CHECKED
)
async def rank_batch_json(
    request: RankBatchRequest, http: Request, replica: RunningReplica
) -> Response:
    """The same for several users, at most `serve.max_rank_users`.

    What the model cannot answer is refused row by row; a body with a field that no request has is
    refused whole. If no row is answered, the status is that of the first refusal.
    """
    rows: list[RankColumns | Refusal] = []
    for one in request.requests:
        try:
            rows.append(RankColumns.of(one))
        except BadBody as error:
            rows.append(error.refusals[0])

    answered = await _rank_rows(replica, rows, http)
    if isinstance(answered, Response):
        return answered

    answers = [None if one is None else one.response() for one in answered.answers]
    body = RankBatchResponse.model_construct(answers=answers, refused=answered.refused)
    return Response(body.model_dump_json(exclude_unset=True), media_type="application/json")


@router.post(
    "/v1/rank/batch/arrow",
    name="rank_batch_arrow",
    responses=CHECKED | ARROW_ANSWER,
    openapi_extra=ARROW_REQUEST,
)
async def rank_batch_arrow(http: Request, replica: RunningReplica) -> Response:
    """The same with users, candidates and scores as columns.

    The body is an uncompressed Arrow IPC stream with columns `user_id` and `item_id` (int64, or
    string) and one for each request feature that differs between candidates (int32, null: as in
    the head); rows of one user that follow each other are one request. Under the key `rank` of the
    schema's metadata is the JSON of a `RankBatchHead`. The answer has a row for each candidate:
    `user_id`, `item_id`, `score.<task>` (float32) and `place` (int32, 0 is best); under the same
    key are `answers`, the other fields of each user's answer, and `refused`.
    """
    requests = read_batch(await http.body(), http.app.state.max_rank_users)
    answered = await _rank_rows(replica, requests, http)
    if isinstance(answered, Response):
        return answered

    body = write_batch(requests, answered.answers, answered.refused)
    return Response(body, media_type=columns.MEDIA_TYPE)


@dataclass(frozen=True, slots=True)
class Answered:
    """Rows of a batch of which at least one has an answer."""

    answers: list[RankedColumns | None]
    refused: list[RefusedRow]


async def _rank_rows(
    replica: Replica, rows: Sequence[RankColumns | Refusal], http: Request
) -> Answered | Response:
    """An answer or a refusal for each row; the HTTP answer where there are too many, or none has
    an answer.
    """
    http.state.num_users = len(rows)  # for the request log
    limit = http.app.state.max_rank_users
    if len(rows) > limit:
        return refused([Refusal.of(["body", "requests"], f"at most {limit} users", len(rows))])

    sent = [row for row in rows if isinstance(row, RankColumns)]
    http.state.num_candidates = sum(map(len, sent))

    turns = asyncio.Semaphore(ROWS_TOGETHER)
    asked = [_rank_row(replica, row, http, turns) for row in rows]
    found = await asyncio.gather(*asked)
    return _sort_out(found, http)


async def _rank_row(
    replica: Replica, row: RankColumns | Refusal, http: Request, turns: asyncio.Semaphore
) -> RankedColumns | Refusal | Overloaded | Unavailable:
    """One row's answer; an outage is its own and not that of the rows that had an answer."""
    if isinstance(row, Refusal):
        return row
    async with turns:
        try:
            return await rank_columns(replica, row, http)
        except (Overloaded, Unavailable) as error:
            return error


def _sort_out(
    found: Sequence[RankedColumns | Refusal | Overloaded | Unavailable], http: Request
) -> Answered | Response:
    """Answers apart from refusals.

    Raises:
        Overloaded, Unavailable: no row has an answer, and this is why.
    """
    answers: list[RankedColumns | None] = []
    refusals: list[RefusedRow] = []
    for row, one in enumerate(found):
        if isinstance(one, RankedColumns):
            answers.append(one)
            http.state.version = one.model_version
        else:
            answers.append(None)
            refusals.append(_refused_row(row, one))

    if len(refusals) < len(found):
        return Answered(answers, refusals)

    # no row is answered: then the request is not
    for one in found:
        if isinstance(one, Exception):
            raise one
    problems = []
    for one in refusals:
        problems += one.detail
    return refused(problems)


def _refused_row(row: int, why: RankedColumns | Refusal | Overloaded | Unavailable) -> RefusedRow:
    if isinstance(why, Refusal):
        body, *field = why.loc
        placed = why.model_copy(update={"loc": [body, "requests", row, *field]})
        return RefusedRow(row=row, status=422, detail=[placed])
    if isinstance(why, Overloaded):
        return RefusedRow(row=row, status=429, detail="too many requests are waiting")
    return RefusedRow(row=row, status=503, detail="no model answers at the moment")
