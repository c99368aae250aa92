"""Training on Ray, and what evaluation writes about its model, on a store of a few users."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from pipeline import config
from pipeline.batches.examples import request_examples, user_events
from pipeline.config import Outage, RunConfig, UserError
from pipeline.evaluate import evaluator
from pipeline.model.artifact import load_model, save_model
from pipeline.train.guards import TrainingStopped
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import command_line
from tests.worlds.tiny import publish_sequences, tiny_config

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.cluster


def train_config(runs_dir: Path, name: str) -> RunConfig:
    train = {
        "epochs": 16,  # of six steps
        "batch_users": 4,
        "num_workers": 2,
        # its blocks go through checkpoints, a lost worker and the model folder too
        "tables": {"item_id": "sharded"},
        "warmup_steps": 5,
        "log_every": 7,
        "checkpoint_every": 15,
        "validate_every": 20,
        "publish": "best",
    }
    return replace(tiny_config(runs_dir, train=train), name=name)


def losses(cfg: RunConfig) -> dict[int, dict[str, float]]:
    lines = [
        json.loads(line)
        for line in (cfg.run_dir / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    return {
        line["step"]: {k: v for k, v in line.items() if k.startswith("train/loss")}
        for line in lines
    }


@pytest.fixture(scope="module")
def trained(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run that nothing disturbed."""
    from pipeline.train import trainer

    cfg = train_config(tmp_path_factory.mktemp("runs"), "unbroken")
    publish_sequences(cfg)
    assert trainer.fit_model(cfg) == cfg.model_dir
    return cfg


def test_a_killed_worker_and_a_dead_tracker_change_no_loss(trained: RunConfig) -> None:
    """SIGKILL to a worker after the first checkpoint: Ray Train starts the workers again where that
    was. An MLflow server that does not answer stops no step, is no failure and is told at the end.
    """
    from pipeline.tracking import Run
    from pipeline.train import trainer

    once = replace(trained.train, max_failures=1)
    cfg = replace(trained, name="killed", train=once)
    shutil.copytree(trained.sequence_dir, cfg.sequence_dir)
    killed = []
    killer = threading.Thread(target=lambda: killed.append(kill_worker_after(cfg, step=25)))
    killer.start()
    with pytest.raises(
        Outage, match=r"complete, .*does not answer any more \(http://127\.0\.0\.1:9\)"
    ):
        trainer.fit_model(cfg, Run("http://127.0.0.1:9", "no such run"))
    killer.join(1)
    assert killed, "training ended before the worker was killed"
    expected, found = losses(trained), losses(cfg)
    assert found.keys() == expected.keys()
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, abs=1e-6), step
    weights = load_file(trained.model_dir / "model.safetensors")
    for name, tensor in load_file(cfg.model_dir / "model.safetensors").items():
        np.testing.assert_allclose(tensor, weights[name], atol=1e-6, err_msg=name)


def has_reached(cfg: RunConfig, step: int) -> bool:
    metrics = cfg.run_dir / "train" / "metrics.jsonl"
    return metrics.exists() and any(
        f'"step": {s},' in metrics.read_text() for s in range(step, step + 50)
    )


def kill_worker_after(cfg: RunConfig, step: int) -> int:
    """Wait for metrics of that step, then end one training worker of this process's own cluster the
    hard way.
    """
    while not has_reached(cfg, step):
        time.sleep(0.02)
    pid = next(pid for pid in our_processes() if b"RayTrainWorker" in command_line(pid))
    os.kill(pid, signal.SIGKILL)
    return pid


