"""The whole server on one real Ray Serve.

Each test finds it answering with the first version alone.
"""

import itertools
import math
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import httpx
import numpy as np
import pytest

from pipeline.config import CanaryConfig, Outage, UserError
from pipeline.tracking import Tracker
from serve_app import deployment, load_test, replay
from serve_app.columns import RankColumns
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.ranking.rollout import in_share
from serve_app.recommend.replay import replay_lists
from serve_app.schemas import RankHead
from tests.support.bad_bodies import BAD_BODIES, ONE, check_refused
from tests.support.exposition import sample
from tests.support.patience import wait_until
from tests.support.served import (
    BackgroundLoad,
    Served,
    asked_inside,
    loaded,
    metrics_page,
    promoted_and_back,
    replica_pids,
    restore,
    running,
)
from tests.worlds.tiny import NOT_A_USER, NUM_USERS

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server(
    local_ray: None, mlflow_runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    with running(
        mlflow_runs, "served", tmp_path_factory.mktemp("models"), num_replicas=2, page="on"
    ) as server:
        yield server


@pytest.fixture
def served(server: Served) -> Served:
    restore(server)
    return server


def test_it_answers_with_the_champion(served: Served) -> None:
    info = served.client.get("/v1/model").json()
    assert (info["model_name"], info["model_version"]) == ("served", served.versions[0])
    assert served.client.get("/healthz").json() == {"status": "ok"}
    assert served.client.get("/readyz").json() == {
        "status": "ready",
        "model_version": served.versions[0],
        "failed_deployment": None,
        "live_events": True,
        "deployments": [info["deployment"]],
    }


def test_the_page_is_told_by_a_replica(served: Served) -> None:
    assert "data-keys" in httpx.get(served.url).text, "the files need no key"
    assert httpx.post(f"{served.url}/page/user", json={"user_id": 3}).status_code == 401
    timeline = served.client.post("/page/user", json={"user_id": 3}).json()
    assert (timeline["user_id"], timeline["unknown_user"]) == (3, False)
    assert len(timeline["rows"]) == timeline["num_events"] > 0
    assert served.client.get("/docs").status_code == 200
    assert httpx.get(f"{served.url}/healthz").status_code == 200
    assert httpx.post(f"{served.url}/v1/rank", json=ONE).status_code == 401


@pytest.mark.parametrize(
    "name", ["malformed JSON", "no candidates", "10,001 candidates", "5 MB", "no history at all"]
)
def test_bad_bodies_over_the_wire(served: Served, name: str) -> None:
    body, *expected = BAD_BODIES[name]
    check_refused(
        served.client.post("/v1/rank", content=body, headers={"content-type": "application/json"}),
        *expected,
    )
    assert served.client.post("/v1/rank", json=ONE).status_code == 200


def test_unknown_user_and_items(served: Served) -> None:
    asked = {"user_id": NOT_A_USER, "candidates": [{"item_id": 1}, {"item_id": 10**12}]}
    answer = served.client.post("/v1/rank", json=asked).json()
    assert answer["unknown_user"]
    assert answer["unknown_items"] == 1
    assert len(answer["scores"]["is_like"]) == 2


def test_an_event_is_part_of_the_next_rank(served: Served) -> None:
    event = {
        "user_id": NOT_A_USER + 1,
        "item_id": 5,
        "event_time": 1_651_500_000_000,
        "actions": {"is_click": True},
    }
    asked = {"user_id": event["user_id"], "candidates": [{"item_id": 1}]}
    before = served.client.post("/v1/rank", json=asked).json()
    statuses = [
        served.client.post("/v1/events", json={"events": [event]}).json()["status"]
        for _ in range(2)
    ]
    assert statuses == [["accepted"], ["already_there"]]
    after = served.client.post("/v1/rank", json=asked).json()
    assert [(a["unknown_user"], a["history_length"]) for a in (before, after)] == [
        (True, 0),
        (False, 1),
    ]
    assert after["scores"] != before["scores"]
    earlier = asked | {"request_time_ms": event["event_time"]}
    assert served.client.post("/v1/rank", json=earlier).json()["history_length"] == 0
    wrong = served.client.post(
        "/v1/events", json={"events": [event | {"actions": {"is_sold": True}}]}
    )
    check_refused(wrong, 422, ["body", "events", 0, "actions"], "is_sold")


def test_a_handle_inside_the_cluster_gets_the_same_answer(served: Served) -> None:
    asked = ONE | {"request_time_ms": 1_651_500_000_000}
    over_http = served.client.post("/v1/rank", json=asked).json()
    head = RankHead(user_id=3, request_time_ms=1_651_500_000_000)
    assert asked_inside(RankColumns(head, np.array([1]), {})).response().model_dump(
        exclude_unset=True
    ) == {name: value for name, value in over_http.items() if name != "request_id"}


def test_the_most_candidates_allowed(served: Served) -> None:
    asked = {"user_id": 3, "candidates": [{"item_id": i} for i in range(10_000)]}
    answer = served.client.post("/v1/rank", json=asked)
    assert answer.status_code == 200
    assert sorted(answer.json()["order"]) == list(range(10_000))


def test_offline_and_http_agree(served: Served) -> None:
    period = replay.PastPeriod.of_run(served.cfg)
    report = replay.replay(period, served.cfg.serve, served.url, served.folders[0])
    assert report.num_requests > 15
    assert report.max_abs_diff <= 1e-5
    other = replay.replay(period, served.cfg.serve, served.url, served.folders[1])
    assert other.max_abs_diff > 1e-2, "another model's scores must not pass"

    lists = replay_lists(period, served.cfg.serve, served.url, served.folders[0])
    assert lists.num_requests == report.num_requests
    assert lists.max_abs_diff <= 1e-5
    other_lists = replay_lists(period, served.cfg.serve, served.url, served.folders[1])
    assert other_lists.max_abs_diff > 1e-2
    assert other_lists.num_equal < lists.num_equal


def test_promote_roll_back_and_a_replica_killed_under_load(served: Served) -> None:
    """No request fails, each answer names its version, and the versions follow the deployments."""
    promoted_and_back(served, lambda: os.kill(replica_pids()[0], signal.SIGKILL))
    assert served.client.post("/v1/rank", json=ONE).json()["model_version"] == served.versions[0]


def test_an_ingress_killed_under_load_is_hardly_seen(served: Served) -> None:
    """What the killed one had taken in, the other answers."""
    before = replica_pids("Api")
    assert len(before) == served.cfg.serve.num_ingress == 2
    with BackgroundLoad(served, most_seconds=60) as load:
        time.sleep(1)
        os.kill(before[0], signal.SIGKILL)
        time.sleep(3)

    sent = load.answers.status != load_test.NOT_SENT
    assert sent.sum() > 40
    failed = load.answers.status[sent] != 200
    assert failed.sum() <= 3, load.answers.status[sent][failed]
    wait_until(lambda: len(set(replica_pids("Api")) - set(before)) == 1, "another ingress")

    # whichever ingress is asked, the page has both
    def ingresses() -> set[str]:
        return set(re.findall(r'ranking_requests_in_flight{ingress="(\w+)"}', metrics_page(served)))

    wait_until(lambda: len(ingresses()) == 2, "both ingresses on the page")
    assert metrics_page(served).count("# TYPE ranking_requests_total") == 1


def test_events_posted_while_a_replica_is_killed_are_there_once(served: Served) -> None:
    """Four writers, who send again what got no answer; `benchmarks.serving.under_load` does it with
    100,000 events.
    """
    num_posts, together, first_user = 40, 10, NOT_A_USER + 100
    began = threading.Barrier(5)

    def write(writer: int) -> set[tuple[int, int]]:
        acknowledged: set[tuple[int, int]] = set()
        began.wait()
        with httpx.Client(base_url=served.url, timeout=10, headers=served.client.headers) as client:
            for post in range(num_posts):
                sent = {(first_user + writer, post * together + i) for i in range(together)}
                rows = [
                    {"user_id": user, "item_id": i, "event_time": 1_651_500_000_000 + i}
                    for user, i in sent
                ]
                while (
                    answer := client.post("/v1/events", json={"events": rows})
                ).status_code != 200:
                    assert answer.status_code in (429, 503, 504), answer.text
                    time.sleep(0.1)
                acknowledged |= sent
        return acknowledged

    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write, writer) for writer in range(4)]
        began.wait()
        time.sleep(0.1)
        os.kill(replica_pids()[0], signal.SIGKILL)
        acknowledged = set().union(*(done.result() for done in writing))
    log = SqliteEvents(served.cfg.run_dir / "serving" / "events.sqlite")
    kept = [(e.user_id, e.item_id) for writer in range(4) for e in log.of_user(first_user + writer)]
    assert len(kept) == len(set(kept)) == len(acknowledged) == 4 * num_posts * together
    assert set(kept) == acknowledged


