"""Routes for machines that know nothing of ranking: health, the Open Inference Protocol, and the
OpenAPI document with the page made from it.
"""

import asyncio
import importlib
import json
import re

import httpx
import pytest
from fastapi import FastAPI
from openapi_python_client import generate
from openapi_python_client.config import Config, ConfigFile, MetaType

from serve_app.schemas import ModelInfo
from serve_app.web.api import make_api
from serve_app.web.limits import LIVE_PATHS
from serve_app.web.protection import ApiKeys
from serve_app.web.replica import Unavailable
from serve_app.web.settings import ApiAccess, ApiLimits
from tests.worlds.web import RANK, Fixed, call, hashed


class Described(Fixed):
    """Says what a model with two tasks would say."""

    async def model_info(self) -> ModelInfo:
        if self.failing:
            raise self.failing
        return ModelInfo(
            model_name="clicks",
            model_version=7,
            canary_version=8,
            tasks=["is_click", "is_like"],
            request_features=["tab"],
            actions=[],
            text_ids=["item_id"],
            sequences="",
        )


@pytest.fixture
def replica() -> Described:
    return Described()


@pytest.fixture
def api(replica: Described) -> FastAPI:
    return make_api(replica, ApiLimits(max_body_bytes=100_000))


# Health --------------------------------------------------------------------------


def test_health_by_head_and_get(api: FastAPI, replica: Described):
    for path in ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready"):
        assert call(api, "HEAD", path).status_code == 200
    assert call(api, "GET", "/v2/health/live").json() == {"live": True}
    assert call(api, "GET", "/v2/health/ready").json() == {"ready": True}

    replica.failing = Unavailable()
    for path in ("/healthz", "/v2/health/live"):
        assert call(api, "HEAD", path).status_code == 200
    for path in ("/readyz", "/v2/health/ready"):
        assert call(api, "HEAD", path).status_code == 503
        assert call(api, "GET", path).status_code == 503


def test_a_server_that_ends_lives_and_is_not_ready(api: FastAPI):
    api.state.gate.is_closed = True
    for path in LIVE_PATHS:
        assert call(api, "GET", path).status_code == 200
    assert call(api, "GET", "/v2/health/ready").status_code == 503


def test_health_needs_no_key_and_the_model_does(replica: Described, tmp_path):
    (tmp_path / "keys").write_text(f"{hashed('secret')} shop\n")
    locked = make_api(
        replica,
        ApiLimits(max_body_bytes=100_000),
        access=ApiAccess(keys=ApiKeys(tmp_path / "keys")),
    )
    for path in ("/v2/health/live", "/v2/health/ready", "/docs"):
        assert call(locked, "GET", path).status_code == 200
    for path in ("/v2", "/v2/models/clicks", "/v2/models/clicks/ready", "/openapi.json"):
        assert call(locked, "GET", path).status_code == 401
        assert call(locked, "GET", path, key="secret").status_code == 200


# The protocol's metadata ---------------------------------------------------------


def test_the_model_as_the_protocol_says_it(api: FastAPI):
    server = call(api, "GET", "/v2").json()
    assert server.keys() == {"name", "version", "extensions"}

    found = call(api, "GET", "/v2/models/clicks").json()
    assert found["versions"] == ["7", "8"]
    assert found["inputs"] == [
        {"name": "user_id", "datatype": "INT64", "shape": [1]},
        {"name": "item_id", "datatype": "BYTES", "shape": [-1]},
        {"name": "tab", "datatype": "INT32", "shape": [-1]},
    ]
    assert [one["name"] for one in found["outputs"]] == ["is_click", "is_like"]
    ready = call(api, "GET", "/v2/models/clicks/ready").json()
    assert ready == {"name": "clicks", "ready": True}


def test_another_model_is_not_found(api: FastAPI):
    for path in ("/v2/models/likes", "/v2/models/likes/ready"):
        answer = call(api, "GET", path)
        assert answer.status_code == 404
        assert answer.json() == {"detail": "the model that answers is clicks"}


# The document and its page -------------------------------------------------------


def test_the_document_makes_a_client(api: FastAPI, tmp_path, monkeypatch):
    """Generated, imported, and used: functions are named by operation, modules by tag."""
    document = call(api, "GET", "/openapi.json").json()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert re.fullmatch("[a-z][a-z_]*", operation["operationId"]), path
            assert len(operation["tags"]) == 1

    source = tmp_path / "openapi.json"
    source.write_text(json.dumps(document))
    settings = Config.from_sources(
        ConfigFile(post_hooks=[]),
        MetaType.NONE,
        document_source=source,
        file_encoding="utf-8",
        overwrite=False,
        output_path=tmp_path / "ranking_client",
    )
    # the generator knows no Arrow
    left_out = [problem.header or "" for problem in generate(config=settings)]
    assert [header for header in left_out if "/arrow " not in header] == []

    monkeypatch.syspath_prepend(tmp_path)
    made = importlib.import_module("ranking_client")
    models = importlib.import_module("ranking_client.models")
    rank = importlib.import_module("ranking_client.api.rank.rank")
    ready = importlib.import_module("ranking_client.api.open_inference_protocol.server_ready")

    async def ask() -> None:
        transport = httpx.ASGITransport(api)
        client = made.Client("http://test", httpx_args={"transport": transport})
        body = models.RankRequest.from_dict(RANK)
        answer = await rank.asyncio(client=client, body=body)
        assert isinstance(answer, models.RankResponse)
        assert (answer.model_version, answer.item_ids) == (7, [1, 2])
        assert (await ready.asyncio(client=client)).ready is True

        refused = models.RankRequest.from_dict(RANK | {"candidates": []})
        problem = await rank.asyncio(client=client, body=refused)
        assert isinstance(problem, models.Problem)
        assert problem.detail[0].loc == ["body", "candidates"]

    asyncio.run(ask())


def test_the_page_loads_nothing_from_elsewhere(api: FastAPI):
    answer = call(api, "GET", "/docs")
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "://" not in answer.text
    assert 'fetch("openapi.json"' in answer.text
    assert call(api, "GET", "/redoc").status_code == 404
