"""`/metrics` for Prometheus; `/healthz` and `/readyz` for load balancers and `jobs.deploy`."""

import asyncio

from fastapi import APIRouter, Request, Response

from serve_app import metrics
from serve_app.schemas import ModelInfo, Ready
from serve_app.web.limits import json_reply
from serve_app.web.replica import Replica, RequestCounts, RunningReplica, Unavailable
from serve_app.web.responses import METRICS_ANSWER, NO_MODEL, PROTECTED

READY_TIMEOUT_S = 2.0

router = APIRouter(tags=["operation"])
open_router = APIRouter(tags=["operation"])  # routes without a key: `protection.OPEN_PATHS`


async def ask_in_time(replica: Replica) -> ModelInfo:
    """What answers now.

    Raises:
        Unavailable: nothing does, or not in time for a load balancer.
    """
    try:
        return await asyncio.wait_for(replica.model_info(), READY_TIMEOUT_S)
    except TimeoutError:
        raise Unavailable from None


@router.get(
    "/metrics", name="prometheus", response_class=Response, responses=PROTECTED | METRICS_ANSWER
)
async def get_metrics(replica: RunningReplica, counts: RequestCounts) -> Response:
    """What all ingresses and replicas have counted, for Prometheus."""
    own = metrics.exposition_text(counts.registry)
    ingresses = await replica.ingress_metrics(own)
    text = metrics.metrics_page(ingresses, await replica.replica_metrics())
    return Response(text, media_type=metrics.CONTENT_TYPE)


@open_router.head("/healthz", include_in_schema=False)
@open_router.get("/healthz", name="healthz")
async def get_health() -> dict[str, str]:
    """This process lives."""
    return {"status": "ok"}


@open_router.head("/readyz", include_in_schema=False)
@open_router.get("/readyz", name="readyz", response_model=Ready, responses=NO_MODEL)
async def get_readiness(replica: RunningReplica, http: Request) -> Response:
    """A model is loaded and answers."""
    ready = await http.app.state.readiness.find(replica)
    return json_reply(ready.model_dump())


class Readiness:
    """What `/readyz` says: all replicas are asked once for all who ask meanwhile.

    Nobody needs a key for it, and a flood of such requests would be one to every replica.
    """

    def __init__(self) -> None:
        self._asking: asyncio.Task[Ready] | None = None

    async def find(self, replica: Replica) -> Ready:
        """The answer to the question that is under way, or to a new one.

        Raises:
            Unavailable: no model answers.
        """
        if self._asking is None or self._asking.done():
            self._asking = asyncio.create_task(_ask_ready(replica))
        # who goes away takes the answer from nobody else
        return await asyncio.shield(self._asking)


async def _ask_ready(replica: Replica) -> Ready:
    info = await ask_in_time(replica)
    return Ready(
        model_version=info.model_version,
        deployments=await replica.deployment_ids(),
        failed_deployment=info.failed_deployment,
        live_events=info.live_events,
    )