def test_a_canary_and_a_shadow_by_configuration(served: Served) -> None:
    first, second = served.versions
    users = range(NUM_USERS)
    ask = lambda user: served.client.post("/v1/rank", json=ONE | {"user_id": user}).json()[
        "model_version"
    ]
    trial = replace(served.cfg.serve, canary=CanaryConfig(version=second, share=0.4), shadow=second)
    replicas = served.cfg.serve.num_replicas
    try:
        deployment.deploy_model(
            served.cfg.folders,
            trial,
            served.dashboard_url,
            Tracker(served.cfg).find_champion(),
        )
        trial_of_all = {
            ("champion", first): replicas,
            ("canary", second): replicas,
            ("shadow", second): replicas,
        }
        wait_until(lambda: loaded(served) == trial_of_all, "the trial everywhere")
        expected = [second if in_share(user, second, 0.4) else first for user in users]
        assert set(expected) == {first, second}
        assert [ask(user) for user in users] == expected
        info = served.client.get("/v1/model").json()
        assert (info["canary_version"], info["canary_share"], info["shadow_version"]) == (
            second,
            0.4,
            second,
        )
        page = lambda: metrics_page(served)
        answered = sample(
            page(), "ranking_ranker_requests_total", version=str(second), role="canary"
        )
        assert answered >= expected.count(second)
        wait_until(
            lambda: sample(page(), "ranking_shadow_score_change_count") >= NUM_USERS,
            "the shadow's scores",
        )
    finally:  # what other tests expect
        deployment.deploy_model(
            served.cfg.folders,
            served.cfg.serve,
            served.dashboard_url,
            Tracker(served.cfg).find_champion(),
        )
    assert {ask(user) for user in users} == {first}


