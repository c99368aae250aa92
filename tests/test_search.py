"""A search for settings: what is drawn, what a trial says of itself, and what came of all."""

import contextlib
import json
import math
import pickle
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import config
from pipeline.config import ConfigError, Outage, RunConfig, UserError
from pipeline.search import tuning
from pipeline.search.page import write_search_page
from pipeline.search.results import (
    read_results,
    require_best,
    results_table,
    write_preset,
)
from pipeline.search.space import Trial, draw_trials, read_space
from pipeline.search.tracked import TrialRuns
from pipeline.search.trial import DIVERGED, ENDED_EARLY, read_outcome, train_trial, write_outcome
from pipeline.train import loop
from pipeline.train.guards import TrainingStopped
from pipeline.train.metrics import MetricsLine
from tests.worlds.tiny import publish_sequences, tiny_config

SPACE = {
    "train.lr": {"loguniform": ["1e-3", 0.1]},
    "model.dropout": {"uniform": [0, 0.25]},
    "model.num_layers": {"integers": [2, 4]},
    "features.item_id_dim": {"choices": [8, 16]},
    "train.task_weights.is_like": {"choices": [1, 2.5]},
}


def write_space(folder: Path, space: object, **search: object) -> Path:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({"space": space, **search}))
    return path


def test_trials_are_drawn_from_the_space_and_the_first_is_the_preset(tmp_path: Path) -> None:
    base = tiny_config(tmp_path)
    trials = draw_trials(base, read_space(write_space(tmp_path, SPACE, trials=30), base))
    assert len(trials) == 30
    assert [trial.name for trial in trials[:2]] == ["tiny-tune-00", "tiny-tune-01"]
    own = trials[0].cfg
    assert (own.train, own.model, own.features) == (base.train, base.model, base.features)
    assert own.sequences.from_run == "tiny"

    rates = []
    for trial in trials[1:]:
        cfg, drawn = trial.cfg, trial.settings
        assert 1e-3 <= cfg.train.lr <= 0.1 and cfg.train.lr == drawn["train.lr"]
        assert 0 <= cfg.model.dropout <= 0.25
        assert cfg.train.task_weights["is_like"] in (1, 2.5)
        rates.append(cfg.train.lr)
    assert {trial.cfg.model.num_layers for trial in trials[1:]} == {2, 3, 4}, "both ends are drawn"
    assert {trial.cfg.features.item_id_dim for trial in trials[1:]} == {8, 16}
    below = sum(rate < 1e-2 for rate in rates)
    assert 8 <= below <= 21, "half of a loguniform range lies below its geometric mean"


def test_more_trials_begin_with_the_same(tmp_path: Path) -> None:
    base = tiny_config(tmp_path)
    few, many = (
        draw_trials(base, read_space(write_space(tmp_path, SPACE, trials=n), base)) for n in (3, 9)
    )
    assert many[:3] == few
    other = draw_trials(base, read_space(write_space(tmp_path, SPACE, trials=3, seed=1), base))
    assert other[0] == few[0] and other[1:] != few[1:]


def test_refused_combinations_and_repeats_are_drawn_anew(tmp_path: Path) -> None:
    base = tiny_config(tmp_path)
    space = {
        "model.num_layers": {"choices": [2, 3]},
        "model.truncate_after_layer": {"choices": [1, None]},
    }
    trials = draw_trials(base, read_space(write_space(tmp_path, space, trials=50), base))
    assert len(trials) == 4, "each combination once"

    one = {"model.num_layers": {"choices": [2]}}
    with pytest.raises(ConfigError, match="nothing to search, it has one combination"):
        draw_trials(base, read_space(write_space(tmp_path, one), base))


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({}, "space must be a mapping of settings to draws, got {}"),
        ({"train.lrr": {"choices": [1]}}, "unknown configuration key 'train.lrr'"),
        ({"train.lr.a": {"choices": [1]}}, "unknown setting 'train.lr.a': lr is not a section"),
        ({"train.lr": {"loguniform": [-1, 1]}}, "space.train.lr.loguniform must be above 0"),
        ({"train.lr": {"uniform": [2, 1]}}, "low below high, got [2, 1]"),
        ({"train.lr": {"uniform": [0, 1]}}, "0.0 is refused: train.lr must be greater than 0"),
        (
            {"model.num_layers": {"uniform": [2, 3.5]}},
            "model.num_layers must be a whole number, got 2.0",
        ),
        ({"model.num_layers": {"integers": [2, 3.5]}}, "must be two whole numbers, got [2, 3.5]"),
        ({"model.encoder": {"choices": ["hstuu"]}}, "'hstuu' is refused: model.encoder must be"),
        ({"model.dropout": {"normal": [0, 1]}}, "must be one of choices, uniform, loguniform"),
        ({"model.dropout": {"choices": []}}, "must be a list that is not empty, got []"),
        ({"model.dropout": 0.5}, "space.model.dropout must be one of"),
        (
            {"features.item.tags.dim": {"choices": [4, 8]}},
            "space.features.item.tags.dim: the preset has no features.item.tags, so that",
        ),
        ({"split.t_val": {"choices": [1]}}, "only settings of model, features, retrieval, train"),
        ({"train.num_workers": {"choices": [1, 2]}}, "is the same for all trials"),
    ],
)
def test_a_mistake_in_a_space_is_named(tmp_path: Path, space: object, message: str) -> None:
    path = write_space(tmp_path, space)
    with pytest.raises(ConfigError, match=re.escape(message)) as refused:
        read_space(path, tiny_config(tmp_path))
    assert str(path) in str(refused.value)


