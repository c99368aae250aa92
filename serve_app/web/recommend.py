"""`/v1/recommend`, its form for several users, and its Arrow form."""

from collections.abc import Sequence

from fastapi import APIRouter, Request, Response

from serve_app import columns
from serve_app.feedback.served_log import ServedLog, noting_failures
from serve_app.ids import new_request_id
from serve_app.recommend import arrow
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import (
    BatchRequest,
    BatchResponse,
    RecommendRequest,
    RecommendResponse,
)
from serve_app.schemas import Refusal
from serve_app.web.bodies import BodyRoute
from serve_app.web.errors import refused
from serve_app.web.replica import Replica, RunningReplica
from serve_app.web.responses import ARROW_ANSWER, ARROW_REQUEST, INDEXED

router = APIRouter(tags=["recommend"], route_class=BodyRoute)


@router.post("/v1/recommend", name="recommend", response_model=RecommendResponse, responses=INDEXED)
async def recommend_json(
    request: RecommendRequest, http: Request, replica: RunningReplica
) -> Response:
    """Recommend items to a user, the best first.

    Items are retrieved from the index of the version that answers, then ranked by its model.
    """
    lists = await _recommend(replica, [request], http, placed=False)
    if isinstance(lists, Refusal):
        return refused([lists])

    # fields that are not asked for are left out
    body = lists[0].response().model_dump_json(exclude_unset=True)
    return Response(body, 200, _timing(lists), media_type="application/json")


@router.post(
    "/v1/recommend/batch",
    name="recommend_batch",
    response_model=BatchResponse,
    responses=INDEXED,
)
async def recommend_batch(
    request: BatchRequest, http: Request, replica: RunningReplica
) -> Response:
    """The same for several users, at most `serve.max_recommend_users`."""
    lists = await _recommend(replica, request.requests, http)
    if isinstance(lists, Refusal):
        return refused([lists])

    answer = BatchResponse.model_construct(lists=[one.response() for one in lists])
    body = answer.model_dump_json(exclude_unset=True)
    return Response(body, 200, _timing(lists), media_type="application/json")


@router.post(
    "/v1/recommend/arrow",
    name="recommend_arrow",
    responses=INDEXED | ARROW_ANSWER,
    openapi_extra=ARROW_REQUEST,
)
async def recommend_arrow(http: Request, replica: RunningReplica) -> Response:
    """The same for several users with users and items as columns.

    The body is an uncompressed Arrow IPC stream with a column `user_id` (int64, or string) and
    one for each request feature that differs between users (int32, null: as in the options);
    under the key `recommend` of the schema's metadata is the JSON of an `ArrowOptions`. The
    answer has a row for each user and item: `user_id`, `place` (int32, 0 is best), `item_id`,
    `score`, `retrieval_score` (float32) and `source`; under the same key is a JSON list of the
    other fields of each user's answer.
    """
    limit = http.app.state.max_recommend_users
    requests = arrow.read_requests(await http.body(), limit)
    lists = await _recommend(replica, requests, http)
    if isinstance(lists, Refusal):
        return refused([lists])

    body = arrow.write_lists(requests, lists)
    return Response(body, 200, _timing(lists), media_type=columns.MEDIA_TYPE)


async def _recommend(
    replica: Replica, requests: Sequence[RecommendRequest], http: Request, *, placed: bool = True
) -> list[RecommendedList] | Refusal:
    """The replica's lists, or the first refusal; `placed`, it says which request it is of."""
    http.state.num_users = len(requests)  # for the request log
    limit = http.app.state.max_recommend_users
    if len(requests) > limit:
        return Refusal.of(["body", "requests"], f"at most {limit} users", len(requests))

    lists: list[RecommendedList] = []
    served: ServedLog | None = http.app.state.served
    with noting_failures(served, requests):
        answers = await replica.recommend(requests)

    for place, answer in enumerate(answers):
        if isinstance(answer, Refusal):
            return _at_place(answer, place) if placed else answer
        lists.append(answer.with_request_id(new_request_id()))

    http.state.version = lists[0].model_version
    if not placed:  # the batch forms have several
        http.state.served_as = lists[0].request_id

    if served is not None:
        for request, answer in zip(requests, lists, strict=True):
            served.note_answer(request, answer, answer.request_id)
    return lists


def _at_place(refusal: Refusal, place: int) -> Refusal:
    """The refusal of one of several requests."""
    body, *field = refusal.loc
    return refusal.model_copy(update={"loc": [body, "requests", place, *field]})


def _timing(lists: Sequence[RecommendedList]) -> dict[str, str]:
    took_ms = sum(one.head["took_ms"] for one in lists)
    return {"Server-Timing": f"recommender;dur={took_ms:.2f}"}
