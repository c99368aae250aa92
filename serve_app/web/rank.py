"""`/v1/rank` and `/v1/rank/arrow`: candidates in, scores and an order out."""

from dataclasses import replace

from fastapi import APIRouter, Request, Response

from serve_app import columns
from serve_app.columns import RankColumns, RankedColumns
from serve_app.feedback.served_log import ServedLog, noting_failures
from serve_app.ids import new_request_id
from serve_app.schemas import RankRequest, RankResponse, Refusal
from serve_app.web.errors import refused
from serve_app.web.replica import Replica, RunningReplica
from serve_app.web.responses import ARROW_ANSWER, ARROW_REQUEST, CHECKED

router = APIRouter(tags=["rank"])


@router.post("/v1/rank", name="rank", response_model=RankResponse, responses=CHECKED)
async def rank_json(request: RankRequest, http: Request, replica: RunningReplica) -> Response:
    """Score and order the candidates."""
    answer = await _rank_one(replica, RankColumns.of(request), http)
    if isinstance(answer, Refusal):
        return refused([answer])

    # live_events is there only where the ranker has set it
    body = answer.response().model_dump_json(exclude_unset=True)
    return Response(body, 200, _timing(answer), media_type="application/json")


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

    return Response(answer.to_arrow(), 200, _timing(answer), media_type=columns.MEDIA_TYPE)


async def _rank_one(
    replica: Replica, request: RankColumns, http: Request
) -> RankedColumns | Refusal:
    """`rank_columns` of a request of its own: the request log gets what it was."""
    http.state.num_candidates = len(request)
    answer = await rank_columns(replica, request, http)
    if isinstance(answer, RankedColumns):
        http.state.version = answer.model_version
        http.state.served_as = answer.head["request_id"]
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


def _timing(answer: RankedColumns) -> dict[str, str]:
    if answer.ranker_ms is None:
        return {}
    return {"Server-Timing": f"ranker;dur={answer.ranker_ms:.2f}"}
