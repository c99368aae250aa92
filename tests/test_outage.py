"""A training whose MLflow server is killed and comes back: a real server, over the network."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from pipeline.config import RunConfig
from pipeline.sequences import store
from pipeline.tracking import Tracker, server
from pipeline.train import loop, worker
from pipeline.train.trainer import complete_run
from tests.support.patience import PATIENCE_S, wait_until
from tests.worlds.model import make_maps
from tests.worlds.training import Loader, train_config

pytestmark = pytest.mark.cluster


def kill_server(folder: Path) -> None:
    """As the kernel kills it when memory runs out: the server and its workers at once."""
    os.killpg(json.loads((folder / server.NOTE).read_text())["pid"], signal.SIGKILL)
    wait_until(lambda: not server._is_alive(folder), "the server to be gone")


def test_a_dead_server_loses_no_metric_and_stops_no_step(
    tracked: RunConfig, mlflow_runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.metrics.RETRY_AFTER_S", 0.1)
    cfg = replace(tracked, tracking=replace(tracked.tracking, experiment="outage"))
    run = Tracker(cfg).start_run(cfg, store.read_manifest(cfg.sequence_dir))
    folder, client = mlflow_runs / "mlflow", mlflow.MlflowClient()
    port = int(run.uri.rpartition(":")[2])

    def steps_there() -> list[int]:
        return [metric.step for metric in client.get_metric_history(run.run_id, "train/loss")]

    trained = []
    with worker._open_metrics(tmp_path, 0, run) as log:

        def log_through_an_outage(step: int, values: dict[str, float]) -> None:
            log(step, values)
            trained.append(step)
            if step == 4:
                wait_until(lambda: steps_there() == [1, 2, 3, 4], "the first steps")
                kill_server(folder)
            if step == 10:
                server._start_or_join(folder, port, PATIENCE_S)

        training = train_config(log_every=1)
        loop.train(training, make_maps(), Loader(), "data", log=log_through_an_outage)
    complete_run(run, tmp_path)

    assert trained == list(range(1, 13)), "no step waits, none is done twice"
    assert steps_there() == trained
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [metric.value for metric in client.get_metric_history(run.run_id, "train/loss")]
    assert losses == [line["train/loss"] for line in lines]
