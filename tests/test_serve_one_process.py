"""The server whose ingress ranks itself: the same answers, and changes of version that no request
notices.
"""

from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipeline.config import ConfigError, ServeConfig
from serve_app import replay
from serve_app.columns import RankColumns
from serve_app.recommend.replay import replay_lists
from serve_app.schemas import RankHead
from tests.support.bad_bodies import ONE
from tests.support.exposition import sample
from tests.support.served import (
    Served,
    asked_inside,
    loaded,
    metrics_page,
    promoted_and_back,
    replica_pids,
    restore,
    running,
)
from tests.worlds.tiny import NOT_A_USER


@pytest.fixture(scope="module")
def server(
    local_ray: None, mlflow_runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with running(
        mlflow_runs, "alone", tmp_path_factory.mktemp("models"), one_process=True
    ) as server:
        yield server


@pytest.fixture
def served(server: Served) -> Served:
    restore(server)
    return server


def test_it_is_for_one_replica() -> None:
    for more in ({"num_replicas": 2}, {"use_gpu": True}):
        with pytest.raises(ConfigError, match=r"serve\.one_process"):
            ServeConfig(one_process=True, **more)


@pytest.mark.cluster
def test_every_route_answers_from_one_process(served: Served) -> None:
    first = served.versions[0]
    info = served.client.get("/v1/model").json()
    assert info["model_version"] == first
    assert served.client.get("/readyz").json()["deployments"] == [info["deployment"]]
    assert httpx.post(f"{served.url}/v1/rank", json=ONE).status_code == 401
    assert served.client.post("/v1/rank", json=ONE | {"user_id": "3"}).status_code == 422
    check_rank_options(served, info)
    event = {"user_id": NOT_A_USER, "item_id": 5, "event_time": 1_651_500_000_000}
    asked = ONE | {"user_id": NOT_A_USER}
    before = served.client.post("/v1/rank", json=asked).json()
    assert served.client.post("/v1/events", json={"events": [event]}).json()["accepted"] == 1
    after = served.client.post("/v1/rank", json=asked).json()
    assert (before["history_length"], after["history_length"]) == (0, 1)
    page = metrics_page(served)
    assert sample(page, "ranking_requests_total", path="/v1/rank", status="200") >= 2
    assert sample(page, "ranking_ranker_requests_total", version=str(first)) >= 2
    period, folder = replay.PastPeriod.of_run(served.cfg), served.folders[0]
    limits, url = served.cfg.serve, served.url
    assert replay.replay(period, limits, url, folder).max_abs_diff <= 1e-5
    assert replay_lists(period, limits, url, folder).max_abs_diff <= 1e-5


def check_rank_options(served: Served, info: dict) -> None:
    """What reaches a replica through the server, and back: reasons, the best alone, several users,
    the protocol's metadata.
    """
    best = served.client.post("/v1/rank", json=ONE | {"explain": True, "top_k": 1}).json()
    assert len(best["item_ids"]) == len(best["explanation"]["candidates"]) == 1
    assert best["explanation"]["rows_tried"] == best["history_length"]

    requests = [ONE, ONE | {"order_by": "is_sold"}]
    batch = served.client.post("/v1/rank/batch", json={"requests": requests}).json()
    assert batch["answers"][0]["item_ids"] == [one["item_id"] for one in ONE["candidates"]]
    assert [one["row"] for one in batch["refused"]] == [1]

    named = served.client.get(f"/v2/models/{info['model_name']}").json()
    assert named["versions"] == [str(info["model_version"])]
    assert [one["name"] for one in named["outputs"]] == info["tasks"]
    assert httpx.head(f"{served.url}/v2/health/ready").status_code == 200
    assert "openapi.json" in httpx.get(f"{served.url}/docs").text


@pytest.mark.cluster
def test_a_handle_inside_the_cluster_gets_the_same_answer(served: Served) -> None:
    over_http = served.client.post(
        "/v1/rank", json=ONE | {"request_time_ms": 1_651_500_000_000}
    ).json()
    head = RankHead(user_id=3, request_time_ms=1_651_500_000_000)
    assert asked_inside(RankColumns(head, np.array([1]), {})).response().model_dump(
        exclude_unset=True
    ) == {name: value for name, value in over_http.items() if name != "request_id"}


@pytest.mark.cluster
def test_promote_and_roll_back_under_load(served: Served) -> None:
    """No request fails, and the process stays the same: a version is loaded beside the one that
    answers.
    """
    process = replica_pids()
    promoted_and_back(served, lambda: check_loaded(served))
    assert replica_pids() == process


def check_loaded(served: Served) -> None:
    assert loaded(served) == {("champion", served.versions[1]): 1}
