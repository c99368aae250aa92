"""Runs, versions, gate and champion on a real MLflow server."""

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import httpx
import mlflow
import pytest
from tiny_world import publish_sequences, save_tiny_model, tiny_config

from pipeline import config, tracking
from pipeline.cluster import free_port
from pipeline.config import RunConfig, UserError
from pipeline.data import store
from pipeline.mlflow_server import mlflow_server

pytestmark = pytest.mark.cluster


@pytest.fixture(scope="module")
def server(mlflow_runs: Path) -> Iterator[RunConfig]:
    """A configuration whose server runs. Tests use names of their own for experiment and model."""
    cfg = tiny_config(mlflow_runs, name="tracking")
    publish_sequences(cfg)
    with mlflow_server(cfg):
        yield cfg


@pytest.fixture
def cfg(server: RunConfig, request: pytest.FixtureRequest) -> RunConfig:
    name = request.node.name
    return replace(server, tracking=replace(server.tracking, experiment=name, model_name=name))


def new_version(cfg: RunConfig, tmp_path: Path, val_ne: float, seed: int = 0) -> int:
    folder = save_tiny_model(cfg, tmp_path / f"model-{val_ne}-{seed}", seed, val_ne)
    with tracking.start_run(cfg, store.read_manifest(cfg.sequence_dir)) as run:
        return tracking.register(cfg, run, folder)


def test_a_run_holds_params_metrics_dataset_plots_and_tags(cfg: RunConfig, tmp_path: Path) -> None:
    manifest = store.read_manifest(cfg.sequence_dir)
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "loss.png").write_bytes(b"png")
    run = tracking.start_run(cfg, manifest, {"attempt": "1"})
    with run:
        for step in (1, 2):
            run.log_metrics({"train/loss": 1 / step, "val/ne/is_click": float("nan")}, step)
        run.log_artifacts(tmp_path / "plots", "plots")
    client = mlflow.MlflowClient()
    found = client.get_run(run.run_id)
    assert found.info.status == "FINISHED"
    params = {key: str(value)[:6000] for key, value in config.flatten(config.to_dict(cfg)).items()}
    assert len(params) > 100, "more than one request takes"
    assert found.data.params == params
    assert [(m.step, m.value) for m in client.get_metric_history(run.run_id, "train/loss")] == [(1, 1.0), (2, 0.5)]
    (used,) = found.inputs.dataset_inputs
    assert used.dataset.digest == manifest.digest[:36]
    assert json.loads(used.dataset.profile)["num_rows"] == manifest.num_rows
    assert [entry.path for entry in client.list_artifacts(run.run_id, "plots")] == ["plots/loss.png"]
    assert found.data.tags["manifest"] == manifest.digest
    assert found.data.tags["attempt"] == "1"
    assert len(found.data.tags.get("git_sha", "0" * 40).removesuffix("-dirty")) == 40


def test_a_run_that_raises_has_failed(cfg: RunConfig) -> None:
    run = tracking.start_run(cfg, store.read_manifest(cfg.sequence_dir))
    with pytest.raises(KeyError), run:
        raise KeyError("lost")
    assert mlflow.MlflowClient().get_run(run.run_id).info.status == "FAILED"


def test_a_training_has_one_run_however_often_it_is_started(cfg: RunConfig) -> None:
    cfg = replace(cfg, name="often")
    manifest = store.read_manifest(replace(cfg, name="tracking").sequence_dir)
    first = tracking.training_run(cfg, manifest)
    with pytest.raises(KeyError), first:
        raise KeyError("lost")
    again = tracking.training_run(replace(cfg, train=replace(cfg.train, log_every=7)), manifest)
    assert again == first
    found = mlflow.MlflowClient().get_run(first.run_id)
    assert (found.info.status, found.data.tags["attempt"]) == ("RUNNING", "2")
    assert found.data.params["train.log_every"] == str(cfg.train.log_every), "params are the first attempt's"
    assert tracking.training_run(cfg, replace(manifest, digest="other")) != first
    newest = tracking.training_run(cfg, manifest, restart=True)
    assert newest != first
    assert tracking.training_run(cfg, manifest) == newest
    mlflow.MlflowClient().delete_run(newest.run_id)
    assert tracking.training_run(cfg, manifest) != newest, "what somebody deleted stays deleted"


