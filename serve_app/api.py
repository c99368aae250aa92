"""The HTTP face, without Ray: routes, limits, and one way to say what is wrong with a request."""

import asyncio
import json
import sqlite3
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.protection import ApiKeys, Protection, RateLimit, RequestLog
from serve_app.schemas import (
    EventsRequest,
    EventsResponse,
    ModelInfo,
    Problem,
    RankRequest,
    RankResponse,
    Ready,
    Refusal,
)

READY_TIMEOUT_S = 2.0
MOST_ERRORS = 10  # errors that one answer lists
NO_MODEL = {503: {"model": Problem, "description": "no model answers at the moment"}}
PROTECTED: dict[int | str, dict[str, Any]] = {
    401: {"model": Problem, "description": "no known API key"},
    429: {"model": Problem, "description": "too many requests of this key, or of all; see Retry-After"},
    **NO_MODEL,
}
CHECKED: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "the body cannot be read at all"},
    413: {"model": Problem, "description": "the body is too long"},
    422: {"model": Problem, "description": "a field is wrong: which one, and its value"},
    **PROTECTED,
}


class Overloaded(Exception):
    """Too many requests wait already."""


class Unavailable(Exception):
    """No replica answers at the moment."""


class Replica(Protocol):
    """What the HTTP face needs of a ranker, wherever it runs."""

    async def rank(self, request: RankRequest) -> RankResponse | Refusal: ...

    async def append(self, request: EventsRequest) -> EventsResponse | Refusal: ...

    async def info(self) -> ModelInfo: ...


def make_api(
    replica: Replica, max_body_bytes: int, keys: ApiKeys | None = None, rate_limit: RateLimit | None = None
) -> FastAPI:
    """The routes. No Ray in them: a test passes a replica of its own."""
    api = FastAPI(title="ULTRA-HSTU ranking", version="1")
    api.add_middleware(Protection, keys=keys, rate_limit=rate_limit)
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)  # around it: who is still sending hears no 401 either
    api.add_middleware(RequestLog)
    # Without keys nothing is asked for, and the document says nothing of them; `Protection` is what checks.
    locks = [Depends(HTTPBearer(auto_error=False, description="an API key"))] if keys else []

    @api.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return _refused([Refusal.of(e["loc"], e["msg"], e.get("input")) for e in error.errors()])

    @api.exception_handler(Overloaded)
    async def _overloaded(*_: object) -> Response:
        return _json({"detail": "too many requests are waiting"}, 429, {"Retry-After": "1"})

    @api.exception_handler(Unavailable)
    async def _unavailable(*_: object) -> Response:
        return _json({"detail": "no model answers at the moment"}, 503, {"Retry-After": "1"})

    @api.exception_handler(sqlite3.OperationalError)
    async def _store_down(*_: object) -> Response:
        return _json({"detail": "the event store does not answer at the moment"}, 503, {"Retry-After": "1"})

    @api.post("/v1/rank", response_model=RankResponse, responses=CHECKED, dependencies=locks)
    async def rank(request: RankRequest, http: Request) -> Response:
        """Score and order the candidates."""
        http.state.num_candidates = len(request.candidates)
        answer = await replica.rank(request)
        if isinstance(answer, Refusal):
            return _refused([answer])
        http.state.version = answer.model_version
        return Response(answer.model_dump_json(), media_type="application/json")

    @api.post("/v1/events", response_model=EventsResponse, responses=CHECKED, dependencies=locks)
    async def events(request: EventsRequest, http: Request) -> Response:
        """Keep what users did. It is on disk before the answer, and part of the history from the next rank on."""
        http.state.num_events = len(request.events)
        answer = await replica.append(request)
        if isinstance(answer, Refusal):
            return _refused([answer])
        return Response(answer.model_dump_json(), media_type="application/json")

    @api.get("/v1/model", responses=PROTECTED, dependencies=locks)
    async def model() -> ModelInfo:
        """Which version answers."""
        return await replica.info()

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
            model_version=info.model_version, deployment=info.deployment, failed_deployment=info.failed_deployment
        )
        return _json(ready.model_dump())

    return api


class BodyLimit:
    """413 for a body of more than `max_bytes`, read to its end but not kept: who is still sending hears no answer."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= self.max_bytes:
                body += chunk
        if size > self.max_bytes:
            detail = [{"loc": ["body"], "msg": f"at most {self.max_bytes} bytes", "input": f"{size} bytes"}]
            await _json({"detail": detail}, 413)(scope, receive, send)
            return
        pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)


def _refused(refusals: Sequence[Refusal]) -> Response:
    return _json({"detail": [refusal.model_dump() for refusal in refusals[:MOST_ERRORS]]}, 422)


def _json(content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(json.dumps(content), status, headers, media_type="application/json")
