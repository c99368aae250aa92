"""The server on Ray Serve: an HTTP ingress before replicas with a model, or both in one process.

    HTTP → Api (checks, JSON) → RankerReplica (requests that wait together, one forward pass)
    HTTP → RankerReplica, with serve.one_process: one call between processes less, one replica only

Which model answers is in the replica's `user_config`. A new one there is loaded and warmed beside
the old, which answers until one assignment swaps them.
"""

import asyncio
import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle

from serve_app.columns import RankColumns, RankedColumns
from serve_app.feedback.served_log import ServedLogSettings
from serve_app.metrics import ReplicaMetrics, exposition_text
from serve_app.page.schemas import Question, Shown
from serve_app.page.showcase import Showcase
from serve_app.ranking.batching import MicroBatcher, TokenBatcher
from serve_app.ranking.explain import Explanations
from serve_app.ranking.lookups import Lookups
from serve_app.ranking.rollout import RankJob, ReceivedRequest, Rollout, load_rollout
from serve_app.recommend.jobs import receive_list
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import RecommendRequest
from serve_app.schemas import EventsRequest, EventsResponse, ModelInfo, Refusal
from serve_app.web.api import make_api
from serve_app.web.page.routes import PageSettings
from serve_app.web.protection import ApiKeys, RateLimit
from serve_app.web.replica import Overloaded, Replica, Unavailable
from serve_app.web.settings import ApiAccess, ApiIdentity, ApiLimits
from serve_app.web.tracing import make_tracer

logger = logging.getLogger("ray.serve")

BROADCAST_TIMEOUT_S = 2.0
USERS_TOGETHER = 4  # of one request for many users' lists
Answer = TypeVar("Answer")


class Ranking:
    """One rollout at a time (a champion, versions on trial), and the requests that wait for it."""

    def __init__(self) -> None:
        _leave_out_of_collections()
        self.rollout: Rollout | None = None
        self.showcase: Showcase | None = None  # of that rollout
        self.deployment = ""  # id of the update that answers
        self.wanted = ""  # id of the newest update
        self.failed: dict[str, str] = {}
        self.loading: asyncio.Task | None = None
        self.counts = ReplicaMetrics()

        self.look_up = Lookups()
        self.explain = Explanations()
        self.batcher = TokenBatcher(self._prepare_job, self._answer_jobs, self._batch_tokens)
        # requests that take long wait for each other, and nobody else for them: neither for the
        # thread nor for a processor
        self.long_batcher = TokenBatcher(
            self._prepare_job, self._answer_jobs, self._batch_tokens, niceness=10
        )
        # events that wait together share a transaction and its fsync
        self.appender = MicroBatcher(self._append_events)

    # Updates -----------------------------------------------------------------

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Serve's protocol: called at the start and at each update."""
        self.wanted = user_config["deployment"]
        if self.rollout is not None:  # an update: the old versions go on answering
            self.loading = asyncio.create_task(self._load_and_swap(user_config))
            return

        # the first start: no traffic before the models are loaded and warm
        rollout = await asyncio.to_thread(load_rollout, user_config, self.counts)
        self._swap(rollout, user_config["deployment"])
        _leave_out_of_collections()

    async def _load_and_swap(self, user_config: dict[str, Any]) -> None:
        deployment = user_config["deployment"]
        try:
            rollout = await asyncio.to_thread(load_rollout, user_config, self.counts, self.rollout)
        except Exception as error:
            # what answered goes on; jobs.deploy reads the reason from /v1/model
            logger.exception("update %s did not load", deployment)
            self.failed = {
                "failed_deployment": deployment,
                "failure": f"the update did not load: {error}",
            }
            return

        if self.wanted == deployment:
            self._swap(rollout, deployment)
        else:  # a later update has overtaken this one
            rollout.close(self._current)

    def _swap(self, rollout: Rollout, deployment: str) -> None:
        before, self.rollout = self.rollout, rollout
        self.showcase = Showcase(rollout)
        self.deployment = deployment
        self.failed = {}
        self.counts.loaded.roles = rollout.rankers
        if before is not None:
            before.close(rollout)

    # Requests ----------------------------------------------------------------

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        """Score one request, together with those that wait."""
        asked = time.perf_counter()
        received = await self.look_up(self._current.receive(request))
        found = time.perf_counter()
        answer = await self._batcher_of(received)(received)
        if isinstance(answer, Refusal):
            return answer

        answer = _with_hops(answer, asked, found)
        if request.head.explain:
            return await self.explain(received, answer)
        return answer

    async def recommend(
        self, requests: Sequence[RecommendRequest]
    ) -> list[RecommendedList | Refusal]:
        """A list for each user; a few users at a time, so that other requests get in between."""
        answers: list[RecommendedList | Refusal] = []
        for begin in range(0, len(requests), USERS_TOGETHER):
            some = requests[begin : begin + USERS_TOGETHER]
            answers += await asyncio.gather(*[self._recommend_one(request) for request in some])
        return answers

    async def _recommend_one(self, request: RecommendRequest) -> RecommendedList | Refusal:
        received = await self.look_up(receive_list(self._current, request))
        return await self._batcher_of(received)(received)

    def _batcher_of(self, received: ReceivedRequest) -> TokenBatcher:
        return self.long_batcher if received.is_long else self.batcher

    def _prepare_job(self, received: ReceivedRequest) -> RankJob:
        return received.prepare()

    def _answer_jobs(self, jobs: list[RankJob]) -> list[RankedColumns | Refusal]:
        # jobs of a pass have one rollout, whatever was swapped meanwhile
        return jobs[0].rollout.answer_jobs(jobs)

    def _batch_tokens(self) -> int:
        return self._current.champion.limits.batch_tokens

    async def append_events(self, request: EventsRequest) -> EventsResponse | Refusal:
        """Keep events; on disk when it returns."""
        return await self.appender(request)

    def _append_events(self, requests: list[EventsRequest]) -> list[EventsResponse | Refusal]:
        return self._current.append_events(requests)

    async def show(self, question: Question) -> Shown | Refusal:
        """What the page for people asks for: files and the event store, beside the event loop."""
        assert self.showcase is not None, "Serve sends nothing before reconfigure has returned"
        return await asyncio.to_thread(self.showcase.answer, question)

    async def model_info(self) -> ModelInfo:
        """The versions that answer, and a later update that did not load."""
        update = {"deployment": self.deployment, **self.failed}
        return self._current.model_info().model_copy(update=update)

    async def own_metrics(self) -> tuple[str, bytes]:
        """This replica's id, and its metrics as exposition text."""
        return _own_id(), exposition_text(self.counts.registry)

    @property
    def _current(self) -> Rollout:
        assert self.rollout is not None, "Serve sends nothing before reconfigure has returned"
        return self.rollout


