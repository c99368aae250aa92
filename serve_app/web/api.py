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
    ApiKeys,
    LocalHosts,
    Protection,
    RateLimit,
    RequestLog,
)
from serve_app.web.replica import Replica
from serve_app.web.responses import FAILED
from serve_app.web.tracing import TraceContext

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

ABOUT = (
    "Recommends items to a user, and scores and orders candidates, by what that user did before, "
    "as of any time."
)


def make_api(
    replica: Replica,
    max_body_bytes: int,
    keys: ApiKeys | None = None,
    rate_limit: RateLimit | None = None,
    *,
    max_wait_s: float = 0.5,
    timeout_s: float = 10.0,
    body_timeout_s: float = 2.0,
    max_candidates: int | None = None,
    max_history: int | None = None,
    max_rank_users: int = 100,
    max_recommend_users: int = 100,
    id_is_sent: bool = False,
    hosts: frozenset[str] | None = None,
    served_log: ServedLogSettings | None = None,
    page: PageSettings | None = None,
    tracer: "Tracer | None" = None,
    name: str = "ingress",
    server_id: str | None = None,
) -> FastAPI:
    """The API over `replica`; a test passes one of its own, Ray Serve one over a handle.

    Args:
        replica: ranks and keeps events.
        max_body_bytes: HTTP 413 beyond it.
        keys: who may ask; None is everybody.
        rate_limit: per key, None is without limit.
        max_wait_s: work that may lie before a request; HTTP 429 beyond it.
        timeout_s: from the first byte to the answer; HTTP 504 beyond it.
        body_timeout_s: until the body is there; HTTP 408 beyond it.
        max_candidates, max_history, max_rank_users, max_recommend_users: of one request; HTTP 422
            beyond it. None is as the replica says.
        id_is_sent: as of `RequestLog`.
        hosts: names that a request may call this server by; None is all.
        served_log: where what is served is written; None is nowhere.
        page: the page for people at /; None is none.
        tracer: of OpenTelemetry, goes on with the traces of requests; None costs nothing.
        name: of this ingress, part of the names of files that it writes.
        server_id: name of the server, in every answer; a request for another one gets HTTP 421.
    """
    api = _new_app(replica, served_log, name)
    _set_limits(api, max_candidates, max_history, max_rank_users, max_recommend_users)

    # from the inside out: without a key no work is admitted and no body is waited for
    api.add_middleware(Admission, max_wait_s=max_wait_s)
    api.add_middleware(BodyLimit, max_bytes=max_body_bytes, timeout_s=body_timeout_s)
    api.add_middleware(Protection, keys=keys, rate_limit=rate_limit, open_paths=_open_paths(page))
    api.add_middleware(LocalHosts, hosts=hosts)
    api.add_middleware(Deadline, timeout_s=timeout_s)
    api.add_middleware(Draining, gate=api.state.gate)
    api.add_middleware(Addressee, server_id=server_id)
    counts = api.state.counts
    api.add_middleware(RequestLog, metrics=counts, id_is_sent=id_is_sent, server_id=server_id)
    if tracer is not None:
        api.add_middleware(TraceContext, tracer=tracer)
    add_error_handlers(api)
    _add_routes(api, page, with_keys=keys is not None)
    return api


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


def _set_limits(
    api: FastAPI,
    max_candidates: int | None,
    max_history: int | None,
    max_rank_users: int,
    max_recommend_users: int,
) -> None:
    """How long a request's lists may be: for the routes, and for bodies that no schema read yet."""
    api.state.max_rank_users = max_rank_users
    api.state.max_recommend_users = max_recommend_users

    # as the replica's own refusals name them
    of_rank = []
    if max_candidates is not None:
        of_rank.append(PartLimit("candidates", max_candidates, "candidates"))
    if max_history is not None:
        of_rank.append(PartLimit("history", max_history, "rows"))

    api.state.part_limits = {
        "/v1/rank": of_rank,
        "/v1/rank/batch": [PartLimit("requests", max_rank_users, "users")],
        "/v1/recommend/batch": [PartLimit("requests", max_recommend_users, "users")],
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
