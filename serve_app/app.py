"""The server on Ray Serve: an HTTP ingress in front of replicas that hold a model, or the two in
one process.

    HTTP → Api (checks, JSON) → RankerReplica (waiting requests together, one forward pass) → Ranker
    HTTP → RankerReplica with serve.one_process: a call between processes fewer, and one replica
    only

Which model answers is in the replica's `user_config`: a new one there is loaded and warmed beside
the old, which answers until one assignment swaps them.
"""

import asyncio
import gc
import logging
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from serve_app.columns import RankColumns, RankedColumns
from serve_app.metrics import ReplicaMetrics, exposition
from serve_app.ranking.batching import MicroBatcher, TokenBatcher
from serve_app.ranking.rollout import RankJob, Rollout, load
from serve_app.schemas import EventsRequest, EventsResponse, ModelInfo, Refusal
from serve_app.web.api import Overloaded, Replica, Unavailable, make_api
from serve_app.web.protection import ApiKeys, RateLimit

logger = logging.getLogger("ray.serve")

BROADCAST_TIMEOUT_S = 2.0
Answer = TypeVar("Answer")


class Ranking:
    """Holds one rollout at a time: a champion, and versions on trial."""

    def __init__(self) -> None:
        gc.collect()
        # what was imported, hundreds of thousands of objects: each full collection would stop all
        # passes
        gc.freeze()
        self.rollout: Rollout | None = None
        self.deployment = self.wanted = ""  # ids of the update that answers, and of the newest
        self.failed: dict[str, str] = {}
        self.loading: asyncio.Task | None = None
        self.counts = ReplicaMetrics()
        self.batcher = TokenBatcher(self._prepare, self._answer, self._batch_tokens)
        # events that wait together share a transaction and its fsync
        self.appender = MicroBatcher(self._append)

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        self.wanted = user_config["deployment"]
        if self.rollout is None:  # first start: no traffic before the models are loaded and warm
            self._take(
                await asyncio.to_thread(load, user_config, self.counts), user_config["deployment"]
            )
        else:  # an update: the old versions go on answering
            self.loading = asyncio.create_task(self._swap(user_config))

    async def _swap(self, user_config: dict[str, Any]) -> None:
        deployment = user_config["deployment"]
        try:
            rollout = await asyncio.to_thread(load, user_config, self.counts, self.rollout)
        except Exception as error:
            # what answered goes on; jobs.deploy reads the reason from /v1/model
            logger.exception("update %s did not load", deployment)
            self.failed = {
                "failed_deployment": deployment,
                "failure": f"the update did not load: {error}",
            }
            return
        if self.wanted == deployment:  # else a later update has overtaken this one
            self._take(rollout, deployment)
        else:
            rollout.close()

    def _take(self, rollout: Rollout, deployment: str) -> None:
        before, self.rollout = self.rollout, rollout
        self.deployment, self.failed = deployment, {}
        self.counts.loaded.roles = rollout.rankers
        if before is not None:
            before.close()

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        return await self.batcher(request)

    def _prepare(self, request: RankColumns) -> RankJob:
        return self._current.prepare(request)

    def _answer(self, jobs: list[RankJob]) -> list[RankedColumns | Refusal]:
        return jobs[0].rollout.answer(jobs)  # that of all of them, whatever was swapped meanwhile

    def _batch_tokens(self) -> int:
        return self._current.champion.limits.batch_tokens

    async def append(self, request: EventsRequest) -> EventsResponse | Refusal:
        return await self.appender(request)

    def _append(self, requests: list[EventsRequest]) -> list[EventsResponse | Refusal]:
        return self._current.append(requests)

    async def info(self) -> ModelInfo:
        return self._current.info().model_copy(
            update={"deployment": self.deployment, **self.failed}
        )

    async def own_metrics(self) -> tuple[str, bytes]:
        """Which replica this is, and its numbers."""
        return serve.get_replica_context().replica_id.unique_id, exposition(self.counts.registry)

    @property
    def _current(self) -> Rollout:
        assert self.rollout is not None, "Serve sends nothing before reconfigure has returned"
        return self.rollout


