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
from serve_app.history import PublishedSequences
from serve_app.ranker import Ranker
from serve_app.schemas import ModelInfo, RankRequest, RankResponse, Refusal

logger = logging.getLogger("ray.serve")


def load_and_warm(user_config: dict[str, Any]) -> Ranker:
    """The ranker that `deployment.user_config` describes, after its first forward pass."""
    model = tracking.PinnedModel(**user_config["model"])
    loaded = load_model(tracking.fetch(model, Path(user_config["cache"])))
    limits = config.from_dict({"serve": user_config["limits"]}).serve
    store = PublishedSequences(Path(user_config["sequences"]), loaded.cfg, Path(user_config["mapped"]))
    ranker = Ranker(loaded, store, model.version, model.name, limits)
    ranker.warm()
    return ranker


@serve.deployment
class RankerReplica:
    """Holds one ranker at a time."""

    def __init__(self) -> None:
        self.ranker: Ranker | None = None
        self.deployment = self.wanted = ""  # ids of the update that answers, and of the newest
        self.failed: dict[str, str] = {}
        self.loading: asyncio.Task | None = None
        self.batcher = MicroBatcher(self._rank)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.wanted = user_config["deployment"]
        if self.ranker is None:  # first start: no traffic before the model is loaded and warm
            self.ranker = await asyncio.to_thread(load_and_warm, user_config)
            self.deployment = user_config["deployment"]
        else:  # an update: the old version goes on answering
            self.loading = asyncio.create_task(self._swap(user_config))

    async def _swap(self, user_config: dict[str, Any]) -> None:
        deployment, version = user_config["deployment"], user_config["model"]["version"]
        try:
            ranker = await asyncio.to_thread(load_and_warm, user_config)
        except Exception as error:  # the old version goes on; jobs.deploy reads the reason from /v1/model
            logger.exception("version %s did not load", version)
            self.failed = {"failed_deployment": deployment, "failure": f"version {version} did not load: {error}"}
            return
        if self.wanted == deployment:  # else a later update has overtaken this one
            self.ranker, self.deployment, self.failed = ranker, deployment, {}

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
        return self.ranker.info().model_copy(update={"deployment": self.deployment, **self.failed})


@serve.deployment
@serve.ingress(None)
class Api:
    """The ingress: `make_api` over the replicas' handle."""

    def __init__(self, replicas: DeploymentHandle, max_body_bytes: int) -> None:
        self.replicas, self.max_body_bytes = replicas, max_body_bytes

    def __serve_build_asgi_app__(self) -> FastAPI:
        return make_api(self, self.max_body_bytes)

    async def rank(self, request: RankRequest) -> RankResponse | Refusal:
        try:
            return await self._with_another_try(self.replicas.rank, request)
        except BackPressureError:
            raise Overloaded from None

    async def info(self) -> ModelInfo:
        return await self._with_another_try(self.replicas.info)

    async def _with_another_try(self, method: DeploymentHandle, *arguments: RankRequest) -> Any:
        """Both methods only read, so what a dying replica took with it is asked of the next one."""
        try:
            return await method.remote(*arguments)
        except RayActorError:
            logger.warning("a replica died with a request; asking another")
        try:
            return await method.remote(*arguments)
        except RayActorError:
            raise Unavailable from None


class Arguments(BaseModel):
    """`args` of the application in serve_config.yaml."""

    max_body_bytes: int = 2_000_000


def build(args: Arguments) -> serve.Application:
    """serve_config.yaml's `import_path`."""
    return Api.bind(RankerReplica.bind(), args.max_body_bytes)