def our_processes() -> list[int]:
    """Processes descended from this one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int(
                    (entry / "stat").read_text().rpartition(")")[2].split()[1]
                )
            except OSError:
                continue  # it ended meanwhile
    found, fresh = set(), {os.getpid()}
    while fresh:
        found |= fresh
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
    return sorted(found)


def test_a_killed_driver_leaves_nothing_and_the_job_started_again_finishes(
    trained: RunConfig, mlflow_runs: Path, tmp_path: Path
) -> None:
    """SIGKILL to `jobs.train` with a private cluster: the second attempt ends with the weights of
    the unbroken run.
    """
    cfg = replace(trained, name="driver")
    uri = json.loads((mlflow_runs / "mlflow" / "server.json").read_text())["uri"]
    cfg = replace(cfg, tracking=replace(cfg.tracking, uri=uri, experiment="killed driver"))
    shutil.copytree(trained.sequence_dir, cfg.sequence_dir)
    preset = tmp_path / "preset.yaml"
    preset.write_text(json.dumps(config.to_dict(cfg)))
    command = [sys.executable, "-m", "jobs.train", "--config", str(preset)]
    mark = f"DRIVER_TEST={uuid.uuid4()}"
    ours = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = ours | dict([mark.split("=")])
    # Ray's agents go on asking for the cluster that died: not for a minute, which is the default
    briefly = environment | {"RAY_gcs_rpc_server_reconnect_timeout_s": "10"}
    driver = subprocess.Popen(command, env=briefly, cwd=ROOT)
    try:
        while not has_reached(cfg, step=25):
            assert driver.poll() is None, "the job ended before it was killed"
            time.sleep(0.02)
        (folder,) = (
            mark.parent
            for mark in Path("/tmp").glob("ray-*/owner")
            if text(mark) == str(driver.pid)
        )
        driver.kill()
        driver.wait()
        assert not cfg.model_dir.exists()
        subprocess.run(command, env=environment, cwd=ROOT, check=True, timeout=PATIENCE_S)
        wait_until(lambda: not marked(mark), "the killed job's processes to end")
    finally:
        for pid in marked(mark):
            os.kill(pid, signal.SIGKILL)
    assert not folder.exists(), "the next start removes what the killed one could not"
    weights = load_file(trained.model_dir / "model.safetensors")
    for name, tensor in load_file(cfg.model_dir / "model.safetensors").items():
        assert torch.equal(tensor, weights[name]), name
    assert losses(cfg) == losses(trained)
    client = mlflow.MlflowClient(uri)
    experiment = client.get_experiment_by_name("killed driver")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.data.tags["attempt"]) == ("FINISHED", "2")
    assert run.data.metrics["train/loss"] == losses(trained)[max(losses(trained))]["train/loss"]


def text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another job's, which has ended meanwhile
        return ""


def marked(variable: str) -> list[int]:
    """Processes with this environment variable, and so started by the job that had it."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if variable.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
            except OSError:
                continue  # it ended meanwhile
    return found


def test_a_finished_run_trains_nothing_more(trained: RunConfig) -> None:
    from pipeline.train import trainer

    before, seconds = losses(trained), load_model(trained.model_dir).extra["train_seconds"]
    trainer.fit_model(trained)
    assert losses(trained) == before
    assert load_model(trained.model_dir).extra["train_seconds"] == seconds


def test_the_best_checkpoint_is_published(trained: RunConfig) -> None:
    """By a validation that both workers share, and that tells what evaluation does: it takes all
    requests there are.
    """
    from pipeline.train import trainer

    last = trainer.earlier_checkpoint(trained)
    assert last is not None
    lines = [
        json.loads(line)
        for line in (trained.run_dir / "train" / "metrics.jsonl").read_text().splitlines()
    ]
    found = {line["step"]: line["val_sample/ne"] for line in lines if "val_sample/ne" in line}
    assert len(found) > 2
    assert (last.state.best, last.state.best_step) == min((ne, step) for step, ne in found.items())
    assert load_model(trained.model_dir).extra["steps"] == last.state.best_step
    metrics = evaluator.evaluate_model(trained, trained.model_dir, ["val"])
    mean = np.mean([metrics[f"val/ne/{task}"] for task in trained.tasks])
    assert mean == pytest.approx(last.state.best, abs=1e-6)


