"""The HTTP face, without Ray: routes, limits, and one way to say what is wrong with a request."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse
from fastapi.security import HTTPBearer

from serve_app import columns, metrics
from serve_app.columns import BadBody, RankColumns, RankedColumns
from serve_app.schemas import (
    EventsRequest,
    EventsResponse,
    ModelInfo,
    Problem,
    RankRequest,
    RankResponse,
    Ready,
    Refusal,
    StoreDown,
)
from serve_app.web.limits import Admission, BodyLimit, Deadline, reply
from serve_app.web.protection import ApiKeys, Protection, RateLimit, RequestLog

ABOUT = "Scores and orders candidates for a user by what that user did before, as of any time."
READY_TIMEOUT_S = 2.0
MOST_ERRORS = 10  # errors that one answer lists
NO_MODEL = {503: {"model": Problem, "description": "no model answers at the moment"}}
PROTECTED: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "no known API key"},
    429: {
        "model": Problem,
        "description": "too many requests of this key, or of all; see Retry-After",
    },
    504: {"model": Problem, "description": "no answer in time"},
    **NO_MODEL,
}
CHECKED: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "the body cannot be read at all"},
    408: {"model": Problem, "description": "the body did not come in time"},
    413: {"model": Problem, "description": "the body is too long"},
    422: {"model": Problem, "description": "a field is wrong: which one, and its value"},
    **PROTECTED,
}


BINARY = {columns.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
ARROW_REQUEST: dict[str, Any] = {"requestBody": {"required": True, "content": BINARY}}
ARROW_ANSWER: dict[int | str, dict[str, Any]] = {
    200: {"description": "an Arrow IPC stream", "content": BINARY}
}


class Overloaded(Exception):
    """Too many requests wait already."""


class Unavailable(Exception):
    """No replica answers at the moment."""


class Replica(Protocol):
    """What the HTTP face needs of a ranker, wherever it runs."""

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal: ...

    async def append(self, request: EventsRequest) -> EventsResponse | Refusal: ...

    async def info(self) -> ModelInfo: ...

    async def deployments(self) -> list[str]:
        """Ids of the updates that the running replicas answer with, each once; empty where one does
        not tell.
        """
        ...

    async def metrics(self) -> Mapping[str, bytes]:
        """Each replica's own, as exposition text."""
        ...


def make_api(
    replica: Replica,
    max_body_bytes: int,
    keys: ApiKeys | None = None,
    rate_limit: RateLimit | None = None,
    *,
    max_wait_s: float = 0.5,
    timeout_s: float = 10.0,
) -> FastAPI:
    """The routes. No Ray in them: a test passes a replica of its own."""
    api = FastAPI(title="ULTRA-HSTU ranking", version="1", description=ABOUT)
    counts = metrics.IngressMetrics()
    # From the inside out: nobody's work is admitted without a key, and who is still sending hears
    # no 401 either.
    api.add_middleware(Admission, max_wait_s=max_wait_s)
    api.add_middleware(Protection, keys=keys, rate_limit=rate_limit)
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)
    api.add_middleware(Deadline, timeout_s=timeout_s)
    api.add_middleware(RequestLog, metrics=counts)
    # Without keys nothing is asked for, and the document says nothing of them; `Protection` is what
    # checks.
    locks = [Depends(HTTPBearer(auto_error=False, description="an API key"))] if keys else []

    @api.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return _refused([Refusal.of(e["loc"], e["msg"], e.get("input")) for e in error.errors()])

    @api.exception_handler(BadBody)
    async def _bad_body(_: Request, error: BadBody) -> Response:
        return _refused(error.refusals)

    @api.exception_handler(Overloaded)
    async def _overloaded(http: Request, _: Exception) -> Response:
        http.state.refused = "overload"
        return reply({"detail": "too many requests are waiting"}, 429, {"Retry-After": "1"})

    @api.exception_handler(Unavailable)
    async def _unavailable(*_: object) -> Response:
        return reply({"detail": "no model answers at the moment"}, 503, {"Retry-After": "1"})

    @api.exception_handler(StoreDown)
    async def _store_down(*_: object) -> Response:
        return reply(
            {"detail": "the event store does not answer at the moment"}, 503, {"Retry-After": "1"}
        )

    @api.post("/v1/rank", response_model=RankResponse, responses=CHECKED, dependencies=locks)
    async def rank(request: RankRequest, http: Request) -> Response:
        """Score and order the candidates."""
        answer = await ranked(RankColumns.of(request), http)
        if isinstance(answer, Refusal):
            return _refused([answer])
        return Response(
            answer.response().model_dump_json(), 200, _timing(answer), media_type="application/json"
        )

    @api.post(
        "/v1/rank/arrow",
        responses=CHECKED | ARROW_ANSWER,
        openapi_extra=ARROW_REQUEST,
        dependencies=locks,
    )
    async def rank_arrow(http: Request) -> Response:
        """The same with candidates and scores as columns, for many candidates at a time.

        The body is an uncompressed Arrow IPC stream with a column `item_id` (int64) and one for
        each request feature that differs between candidates (int32, null: as in the request); under
        the key `rank` of the schema's metadata is the rest of the request, the JSON of a
        `RankHead`. The answer has the columns `item_id`, `score.<task>` (float32) and `place`
        (int32, 0 is best), and its other fields as JSON under the same key.
        """
        answer = await ranked(RankColumns.from_arrow(await http.body()), http)
        if isinstance(answer, Refusal):
            return _refused([answer])
        return Response(answer.to_arrow(), 200, _timing(answer), media_type=columns.MEDIA_TYPE)

    async def ranked(request: RankColumns, http: Request) -> RankedColumns | Refusal:
        http.state.num_candidates = len(request)
        answer = await replica.rank(request)
        if isinstance(answer, RankedColumns):
            http.state.version = answer.model_version
        return answer

    @api.post("/v1/events", response_model=EventsResponse, responses=CHECKED, dependencies=locks)
    async def events(request: EventsRequest, http: Request) -> Response:
        """Keep what users did.

        It is on disk before the answer, and part of the history from the next rank on.
        """
        http.state.num_events = len(request.events)
        answer = await replica.append(request)
        if isinstance(answer, Refusal):
            return _refused([answer])
        counts.count_events(answer)
        return Response(answer.model_dump_json(), media_type="application/json")

    @api.get("/v1/model", responses=PROTECTED, dependencies=locks)
    async def model() -> ModelInfo:
        """Which version answers."""
        return await replica.info()

    @api.get("/metrics", response_class=PlainTextResponse, responses=PROTECTED, dependencies=locks)
    async def prometheus() -> Response:
        """What this ingress and all replicas have counted, for Prometheus."""
        text = metrics.page(counts.registry, await replica.metrics())
        return Response(text, media_type=metrics.CONTENT_TYPE)

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """This process lives."""
        return {"status": "ok"}

    @api.get("/readyz", response_model=Ready, responses={**NO_MODEL})
    async def readyz() -> Response:
        """A model is loaded and answers."""
        try:
            info = await asyncio.wait_for(replica.info(), READY_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable from None
        ready = Ready(
            model_version=info.model_version,
            deployments=await replica.deployments(),
            failed_deployment=info.failed_deployment,
        )
        return reply(ready.model_dump())

    return api


def _timing(answer: RankedColumns) -> dict[str, str]:
    return (
        {} if answer.ranker_ms is None else {"Server-Timing": f"ranker;dur={answer.ranker_ms:.2f}"}
    )


def _refused(refusals: Sequence[Refusal]) -> Response:
    return reply({"detail": [refusal.model_dump() for refusal in refusals[:MOST_ERRORS]]}, 422)
