"""`/v1/rank` and `/v1/rank/arrow`: candidates in, scores and an order out.

The header `Server-Timing` of an answer says where its time went, in the order of `HOPS`:

    first byte → read → handle → lookup → wait → ranker → back → write → answer
"""

import time
from dataclasses import replace

from fastapi import APIRouter, Request, Response

from serve_app import columns
from serve_app.columns import RankColumns, RankedColumns
from serve_app.feedback.served_log import ServedLog, noting_failures
from serve_app.ids import new_request_id
from serve_app.schemas import RankRequest, RankResponse, Refusal
from serve_app.web.bodies import BodyRoute
from serve_app.web.errors import refused
from serve_app.web.replica import Replica, RunningReplica
from serve_app.web.responses import ARROW_ANSWER, ARROW_REQUEST, CHECKED

# names in Server-Timing; the ranker's pass first, the others add up to the rest of `total`
HOPS = {
    "ranker": "the pass that ranked it, with others or alone",
    "read": "the body, read and checked",
    "handle": "to the replica and back, and explaining; the rest of what the replica was asked",
    "lookup": "the user's history",
    "wait": "the passes before its own",
    "back": "from the ranking thread to the event loop",
    "write": "the answer's JSON or columns",
}

router = APIRouter(tags=["rank"], route_class=BodyRoute)


@router.post("/v1/rank", name="rank", response_model=RankResponse, responses=CHECKED)
async def rank_json(request: RankRequest, http: Request, replica: RunningReplica) -> Response:
    """Score and order the candidates."""
    answer = await _rank_one(replica, RankColumns.of(request), http)
    if isinstance(answer, Refusal):
        return refused([answer])

    # live_events is there only where the ranker has set it
    body = answer.response().model_dump_json(exclude_unset=True)
    return Response(body, 200, _timing(answer, http), media_type="application/json")


@router.post(
    "/v1/rank/arrow",
    name="rank_arrow",
    responses=CHECKED | ARROW_ANSWER,
    openapi_extra=ARROW_REQUEST,
)
async def rank_arrow(http: Request, replica: RunningReplica) -> Response:
    """The same with candidates and scores as columns, for many candidates at a time.

    The body is an uncompressed Arrow IPC stream with a column `item_id` (int64, or string) and
    one for each request feature that differs between candidates (int32, or text as in the logs;
    null: as in the request); under the key `rank` of the schema's metadata is the rest of the
    request, the JSON of a `RankHead`. The answer has the columns `item_id`, `score.<task>`
    (float32) and `place` (int32, 0 is best), and its other fields as JSON under the same key.
    """
    answer = await _rank_one(replica, RankColumns.from_arrow(await http.body()), http)
    if isinstance(answer, Refusal):
        return refused([answer])

    body = answer.to_arrow()
    return Response(body, 200, _timing(answer, http), media_type=columns.MEDIA_TYPE)


async def _rank_one(
    replica: Replica, request: RankColumns, http: Request
) -> RankedColumns | Refusal:
    """`rank_columns` of a request of its own: the request log gets what it was."""
    http.state.num_candidates = len(request)
    asked = time.perf_counter()
    answer = await rank_columns(replica, request, http)
    if isinstance(answer, Refusal):
        return answer

    http.state.version = answer.model_version
    http.state.served_as = answer.head["request_id"]
    http.state.asked, http.state.answered = asked, time.perf_counter()
    return answer


async def rank_columns(
    replica: Replica, request: RankColumns, http: Request
) -> RankedColumns | Refusal:
    """The replica's answer with an id of its own; the served log gets what was served."""
    served: ServedLog | None = http.app.state.served
    with noting_failures(served, [request]):
        answer = await replica.rank(request)
    if not isinstance(answer, RankedColumns):
        return answer

    request_id = new_request_id()
    answer = replace(answer, head={"request_id": request_id, **answer.head})
    if served is not None:
        served.note_answer(request, answer, request_id)
    return answer


def _timing(answer: RankedColumns, http: Request) -> dict[str, str]:
    """The header that says where the time of an answer went, in ms."""
    if answer.ranker_ms is None:
        return {}

    state, now = http.state, time.perf_counter()
    in_replica_ms = answer.ranker_ms + sum(answer.hops_ms.values())
    took_ms = {
        "ranker": answer.ranker_ms,
        "read": 1000 * (state.asked - state.started),
        "handle": max(1000 * (state.answered - state.asked) - in_replica_ms, 0.0),
        **answer.hops_ms,
        "write": 1000 * (now - state.answered),
        "total": 1000 * (now - state.started),
    }
    return {"Server-Timing": ", ".join(f"{name};dur={ms:.2f}" for name, ms in took_ms.items())}
