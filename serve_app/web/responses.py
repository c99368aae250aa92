"""Answers that the OpenAPI document lists beside a route's own, by status."""

from typing import Any

from serve_app import columns
from serve_app.schemas import Problem

Responses = dict[int | str, dict[str, Any]]

NO_MODEL: Responses = {503: {"model": Problem, "description": "no model answers at the moment"}}

# all routes
FAILED: Responses = {
    421: {"model": Problem, "description": "the request's X-Server-Id names another server"},
    500: {
        "model": Problem,
        "description": "the server failed; its log has the reason under the answer's X-Request-Id",
    },
}

# routes that ask for a key
PROTECTED: Responses = {
    401: {"model": Problem, "description": "no known API key"},
    429: {
        "model": Problem,
        "description": "too many requests of this key, or of all; see Retry-After",
    },
    504: {"model": Problem, "description": "no answer in time"},
    **NO_MODEL,
}

# routes that also read a body
CHECKED: Responses = {
    400: {"model": Problem, "description": "the body cannot be read at all"},
    408: {"model": Problem, "description": "the body did not come in time"},
    413: {"model": Problem, "description": "the body is too long"},
    422: {"model": Problem, "description": "a field is wrong: which one, and its value"},
    **PROTECTED,
}

# routes that need an index
INDEXED: Responses = {
    409: {"model": Problem, "description": "the version that answers has no item index"},
    **CHECKED,
}

_BINARY = {columns.MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}}
ARROW_REQUEST: dict[str, Any] = {"requestBody": {"required": True, "content": _BINARY}}
ARROW_ANSWER: Responses = {200: {"description": "an Arrow IPC stream", "content": _BINARY}}
METRICS_ANSWER: Responses = {
    200: {
        "description": "Prometheus' text format",
        "content": {"text/plain": {"schema": {"type": "string"}}},
    }
}
