"""Who becomes champion: figures of the same rows, those that are numbers, and a floor for the
first. No tracking server.
"""

import math
import shutil
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from pipeline.config import ConfigError, RunConfig, SourceConfig, TrackingConfig, UserError
from pipeline.evaluate import evaluator
from pipeline.files import folder_digests
from pipeline.model.artifact import load_model, save_model
from pipeline.sequences import store
from pipeline.tracking import PinnedModel, fetch_model
from pipeline.tracking.gate import (
    REFIT,
    ScoredAnew,
    judge_version,
    learned_until,
    row_differences,
)
from pipeline.tracking.registry import require_fit
from serve_app import deployment
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config

NAN = math.nan
TASKS = ("is_click", "is_like")
BOTH = {"is_click": 0.9, "is_like": 0.9}
ITEMS = {"is_click": 0.95, "is_like": 0.95}
GATE = TrackingConfig(gate_max_ne={"is_like": 1.0})


def version(
    number: int, ne: dict[str, float], baseline: dict[str, float] = ITEMS, **tags: str
) -> SimpleNamespace:
    found = {f"val/ne/{task}": repr(value) for task, value in ne.items()}
    found |= {f"val/baseline_ne/{task}": repr(value) for task, value in baseline.items()}
    rows = {"manifest": "a", "split.t_val": "monday", "split.t_test": "tuesday"}
    return SimpleNamespace(version=str(number), tags=found | rows | tags)


@pytest.mark.parametrize(
    ("new", "old", "promoted", "said"),
    [
        (BOTH, None, True, "first champion"),
        (BOTH | {"is_like": 1.01}, None, False, "val/ne/is_like 1.0100 is above the gate's 1"),
        ({"is_click": 0.9}, None, False, "no validation NE of is_like"),
        (BOTH, {"is_click": 0.899, "is_like": 0.899}, True, "+0.0010"),
        (BOTH, {"is_click": 0.89, "is_like": 0.9}, False, "allowed +0.002"),
    ],
)
def test_judgement(new: dict, old: dict | None, promoted: bool, said: str) -> None:
    champion = None if old is None else version(1, old)
    decision = judge_version(GATE, TASKS, version(2, new), champion)
    assert decision.promoted == promoted
    assert said in decision.reason


def test_a_refit_has_learned_the_validation_rows_too() -> None:
    """They may not judge it, nor any before them."""
    val, test = "2022-05-01T00:00:00+00:00", "2022-05-02T00:00:00+00:00"
    days = {"split.t_val": val, "split.t_test": test}
    assert learned_until(version(1, BOTH, **days)) == datetime.fromisoformat(val)
    assert learned_until(version(2, BOTH, **days, **{REFIT: "true"})) == datetime.fromisoformat(
        test
    )
    assert learned_until(SimpleNamespace(version="3", tags={})) is None, "older code's"


def test_a_tag_of_rows_that_older_code_did_not_write_says_nothing() -> None:
    older, newer = version(1, BOTH), version(2, BOTH)
    del older.tags["split.t_test"]
    assert row_differences(newer, older) == row_differences(older, newer) == ""
    assert judge_version(GATE, TASKS, newer, older).promoted

    other_day = version(3, BOTH, **{"split.t_val": "sunday"})
    told = row_differences(other_day, older)
    assert told == "split.t_val monday of the champion, sunday of the challenger"


def test_a_task_that_the_rows_do_not_define_is_left_out_and_named() -> None:
    """A day without a positive of is_like: neither promoted by it nor blocked for ever."""
    today = BOTH | {"is_like": NAN}
    rows = ITEMS | {"is_like": NAN}
    first = judge_version(GATE, TASKS, version(1, today, rows), None)
    assert first.promoted
    assert "left out, not defined on both sides: is_like" in first.reason

    for challenger, champion in (
        (version(2, today, rows), version(1, BOTH)),
        (version(2, BOTH), version(1, today, rows)),
    ):
        decision = judge_version(GATE, TASKS, challenger, champion)
        assert decision.promoted
        assert "over is_click +0.0000" in decision.reason
        assert "left out, not defined on both sides: is_like" in decision.reason

    worse = version(2, {"is_click": 0.94, "is_like": NAN}, rows)
    assert not judge_version(GATE, TASKS, worse, version(1, BOTH)).promoted


