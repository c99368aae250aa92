"""Runs on a real MLflow server, and joining one that is there."""

import json
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import mlflow
import pytest

from jobs.mlflow_import import read_figures
from pipeline import config
from pipeline.cluster import free_port
from pipeline.config import Outage, RunConfig, TrackingConfig, UserError
from pipeline.figures import append_run
from pipeline.run_note import noted_run
from pipeline.sequences import store
from pipeline.tracking import Run, Tracker, server, session
from pipeline.tracking.provenance import provenance_tags
from pipeline.tracking.runs import run_params

pytestmark = pytest.mark.cluster


@pytest.fixture
def cfg(tracked: RunConfig, request: pytest.FixtureRequest) -> RunConfig:
    """Under names of its own for experiment and model."""
    name = request.node.name
    return replace(tracked, tracking=replace(tracked.tracking, experiment=name, model_name=name))


def test_a_run_holds_params_metrics_dataset_plots_and_tags(cfg: RunConfig, tmp_path: Path) -> None:
    manifest = store.read_manifest(cfg.sequence_dir)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"png")
    run = Tracker(cfg).start_run(cfg, manifest)
    with run:
        for step in (1, 2):
            run.log_metrics(
                {"train/loss": 1 / step, "val/ne/is_click": float("nan"), "val/ne/ärger?": 1.0},
                step,
            )
        run.log_artifacts(tmp_path / "plots", "plots")
    client = mlflow.MlflowClient()
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    assert found.data.params == {key: str(value) for key, value in run_params(cfg).items()}
    whole = client.download_artifacts(run.run_id, "config.yaml", str(tmp_path))
    assert config.load(whole) == cfg
    tags = found.data.tags
    assert tags["mlflow.user"] and tags["mlflow.source.name"] and tags["version.torch"]
    assert tags["rows"] == str(manifest.num_rows)
    assert cfg.model.encoder in tags["mlflow.note.content"]
    experiment = client.get_experiment(found.info.experiment_id)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "train/loss")] == [
        (1, 1.0),
        (2, 0.5),
    ]
    assert "val/ne/ärger_" in found.data.metrics, (
        "a user's column may hold what MLflow does not take in a name"
    )
    (used,) = found.inputs.dataset_inputs
    assert used.dataset.digest == manifest.digest[:36]
    assert json.loads(used.dataset.profile)["num_rows"] == manifest.num_rows
    assert [entry.path for entry in client.list_artifacts(run.run_id, "plots")] == [
        "plots/loss.png"
    ]
    assert found.data.tags["manifest"] == manifest.digest
    assert len(found.data.tags.get("git_sha", "0" * 40).removesuffix("-dirty")) == 40


def test_a_run_is_named_by_what_differs_from_the_one_before(cfg: RunConfig) -> None:
    manifest = store.read_manifest(cfg.sequence_dir)
    faster = replace(cfg, train=replace(cfg.train, lr=0.5))
    names = []
    for settings in (cfg, cfg, faster):
        run = Tracker(settings).start_run(settings, manifest)
        names.append(mlflow.MlflowClient().get_run(run.run_id).info.run_name)
        time.sleep(0.01)  # the newest is by the millisecond
    assert names == ["tracked", "tracked · again", "tracked · train.lr=0.5"]


def test_params_are_what_a_training_used() -> None:
    for preset in ("demo", "kuairand", "smoke"):
        params = run_params(config.load(f"configs/{preset}.yaml"))
        assert len(params) <= 80
        assert {"model.encoder", "model.num_layers", "split.t_val"} <= params.keys()
        sections = {key.partition(".")[0] for key in params}
        assert sections.isdisjoint({"serve", "drift", "checks", "ray", "tracking", "runs_dir"})
        layers = {"demo": "2", "kuairand": "2 + 2", "smoke": "2"}[preset]
        assert params["model.num_layers"] == layers
    assert "source.synthetic" not in run_params(config.load("configs/demo.yaml"))


def test_a_run_says_which_submitted_job_and_code_it_is_of(monkeypatch: pytest.MonkeyPatch) -> None:
    package = {"working_dir": "gcs://_ray_pkg_0123.zip"}
    job = {"metadata": {"job_submission_id": "raysubmit_7"}, "runtime_env": package}
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(job))
    monkeypatch.setenv("GIT_SHA", "c0ffee")
    tags = provenance_tags()
    assert tags["ray_submission_id"] == "raysubmit_7"
    assert tags["ray_package"] == "gcs://_ray_pkg_0123.zip"
    assert tags["mlflow.source.git.commit"] == "c0ffee"
    assert re.fullmatch("[0-9a-f]{16}", tags["code_digest"])


