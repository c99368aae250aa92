"""A running server for tests: its state, its return to a known state, and a load upon it."""

import asyncio
import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig
from pipeline.sequences import store
from pipeline.tracking import Tracker, session
from serve_app import deployment, load_test, replay
from serve_app.columns import RankColumns, RankedColumns
from tests.support.patience import wait_until
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config


@dataclass
class Served:
    cfg: RunConfig
    url: str
    dashboard_url: str
    versions: list[int]
    folders: list[Path]
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(
            base_url=self.url, timeout=30, headers=replay.key_header(self.cfg.serve)
        )


@contextmanager
def running(mlflow_runs: Path, name: str, folder: Path, **options: Any) -> Iterator[Served]:
    """Two registered versions, the first of them champion and serving to who has a key; Ray is
    there already.
    """
    from ray import serve

    hashes, key = folder / "keys.sha256", folder / "key"
    key.write_text("a-key")
    hashes.write_text(f"{hashlib.sha256(b'a-key').hexdigest()} tests\n")

    options |= {"port": 0, "api_keys_file": str(hashes), "client_key_file": str(key)}
    # a busy machine is no reason to refuse
    options |= {"max_wait_ms": 20_000, "request_timeout_s": 60}
    cfg = tiny_config(
        mlflow_runs,
        tracking={"model_name": name},
        serve=options,
        retrieval={"enabled": True, "dim": 4},
        train={"max_targets_per_sequence": 6},
    )
    cfg = replace(cfg, name=name)
    publish_sequences(cfg)
    folders = [save_tiny_model(cfg, folder / str(seed), seed, 0.9 - seed / 10) for seed in (0, 1)]
    with session(cfg), ray_cluster(cfg.ray, runs_dir=cfg.runs_dir) as cluster:
        versions = []
        for model in folders:
            with Tracker(cfg).start_run(cfg, store.read_manifest(cfg.sequence_dir)) as run:
                versions.append(Tracker(cfg).register_model(run, model))

        Tracker(cfg).promote_version(versions[0])
        try:
            url = deployment.deploy_model(
                cfg.folders, cfg.serve, cluster.dashboard_url, Tracker(cfg).find_champion()
            )
            yield Served(cfg, url, cluster.dashboard_url, versions, folders)
        finally:
            serve.shutdown()


def restore(server: Served) -> None:
    """The first version the champion, and every replica answering with it alone, whatever a test
    left or killed.
    """
    first = server.versions[0]
    if Tracker(server.cfg).find_champion().version != first:
        assert Tracker(server.cfg).roll_back() == first
    champion_alone = {("champion", first): server.cfg.serve.num_replicas}
    if wait_until(lambda: loaded(server), "a loaded model").keys() - champion_alone.keys():
        deployment.deploy_model(
            server.cfg.folders,
            server.cfg.serve,
            server.dashboard_url,
            Tracker(server.cfg).find_champion(),
        )
    wait_until(
        lambda: (
            loaded(server) == champion_alone
            and len(replica_pids()) == server.cfg.serve.num_replicas
        ),
        "the champion alone on every replica",
    )


def loaded(server: Served) -> dict[tuple[str, int], int]:
    """By role and version, how many replicas have it loaded."""
    found: dict[tuple[str, int], int] = {}
    for family in text_string_to_metric_families(metrics_page(server)):
        for entry in family.samples if family.name == "ranking_model" else ():
            key = entry.labels["role"], int(entry.labels["version"])
            found[key] = found.get(key, 0) + 1
    return found


def metrics_page(server: Served) -> str:
    """The text of /metrics, which is 503 where a replica of a busy machine does not say its numbers
    in time.
    """

    def page() -> str:
        answer = server.client.get("/metrics")
        assert answer.status_code in (200, 503), answer.text
        return answer.text if answer.status_code == 200 else ""

    return wait_until(page, "the page of metrics")


class BackgroundLoad:
    """Open-loop requests of all users at 20 a second while the block runs."""

    def __init__(self, served: Served, most_seconds: float) -> None:
        self.load = load_test.RequestLoad(rate=20, seconds=most_seconds, candidates=5, timeout_s=30)
        users, items = load_test.known_ids(served.cfg.sequence_dir)
        self.asked = load_test.draw_arrivals(self.load, users)
        bodies = load_test.request_bodies(self.load, self.asked, items)
        headers = dict(replay.key_header(served.cfg.serve))
        self.sending = threading.Thread(target=self._send, args=(served.url, bodies, headers))
        self.stop = threading.Event()

    def _send(self, url: str, bodies: list[bytes], headers: dict[str, str]) -> None:
        self.answers = asyncio.run(
            load_test.send_requests(url, self.load, self.asked, bodies, headers, self.stop)
        )

    def __enter__(self) -> "BackgroundLoad":
        self.sending.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.sending.join()


def promoted_and_back(served: Served, meanwhile: Callable[[], object]) -> None:
    """Promote the second version under load, do `meanwhile`, and roll back.

    No request fails, and the versions that answer follow the deployments.
    """
    first, second = served.versions
    with BackgroundLoad(served, most_seconds=90) as load:
        time.sleep(1)
        assert Tracker(served.cfg).promote_version(second).promoted
        assert (
            deployment.deploy_model(
                served.cfg.folders,
                served.cfg.serve,
                served.dashboard_url,
                Tracker(served.cfg).find_champion(),
            )
            == served.url
        )
        meanwhile()
        time.sleep(2)
        assert Tracker(served.cfg).roll_back() == first
        deployment.deploy_model(
            served.cfg.folders,
            served.cfg.serve,
            served.dashboard_url,
            Tracker(served.cfg).find_champion(),
        )
        time.sleep(1)

    sent = load.answers.status != load_test.NOT_SENT
    assert sent.sum() > 40
    assert load.answers.status[sent].tolist() == [200] * sent.sum()
    versions = load.answers.version[sent].tolist()
    assert (versions[0], versions[-1], set(versions)) == (first, first, {first, second})


def asked_inside(request: RankColumns) -> RankedColumns:
    """The answer to a caller in the cluster, by a handle."""
    import ray

    @ray.remote
    class Caller:
        async def ask(self, request: RankColumns) -> RankedColumns:
            from ray import serve

            return await serve.get_deployment_handle(
                "RankerReplica", deployment.APPLICATION
            ).rank.remote(request)

    return ray.get(Caller.remote().ask.remote(request))


def replica_pids(deployment_name: str = "RankerReplica") -> list[int]:
    from ray.util.state import list_actors

    name = f"ServeReplica:ranking:{deployment_name}"
    return [
        a.pid for a in list_actors(filters=[("class_name", "=", name), ("state", "=", "ALIVE")])
    ]