def test_a_mistake_beside_the_space_is_named(tmp_path: Path) -> None:
    base = tiny_config(tmp_path)
    for wrong, message in (
        ({"trails": 3}, "unknown configuration key 'trails'"),
        ({"trials": 0}, "trials must be 1 or more, got 0"),
        ({"keep_one_in": 1}, "keep_one_in must be 2 or more"),
        ({"first_share": 1.5}, r"first_share must be in \(0, 1\]"),
    ):
        with pytest.raises(ConfigError, match=message):
            read_space(write_space(tmp_path, SPACE, **wrong), base)
    with pytest.raises(ConfigError, match="No such file"):
        read_space(tmp_path / "none.yaml", base)


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A preset with published sequences, whose trials have 16 steps."""
    base = tiny_config(tmp_path_factory.mktemp("search"))
    publish_sequences(base)
    train = replace(base.train, epochs=2, batch_users=3, log_every=2, lr=0.01)
    return replace(base, train=train)


def some_trials(base: RunConfig, folder: Path, name: str) -> list[Trial]:
    """Two of a search of a name of its own, on the preset's sequences."""
    sequences = replace(base.sequences, from_run=base.name)
    base = replace(base, name=name, sequences=sequences)
    space = {"train.lr": {"choices": [0.01, 0.02]}}
    return draw_trials(base, read_space(write_space(folder, space, trials=2), base))


class Ended(Exception):
    """The scheduler ends a trial."""


def run_trial(trial: Trial, most_reports: int = 1000) -> list[tuple[float, float]]:
    """What the trial reports, up to a report from which it does not return."""
    reports = []

    def report(epochs: float, value: float) -> None:
        reports.append((epochs, value))
        if len(reports) == most_reports:
            raise Ended

    with contextlib.suppress(Ended):
        train_trial(trial.cfg, trial.settings, report, None)
    return reports


def test_a_trial_that_was_killed_goes_on_and_reports_all_again(
    searched: RunConfig, tmp_path: Path
) -> None:
    whole, _ = some_trials(searched, tmp_path, "whole")
    expected = run_trial(whole)
    assert len(expected) == 8, "so many validations where the preset has none"
    assert expected[-1][0] == 2.0, "epochs"
    assert read_outcome(whole.cfg.run_dir) == {"status": "finished", "why": ""}

    killed, _ = some_trials(searched, tmp_path, "killed")
    begun = run_trial(killed, most_reports=4)
    assert read_outcome(killed.cfg.run_dir) is None
    lines = (killed.cfg.train_dir / "metrics.jsonl").read_text().splitlines()
    assert run_trial(killed) == expected, "equal to the last bit"
    assert begun == expected[:4]
    again = (killed.cfg.train_dir / "metrics.jsonl").read_text().splitlines()
    assert again[: len(lines) - 1] == lines[:-1], "what lies before its checkpoint is kept"

    files = sorted(killed.cfg.train_dir.rglob("*"))
    assert run_trial(killed) == expected, "one that is finished reports, and trains nothing"
    assert sorted(killed.cfg.train_dir.rglob("*")) == files