def _leave_out_of_collections() -> None:
    """Have no full collection look through what there is by now.

    Imports leave hundreds of thousands of objects, and a loaded version so many that each full
    collection stopped all passes for ten milliseconds. Memory is given back as before: no version
    is part of a cycle.
    """
    gc.collect()
    gc.freeze()


def _with_hops(answer: RankedColumns, asked: float, found: float) -> RankedColumns:
    """The answer with the time that it took beside its pass; `found` is when the look-up ended.

    asked → lookup → found → wait → the pass, ranker_ms → scored → back → now
    """
    now, pass_s = time.perf_counter(), (answer.ranker_ms or 0.0) / 1000
    hops_s = {
        "lookup": found - asked,
        "wait": max(answer.scored_s - pass_s - found, 0.0),
        "back": now - answer.scored_s,
    }
    return replace(answer, hops_ms={name: 1000 * seconds for name, seconds in hops_s.items()})


def _own_id() -> str:
    """Serve's id of this process."""
    return serve.get_replica_context().replica_id.unique_id


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
        self.api: FastAPI | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        self.api = _build_api(self, self.args)
        return self.api

    async def drain(self) -> int:
        return await _drain(self.api, self.args)

    def __del__(self) -> None:  # Serve calls it when it ends a process in peace
        _close_served_log(self.api)

    async def deployment_ids(self) -> list[str]:
        return [self.deployment]

    async def ingress_metrics(self, own: bytes) -> dict[str, bytes]:
        return {_own_id(): own}

    async def replica_metrics(self) -> dict[str, bytes]:
        return dict([await self.own_metrics()])


