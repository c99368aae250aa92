"""The HTTP face on Ray Serve: a FastAPI ingress in front of replicas that hold a model.

    HTTP → Api (checks, JSON) → RankerReplica (waiting requests together, one forward pass) → Ranker

Which model answers is in the replica's `user_config`: a new one there is loaded and warmed beside the old, which
answers until one assignment swaps them.
"""

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from ray import serve
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline import config, tracking
from pipeline.model.artifact import load_model
from serve_app.history import PublishedSequences
from serve_app.ranker import Ranker
from serve_app.schemas import ModelInfo, RankRequest, RankResponse, Refusal

logger = logging.getLogger("ray.serve")

MAX_TOGETHER = 16  # requests of one forward pass
READY_TIMEOUT_S = 2.0
MOST_ERRORS = 10  # errors that one answer lists


class MicroBatcher:
    """Requests that came while a batch was computed form the next one: nothing waits for company.

    `work` runs in a thread, so that the event loop goes on answering health checks.
    """

    def __init__(self, work: Callable[[list[Any]], Sequence[Any]], max_together: int = MAX_TOGETHER) -> None:
        self._work, self._max_together = work, max_together
        self._waiting: deque[tuple[Any, asyncio.Future]] = deque()
        self._running: asyncio.Task | None = None

    async def __call__(self, item: Any) -> Any:
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((item, answer))
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        while self._waiting:
            batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_together))]
            try:
                results = await asyncio.to_thread(self._work, [item for item, _ in batch])
            except Exception as error:  # whatever it was, it belongs to those who wait for these answers
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(error)
                continue
            for (_, answer), result in zip(batch, results, strict=True):
                if not answer.done():  # else the client has gone away
                    answer.set_result(result)


def load_and_warm(user_config: dict[str, Any]) -> Ranker:
    """The ranker that `deployment.user_config` describes, after its first forward pass."""
    model = tracking.PinnedModel(**user_config["model"])
    cache = Path(user_config["cache"])
    loaded = load_model(tracking.fetch(model, cache))
    limits = config.from_dict({"serve": user_config["limits"]}).serve
    store = PublishedSequences(Path(user_config["sequences"]), loaded.cfg, cache)
    ranker = Ranker(loaded, store, model.version, model.name, limits)
    ranker.warm()
    return ranker


@serve.deployment
class RankerReplica:
    """Holds one ranker at a time."""

    def __init__(self) -> None:
        self.ranker: Ranker | None = None
        self.wanted: dict[str, Any] = {}
        self.failure: str | None = None
        self.loading: asyncio.Task | None = None
        self.batcher = MicroBatcher(self._rank)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.wanted = user_config
        if self.ranker is None:  # first start: no traffic before the model is loaded and warm
            self.ranker = await asyncio.to_thread(load_and_warm, user_config)
        else:  # an update: the old version goes on answering
            self.loading = asyncio.create_task(self._swap(user_config))

    async def _swap(self, user_config: dict[str, Any]) -> None:
        try:
            ranker = await asyncio.to_thread(load_and_warm, user_config)
        except Exception as error:  # the old version goes on; jobs.deploy reads the reason from /v1/model
            logger.exception("version %s did not load", user_config["model"]["version"])
            if self.wanted is user_config:
                self.failure = f"version {user_config['model']['version']} did not load: {error}"
            return
        if self.wanted is user_config:  # else a later update has overtaken this one
            self.ranker, self.failure = ranker, None

    async def rank(self, request: RankRequest) -> RankResponse | Refusal:
        return await self.batcher(request)

    def _rank(self, requests: list[RankRequest]) -> list[RankResponse | Refusal]:
        ranker = self.ranker  # one version for the whole batch, whatever is swapped meanwhile
        assert ranker is not None, "Serve sends nothing before reconfigure has returned"
        answers: list[RankResponse | Refusal | None] = [ranker.refusal(request) for request in requests]
        accepted = [i for i, answer in enumerate(answers) if answer is None]
        if accepted:
            for i, response in zip(accepted, ranker.rank([requests[i] for i in accepted]), strict=True):
                answers[i] = response
        return [answer for answer in answers if answer is not None]

    async def info(self) -> ModelInfo:
        assert self.ranker is not None, "Serve sends nothing before reconfigure has returned"
        return self.ranker.info().model_copy(update={"failure": self.failure})


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

    @api.post("/v1/rank", response_model=RankResponse)
    async def rank(request: RankRequest) -> Response:
        """Score and order the candidates."""
        try:
            answer = await replica.rank(request)
        except BackPressureError:
            return _json({"detail": "too many requests are waiting"}, 429, {"Retry-After": "1"})
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
            return _json({"status": "no model answers yet"}, 503)
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


@serve.deployment
@serve.ingress(None)
class Api:
    """The ingress: `make_api` over the replicas' handle."""

    def __init__(self, replicas: DeploymentHandle, max_body_bytes: int) -> None:
        self.replicas, self.max_body_bytes = replicas, max_body_bytes

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self.max_body_bytes)

    async def rank(self, request: RankRequest) -> RankResponse | Refusal:
        return await self.replicas.rank.remote(request)

    async def info(self) -> ModelInfo:
        return await self.replicas.info.remote()


class Arguments(BaseModel):
    """`args` of the application in serve_config.yaml."""

    max_body_bytes: int = 2_000_000


def build(args: Arguments) -> serve.Application:
    """serve_config.yaml's `import_path`."""
    return Api.bind(RankerReplica.bind(), args.max_body_bytes)
