"""`/v1/events`: what users did."""

from fastapi import APIRouter, Request, Response

from serve_app.schemas import EventsRequest, EventsResponse, Refusal
from serve_app.web.bodies import BodyRoute
from serve_app.web.errors import refused
from serve_app.web.replica import RequestCounts, RunningReplica
from serve_app.web.responses import CHECKED

router = APIRouter(tags=["events"], route_class=BodyRoute)


@router.post("/v1/events", name="events", response_model=EventsResponse, responses=CHECKED)
async def post_events(
    request: EventsRequest, http: Request, replica: RunningReplica, counts: RequestCounts
) -> Response:
    """Keep what users did.

    It is on disk before the answer, and part of the history from the next rank on.
    """
    http.state.num_events = len(request.events)  # for the request log
    answer = await replica.append_events(request)
    if isinstance(answer, Refusal):
        return refused([answer])

    counts.count_events(answer)
    return Response(answer.model_dump_json(), media_type="application/json")
