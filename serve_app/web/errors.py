"""One way to say what is wrong with a request: exceptions as answers."""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError

from serve_app.columns import BadBody
from serve_app.schemas import NoIndex, Refusal, StoreDown
from serve_app.web.bodies import RefusedBody
from serve_app.web.limits import json_reply
from serve_app.web.replica import Overloaded, Unavailable

MOST_ERRORS = 10  # errors that one answer lists
TRY_AGAIN = {"Retry-After": "1"}


def add_error_handlers(api: FastAPI) -> None:
    """Answers to the exceptions of all routes; `RequestLog` answers any other one with a 500."""
    api.add_exception_handler(RequestValidationError, _answer_invalid)
    api.add_exception_handler(BadBody, _answer_bad_body)
    api.add_exception_handler(RefusedBody, _answer_refused_body)
    api.add_exception_handler(Overloaded, _answer_overloaded)
    api.add_exception_handler(Unavailable, _answer_unavailable)
    api.add_exception_handler(NoIndex, _answer_no_index)
    api.add_exception_handler(StoreDown, _answer_store_down)


def refused(refusals: Sequence[Refusal]) -> Response:
    """422 with the first `MOST_ERRORS` refusals."""
    listed = [refusal.model_dump() for refusal in refusals[:MOST_ERRORS]]
    return json_reply({"detail": listed}, 422)


async def _answer_invalid(http: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    kind = http.headers.get("content-type", "none")
    refusals = []
    # a body may be wrong in ever so many places
    for one in error.errors()[:MOST_ERRORS]:
        refusals.append(Refusal.of(one["loc"], _say_what_is_wrong(one, kind), one.get("input")))
    return refused(refusals)


def _say_what_is_wrong(found: dict[str, Any], content_type: str) -> str:
    """The message of one of FastAPI's errors, and what it leaves out of bodies that are no JSON."""
    if found["type"] == "json_invalid":
        return f"{found['msg']}: {found['ctx']['error']}"
    if found["loc"] == ("body",) and isinstance(found.get("input"), bytes):
        return f"must be sent with content-type: application/json, got {content_type}"
    return found["msg"]


async def _answer_bad_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, BadBody)
    return refused(error.refusals)


async def _answer_refused_body(_: Request, error: Exception) -> Response:
    assert isinstance(error, RefusedBody)
    return refused([error.refusal])


async def _answer_overloaded(http: Request, _: Exception) -> Response:
    http.state.refused = "overload"  # the request log counts it by its reason
    return json_reply({"detail": "too many requests are waiting"}, 429, TRY_AGAIN)


async def _answer_unavailable(*_: object) -> Response:
    return json_reply({"detail": "no model answers at the moment"}, 503, TRY_AGAIN)


async def _answer_no_index(*_: object) -> Response:
    detail = "the version that answers was registered without an item index (index.enabled)"
    return json_reply({"detail": detail}, 409)


async def _answer_store_down(*_: object) -> Response:
    detail = "the event store does not answer at the moment"
    return json_reply({"detail": detail}, 503, TRY_AGAIN)
