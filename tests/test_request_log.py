"""Failures are counted, logged and answered as what they are; every answer has an id."""

import asyncio
import json
import logging

import pytest
from starlette.requests import ClientDisconnect

from serve_app.columns import RankColumns, RankedColumns
from serve_app.schemas import Problem, Refusal
from serve_app.web.api import make_api
from serve_app.web.settings import ApiIdentity
from tests.support.exposition import sample
from tests.worlds.web import RANK, Fixed, call


class Failing(Fixed):
    """Raises what it is told to."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        raise self.error


def log_lines(caplog: pytest.LogCaptureFixture) -> list[dict]:
    lines = [record for record in caplog.records if record.name == "ray.serve.requests"]
    return [json.loads(record.message) for record in lines]


# a replica's own time limit is no deadline of the request
@pytest.mark.parametrize("error", [RuntimeError("the secret"), TimeoutError("the secret")])
def test_a_failure_is_500_to_the_client_in_the_log_and_at_metrics(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    api = make_api(Failing(error))
    with caplog.at_level(logging.INFO, logger="ray.serve.requests"):
        answer = call(api, "POST", "/v1/rank", json=RANK)

    assert answer.status_code == 500
    assert "secret" not in Problem.model_validate(answer.json()).detail
    (line,) = log_lines(caplog)
    assert (line["path"], line["status"]) == ("/v1/rank", 500)

    # the traceback is found by the id that the client has
    (failure,) = [record for record in caplog.records if record.exc_info]
    assert answer.headers["X-Request-Id"] == line["request_id"]
    assert line["request_id"] in failure.getMessage()

    text = call(api, "GET", "/metrics").text
    assert sample(text, "ranking_requests_total", path="/v1/rank", status="500") == 1
    assert 'status="0"' not in text


@pytest.mark.parametrize("gone", [asyncio.CancelledError(), ClientDisconnect()])
def test_a_client_that_went_away_is_no_failure(gone: BaseException) -> None:
    api = make_api(Failing(gone))
    with pytest.raises((asyncio.CancelledError, AssertionError)):  # there is no answer
        call(api, "POST", "/v1/rank", json=RANK)

    text = call(api, "GET", "/metrics").text
    assert sample(text, "ranking_requests_total", path="/v1/rank", status="0") == 1
    assert 'status="500"' not in text


def test_the_document_knows_of_failures() -> None:
    document = call(make_api(Fixed()), "GET", "/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answer = operation["responses"]["500"]["content"]["application/json"]["schema"]
            assert answer == {"$ref": "#/components/schemas/Problem"}, path


def test_the_request_id_is_the_clients_where_it_is_a_token(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = make_api(Fixed())
    made = set()
    caplog.set_level(logging.INFO, logger="ray.serve.requests")
    for given, is_token in (
        ("order-17.3:a/b+c=", True),
        ("x" * 128, True),
        ("x" * 129, False),
        ("two words", False),
        ('"}', False),
        ("", False),
        (None, False),
    ):
        headers = {} if given is None else {"X-Request-Id": given}
        answer = call(api, "POST", "/v1/rank", headers=headers, json=RANK)
        found = answer.headers["X-Request-Id"]
        assert log_lines(caplog)[-1]["request_id"] == found
        assert (found == given) == is_token
        if not is_token:
            made.add(found)
    assert len(made) == 5


def test_every_answer_has_one_id() -> None:
    api = make_api(Fixed())
    asked = [("GET", "/healthz"), ("GET", "/nowhere"), ("GET", "/v1/rank"), ("POST", "/v1/events")]
    for method, path in asked:
        answer = call(api, method, path)
        assert len(answer.headers.get_list("X-Request-Id")) == 1, path


def test_where_ray_sends_the_id_it_is_not_there_twice() -> None:
    api = make_api(Fixed(), identity=ApiIdentity(id_is_sent=True))
    answer = call(api, "GET", "/healthz", headers={"X-Request-Id": "a"})
    assert "X-Request-Id" not in answer.headers

    # what Ray sends is no token: ours is beside it
    answer = call(api, "GET", "/healthz", headers={"X-Request-Id": "a b"})
    assert "X-Request-Id" in answer.headers