def test_the_list_of_runs_has_columns_that_tell_them_apart(cfg: RunConfig) -> None:
    """In a tag of the experiment, which an address names; other tasks bring other columns."""
    tracker, client = Tracker(cfg), mlflow.MlflowClient()
    manifest = store.read_manifest(cfg.sequence_dir)
    with tracker.start_run(cfg, manifest) as run:
        experiment = client.get_run(run.run_id).info.experiment_id
    listed = f"/#/experiments/{experiment}/runs?viewStateShareKey=trainings"
    assert tracker.list_url.startswith(tracker.server_url + listed)

    def columns() -> list[str]:
        tags = client.get_experiment(experiment).tags
        return json.loads(tags["mlflow.sharedViewState.trainings"])["selectedColumns"]

    task = cfg.tasks[0]
    assert {"params.`model.encoder`", f"metrics.`val/ne/{task}`", "tags.`attempt`"} <= {*columns()}
    with tracker.start_run(replace(cfg, tasks=cfg.tasks[1:]), manifest):
        assert f"metrics.`val/ne/{task}`" not in columns()


def test_a_run_that_raises_has_failed(cfg: RunConfig) -> None:
    run = Tracker(cfg).start_run(cfg, store.read_manifest(cfg.sequence_dir))
    with pytest.raises(KeyError), run:
        raise KeyError("lost")
    assert mlflow.MlflowClient().get_run(run.run_id).info.status == "FAILED"


