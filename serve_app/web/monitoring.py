"""`/metrics` for Prometheus; `/healthz` and `/readyz` for load balancers and `jobs.deploy`."""

import asyncio

from fastapi import APIRouter, Response

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
async def get_readiness(replica: RunningReplica) -> Response:
    """A model is loaded and answers."""
    info = await ask_in_time(replica)
    ready = Ready(
        model_version=info.model_version,
        deployments=await replica.deployment_ids(),
        failed_deployment=info.failed_deployment,
        live_events=info.live_events,
    )
    return json_reply(ready.model_dump())
