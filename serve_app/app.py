"""The server on Ray Serve: an HTTP ingress in front of replicas that hold a model.

    HTTP → Api (checks, JSON) → RankerReplica (waiting requests together, one forward pass) → Ranker

Which model answers is in the replica's `user_config`: a new one there is loaded and warmed beside the old, which
answers until one assignment swaps them.
"""

import asyncio
import logging
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from pipeline import config, tracking
from pipeline.model.artifact import load_model
from serve_app.api import Overloaded, Unavailable, make_api
from serve_app.batching import MicroBatcher
from serve_app.events import LiveHistory, SqliteEvents
from serve_app.history import PublishedSequences
from serve_app.protection import ApiKeys, RateLimit
from serve_app.ranker import Ranker
from serve_app.schemas import EventsRequest, EventsResponse, ModelInfo, RankRequest, RankResponse, Refusal

logger = logging.getLogger("ray.serve")


def load_and_warm(user_config: dict[str, Any]) -> tuple[Ranker, LiveHistory]:
    """The ranker that `deployment.user_config` describes, after its first forward pass, and the store it reads."""
    model = tracking.PinnedModel(**user_config["model"])
    loaded = load_model(tracking.fetch(model, Path(user_config["cache"])))
    limits = config.from_dict({"serve": user_config["limits"]}).serve
    folder = Path(user_config["serving"])
    published = PublishedSequences(Path(user_config["sequences"]), loaded.cfg, folder)
    history = LiveHistory(published, SqliteEvents(folder / "events.sqlite"), loaded.cfg, limits.max_events)
    ranker = Ranker(loaded, history, model.version, model.name, limits)
    ranker.warm()
    return ranker, history


@serve.deployment
class RankerReplica:
    """Holds one ranker at a time."""

    def __init__(self) -> None:
        self.ranker: Ranker | None = None
        self.history: LiveHistory | None = None  # what the ranker reads, and where events go
        self.deployment = self.wanted = ""  # ids of the update that answers, and of the newest
        self.failed: dict[str, str] = {}
        self.loading: asyncio.Task | None = None
        self.batcher = MicroBatcher(self._rank)
        self.appender = MicroBatcher(self._append)  # events that wait together share a transaction and its fsync

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.wanted = user_config["deployment"]
        if self.ranker is None:  # first start: no traffic before the model is loaded and warm
            self.ranker, self.history = await asyncio.to_thread(load_and_warm, user_config)
            self.deployment = user_config["deployment"]
        else:  # an update: the old version goes on answering
            self.loading = asyncio.create_task(self._swap(user_config))

    async def _swap(self, user_config: dict[str, Any]) -> None:
        deployment, version = user_config["deployment"], user_config["model"]["version"]
        try:
            ranker, history = await asyncio.to_thread(load_and_warm, user_config)
        except Exception as error:  # the old version goes on; jobs.deploy reads the reason from /v1/model
            logger.exception("version %s did not load", version)
            self.failed = {"failed_deployment": deployment, "failure": f"version {version} did not load: {error}"}
            return
        if self.wanted == deployment:  # else a later update has overtaken this one
            self.ranker, self.history, self.deployment, self.failed = ranker, history, deployment, {}

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

    async def append(self, request: EventsRequest) -> EventsResponse | Refusal:
        return await self.appender(request)

    def _append(self, requests: list[EventsRequest]) -> list[EventsResponse | Refusal]:
        history = self.history
        assert history is not None, "Serve sends nothing before reconfigure has returned"
        return history.append_all(requests)

    async def info(self) -> ModelInfo:
        assert self.ranker is not None, "Serve sends nothing before reconfigure has returned"
        return self.ranker.info().model_copy(update={"deployment": self.deployment, **self.failed})


@serve.deployment
@serve.ingress(None)
class Api:
    """The ingress: `make_api` over the replicas' handle."""

    def __init__(self, replicas: DeploymentHandle, args: "Arguments") -> None:
        self.replicas, self.args = replicas, args

    def __serve_build_asgi_app__(self) -> FastAPI:
        file, rate = self.args.api_keys_file, self.args.rate_limit_per_s
        keys = ApiKeys(Path(file)) if file is not None else None
        return make_api(self, self.args.max_body_bytes, keys, RateLimit(rate) if rate is not None else None)

    async def rank(self, request: RankRequest) -> RankResponse | Refusal:
        return await self._with_another_try(self.replicas.rank, request)

    async def append(self, request: EventsRequest) -> EventsResponse | Refusal:
        return await self._with_another_try(self.replicas.append, request)

    async def info(self) -> ModelInfo:
        return await self._with_another_try(self.replicas.info)

    async def _with_another_try(self, method: DeploymentHandle, *arguments: RankRequest | EventsRequest) -> Any:
        """What a dying replica took with it is asked of the next one: no method does more when called again."""
        try:
            try:
                return await method.remote(*arguments)
            except RayActorError:
                logger.warning("a replica died with a request; asking another")
            return await method.remote(*arguments)
        except RayActorError:
            raise Unavailable from None
        except BackPressureError:
            raise Overloaded from None


class Arguments(BaseModel):
    """`args` of the application in serve_config.yaml."""

    max_body_bytes: int = 2_000_000
    api_keys_file: str | None = None
    rate_limit_per_s: float | None = None


def build(args: Arguments) -> serve.Application:
    """serve_config.yaml's `import_path`."""
    return Api.bind(RankerReplica.bind(), args)
