"""How the server's job begins without MLflow, ends with its cluster, and drains."""

import asyncio
import os
import stat
import threading
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from ray import serve

from jobs import cli
from jobs.serve import find_champion, open_ports, require_cluster
from pipeline import cluster
from pipeline.cluster import KEPT_LOGS, free_port, keep_serve_logs
from pipeline.config import Outage
from pipeline.tracking import PinnedModel
from serve_app import deployment
from serve_app.columns import RankColumns, RankedColumns
from serve_app.schemas import Refusal
from serve_app.web.api import make_api
from tests.worlds.tiny import publish_sequences, tiny_config
from tests.worlds.web import RANK, Fixed


def test_what_is_in_flight_is_answered_and_nothing_else_let_in() -> None:
    class Waiting(Fixed):
        def __init__(self) -> None:
            self.begun, self.go_on = asyncio.Event(), asyncio.Event()

        async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
            self.begun.set()
            await self.go_on.wait()
            return await super().rank(request)

    async def main() -> None:
        replica = Waiting()
        api = make_api(replica)
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            inside = asyncio.create_task(client.post("/v1/rank", json=RANK))
            await replica.begun.wait()
            assert await api.state.gate.close_and_wait(0.01) == 1

            late = await client.post("/v1/rank", json=RANK)
            assert (late.status_code, late.headers["Retry-After"]) == (503, "1")
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.get("/healthz")).status_code == 200

            replica.go_on.set()
            assert await api.state.gate.close_and_wait(10) == 0
            assert (await inside).status_code == 200

    asyncio.run(main())


def test_without_mlflow_the_champion_of_the_last_time_is_served(tmp_path: Path) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    cfg = tiny_config(tmp_path / "runs", tracking={"uri": nowhere})
    with ExitStack() as stack, pytest.raises(Outage):
        find_champion(cfg, stack)

    model = PinnedModel(nowhere, cfg.model_name, 3, {"config.json": "0" * 64})
    deployment._remember_champion(cfg.runs_dir, model)
    with ExitStack() as stack:
        assert find_champion(cfg, stack) == (model, "does not answer")


class WithoutDatabase(BaseHTTPRequestHandler):
    """An MLflow server that lives, and has lost what is behind it."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 500)
        self.end_headers()

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_an_mlflow_that_has_lost_its_database_stops_no_start_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with HTTPServer(("127.0.0.1", 0), WithoutDatabase) as broken:
        threading.Thread(target=broken.serve_forever, daemon=True).start()
        uri = f"http://127.0.0.1:{broken.server_port}"
        cfg = tiny_config(tmp_path / "runs", tracking={"uri": uri})
        model = PinnedModel(uri, cfg.model_name, 3, {"config.json": "0" * 64})
        deployment._remember_champion(cfg.runs_dir, model)
        with ExitStack() as stack:
            assert find_champion(cfg, stack) == (model, "does not answer")
        broken.shutdown()


def test_the_job_ends_with_its_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "CHECK_S", 0.001)
    lost: list[str] = []
    monkeypatch.setattr(cluster, "lost_processes", lambda: lost)
    require_cluster()
    lost.append("raylet")
    with pytest.raises(Outage, match="lost raylet"):
        cli.wait_for_interrupt(require_cluster)
    monkeypatch.undo()
    assert cluster.lost_processes() == [], "no cluster of ours runs"


@pytest.mark.cluster
def test_where_there_is_no_server_yet_none_is_ended(tmp_path: Path) -> None:
    """As of a canary that is not registered: an error here would hide that message."""
    cfg = tiny_config(tmp_path / "runs")
    with cluster.ray_cluster(cfg.ray, runs_dir=cfg.runs_dir):
        deployment.end_server(cfg.serve)
        assert not serve.status().applications


def test_what_ray_opens_to_the_network_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environment = cluster.serve_environment(tmp_path)
    for name, port in environment.items():
        monkeypatch.setenv(name, port)
    said = open_ports()
    assert f"statistics on port {environment['RAY_SERVE_HAPROXY_STATS_PORT']}," in said
    assert f"metrics on port {environment['RAY_SERVE_HAPROXY_METRICS_PORT']}," in said

    monkeypatch.delenv("RAY_SERVE_HAPROXY_STATS_PORT")
    assert "statistics" not in open_ports(), "a cluster that somebody else started"
    cluster.release_replica_ports(tmp_path)


def test_logs_outlive_the_cluster(tmp_path: Path) -> None:
    session = tmp_path / "session"
    (session / "logs").mkdir(parents=True)
    kept = tmp_path / "run" / "logs"
    for start in range(KEPT_LOGS + 3):
        (kept / f"2026010{start:02}-000000").mkdir(parents=True)

    context = SimpleNamespace(address_info={"session_dir": str(session)})
    folder = keep_serve_logs(context, kept)
    (session / "logs" / "serve" / "replica.log").write_text("why it did not load")
    assert (folder / "replica.log").read_text() == "why it did not load"
    assert len(list(kept.iterdir())) == KEPT_LOGS
    assert folder in list(kept.iterdir())


@pytest.mark.skipif(os.name != "posix", reason="modes of files")
def test_what_users_did_is_for_their_server_alone(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    publish_sequences(cfg)
    model = PinnedModel("http://127.0.0.1:1", "tiny", 3, {})
    serving = Path(deployment.user_config(cfg.folders, cfg.serve, model)["serving"])
    assert stat.S_IMODE(serving.stat().st_mode) == 0o700