def test_ray_train_knows_the_checkpoints_and_their_metrics(trained: RunConfig) -> None:
    """Ours, where they lie: it copies none and keeps no other."""
    from pipeline.train import trainer

    notes = json.loads((trained.train_dir / trainer.RAY_NOTES).read_text())
    told = {found["checkpoint_dir_name"]: found["metrics"] for found in notes["checkpoint_results"]}
    last = trainer.earlier_checkpoint(trained)
    assert last is not None
    values = told[f"checkpoints/{last.folder.name}"]
    assert values["step"] == last.state.step
    assert values["val_sample/ne"] >= last.state.best
    assert values["train/loss"] == losses(trained)[last.state.step]["train/loss"]
    assert {path.name for path in trained.train_dir.iterdir() if path.is_dir()} == {"checkpoints"}


def test_a_training_gone_wrong_is_one_message_and_not_tried_again(trained: RunConfig) -> None:
    from pipeline.train import trainer

    wild = replace(trained.train, num_workers=1, lr=1e38, warmup_steps=0, max_bad_steps=5)
    cfg = replace(trained, name="wild", train=wild)
    shutil.copytree(trained.sequence_dir, cfg.sequence_dir)
    with pytest.raises(
        TrainingStopped, match=r"steps in a row up to step 7 .* the loss of is_click"
    ):
        trainer.fit_model(cfg)
    assert not cfg.model_dir.exists()


def test_other_settings_under_the_same_name_are_refused_before_a_worker_starts(
    trained: RunConfig,
) -> None:
    from pipeline.train import trainer

    with pytest.raises(UserError, match=r"train\.lr"):
        trainer.fit_model(replace(trained, train=replace(trained.train, lr=0.5)))