@pytest.mark.parametrize("champion", [None, version(1, {"is_click": 1.2, "is_like": 1.2})])
def test_who_passes_without_having_learned_anything_is_warned_of(
    champion: SimpleNamespace | None,
) -> None:
    """The item's rate, or the champion, is worse than the constant rate too."""
    rows = {"is_click": 1.05, "is_like": 1.05}
    challenger = version(2, {"is_click": 1.0004, "is_like": 0.9}, rows)
    decision = judge_version(TrackingConfig(), TASKS, challenger, champion)
    assert decision.promoted
    assert decision.warning.startswith("val/ne is_click 1.0004: not below 1")
    assert "is_like" not in decision.warning

    anew = judge_version(
        TrackingConfig(),
        TASKS,
        version(2, BOTH),
        version(1, BOTH),
        anew=ScoredAnew({"is_click": 1.2, "is_like": 1.2}, {"is_click": 0.9, "is_like": 1.0}),
    )
    assert anew.promoted
    assert anew.warning.startswith("val/ne is_like 1.0000: not below 1")
    refused = judge_version(GATE, TASKS, version(2, {"is_click": 1.3, "is_like": 1.0}), None)
    assert (refused.promoted, refused.warning) == (False, "")
    assert judge_version(GATE, TASKS, version(2, BOTH), None).warning == ""


def test_a_task_that_only_the_champion_predicts_is_named() -> None:
    """Two versions of other tasks are held against each other by what both predict."""
    wider = version(1, BOTH | {"is_follow": 0.5})
    decision = judge_version(GATE, TASKS, version(2, BOTH), wider)
    assert decision.promoted
    assert "over is_click, is_like +0.0000" in decision.reason
    assert "(no longer predicted: is_follow)" in decision.reason

    decision = judge_version(GATE, (*TASKS, "is_follow"), wider, version(3, BOTH))
    assert "left out, not defined on both sides: is_follow" in decision.reason


@pytest.mark.parametrize("champion", [None, version(1, BOTH)])
@pytest.mark.parametrize("value", [NAN, math.inf])
def test_a_model_whose_scores_are_no_numbers_is_never_promoted(
    value: float, champion: SimpleNamespace | None
) -> None:
    broken = version(2, BOTH | {"is_like": value})
    decision = judge_version(GATE, TASKS, broken, champion)
    assert not decision.promoted
    assert "val/ne of is_like is not a number: version 2 gives no scores" in decision.reason

    undefined = dict.fromkeys(TASKS, NAN)
    nothing = version(2, undefined, undefined)
    assert not judge_version(GATE, TASKS, nothing, champion, force_first=True).promoted


def test_a_champion_of_nan_blocks_nobody() -> None:
    undefined = dict.fromkeys(TASKS, NAN)
    decision = judge_version(GATE, TASKS, version(2, BOTH), version(1, undefined, undefined))
    assert decision.promoted
    assert "champion 1 has no task to compare with" in decision.reason


def test_a_first_champion_must_beat_the_items_rate() -> None:
    weak = version(1, {"is_click": 0.96, "is_like": 0.95})
    refused = judge_version(GATE, TASKS, weak, None)
    assert not refused.promoted
    assert "mean val/ne 0.9550, the item's smoothed rate has 0.9500" in refused.reason
    assert "--force-first" in refused.reason

    forced = judge_version(GATE, TASKS, weak, None, force_first=True)
    assert forced.promoted
    assert "by --force-first" in forced.reason

    unknown = judge_version(GATE, TASKS, version(1, BOTH, {}), None)
    assert not unknown.promoted
    assert "no baseline" in unknown.reason


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"manifest": "b"}, "sequences a of the champion, b of the challenger"),
        ({"split.t_val": "sunday"}, r"split.t_val monday of the champion, sunday of"),
    ],
)
def test_figures_of_other_rows_are_not_compared(changed: dict[str, str], said: str) -> None:
    challenger, champion = version(2, BOTH, **changed), version(1, BOTH)
    refused = judge_version(GATE, TASKS, challenger, champion)
    assert not refused.promoted
    assert said in refused.reason

    anew = {"is_click": 0.95, "is_like": 0.95}
    decision = judge_version(GATE, TASKS, challenger, champion, anew=ScoredAnew(anew))
    assert decision.promoted
    assert "-0.0500 against champion 1, scored anew on the challenger's rows" in decision.reason
    better = {"is_click": 0.8, "is_like": 0.9}
    assert not judge_version(GATE, TASKS, challenger, champion, anew=ScoredAnew(better)).promoted

    both = ScoredAnew(anew, {"is_click": 0.96, "is_like": 0.95})
    refused = judge_version(GATE, TASKS, challenger, champion, anew=both)
    assert "+0.0050 against champion 1, both scored anew on the rows at hand" in refused.reason
    both = ScoredAnew(anew, {"is_click": 0.9, "is_like": 1.01})
    limit = judge_version(GATE, TASKS, challenger, champion, anew=both)
    assert "val/ne/is_like 1.0100 is above the gate's 1" in limit.reason


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = tiny_config(tmp_path_factory.mktemp("runs"))
    publish_sequences(cfg)
    save_tiny_model(cfg, cfg.model_dir)
    (cfg.model_dir / "metrics.json").unlink()
    return cfg


