"""Whatever is sent, the answer is a 2xx or a 4xx that says no more than it must: nothing of the
server's insides.
"""

import asyncio
import random

import httpx
import pytest
import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance, unsupported_method

from serve_app.schemas import (
    RANK_EXAMPLE,
)
from serve_app.web.api import make_api
from serve_app.web.protection import OPEN_PATHS, ApiKeys
from serve_app.web.settings import ApiAccess, ApiLimits
from tests.support.hostile_bodies import insides, malformed, malformed_arrow
from tests.worlds.recommender import Served
from tests.worlds.web import hashed

NUM_BODIES = 2000  # of each route; `benchmarks.serving.under_load` sends 10,000 over the wire
NUM_EXAMPLES = 40
POSTED = ("/v1/rank", "/v1/events", "/v1/recommend")


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    return make_api(Served(tmp_path_factory.mktemp("hostile")), ApiLimits(max_body_bytes=100_000))


@pytest.fixture(scope="module")
def locked(tmp_path_factory: pytest.TempPathFactory) -> FastAPI:
    folder = tmp_path_factory.mktemp("locked")
    (folder / "keys").write_text(f"{hashed('secret')} shop\n")
    return make_api(
        Served(folder),
        ApiLimits(max_body_bytes=100_000),
        access=ApiAccess(keys=ApiKeys(folder / "keys")),
    )


# The Arrow body is binary: `malformed_arrow` below. There is nothing to get wrong in a GET.
CASES = [(path, "POST", mode) for path in POSTED for mode in GenerationMode]
CASES += [("/v1/rank/batch", "POST", GenerationMode.POSITIVE)]
CASES += [("/v2/models/{name}", "GET", GenerationMode.POSITIVE)]
CASES += [(path, "GET", GenerationMode.POSITIVE) for path in ("/v1/model", "/metrics", "/readyz")]


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_requests_made_from_our_own_document(
    api: FastAPI, path: str, method: str, mode: GenerationMode
) -> None:
    """No 5xx, and every status, content type and body as the document says; what it forbids is
    refused.

    Not checked: that all it allows is accepted. Which actions and columns there are is the model's
    to say.
    """
    operation = schemathesis.openapi.from_asgi("/openapi.json", api)[path][method]

    @settings(
        max_examples=NUM_EXAMPLES,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: schemathesis.Case) -> None:
        answer = case.call_and_validate(
            excluded_checks=[positive_data_acceptance, unsupported_method]
        )
        assert_says_nothing(answer.text, path)

    ask()


def test_the_document_of_a_locked_server_is_true_too(locked: FastAPI) -> None:
    async def ask() -> list[httpx.Response]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(locked), base_url="http://test"
        ) as client:
            key = {"Authorization": "Bearer secret"}
            paths = (await client.get("/openapi.json", headers=key)).json()["paths"]
            return [
                await client.request(m, path) for path, methods in paths.items() for m in methods
            ]

    for answer in asyncio.run(ask()):
        is_open = answer.url.path in OPEN_PATHS
        assert answer.status_code == (200 if is_open else 401)
        assert_says_nothing(answer.text, answer.url.path)


def assert_says_nothing(text: str, path: str) -> None:
    if path not in ("/openapi.json", "/docs", "/metrics"):
        assert not insides(text), text[:500]


@pytest.mark.parametrize("path", [*POSTED, "/v1/rank/arrow"])
def test_malformed_bodies(api: FastAPI, path: str) -> None:
    async def ask() -> list[tuple[bytes, httpx.Response]]:
        rng = random.Random(path)
        types = [
            "application/json",
            "application/json",
            "text/plain",
            "application/x-www-form-urlencoded",
            "",
            "\x80",
        ]
        answers = []
        transport = httpx.ASGITransport(api)  # an exception of ours would come out here
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            for _ in range(NUM_BODIES):
                body = malformed_arrow(rng) if path == "/v1/rank/arrow" else malformed(rng)
                headers = {"content-type": rng.choice(types).encode("latin-1")}
                answers.append((body, await client.post(path, content=body, headers=headers)))
            assert (await client.post("/v1/rank", json=RANK_EXAMPLE)).status_code == 200
        return answers

    answers = asyncio.run(ask())
    assert {answer.status_code for _, answer in answers} <= {200, 400, 413, 422}
    refused = [answer for _, answer in answers if answer.status_code != 200]
    assert len(refused) > NUM_BODIES * 0.6
    for answer in refused:
        assert_says_nothing(answer.text, path)
        assert answer.json()["detail"]
        assert len(answer.content) < 20_000, "what was sent is not sent back whole"