def test_a_version_carries_its_hashes_numbers_and_card(cfg: RunConfig, tmp_path: Path) -> None:
    number = new_version(cfg, tmp_path, 0.9)
    client = mlflow.MlflowClient()
    version = client.get_model_version(cfg.tracking.model_name, str(number))
    assert {"sha256.model.safetensors", "sha256.config.json", "sha256.README.md"} <= version.tags.keys()
    assert version.tags["val/ne/is_like"] == "0.9"
    assert version.tags["manifest"] == store.read_manifest(cfg.sequence_dir).digest
    assert "| val NE | 0.9000 | 0.9000 |" in version.description
    assert client.get_run(version.run_id).data.metrics["test/auc/is_click"] == 0.7
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.status == "READY"
    assert {metric.key for metric in model.metrics} >= {"val/ne/is_click", "test/auc/is_click"}


def test_the_gate_the_champion_and_back(cfg: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no version"):
        tracking.promote(cfg)
    with pytest.raises(UserError, match="no champion"):
        tracking.champion(cfg)
    first = new_version(cfg, tmp_path, 0.9)
    assert tracking.promote(cfg).promoted
    with pytest.raises(UserError, match="first champion"):
        tracking.rollback(cfg)
    worse = new_version(cfg, tmp_path, 0.95)
    refused = tracking.promote(cfg)
    assert not refused.promoted
    assert "+0.0500" in refused.reason
    assert tracking.champion(cfg).version == first
    better = new_version(cfg, tmp_path, 0.8)
    assert tracking.promote(cfg).promoted
    assert tracking.champion(cfg).version == better
    tags = mlflow.MlflowClient().get_model_version(cfg.tracking.model_name, str(worse)).tags
    assert tags["promotion"] == refused.reason
    assert tracking.rollback(cfg) == first
    assert tracking.champion(cfg).version == first
    assert tracking.promote(cfg, first) == tracking.Decision(True, f"version {first} is the champion already")
    with pytest.raises(UserError, match="no version 77"):
        tracking.promote(cfg, 77)


def test_the_champion_comes_down_checked_and_by_number(cfg: RunConfig, tmp_path: Path) -> None:
    new_version(cfg, tmp_path, 0.9)
    tracking.promote(cfg)
    pinned = tracking.champion(cfg)
    folder, number = tracking.download_champion(cfg)
    assert number == pinned.version == 1
    original = tmp_path / "model-0.9-0" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == original.read_bytes()
    new_version(cfg, tmp_path, 0.8, seed=1)
    tracking.promote(cfg)
    assert tracking.fetch(pinned, tmp_path / "other") == tmp_path / "other" / f"{cfg.tracking.model_name}-1"
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        tracking.fetch(pinned, folder.parent)


def test_a_registry_whose_files_changed_is_refused(cfg: RunConfig, tmp_path: Path) -> None:
    new_version(cfg, tmp_path, 0.9)
    tracking.promote(cfg)
    source = mlflow.MlflowClient().get_model_version(cfg.tracking.model_name, "1").source.removeprefix("models:/")
    (stored,) = Path(cfg.runs_dir, "mlflow", "artifacts").rglob(f"{source}/**/config.json")
    stored.write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        tracking.fetch(tracking.champion(cfg), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [], "nothing half-written stays"


def test_an_unevaluated_model_is_not_registered(cfg: RunConfig, tmp_path: Path) -> None:
    folder = save_tiny_model(cfg, tmp_path / "model")
    (folder / "metrics.json").unlink()
    with (
        tracking.start_run(cfg, store.read_manifest(cfg.sequence_dir)) as run,
        pytest.raises(UserError, match=r"metrics\.json"),
    ):
        tracking.register(cfg, run, folder)


def test_a_second_job_joins_the_server_that_runs(server: RunConfig) -> None:
    before = mlflow.get_tracking_uri()
    with mlflow_server(server) as uri:
        assert uri == before
    assert httpx.get(f"{uri}/health").status_code == 200, "it was not this block's to end"
    assert mlflow.get_tracking_uri() == before


def test_a_server_that_is_down_is_said_at_once(server: RunConfig) -> None:
    uri = f"http://127.0.0.1:{free_port()}"
    absent = replace(server, tracking=replace(server.tracking, uri=uri))
    started = time.monotonic()
    with (
        pytest.raises(UserError, match=f"tracking.uri: no MLflow server answers at '{uri}'"),
        mlflow_server(absent),
    ):
        raise AssertionError("there is no server")
    assert time.monotonic() - started < 5
    with pytest.raises(UserError, match="does not answer"):
        tracking.Run(uri, "0" * 32).log_metrics({"train/loss": 1.0}, 1)
    assert time.monotonic() - started < 30


def version(number: int, ne: dict[str, float], manifest: str = "a") -> SimpleNamespace:
    tags = {f"val/ne/{task}": repr(value) for task, value in ne.items()} | {"manifest": manifest}
    return SimpleNamespace(version=str(number), tags=tags)


BOTH = {"is_click": 0.9, "is_like": 0.9}


@pytest.mark.parametrize(
    ("new", "old", "promoted", "said"),
    [
        (BOTH, None, True, "first champion"),
        (BOTH | {"is_like": 1.01}, None, False, "val/ne/is_like 1.0100 is above the gate's 1"),
        (BOTH | {"is_like": float("nan")}, None, False, "val/ne/is_like nan"),
        ({"is_click": 0.9}, None, False, "no validation NE of is_like"),
        (BOTH, {"is_click": 0.899, "is_like": 0.899}, True, "+0.0010"),
        (BOTH, {"is_click": 0.89, "is_like": 0.9}, False, "allowed +0.002"),
        (BOTH | {"is_click": float("nan")}, BOTH, False, "nan"),
    ],
)
def test_judgement(new: dict, old: dict | None, promoted: bool, said: str, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path, tracking={"gate_max_ne": {"is_like": 1.0}})
    champion = None if old is None else version(1, old)
    decision = tracking.judge(cfg, version(2, new), champion)  # pyright: ignore[reportArgumentType]
    assert decision.promoted == promoted
    assert said in decision.reason


def test_a_model_trained_on_the_validation_rows_needs_another_to_vouch_for_it(cfg: RunConfig, tmp_path: Path) -> None:
    honest = new_version(cfg, tmp_path, 0.9)
    refit_cfg = replace(cfg, split=replace(cfg.split, refit=True))
    refit = new_version(refit_cfg, tmp_path / "refit", 0.1)
    refused = tracking.promote(cfg, refit)
    assert not refused.promoted
    assert "trained on the validation rows" in refused.reason
    other = new_version(replace(cfg, train=replace(cfg.train, lr=0.5)), tmp_path / "other", 0.9)
    with pytest.raises(UserError, match=r"trained with train\.lr = 0\.5, version 2 with 0\.002"):
        tracking.promote(cfg, refit, validated_by=other)
    with pytest.raises(UserError, match=r"trained without split\.refit"):
        tracking.promote(cfg, honest, validated_by=refit)
    decision = tracking.promote(cfg, refit, validated_by=honest)
    assert decision.promoted
    assert f"is_click 0.9000, is_like 0.9000 of version {honest}" in decision.reason
    worse = new_version(cfg, tmp_path / "worse", 0.95, seed=1)
    assert "+0.0500" in tracking.promote(cfg, worse).reason, "the next challenger meets the borrowed figures"


def test_validation_on_other_sequences_is_said(tmp_path: Path) -> None:
    decision = tracking.judge(tiny_config(tmp_path), version(2, BOTH, "b"), version(1, BOTH))  # pyright: ignore[reportArgumentType]
    assert "other sequences" in decision.reason


def test_figures_made_elsewhere_become_a_run_once(cfg: RunConfig, tmp_path: Path) -> None:
    figures = {
        "name": "ultra",
        "environment": {"device": "a GPU", "cores": 16},
        "metrics": {"val/ne/is_click": 0.84},
        "ours": {"causal 4096": {"forward_ms": 0.5}},
        "config": {"model": {"d_model": 64}},
    }
    path = tmp_path / "ultra-0.json"
    path.write_text(json.dumps(figures))
    assert tracking.import_result(cfg, path)
    assert not tracking.import_result(cfg, path)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name(f"{cfg.tracking.experiment}-benchmarks")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "ultra-0"
    assert run.data.metrics == {"val/ne/is_click": 0.84, "ours.causal 4096.forward_ms": 0.5}
    params = {"name": "ultra", "environment.device": "a GPU", "environment.cores": "16", "config.model.d_model": "64"}
    assert run.data.params == params
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["ultra-0.json"]
    path.write_text("[1")
    with pytest.raises(UserError, match="not a JSON object"):
        tracking.import_result(cfg, path)