def test_metrics_of_the_ingress_and_of_every_replica(served: Served) -> None:
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    rank_all = lambda: [
        served.client.post("/v1/rank", json=ONE | {"user_id": user}) for user in range(NUM_USERS)
    ]
    before = metrics_page(served)
    rank_all()
    after = metrics_page(served)
    for name in ("ranking_requests_total", "ranking_ranker_requests_total"):
        labels = {"path": "/v1/rank"} if name == "ranking_requests_total" else {}
        was = sample(before, name, **labels)
        assert sample(after, name, **labels) - (0 if math.isnan(was) else was) == NUM_USERS, name


def test_a_user_goes_where_the_encoded_history_is(served: Served) -> None:
    """Everybody asks twice with a history never seen; only a replica that has just come back may
    take users over.
    """
    missed = lambda: sample(metrics_page(served), "ranking_history_cache_misses_total")
    items = itertools.count()

    def sticky() -> bool:
        item = next(items)
        misses = []
        for _ in range(2):
            before = missed()
            for user in range(NUM_USERS):
                row = {"item_id": item, "event_time": 1_650_000_000_000 + user}
                served.client.post("/v1/rank", json=ONE | {"user_id": user, "history": [row]})
            misses.append(missed() - before)
        return misses == [NUM_USERS, 0]

    wait_until(sticky, "a user to stay with a replica")


def test_a_version_that_does_not_load_leaves_the_old_one(served: Served) -> None:
    broken = replace(Tracker(served.cfg).find_champion(), sha256={"model.safetensors": "0" * 64})
    with pytest.raises(UserError, match="sha256"):
        deployment.deploy_model(served.cfg.folders, served.cfg.serve, served.dashboard_url, broken)
    # where only the replicas see it
    with pytest.raises(UserError, match=r"did not load.*goes on answering"):
        deployment.send_update(
            served.cfg.serve,
            served.dashboard_url,
            deployment.user_config(served.cfg.folders, served.cfg.serve, broken),
        )
    assert served.client.post("/v1/rank", json=ONE).status_code == 200


def test_an_update_that_another_one_overtakes_is_not_waited_for(served: Served) -> None:
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    client = ServeSubmissionClient(f"http://{served.dashboard_url}")
    champion = Tracker(served.cfg).find_champion()
    deployment.deploy_model(served.cfg.folders, served.cfg.serve, served.dashboard_url, champion)
    with pytest.raises(Outage, match="another job has updated the server"):
        deployment.wait_for_update(client, served.url, "0" * 32, 600)


def test_an_update_is_the_one_wanted_from_its_put_on(served: Served) -> None:
    """Also while Serve builds the application anew, for other arguments of the ingress."""
    from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

    client = ServeSubmissionClient(f"http://{served.dashboard_url}")
    champion = Tracker(served.cfg).find_champion()
    for max_body_bytes in (2_000_000, served.cfg.serve.max_body_bytes):
        settings = replace(served.cfg.serve, max_body_bytes=max_body_bytes)
        wanted = deployment.user_config(served.cfg.folders, settings, champion)
        port = int(served.url.rpartition(":")[2])
        code = deployment.code_of_this_job()
        client.deploy_applications(deployment.serve_config(settings, wanted, port, code))

        assert deployment.find_wanted(client.get_serve_details()) == wanted["deployment"]
        deployment.wait_for_update(
            client, served.url, wanted["deployment"], settings.start_timeout_s
        )