def test_results_are_read_from_the_files_best_first(searched: RunConfig, tmp_path: Path) -> None:
    good, other = some_trials(searched, tmp_path, "results")
    reports = run_trial(good)
    run_trial(other, most_reports=2)
    write_outcome(other.cfg.run_dir, ENDED_EARLY)
    assert run_trial(other) == run_trial(other), "one that was ended does not go on"

    best, worse = read_results([other, good], {})
    assert (best.trial, best.value, best.epochs) == (good, reports[-1][1], 2.0)
    assert (worse.status, worse.epochs) == ("ended early", 0.5)
    assert require_best([best, worse]) is best
    first, second = results_table([best, worse]).splitlines()
    assert re.match(
        r"results-tune-00  \d\.\d{4}  2\.00 epochs  finished     train\.lr=0\.01$", first
    )
    assert second.startswith("results-tune-01") and "0.50 epochs  ended early" in second

    base = replace(searched, name="results", train=replace(searched.train, num_workers=2))
    write_preset(best, tmp_path / "best.yaml", base.runs_dir, base.train.num_workers)
    preset = config.load(tmp_path / "best.yaml")
    assert preset.name == good.name and preset.train.lr == 0.01
    assert (preset.runs_dir, preset.train.num_workers) == (base.runs_dir, 2)
    assert preset.sequences.from_run == "tiny"

    draws = read_space(tmp_path / "space.yaml", base).draws
    page = write_search_page(tmp_path, "results-tune", draws, [best, worse]).read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page), "nothing is loaded from elsewhere"
    assert (tmp_path / "parallel_coordinates.png").exists()