@serve.deployment
@serve.ingress(None)
class Api:
    """The ingress, in several processes: `make_api` over the replicas' handle."""

    def __init__(self, replicas: DeploymentHandle, args: "Arguments") -> None:
        # Ray's default, cloudpickle, is for code; these are values
        self.replicas = replicas.options(
            request_serialization="pickle", response_serialization="pickle"
        )
        # made once: each handle is an object of its own
        self.ranking = self.replicas.rank
        self.recommending = self.replicas.recommend
        self.appending = self.replicas.append_events
        self.asking = self.replicas.model_info
        self.showing = self.replicas.show
        self.args = args
        context = serve.get_replica_context()
        self.ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        self.api: FastAPI | None = None

    def __serve_build_asgi_app__(self) -> FastAPI:
        self.api = _build_api(self, self.args)
        return self.api

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        method = self.ranking
        if request.user_id is not None:  # a user's encoded history lies with one replica
            method = method.options(session_id=str(request.user_id))
        return await self._call(method, request)

    async def recommend(
        self, requests: Sequence[RecommendRequest]
    ) -> list[RecommendedList | Refusal]:
        method = self.recommending
        if len(requests) == 1 and requests[0].user_id is not None:
            method = method.options(session_id=str(requests[0].user_id))
        return await self._call(method, list(requests))

    async def append_events(self, request: EventsRequest) -> EventsResponse | Refusal:
        return await self._call(self.appending, request)

    async def show(self, question: Question) -> Shown | Refusal:
        return await self._call(self.showing, question)

    async def model_info(self) -> ModelInfo:
        return await self._call(self.asking)

    async def deployment_ids(self) -> list[str]:
        try:
            infos = await self._call_all("model_info", ModelInfo)
        except TimeoutError:  # a replica that is busy says nothing of the others' readiness
            return []
        return sorted({info.deployment for info in infos})

    async def drain(self) -> int:
        """Take nothing in any more and answer what is there; returns how much is left of it."""
        return await _drain(self.api, self.args)

    def __del__(self) -> None:  # Serve calls it when it ends a process in peace
        _close_served_log(self.api)

    async def own_counts(self) -> tuple[str, bytes]:
        """This ingress' id, and its metrics as exposition text."""
        assert self.api is not None, "Serve builds the API before it calls anything"
        return _own_id(), exposition_text(self.api.state.counts.registry)

    async def ingress_metrics(self, own: bytes) -> dict[str, bytes]:
        try:
            found = dict(await self._call_all("own_counts", tuple, self.ingresses))
        except TimeoutError:
            raise Unavailable from None
        return {**found, _own_id(): own}

    async def replica_metrics(self) -> dict[str, bytes]:
        try:
            return dict(await self._call_all("own_metrics", tuple))
        except TimeoutError:
            raise Unavailable from None

    async def _call_all(
        self, method: str, kind: type[Answer], processes: DeploymentHandle | None = None
    ) -> list[Answer]:
        """The answer of each replica, or of other `processes`; one that is dying is left out."""
        asked = (processes or self.replicas).broadcast(method)
        found = await asked.results_async(timeout_s=BROADCAST_TIMEOUT_S, return_exceptions=True)
        return [answer for answer in found if isinstance(answer, kind)]

    async def _call(self, method: DeploymentHandle, *arguments: Any) -> Any:
        """One replica's answer. Retry once on another if it dies: every method is idempotent."""
        try:
            try:
                return await _wait_for(method.remote(*arguments))
            except RayActorError:
                logger.warning("a replica died with a request; asking another")
            return await _wait_for(method.remote(*arguments))
        except RayActorError:
            raise Unavailable from None
        except BackPressureError:
            raise Overloaded from None


async def _drain(api: FastAPI | None, args: "Arguments") -> int:
    assert api is not None, "Serve builds the API before it calls anything"
    left = await api.state.gate.close_and_wait(args.request_timeout_s)
    await asyncio.to_thread(_close_served_log, api)
    return left


def _close_served_log(api: FastAPI | None) -> None:
    """Write what an ingress that ends has not written yet."""
    if api is not None and api.state.served is not None:
        api.state.served.close()
        api.state.served = None


async def _wait_for(response: Any) -> Any:
    """The value of a `DeploymentResponse`; a caller that stops waiting cancels the work."""
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
    body_timeout_s: float = 2.0
    max_candidates: int | None = None
    max_history: int | None = None
    max_rank_users: int = 100
    max_recommend_users: int = 100
    hosts: list[str] | None = None
    trace_context: bool = False
    otlp_endpoint: str | None = None
    served_log: ServedLogSettings | None = None
    page: PageSettings | None = None
    server_id: str | None = None


def _build_api(replica: Replica, args: Arguments) -> FastAPI:
    keys = None
    if args.api_keys_file is not None:
        keys = ApiKeys(Path(args.api_keys_file))

    rate_limit = None
    if args.rate_limit_per_s is not None:
        rate_limit = RateLimit(args.rate_limit_per_s)

    tracer = None
    if args.trace_context:
        tracer = make_tracer(args.otlp_endpoint)

    limits = ApiLimits(
        max_body_bytes=args.max_body_bytes,
        max_wait_s=args.max_wait_ms / 1000,
        timeout_s=args.request_timeout_s,
        body_timeout_s=args.body_timeout_s,
        max_candidates=args.max_candidates,
        max_history=args.max_history,
        max_rank_users=args.max_rank_users,
        max_recommend_users=args.max_recommend_users,
    )
    hosts = None if args.hosts is None else frozenset(args.hosts)
    return make_api(
        replica,
        limits,
        access=ApiAccess(keys=keys, rate_limit=rate_limit, hosts=hosts),
        identity=ApiIdentity(name=_own_id(), server_id=args.server_id, id_is_sent=True),
        served_log=args.served_log,
        page=args.page,
        tracer=tracer,
    )


def build(args: Arguments) -> serve.Application:
    """The application; `import_path` of serve_config.yaml."""
    if args.one_process:
        return RankerWithIngress.bind(args)
    return Api.bind(RankerReplica.bind(), args)