def test_a_corrupted_checkpoint_is_skipped(
    trained: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    from pipeline.train import trainer

    cfg = replace(trained, name="damaged")
    shutil.copytree(trained.run_dir, cfg.run_dir)
    newest = sorted((cfg.train_dir / "checkpoints").iterdir())[-1]
    next(newest.glob("*.safetensors")).write_bytes(b"")
    assert trainer.plan_training(cfg)["resumes_from_step"] < max(losses(trained))
    assert newest.name in caplog.text


def test_features_and_steps_of_a_large_store_are_counted_by_tasks(
    trained: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.batches.features import fit_features
    from pipeline.batches.steps import step_plan
    from pipeline.train import trainer

    monkeypatch.setattr(trainer, "LARGE_STORE", 0)
    cfg = replace(trained, train=replace(trained.train, readers=2))
    with trainer._store_workers(cfg.sequence_dir, cfg.ray, cfg.runs_dir) as run:
        assert step_plan(cfg, run=run) == step_plan(cfg)
        fit_features(cfg, run).save(tmp_path)
    assert saved_features(tmp_path) == saved_features(trained.train_dir)


def saved_features(folder: Path) -> bytes:
    return (folder / "features.safetensors").read_bytes()


def test_plan_says_what_training_would_take(
    trained: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.train import supervision, trainer

    plan = trainer.plan_training(replace(trained, name="unbroken"))
    assert plan["world_size"] == plan["readers"] == 2
    assert plan["steps_per_epoch"] * trained.train.epochs == max(losses(trained))
    model = load_model(trained.model_dir).model
    assert sum(plan["parameters"].values()) == sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(supervision, "is_private", lambda _: True)  # as without the tests' cluster
    with pytest.raises(UserError, match=r"ray\.num_cpus"):
        trainer.plan_training(replace(trained, train=replace(trained.train, num_workers=9)))


def test_a_mistake_that_a_worker_finds_is_not_tried_again(
    trained: RunConfig, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.train import trainer

    # a mistake that the driver overlooks
    monkeypatch.setattr(trainer, "check_periods", lambda *_, **__: {})
    late = {"t_val": "2030-01-01T00:00:00+00:00", "t_test": "2030-01-02T00:00:00+00:00"}
    alone = replace(trained.train, num_workers=1, validate_every=5)
    cfg = replace(trained, name="late", split=replace(trained.split, **late), train=alone)
    shutil.copytree(trained.sequence_dir, cfg.sequence_dir)
    with pytest.raises(UserError, match="the val period holds no request"):
        trainer.fit_model(cfg)
    said = capfd.readouterr().err
    assert said.count("Var(A) by layer at the start") == 1, "no second attempt did a step"


# Evaluation


@pytest.fixture(scope="module")
def evaluated(trained: RunConfig) -> tuple[RunConfig, dict[str, float]]:
    return trained, evaluator.evaluate_model(trained, trained.model_dir)


def test_every_request_row_is_scored_once(evaluated: tuple[RunConfig, dict[str, float]]) -> None:
    cfg, metrics = evaluated
    from pipeline.sequences import store

    users = user_events(store.read_sequences(cfg.sequence_dir), cfg.source, cfg.features)
    for split, bounds in {
        "val": (cfg.split.val_ms, cfg.split.test_ms),
        "test": (cfg.split.test_ms, cfg.split.end_ms),
    }.items():
        examples = request_examples(users, *bounds)
        expected = [
            (users.user_id[user], users.events.item_id[row], users.events.event_time[row])
            for user, begin, end in zip(
                examples.user, examples.target_begin, examples.target_end, strict=True
            )
            for row in range(begin, end)
        ]
        rows = pq.read_table(cfg.run_dir / "evaluation" / "predictions" / f"{split}.parquet")
        found = zip(
            *(rows[name].to_numpy() for name in ("user_id", "item_id", "event_time")), strict=True
        )
        assert sorted(found) == sorted(expected)
        known = rows["label.is_click"].is_valid().to_numpy().sum()
        assert metrics[f"{split}/rows/is_click"] == known > 0


def test_metrics_are_written_beside_the_weights_and_the_plots(
    evaluated: tuple[RunConfig, dict[str, float]],
) -> None:
    cfg, metrics = evaluated
    assert json.loads((cfg.model_dir / "metrics.json").read_text()) == metrics
    assert {
        "val/ne/is_click",
        "test/auc/is_like",
        "test/gauc/is_like",
        "test/gauc_users/is_like",
    } <= metrics.keys()
    assert 0 < metrics["masked_pair_share"] < 1
    assert 0 < metrics["truncated_token_share"] < 1
    for name in ("calibration_val", "calibration_test", "roc_val", "roc_test"):
        assert (cfg.run_dir / "evaluation" / f"{name}.png").stat().st_size > 1000
    load_model(cfg.model_dir)  # metrics.json does not disturb the digests


def test_batch_size_changes_no_score(
    evaluated: tuple[RunConfig, dict[str, float]], tmp_path: Path
) -> None:
    cfg, metrics = evaluated
    loaded = load_model(cfg.model_dir)
    save_model(tmp_path / "copy", loaded.model, loaded.cfg, loaded.maps, {})
    small = replace(cfg, name="small", evaluate=replace(cfg.evaluate, batch_tokens=30))
    shutil.copytree(cfg.sequence_dir, small.sequence_dir)
    assert evaluator.evaluate_model(small, tmp_path / "copy", ["test"])[
        "test/ne/is_click"
    ] == pytest.approx(metrics["test/ne/is_click"], abs=1e-6)


def test_a_split_without_requests_is_refused(trained: RunConfig) -> None:
    late = {"t_val": "2030-01-01T00:00:00+00:00", "t_test": "2030-01-02T00:00:00+00:00"}
    cfg = replace(trained, split=replace(trained.split, **late))
    with pytest.raises(UserError, match="holds no request"):
        evaluator.evaluate_model(cfg, trained.model_dir, ["val"], name="late")
