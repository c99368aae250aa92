"""The HTTP face, without Ray: routes, limits, and one way to say what is wrong with a request."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve_app.schemas import ModelInfo, RankRequest, RankResponse, Refusal

READY_TIMEOUT_S = 2.0
MOST_ERRORS = 10  # errors that one answer lists


class Overloaded(Exception):
    """Too many requests wait already."""


class Unavailable(Exception):
    """No replica answers at the moment."""


class Replica(Protocol):
    """What the HTTP face needs of a ranker, wherever it runs."""

    async def rank(self, request: RankRequest) -> RankResponse | Refusal: ...

    async def info(self) -> ModelInfo: ...


def make_api(replica: Replica, max_body_bytes: int) -> FastAPI:
    """The routes. No Ray in them: a test passes a replica of its own."""
    api = FastAPI(title="ULTRA-HSTU ranking", version="1")
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes)

    @api.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        return _refused([Refusal.of(e["loc"], e["msg"], e.get("input")) for e in error.errors()])

    @api.exception_handler(Overloaded)
    async def _overloaded(*_: object) -> Response:
        return _json({"detail": "too many requests are waiting"}, 429, {"Retry-After": "1"})

    @api.exception_handler(Unavailable)
    async def _unavailable(*_: object) -> Response:
        return _json({"detail": "no model answers at the moment"}, 503, {"Retry-After": "1"})

    @api.post("/v1/rank", response_model=RankResponse)
    async def rank(request: RankRequest) -> Response:
        """Score and order the candidates."""
        answer = await replica.rank(request)
        if isinstance(answer, Refusal):
            return _refused([answer])
        return Response(answer.model_dump_json(), media_type="application/json")

    @api.get("/v1/model")
    async def model() -> ModelInfo:
        """Which version answers."""
        return await replica.info()

    @api.get("/healthz")
    async def healthz() -> dict[str, str]:
        """This process lives."""
        return {"status": "ok"}

    @api.get("/readyz")
    async def readyz() -> Response:
        """A model is loaded and answers."""
        try:
            info = await asyncio.wait_for(replica.info(), READY_TIMEOUT_S)
        except TimeoutError:
            raise Unavailable from None
        return _json({"status": "ready", "model_version": info.model_version})

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