def test_a_trial_that_diverges_is_an_answer(
    searched: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial, other = some_trials(searched, tmp_path, "wild")

    def diverge(*_: object, **__: object) -> None:
        raise TrainingStopped("the loss is 1e9")

    monkeypatch.setattr(loop, "train", diverge)
    assert run_trial(trial) == []
    assert read_outcome(trial.cfg.run_dir) == {"status": DIVERGED, "why": "the loss is 1e9"}
    results = read_results([trial, other], {other.name: "out of memory"})
    assert math.isnan(results[0].value)
    with pytest.raises(Outage, match=r"diverged the loss is 1e9; .* failed out of memory"):
        require_best(results)
    assert "–" in results_table(results)


def test_a_search_of_a_name_has_one_space(searched: RunConfig, tmp_path: Path) -> None:
    base = replace(searched, name="once", sequences=replace(searched.sequences, from_run="tiny"))

    def open_with(base: RunConfig, lr: list[float], trials: int) -> None:
        path = write_space(tmp_path, {"train.lr": {"choices": lr}}, trials=trials)
        space = read_space(path, base)
        tuning.open_search(base, space, draw_trials(base, space))

    open_with(base, [0.01, 0.02], 2)
    open_with(base, [0.01, 0.02], 3)  # more trials are the same search
    with pytest.raises(UserError, match=r"began with space\.train\.lr\.choices = .*--restart"):
        open_with(base, [0.01, 0.03], 2)
    wider = replace(base, model=replace(base.model, d_model=32))
    with pytest.raises(UserError, match=r"began with model\.d_model = 16 .* --set name="):
        open_with(wider, [0.01, 0.02], 2)

    (base.run_dir.parent / "once-tune-00").mkdir()
    tuning.forget_search(base.run_dir.parent / "once-tune")
    left = [path.name for path in base.run_dir.parent.glob("once-tune*")]
    assert left == []
    open_with(wider, [0.01, 0.02], 2)


def test_what_no_search_can_do_is_said(searched: RunConfig, tmp_path: Path) -> None:
    trials = some_trials(searched, tmp_path, "refused")
    for wrong, message in (
        (replace(searched, split=replace(searched.split, refit=True)), "split.refit leaves no"),
        (replace(searched, train=replace(searched.train, init="champion")), "train.init"),
    ):
        with pytest.raises(UserError, match=message):
            tuning.check_search(wrong, trials)


def test_trials_that_share_a_gpu_have_a_part_of_it(searched: RunConfig) -> None:
    train = replace(searched.train, threads_per_worker=2)
    on_gpu = replace(train, use_gpu=True)
    assert tuning.trial_resources(train) == {"cpu": 2.0, "gpu": 0.0}
    assert tuning.trial_resources(on_gpu) == {"cpu": 2.0, "gpu": 1.0}
    assert tuning.trial_resources(on_gpu, trials_per_gpu=4) == {"cpu": 2.0, "gpu": 0.25}

    with pytest.raises(UserError, match="--trials-per-gpu must be 1 or more, got 0"):
        tuning.trial_resources(on_gpu, trials_per_gpu=0)
    with pytest.raises(UserError, match="--trials-per-gpu 4: trials train without a GPU"):
        tuning.trial_resources(train, trials_per_gpu=4)


class TrackedRun:
    """A run of a tracker that may be down."""

    def __init__(self, run_id: str, tracker: "Tracker") -> None:
        self.run_id, self.tracker = run_id, tracker
        self.steps: list[int] = []
        self.tags: dict[str, str] = {}
        self.status = "RUNNING"

    def log_history(self, lines: Sequence[MetricsLine]) -> None:
        self.tracker.require_up()
        self.steps += [line.step for line in lines]

    def set_tags(self, tags: Mapping[str, str]) -> None:
        self.tracker.require_up()
        self.tags |= tags

    def end(self, status: str) -> None:
        self.tracker.require_up()
        self.status = status


class Tracker:
    def __init__(self) -> None:
        self.runs: dict[str, TrackedRun] = {}
        self.down = False

    def require_up(self) -> None:
        if self.down:
            raise Outage("nobody answers")

    def trial_run(self, cfg: RunConfig, manifest: object, parent: object, drawn: dict) -> Any:
        self.require_up()
        return self.runs.setdefault(cfg.name, TrackedRun(cfg.name, self))


def test_trials_are_tracked_whole_whenever_the_tracker_answers(
    searched: RunConfig, tmp_path: Path
) -> None:
    good, ended = some_trials(searched, tmp_path, "tracked")
    tracker = Tracker()
    runs = TrialRuns(tracker, None, None, [good, ended])  # pyright: ignore[reportArgumentType]
    assert pickle.loads(pickle.dumps(runs)), "Tune pickles it"
    with runs:
        run_trial(good, most_reports=3)
        runs.send_trial(good)
        assert tracker.runs[good.name].steps == [2, 4, 6]
        tracker.down = True
        run_trial(good)
        with pytest.raises(Outage):
            runs.send_trial(good)
        run_trial(ended, most_reports=2)
        tracker.down = False
    assert tracker.runs[good.name].steps == list(range(2, 17, 2)), "no step lost or repeated"
    assert tracker.runs[good.name].status == "FINISHED"
    assert list(tracker.runs) == [good.name], "of the other the search has heard nothing"

    write_outcome(ended.cfg.run_dir, ENDED_EARLY)
    again = Tracker()
    with TrialRuns(again, None, None, [good, ended]):  # pyright: ignore[reportArgumentType]
        pass
    assert list(again.runs) == [ended.name], "one that is tracked whole is left alone"
    run = again.runs[ended.name]
    assert (run.steps, run.status, run.tags) == (
        [2, 4],
        "FINISHED",
        {"trial_status": "ended early"},
    )


def test_a_search_that_is_ended_marks_its_trials_so(searched: RunConfig, tmp_path: Path) -> None:
    trial, _ = some_trials(searched, tmp_path, "stopped")
    tracker = Tracker()
    runs = TrialRuns(tracker, None, None, [trial])  # pyright: ignore[reportArgumentType]

    def search() -> None:
        with runs:
            run_trial(trial, most_reports=1)
            runs.send_trial(trial)
            sys.exit(143)

    with pytest.raises(SystemExit):
        search()
    assert tracker.runs[trial.name].status == "KILLED"


@pytest.mark.cluster
def test_trials_run_on_a_cluster_and_a_worse_one_is_ended(
    searched: RunConfig, local_ray: None, tmp_path: Path
) -> None:
    """Two at once; the one that diverged is an answer, and the same command trains nothing."""
    base = replace(searched, name="cluster", sequences=replace(searched.sequences, from_run="tiny"))
    path = write_space(tmp_path, {"train.lr": {"choices": [0.01, 0.02]}}, trials=2, keep_one_in=2)
    space = read_space(path, base)
    trials = draw_trials(base, space)
    tuning.open_search(base, space, trials)
    results = tuning.run_search(base, space, trials, tuning.trial_resources(base.train))

    statuses = {result.status for result in results}
    assert results[0].status == "finished"
    assert statuses <= {"finished", "ended early"}
    assert json.loads((trials[0].cfg.run_dir / "trial.json").read_text())["total_steps"] == 16
