"""The HTTP API without Ray: routes by subject, layers around them, answers to exceptions.

    request → RequestLog → Addressee → Draining → Deadline → LocalHosts → Protection → BodyLimit
    → Admission → a router

Routers are in `rank`, `rank_batch`, `recommend`, `events`, `model`, `open_inference`, `monitoring`
and `docs`; layers in `limits` and `protection`.
"""

from typing import TYPE_CHECKING

from fastapi import Depends, FastAPI
from fastapi.security import HTTPBearer

from pipeline.version import package_version
from serve_app import metrics
from serve_app.feedback.served_log import ServedLog, ServedLogSettings
from serve_app.web import (
    docs,
    events,
    model,
    monitoring,
    open_inference,
    rank,
    rank_batch,
    recommend,
)
from serve_app.web.bodies import PartLimit
from serve_app.web.errors import add_error_handlers
from serve_app.web.limits import Admission, BodyLimit, Deadline, Draining, Gate
from serve_app.web.page import routes as page_routes
from serve_app.web.page.routes import PageSettings
from serve_app.web.protection import (
    OPEN_PATHS,
    Addressee,
    LocalHosts,
    Protection,
    RequestLog,
)
from serve_app.web.replica import Replica
from serve_app.web.responses import FAILED
from serve_app.web.settings import ApiAccess, ApiIdentity, ApiLimits
from serve_app.web.tracing import TraceContext

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

ABOUT = (
    "Recommends items to a user, and scores and orders candidates, by what that user did before, "
    "as of any time."
)


def make_api(
    replica: Replica,
    limits: ApiLimits = ApiLimits(),
    *,
    access: ApiAccess = ApiAccess(),
    identity: ApiIdentity = ApiIdentity(),
    served_log: ServedLogSettings | None = None,
    page: PageSettings | None = None,
    tracer: "Tracer | None" = None,
) -> FastAPI:
    """The API over `replica`; a test passes one of its own, Ray Serve one over a handle.

    Args:
        replica: ranks and keeps events.
        served_log: where what is served is written; None is nowhere.
        page: the page for people at /; None is none.
        tracer: of OpenTelemetry, goes on with the traces of requests; None costs nothing.
    """
    api = _new_app(replica, served_log, identity.name)
    _limit_lists(api, limits)
    _add_layers(api, limits, access, identity, _open_paths(page))
    if tracer is not None:
        api.add_middleware(TraceContext, tracer=tracer)
    add_error_handlers(api)
    _add_routes(api, page, with_keys=access.keys is not None)
    return api


def _add_layers(
    api: FastAPI,
    limits: ApiLimits,
    access: ApiAccess,
    identity: ApiIdentity,
    open_paths: tuple[str, ...],
) -> None:
    """The layers around the routes; `open_paths` need no key."""
    # from the inside out: without a key no work is admitted and no body is waited for
    api.add_middleware(Admission, max_wait_s=limits.max_wait_s)
    api.add_middleware(BodyLimit, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s)
    api.add_middleware(
        Protection, keys=access.keys, rate_limit=access.rate_limit, open_paths=open_paths
    )
    api.add_middleware(LocalHosts, hosts=access.hosts)
    api.add_middleware(Deadline, timeout_s=limits.timeout_s)
    api.add_middleware(Draining, gate=api.state.gate)
    api.add_middleware(Addressee, server_id=identity.server_id)
    api.add_middleware(
        RequestLog,
        metrics=api.state.counts,
        id_is_sent=identity.id_is_sent,
        server_id=identity.server_id,
    )


def _new_app(replica: Replica, served_log: ServedLogSettings | None, name: str) -> FastAPI:
    """An app without routes, and what its routes and layers share."""
    api = FastAPI(
        title="ULTRA-HSTU ranking",
        version=package_version(),
        description=ABOUT,
        responses=FAILED,
        docs_url=None,  # FastAPI's page loads scripts from another host; `docs` has one of ours
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    api.state.replica = replica
    api.state.counts = metrics.IngressMetrics()
    api.state.gate = Gate()
    api.state.readiness = monitoring.Readiness()
    api.state.served = None
    if served_log is not None:
        api.state.served = ServedLog(served_log, name, api.state.counts)
    return api


def _open_paths(page: PageSettings | None) -> tuple[str, ...]:
    """Paths without a key: a browser asks for the page before anybody can give it one."""
    return OPEN_PATHS if page is None else (*OPEN_PATHS, *page_routes.FILE_PATHS)


def _limit_lists(api: FastAPI, limits: ApiLimits) -> None:
    """How long a request's lists may be: for the routes, and for bodies that no schema read yet."""
    api.state.max_rank_users = limits.max_rank_users
    api.state.max_recommend_users = limits.max_recommend_users

    # as the replica's own refusals name them
    of_rank = []
    if limits.max_candidates is not None:
        of_rank.append(PartLimit("candidates", limits.max_candidates, "candidates"))
    if limits.max_history is not None:
        of_rank.append(PartLimit("history", limits.max_history, "rows"))

    api.state.part_limits = {
        "/v1/rank": of_rank,
        "/v1/rank/batch": [PartLimit("requests", limits.max_rank_users, "users")],
        "/v1/recommend/batch": [PartLimit("requests", limits.max_recommend_users, "users")],
    }


def _add_routes(api: FastAPI, page: PageSettings | None, *, with_keys: bool) -> None:
    """All routers; a new subject is one more."""
    # for the OpenAPI document alone: `Protection` does the checking
    locks = []
    if with_keys:
        locks.append(Depends(HTTPBearer(auto_error=False, description="an API key")))

    protected = (
        *(rank.router, rank_batch.router, recommend.router, events.router, model.router),
        *(open_inference.router, monitoring.router),
    )
    for router in protected:
        api.include_router(router, dependencies=locks)
    for router in (monitoring.open_router, open_inference.open_router, docs.open_router):
        api.include_router(router)
    if page is not None:
        api.include_router(page_routes.router)
        api.include_router(page_routes.files_router(page, needs_key=with_keys))