@serve.deployment(name="RankerReplica")
class RankerReplica(Ranking):
    """One of several behind `Api`."""


@serve.deployment(name="RankerReplica")
@serve.ingress(None)
class RankerWithIngress(Ranking):
    """The only replica and its ingress: both on one event loop, the ranker in a thread beside it as
    ever.
    """

    def __init__(self, args: "Arguments") -> None:
        super().__init__()
        self.args = args

    def __serve_build_asgi_app__(self) -> FastAPI:
        return _http_face(self, self.args)

    async def deployments(self) -> list[str]:
        return [self.deployment]

    async def metrics(self) -> dict[str, bytes]:
        return dict([await self.own_metrics()])


@serve.deployment
@serve.ingress(None)
class Api:
    """The ingress: `make_api` over the replicas' handle."""

    def __init__(self, replicas: DeploymentHandle, args: "Arguments") -> None:
        # Made once: each handle is an object of its own. Ray's default, cloudpickle, is for code;
        # these are values.
        self.replicas = replicas.options(
            request_serialization="pickle", response_serialization="pickle"
        )
        self.ranking = self.replicas.rank
        self.appending = self.replicas.append
        self.asking = self.replicas.info
        self.args = args

    def __serve_build_asgi_app__(self) -> FastAPI:
        return _http_face(self, self.args)

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        if request.user_id is None:
            return await self._with_another_try(self.ranking, request)
        # a user's encoded history lies with one replica
        return await self._with_another_try(
            self.ranking.options(session_id=str(request.user_id)), request
        )

    async def append(self, request: EventsRequest) -> EventsResponse | Refusal:
        return await self._with_another_try(self.appending, request)

    async def info(self) -> ModelInfo:
        return await self._with_another_try(self.asking)

    async def deployments(self) -> list[str]:
        try:
            return sorted({info.deployment for info in await self._of_all("info", ModelInfo)})
        except TimeoutError:  # a replica that is busy says nothing of the others' readiness
            return []

    async def metrics(self) -> dict[str, bytes]:
        try:
            return dict(await self._of_all("own_metrics", tuple))
        except TimeoutError:
            raise Unavailable from None

    async def _of_all(self, method: str, kind: type[Answer]) -> list[Answer]:
        """What each replica answers; one that is dying is left out."""
        asked = self.replicas.broadcast(method)
        found = await asked.results_async(timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True)
        return [answer for answer in found if isinstance(answer, kind)]

    async def _with_another_try(
        self, method: DeploymentHandle, *arguments: RankColumns | EventsRequest
    ) -> Any:
        """What a dying replica took with it is asked of the next one: no method does more when
        called again.
        """
        try:
            try:
                return await _answer(method.remote(*arguments))
            except RayActorError:
                logger.warning("a replica died with a request; asking another")
            return await _answer(method.remote(*arguments))
        except RayActorError:
            raise Unavailable from None
        except BackPressureError:
            raise Overloaded from None


async def _answer(response: Any) -> Any:
    """What a `DeploymentResponse` brings; who stops waiting tells the replica so."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


class Arguments(BaseModel):
    """`args` of the application in serve_config.yaml."""

    one_process: bool = False
    max_body_bytes: int = 2_000_000
    api_keys_file: str | None = None
    rate_limit_per_s: float | None = None
    max_wait_ms: float = 500.0
    request_timeout_s: float = 10.0


def _http_face(replica: Replica, args: Arguments) -> FastAPI:
    file, rate = args.api_keys_file, args.rate_limit_per_s
    return make_api(
        replica,
        args.max_body_bytes,
        ApiKeys(Path(file)) if file is not None else None,
        RateLimit(rate) if rate is not None else None,
        max_wait_s=args.max_wait_ms / 1000,
        timeout_s=args.request_timeout_s,
    )


def build(args: Arguments) -> serve.Application:
    """serve_config.yaml's `import_path`."""
    return (
        RankerWithIngress.bind(args) if args.one_process else Api.bind(RankerReplica.bind(), args)
    )