def test_the_champion_is_scored_on_the_challengers_rows(cfg: RunConfig) -> None:
    """The same figures as an evaluation on those rows, and no file of it."""
    other = replace(cfg, name="tomorrow", split=replace(cfg.split, t_val="2022-05-02T00:00:00Z"))
    shutil.copytree(cfg.sequence_dir, other.sequence_dir)
    found = evaluator.score_model(other, cfg.model_dir)
    assert not (cfg.model_dir / "metrics.json").exists()

    expected = evaluator.evaluate_model(other, cfg.model_dir, ["val"], name="check")
    for task in cfg.tasks:
        assert found[task] == pytest.approx(expected[f"val/ne/{task}"], nan_ok=True)
    tags = evaluator.row_tags(other.sequence_dir, other.split)
    assert tags["split.t_val"] == "2022-05-02T00:00:00Z"


def test_a_champion_of_other_data_is_not_deployed(cfg: RunConfig) -> None:
    manifest = store.read_manifest(cfg.sequence_dir)
    model = PinnedModel("", "shared", 1, {}, "demo")
    require_fit(cfg.model_dir, model, manifest)

    foreign = replace(manifest, actions=("clicked", "liked"))
    with pytest.raises(
        UserError,
        match=r"version 1 is of runs/demo and does not fit these sequences: its source.actions",
    ):
        require_fit(cfg.model_dir, model, foreign)


def test_cached_champions_are_named_by_content(cfg: RunConfig, tmp_path: Path) -> None:
    """Version 1 of a registry that began anew is not taken for the one of before."""
    before = PinnedModel("", "m", 1, folder_digests(cfg.model_dir))
    shutil.copytree(cfg.model_dir, tmp_path / before.folder_name)
    assert fetch_model(before, tmp_path) == tmp_path / before.folder_name

    anew = replace(before, sha256=before.sha256 | {"model.safetensors": "0" * 64})
    assert anew.folder_name != before.folder_name
    assert replace(before, version=7).folder_name == before.folder_name


def test_a_model_of_nan_is_not_deployed(cfg: RunConfig, tmp_path: Path) -> None:
    broken = replace(cfg, runs_dir=str(tmp_path))
    shutil.copytree(cfg.sequence_dir, broken.sequence_dir)
    loaded = load_model(cfg.model_dir)
    folder = deployment.cache_folder(broken.runs_dir) / "new"
    save_model(folder, loaded.model, loaded.cfg, loaded.maps, {})

    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if name.startswith("heads."))
    weights[name] = torch.full_like(weights[name], NAN)
    loaded.model.load_state_dict(weights)
    save_model(folder, loaded.model, loaded.cfg, loaded.maps, {})

    model = PinnedModel("", "m", 3, folder_digests(folder))
    folder.rename(folder.parent / model.folder_name)
    with pytest.raises(UserError, match=rf"m version 3 is not served: {name} holds numbers"):
        deployment._checked(broken.folders, broken.serve, model)


def test_each_source_of_data_has_a_registered_model_of_its_own(tmp_path: Path) -> None:
    names = set()
    for path in ("data/own/log", "data/other/log", "s3://bucket/own/log?region=eu"):
        names.add(SourceConfig(path=path, actions=("click",)).data_name)
    names.add(tiny_config(tmp_path).model_name)
    assert len(names) == 4
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.-") for name in names)

    own = SourceConfig(path="data/own/log", actions=("click",)).data_name
    assert own.startswith("own-log-")
    assert SourceConfig(path="data/own/log/", actions=("click", "buy")).data_name == own
    assert tiny_config(tmp_path, tracking={"model_name": "mine"}).model_name == "mine"


@pytest.mark.parametrize("name", ["a/b", "a:b", "it's", ""])
def test_a_name_that_the_registry_refuses_is_told_at_once(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.model_name must be letters"):
        TrackingConfig(model_name=name)
