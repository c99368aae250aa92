"""Versions, gate and champion on a real MLflow server."""

import json
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from pipeline import config, files
from pipeline.config import RunConfig, UserError
from pipeline.sequences import store
from pipeline.tracking import Decision, RowsAtHand, Tracker, fetch_model, registry
from pipeline.version import package_version
from tests.worlds.tiny import publish_sequences, save_tiny_model

pytestmark = pytest.mark.cluster


@pytest.fixture
def cfg(tracked: RunConfig, request: pytest.FixtureRequest) -> RunConfig:
    """Under names of its own for experiment and model."""
    name = request.node.name
    return replace(tracked, tracking=replace(tracked.tracking, experiment=name, model_name=name))


def new_version(cfg: RunConfig, tmp_path: Path, val_ne: float, seed: int = 0) -> int:
    folder = save_tiny_model(cfg, tmp_path / f"model-{val_ne}-{seed}", seed, val_ne)
    with Tracker(cfg).start_run(cfg, store.read_manifest(cfg.sequence_dir)) as run:
        return Tracker(cfg).register_model(run, folder)


def test_a_version_carries_its_hashes_numbers_and_card(cfg: RunConfig, tmp_path: Path) -> None:
    number = new_version(cfg, tmp_path, 0.9)
    client = mlflow.MlflowClient()
    version = client.get_model_version(cfg.model_name, str(number))
    assert {
        "sha256.model.safetensors",
        "sha256.config.json",
        "sha256.README.md",
    } <= version.tags.keys()
    assert version.tags["val/ne/is_like"] == "0.9"
    assert version.tags["software_version"] == package_version()
    assert version.tags["val/baseline_ne/is_like"] == "0.99"
    assert version.tags["split.t_val"] == cfg.split.t_val
    assert version.tags["trained_as"] == cfg.name
    assert version.tags["manifest"] == store.read_manifest(cfg.sequence_dir).digest
    assert "| val NE | 0.9000 | 0.9000 |" in version.description
    assert client.get_run(version.run_id).data.metrics["test/auc/is_click"] == 0.7
    model = client.get_logged_model(version.source.removeprefix("models:/"))
    assert model.status == "READY"
    assert {metric.key for metric in model.metrics} >= {"val/ne/is_click", "test/auc/is_click"}


def test_awkward_task_names_reach_the_gate(cfg: RunConfig, tmp_path: Path) -> None:
    """Every kind of name that the configuration lets pass, as metrics and as tags."""
    tasks = ("Straße 2.5: ja-nein_", "購入", "a" * 200)
    source = {"kind": "parquet", "path": "x", "actions": list(tasks)}
    assert config.from_dict({"source": source, "tasks": list(tasks)}).tasks == tasks
    for number, ne in enumerate((0.9, 0.8)):
        folder = save_tiny_model(cfg, tmp_path / str(number))
        metrics = {f"val/ne/{task}": ne for task in tasks}
        metrics |= {f"val/baseline_ne/{task}": 0.95 for task in tasks}
        (folder / "metrics.json").write_text(json.dumps(metrics))
        with Tracker(cfg).start_run(cfg, store.read_manifest(cfg.sequence_dir)) as run:
            version = Tracker(cfg).register_model(run, folder)
        found = mlflow.MlflowClient().get_run(run.run_id).data.metrics
        assert {found[f"val/ne/{task}"] for task in tasks} == {ne}
        decision = registry.promote_version(cfg.tracking, cfg.model_name, tasks, version)
        assert decision.promoted, decision.reason
    assert "mean val/ne over Straße 2.5: ja-nein_, 購入, aaa" in decision.reason
    assert "-0.1000" in decision.reason