def test_a_job_whose_server_ends_first_is_marked_by_the_next(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray job stop` ends every process of the job, its MLflow server too."""
    manifest, client = store.read_manifest(cfg.sequence_dir), mlflow.MlflowClient()
    cfg = replace(cfg, name="stopped")
    run = Tracker(cfg).training_run(manifest)

    def gone(*_: object) -> None:
        raise Outage("the server went first")

    def stopped_job() -> None:
        with run:
            sys.exit(143)

    with monkeypatch.context() as outage:
        outage.setattr(Run, "end", gone)
        with pytest.raises(SystemExit):
            stopped_job()
    assert client.get_run(run.run_id).info.status == "RUNNING"
    for _ in range(2):
        with session(cfg):
            assert client.get_run(run.run_id).info.status == "KILLED"
    assert list(cfg.run_dir.glob("*end*")) == []

    with pytest.raises(SystemExit):
        stopped_job()
    assert list(cfg.run_dir.glob("*end*")) == [], "nothing is left to tell"


def test_a_training_has_one_run_however_often_it_is_started(cfg: RunConfig) -> None:
    cfg = replace(cfg, name="often")
    manifest = store.read_manifest(replace(cfg, name="tracked").sequence_dir)
    first = Tracker(cfg).training_run(manifest)
    with pytest.raises(KeyError), first:
        raise KeyError("lost")
    other = replace(cfg, train=replace(cfg.train, log_every=7))
    again = Tracker(other).training_run(manifest)
    assert again == first
    found = mlflow.MlflowClient().get_run(first.run_id)
    assert (found.info.status, found.data.tags["attempt"]) == ("RUNNING", "2")
    assert "train.log_every" not in found.data.params, "params are the first attempt's"
    assert Tracker(cfg).training_run(replace(manifest, digest="other")) != first
    newest = Tracker(cfg).training_run(manifest, restart=True)
    assert newest != first
    assert Tracker(cfg).training_run(manifest) == newest
    mlflow.MlflowClient().delete_run(newest.run_id)
    assert Tracker(cfg).training_run(manifest) != newest, "what somebody deleted stays deleted"


def test_a_trial_is_a_run_below_its_search_named_by_its_values(cfg: RunConfig) -> None:
    tracker, manifest = Tracker(cfg), store.read_manifest(cfg.sequence_dir)
    parent = tracker.start_run(cfg, manifest)
    trial = replace(cfg, name="trial-01")
    drawn = {"train.lr": cfg.train.lr, "features.item_id_dim": 16}
    run = tracker.trial_run(trial, manifest, parent, drawn)
    assert tracker.trial_run(trial, manifest, parent, drawn) == run
    assert noted_run(trial.run_dir) == run.run_id
    assert noted_run(replace(cfg, name="none").run_dir) is None
    found = mlflow.MlflowClient().get_run(run.run_id)
    assert found.info.run_name == f"trial-01 · train.lr={cfg.train.lr}, features.item_id_dim=16"
    assert found.data.tags["mlflow.parentRunId"] == parent.run_id
    values = {key: str(value) for key, value in drawn.items()}
    assert found.data.params.items() >= values.items(), "one at its default, too"


def test_a_second_job_joins_the_server_that_runs(tracked: RunConfig) -> None:
    before = mlflow.get_tracking_uri()
    with session(tracked) as tracker:
        assert tracker.server_url == before
    assert httpx.get(f"{before}/health").status_code == 200, "it was not this block's to end"
    assert mlflow.get_tracking_uri() == before


def test_a_server_outlives_the_job_that_started_it_while_another_uses_it(tmp_path: Path) -> None:
    """And it ends with the last one. A program on the port of one that is gone is not taken for it,
    nor is the original's by a copy of the folder.
    """
    folder = tmp_path / "runs" / "mlflow"
    settings = TrackingConfig()
    starter, joiner = (server._shared_server(folder, None, settings) for _ in range(2))
    uri = starter.__enter__()
    assert joiner.__enter__() == uri
    starter.__exit__(None, None, None)
    assert httpx.get(f"{uri}/health").status_code == 200

    copied = tmp_path / "copy" / "mlflow"
    copied.mkdir(parents=True)
    for name in ("server.json", "alive", "users"):
        shutil.copy(folder / name, copied)
    assert not server._is_alive(copied)

    joiner.__exit__(None, None, None)
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{uri}/health")
    with impostor(int(uri.rpartition(":")[2])):
        assert httpx.get(f"{uri}/health").status_code == 200
        assert not server._is_alive(folder)


@contextmanager
def impostor(port: int) -> Iterator[None]:
    """A program that says 200 to everything."""

    class Yes(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

    listening = HTTPServer(("127.0.0.1", port), Yes)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    try:
        yield
    finally:
        listening.shutdown()
        listening.server_close()


def test_a_server_that_is_down_is_said(tracked: RunConfig) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    absent = replace(tracked, tracking=replace(tracked.tracking, uri=uri))
    with (
        pytest.raises(Outage, match=f"tracking.uri: no MLflow server answers at '{uri}'"),
        session(absent),
    ):
        raise AssertionError("there is no server")
    with pytest.raises(Outage, match="does not answer"):
        Run(uri, "0" * 32).log_metrics({"train/loss": 1.0}, 1)


def test_figures_made_elsewhere_become_a_run_once(cfg: RunConfig, tmp_path: Path) -> None:
    figures = {
        "name": "ultra",
        "environment": {"device": "a GPU", "cores": 16},
        "metrics": {"val/ne/is_click": 0.84},
        "ours": {"causal 4096": {"forward_ms": 0.5}},
        "config": {"model": {"d_model": 64}},
    }
    (tmp_path / "ultra-0.json").write_text(json.dumps(figures))
    ((name, read),) = read_figures(tmp_path)
    assert Tracker(cfg).import_result(name, read)
    assert not Tracker(cfg).import_result(name, read)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(f"{cfg.tracking.experiment}-benchmarks")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "ultra-0"
    assert run.data.metrics == {"val/ne/is_click": 0.84, "ours.causal 4096.forward_ms": 0.5}
    params = {
        "name": "ultra",
        "environment.device": "a GPU",
        "environment.cores": "16",
        "config.model.d_model": "64",
    }
    assert run.data.params == params
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["ultra-0.json"]


def test_figures_are_read_from_files_and_from_lines(tmp_path: Path) -> None:
    run = {"name": "plain", "seed": 1, "metrics": {"auc": 0.7}, "config": {"lr": 0.1}}
    append_run(tmp_path / "quality.jsonl", run)
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "speed.json").write_text('{"ms": 3}')
    assert list(read_figures(tmp_path)) == [("speed", {"ms": 3}), ("quality/plain-1", run)]

    for broken in ("[1", '{"base": "none", "changes": {}}'):
        (tmp_path / "broken.jsonl").write_text(broken)
        with pytest.raises(UserError, match=r"broken.jsonl is not a JSON object"):
            list(read_figures(tmp_path))
