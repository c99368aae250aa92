"""Users taken out of what models hold of them, with every digest that names the changed files."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
from safetensors.numpy import load_file

from pipeline.config import RunConfig, UserError
from pipeline.files import folder_digests
from pipeline.index.folder import load_indexed
from pipeline.model.artifact import load_model
from pipeline.model.forgetting import FEATURES, forget_in_model
from pipeline.sequences import store
from pipeline.tracking import (
    PinnedModel,
    Tracker,
    fetch_model,
    forget_in_cache,
    forget_in_folders,
)
from serve_app import deployment
from tests.worlds.tiny import NUM_USERS, publish_sequences, save_tiny_model, tiny_config

USERS = np.array([3, 8, 12_345])  # of whom the models know two


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    cfg = tiny_config(tmp_path / "runs")
    publish_sequences(cfg)
    save_tiny_model(cfg, cfg.model_dir)
    return cfg


def known_users(folder: Path) -> list[int]:
    return load_file(folder / FEATURES)["user_ids"].tolist()


def test_a_model_forgets_users_and_keeps_all_others(cfg: RunConfig) -> None:
    before = load_model(cfg.model_dir)
    codes = {}
    for user in range(NUM_USERS):
        codes[user] = before.maps.user_codes[before.maps.user_rows(np.array([user]))].tolist()
    assert codes[3] != codes[8], "their cities differ"

    assert forget_in_model(cfg.model_dir, USERS) == 2
    after = load_model(cfg.model_dir)  # which holds all files against their digests
    unknown = after.maps.user_codes[:1].tolist()
    for user in range(NUM_USERS):
        found = after.maps.user_codes[after.maps.user_rows(np.array([user]))].tolist()
        assert found == (unknown if user in USERS else codes[user])
    assert forget_in_model(cfg.model_dir, USERS) == 0

    weights, rest = before.model.state_dict(), after.model.state_dict()
    assert all((weights[name] == rest[name]).all() for name in weights)


def test_trainings_and_runs_on_the_same_sequences_forget_too(cfg: RunConfig) -> None:
    own = replace(cfg, name="beside", sequences=replace(cfg.sequences, from_run=cfg.name))
    other = replace(cfg, name="other")
    for one in (own, other):
        save_tiny_model(replace(one, sequences=cfg.sequences, name=cfg.name), one.model_dir)
        settings = json.loads((one.model_dir / "config.json").read_text())
        settings |= {"name": one.name, "sequences": {"from_run": one.sequences.from_run}}
        (one.model_dir / "config.json").write_text(json.dumps(settings))
    cfg.train_dir.mkdir()
    for name in (FEATURES, "features.json"):
        shutil.copy(cfg.model_dir / name, cfg.train_dir / name)

    assert forget_in_folders(cfg.run_dir, USERS) == 3
    for folder in (cfg.model_dir, cfg.train_dir, own.model_dir):
        assert set(known_users(folder)).isdisjoint(USERS)
    assert set(USERS[:2]) <= set(known_users(other.model_dir)), "another run's users"


def test_a_server_that_starts_without_mlflow_finds_the_renamed_champion(cfg: RunConfig) -> None:
    cache = deployment.cache_folder(cfg.runs_dir)
    model = PinnedModel("nowhere", cfg.model_name, 4, folder_digests(cfg.model_dir))
    shutil.copytree(cfg.model_dir, cache / model.folder_name)
    deployment._remember_champion(cfg.runs_dir, model)

    renamed = forget_in_cache(cache, cfg.name, USERS)
    assert list(renamed) == [model.folder_name]
    deployment.rename_champions(cfg.runs_dir, renamed)

    served = deployment.recall_champion(cfg.runs_dir, cfg.model_name)
    assert served is not None
    assert (served.version, served.uri) == (4, "nowhere")
    folder = fetch_model(served, cache)
    assert set(known_users(folder)).isdisjoint(USERS)
    assert not (cache / model.folder_name).exists()
    assert forget_in_cache(cache, cfg.name, USERS) == {}


@pytest.mark.cluster
def test_registered_versions_forget_users_and_stay_whole(
    tracked: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their files, digests and tags are renewed together, also where a job was killed between."""
    names = {"experiment": "forgetting", "model_name": "forgetting"}
    cfg = replace(tracked, tracking=replace(tracked.tracking, **names))
    tracker, folder = Tracker(cfg), save_tiny_model(cfg, tmp_path / "model")
    with tracker.start_run(cfg, store.read_manifest(cfg.sequence_dir)) as run:
        (tmp_path / "validation.json").write_text("{}")
        run.log_artifacts(tmp_path / "validation.json", "validation_report")
        version = tracker.register_model(run, folder)
    assert tracker.promote_version().promoted
    before = tracker.find_champion()

    client = mlflow.MlflowClient()
    kind = type(client)

    def full_disk(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(kind, "log_model_artifacts", full_disk)
        with pytest.raises(OSError, match="disk full"):
            tracker.forget_users(USERS)
    with monkeypatch.context() as patch:
        patch.setattr(kind, "delete_model_version_tag", lambda *_: None)
        removed = tracker.forget_users(USERS)
    assert removed == {"versions": 1, "uploaded_predictions": 0, "uploaded_reports": 1}
    assert tracker.forget_users(USERS)["versions"] == 1, "as after a kill before the last step"
    assert set(tracker.forget_users(USERS).values()) == {0}
    assert client.list_artifacts(run.run_id, "validation_report") == []

    after = tracker.find_champion()
    assert after.version == version
    changed = {name for name, digest in after.sha256.items() if before.sha256[name] != digest}
    assert changed == {FEATURES, "artifact.json", "index/artifact.json"}
    _, index = load_indexed(fetch_model(after, tmp_path / "cache"))
    assert index is not None
    assert set(known_users(tmp_path / "cache" / after.folder_name)).isdisjoint(USERS)

    # the run's own model, which is the same one, is found by its digest
    forget_in_model(folder, USERS)
    tag = client.get_model_version(cfg.model_name, str(version)).tags["sha256.artifact.json"]
    assert folder_digests(folder)["artifact.json"] == tag

    # a file that somebody else has changed is not made right
    source = client.get_model_version(cfg.model_name, str(version)).source.removeprefix("models:/")
    (stored,) = Path(cfg.runs_dir, "mlflow", "artifacts").rglob(f"{source}/**/{FEATURES}")
    shutil.copy(tmp_path / "model" / "model.safetensors", stored)
    with pytest.raises(UserError, match=r"features\.safetensors does not have the sha256"):
        tracker.forget_users(np.array([5]))