def test_the_gate_the_champion_and_back(cfg: RunConfig, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no version"):
        Tracker(cfg).promote_version()
    with pytest.raises(UserError, match="no champion"):
        Tracker(cfg).find_champion()
    first = new_version(cfg, tmp_path, 0.9)
    assert Tracker(cfg).promote_version().promoted
    with pytest.raises(UserError, match="first champion"):
        Tracker(cfg).roll_back()
    worse = new_version(cfg, tmp_path, 0.95)
    refused = Tracker(cfg).promote_version()
    assert not refused.promoted
    assert "+0.0500" in refused.reason
    assert Tracker(cfg).find_champion().version == first
    better = new_version(cfg, tmp_path, 0.8)
    assert Tracker(cfg).promote_version().promoted
    assert Tracker(cfg).find_champion().version == better
    tags = mlflow.MlflowClient().get_model_version(cfg.model_name, str(worse)).tags
    assert tags["promotion"] == refused.reason
    assert Tracker(cfg).roll_back() == first
    assert Tracker(cfg).find_champion().version == first
    assert Tracker(cfg).promote_version(first) == Decision(
        True, f"version {first} is the champion already"
    )
    with pytest.raises(UserError, match="no version 77"):
        Tracker(cfg).promote_version(77)


def test_what_the_gate_warns_of_stays_with_the_version(
    cfg: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = new_version(cfg, tmp_path, 1.03)
    decision = Tracker(cfg).promote_version(first, force_first=True)
    assert decision.promoted
    task = cfg.tasks[0]
    assert f"version {first}: val/ne {task} 1.0300" in caplog.text

    client = mlflow.MlflowClient()
    found = client.get_model_version(cfg.model_name, str(first))
    assert found.tags["promotion_warning"] == decision.warning
    card = found.description
    assert card.endswith(f"**Warning of the gate:** {decision.warning}.\n")

    # judged once more, after a better one: said once
    second = new_version(cfg, tmp_path, 1.03, seed=1)
    for _ in range(2):
        registry.promote_version(cfg.tracking, cfg.model_name, cfg.tasks, second)
        Tracker(cfg).roll_back()
    card = client.get_model_version(cfg.model_name, str(second)).description
    assert card.count("**Warning of the gate:**") == 1


def test_a_new_index_of_the_champion_passes_whatever_rows_are_there_by_now(
    cfg: RunConfig, tmp_path: Path
) -> None:
    """The day after an append: other sequences, and the validation of before."""
    first = new_version(cfg, tmp_path, 0.9)
    tracker = Tracker(cfg)
    assert tracker.promote_version(first).promoted
    folder, _ = tracker.download_champion()

    later = replace(cfg, name="later", runs_dir=str(tmp_path / "runs"))
    publish_sequences(later, seed=1)
    manifest = store.read_manifest(later.sequence_dir)
    with Tracker(later).start_run(later, manifest) as run:
        blind = Tracker(later).register_model(run, folder)
        version = Tracker(later).register_model(run, folder, same_as=first)
    assert "other rows" in tracker.promote_version(blind).reason

    decision = tracker.promote_version(version)
    assert decision.promoted, decision.reason
    client = mlflow.MlflowClient()
    was, now = (client.get_model_version(cfg.model_name, str(one)).tags for one in (first, version))
    for tag in ("manifest", "val/ne/is_like", "val/baseline_ne/is_click", "trained_as"):
        assert now[tag] == was[tag], "the next challenger is held against these"


def test_the_champion_comes_down_checked_and_by_number(cfg: RunConfig, tmp_path: Path) -> None:
    new_version(cfg, tmp_path, 0.9)
    Tracker(cfg).promote_version()
    pinned = Tracker(cfg).find_champion()
    folder, number = Tracker(cfg).download_champion()
    assert number == pinned.version == 1
    original = tmp_path / "model-0.9-0" / "model.safetensors"
    assert (folder / "model.safetensors").read_bytes() == original.read_bytes()
    new_version(cfg, tmp_path, 0.8, seed=1)
    Tracker(cfg).promote_version()
    assert fetch_model(pinned, tmp_path / "other") == tmp_path / "other" / pinned.folder_name
    (folder / "model.safetensors").write_bytes(b"other weights")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        fetch_model(pinned, folder.parent)


def test_of_two_replicas_that_fetch_a_version_the_first_one_s_folder_stays(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other may be reading it already: it must not be gone for a moment."""
    new_version(cfg, tmp_path, 0.9)
    Tracker(cfg).promote_version()
    pinned = Tracker(cfg).find_champion()
    faster = fetch_model(pinned, tmp_path / "faster")
    folder = tmp_path / "cache" / pinned.folder_name
    sync = files.sync_to_disk

    def sync_while_another_publishes(path: Path) -> None:
        sync(path)
        if not folder.exists():
            faster.rename(folder)

    published = faster.stat().st_ino
    monkeypatch.setattr(files, "sync_to_disk", sync_while_another_publishes)
    assert fetch_model(pinned, tmp_path / "cache") == folder
    assert folder.stat().st_ino == published
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_a_registry_whose_files_changed_is_refused(cfg: RunConfig, tmp_path: Path) -> None:
    new_version(cfg, tmp_path, 0.9)
    Tracker(cfg).promote_version()
    source = (
        mlflow.MlflowClient().get_model_version(cfg.model_name, "1").source.removeprefix("models:/")
    )
    (stored,) = Path(cfg.runs_dir, "mlflow", "artifacts").rglob(f"{source}/**/config.json")
    stored.write_text("{}")
    with pytest.raises(UserError, match=r"config\.json"):
        fetch_model(Tracker(cfg).find_champion(), tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == [], "nothing half-written stays"


def test_an_unevaluated_model_is_not_registered(cfg: RunConfig, tmp_path: Path) -> None:
    folder = save_tiny_model(cfg, tmp_path / "model")
    (folder / "metrics.json").unlink()
    with (
        Tracker(cfg).start_run(cfg, store.read_manifest(cfg.sequence_dir)) as run,
        pytest.raises(UserError, match=r"metrics\.json"),
    ):
        Tracker(cfg).register_model(run, folder)


def test_a_model_whose_run_the_server_does_not_have_is_registered_with_a_new_one(
    cfg: RunConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """After its database was restored from a day before, say; or its run was deleted."""
    with Tracker(cfg).start_run(cfg, store.read_manifest(cfg.sequence_dir)) as run:
        deleted = run.run_id
    mlflow.MlflowClient().delete_run(deleted)

    for seed, run_id in enumerate(("0" * 32, deleted)):
        lost = replace(cfg, name=f"lost-{seed}")
        publish_sequences(lost)
        save_tiny_model(lost, lost.model_dir, seed, 0.9, mlflow_run_id=run_id)
        version = Tracker(lost).register_trained()
        made_by = mlflow.MlflowClient().get_model_version(cfg.model_name, str(version)).run_id
        assert made_by not in (None, run_id)
        assert f"run {run_id} is not on this server" in caplog.text
        assert Tracker(lost).register_trained() == version


def test_nobody_rolls_back_to_a_version_that_was_deleted(cfg: RunConfig, tmp_path: Path) -> None:
    first = new_version(cfg, tmp_path, 0.9)
    Tracker(cfg).promote_version()
    second = new_version(cfg, tmp_path, 0.8)
    Tracker(cfg).promote_version()
    mlflow.MlflowClient().delete_model_version(cfg.model_name, str(first))
    with pytest.raises(UserError, match=f"has no version {first}"):
        Tracker(cfg).roll_back()
    assert Tracker(cfg).find_champion().version == second


def test_a_model_trained_on_the_validation_rows_needs_another_to_vouch_for_it(
    cfg: RunConfig, tmp_path: Path
) -> None:
    honest = new_version(cfg, tmp_path, 0.9)
    refit_cfg = replace(cfg, split=replace(cfg.split, refit=True))
    refit = new_version(refit_cfg, tmp_path / "refit", 0.1)
    refused = Tracker(cfg).promote_version(refit)
    assert not refused.promoted
    assert "trained on the validation rows" in refused.reason
    other = new_version(replace(cfg, train=replace(cfg.train, lr=0.5)), tmp_path / "other", 0.9)
    with pytest.raises(UserError, match=r"trained with train\.lr = 0\.5, version 2 with 0\.002"):
        Tracker(cfg).promote_version(refit, validated_by=other)
    with pytest.raises(UserError, match=r"trained without split\.refit"):
        Tracker(cfg).promote_version(honest, validated_by=refit)
    decision = Tracker(cfg).promote_version(refit, validated_by=honest)
    assert decision.promoted
    assert f"is_click 0.9000, is_like 0.9000 of version {honest}" in decision.reason
    worse = new_version(cfg, tmp_path / "worse", 0.95, seed=1)
    assert "+0.0500" in Tracker(cfg).promote_version(worse).reason, (
        "the next challenger meets the borrowed figures"
    )


def test_a_champion_of_other_rows_is_scored_on_the_challengers(
    cfg: RunConfig, tmp_path: Path
) -> None:
    """Yesterday's champion and today's challenger were validated on other days."""
    new_version(cfg, tmp_path, 0.9)
    assert Tracker(cfg).promote_version().promoted
    today = replace(cfg, split=replace(cfg.split, t_val="2022-05-02T00:00:00Z"))
    challenger = new_version(today, tmp_path / "today", 0.95)
    refused = Tracker(today).promote_version(challenger)
    assert "was not scored on these: split.t_val" in refused.reason

    scored = []

    def score(folder: Path) -> dict[str, float]:
        scored.append(folder)
        return {"is_click": 0.97, "is_like": float("nan")}

    manifest = store.read_manifest(cfg.sequence_dir).digest
    tags = {"manifest": manifest} | {
        f"split.{name}": getattr(today.split, name) for name in ("t_val", "t_test")
    }
    learned = RowsAtHand(tags | {"split.t_val": "2022-05-01T12:00:00Z"}, score)
    refused = Tracker(today).promote_version(challenger, rows=learned)
    assert "may be among those that version 2 has learned" in refused.reason
    nothing = Tracker(today).promote_version(
        challenger, rows=RowsAtHand(tags | {"manifest": ""}, score)
    )
    assert "no sequences at hand" in nothing.reason
    assert not scored

    decision = Tracker(today).promote_version(challenger, rows=RowsAtHand(tags, score))
    assert decision.promoted
    assert "over is_click -0.0200 against champion 1, scored anew" in decision.reason
    assert (scored[0] / "model.safetensors").exists()


def test_a_champion_that_came_while_the_gate_was_scoring_is_held_against_too(
    cfg: RunConfig, tmp_path: Path
) -> None:
    first = new_version(cfg, tmp_path, 0.9)
    assert Tracker(cfg).promote_version(first).promoted
    better = new_version(cfg, tmp_path, 0.5)
    today = replace(cfg, split=replace(cfg.split, t_val="2022-05-02T00:00:00Z"))
    challenger = new_version(today, tmp_path / "today", 0.7)
    ne = [0.9, 0.5]  # of the champion at first, then of the one that somebody has promoted

    def score(folder: Path) -> dict[str, float]:
        Tracker(cfg).promote_version(better)
        return dict.fromkeys(cfg.tasks, ne.pop(0))

    tags = {"manifest": store.read_manifest(cfg.sequence_dir).digest}
    tags |= {f"split.{name}": getattr(today.split, name) for name in ("t_val", "t_test")}
    refused = Tracker(today).promote_version(challenger, rows=RowsAtHand(tags, score))
    assert not refused.promoted
    assert f"+0.2000 against champion {better}" in refused.reason
    assert Tracker(cfg).find_champion().version == better


def test_two_versions_are_scored_on_rows_that_came_after_both(
    cfg: RunConfig, tmp_path: Path
) -> None:
    """A trial lasts for days, in which the sequences move on."""
    new_version(cfg, tmp_path, 0.9)
    assert Tracker(cfg).promote_version().promoted
    today = replace(cfg, split=replace(cfg.split, t_val="2022-05-02T00:00:00Z"))
    challenger = new_version(today, tmp_path / "today", 0.7)

    ne = [0.9, 0.95]  # of the champion, then of the challenger: its own figure is of easier rows
    rows = RowsAtHand(
        {"manifest": "d", "split.t_val": "2022-05-03T00:00:00Z", "split.t_test": "2022-05-04"},
        lambda folder: dict.fromkeys(cfg.tasks, ne.pop(0)),
    )
    refused = Tracker(today).promote_version(challenger, rows=rows)
    assert not refused.promoted
    assert "+0.0500 against champion 1, both scored anew on the rows at hand" in refused.reason

    ne = [0.95, 0.9]
    decision = Tracker(today).promote_version(challenger, rows=rows)
    assert decision.promoted
    assert Tracker(today).find_champion().version == challenger
