"""The benchmark of days: its plan, and two days of it on a tiny world."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.quality import day_by_day, day_by_day_report
from benchmarks.quality.day_by_day import FROM_NOTHING, STALE, Seconds, plan_days
from pipeline.config import RunConfig
from pipeline.figures import read_runs
from tests.worlds.tiny import publish_sequences, tiny_config

DATES = ("2022-05-01", "2022-05-02")  # the tiny world's validation period begins with the first


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    runs_dir = tmp_path_factory.mktemp("runs")
    publish_sequences(tiny_config(runs_dir, name="demo"))
    cfg = tiny_config(runs_dir, train={"epochs": 1, "batch_users": 8})
    return replace(cfg, sequences=replace(cfg.sequences, from_run="demo"))


def going_on(cfg: RunConfig) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, init="champion", replay_share=0.5))


def test_all_ways_begin_with_one_model_and_go_on_from_their_own(cfg: RunConfig) -> None:
    anew = plan_days(cfg, going_on(cfg), FROM_NOTHING, 3, DATES)
    replayed = plan_days(cfg, going_on(cfg), "replay", 3, DATES)
    assert anew[0] == replayed[0]
    assert [day.key for day in replayed] == [
        (FROM_NOTHING, DATES[0], 3),
        ("replay", DATES[1], 3),
    ]
    assert anew[1].before is None
    assert anew[1].cfg.train.init == "random"
    assert replayed[1].before == replayed[0].cfg
    assert (replayed[1].cfg.train.init, replayed[1].cfg.train.replay_share) == ("champion", 0.5)
    assert replayed[1].cfg.split.t_val == "2022-05-02T00:00:00+08:00"
    assert replayed[1].cfg.split.t_test == "2022-05-03T00:00:00+08:00"


def test_two_days_are_trained_and_scored(
    cfg: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second day goes on from the first one's model, in each way to one of its own."""
    monkeypatch.setattr(day_by_day, "DAYS", DATES)
    out = tmp_path / "days.jsonl"
    for way in (FROM_NOTHING, "replay", STALE):
        for day in plan_days(cfg, going_on(cfg), way, 0, DATES):
            if day.key not in day_by_day.finished_days(out):
                day_by_day.carry_out(day, out, tmp_path / "predictions")

    runs = day_by_day_report.read_days(out)
    assert len(read_runs(out)) == len(runs) == 4, "the first day is trained once"
    first, anew, replayed, stale = runs.values()
    assert replayed["config"]["train"]["init"] == "champion"
    assert replayed["steps"] > 0
    assert anew["metrics"]["val/rows"] == replayed["metrics"]["val/rows"]
    assert first["metrics"] != anew["metrics"] != replayed["metrics"] != stale["metrics"]
    assert stale["steps"] == 0
    assert set(replayed["cpu_seconds"]) == {"prepare", "train", "evaluate"}

    kept = json.loads((day_by_day.first_model(day) / "artifact.json").read_text())
    assert kept["extra"]["steps"] == first["steps"], "every way and seed goes on from it"


def test_seconds_are_of_processors_too() -> None:
    seconds = Seconds()
    with seconds.measure("work"):
        sum(range(10**6))
    assert seconds.clock["work"] > 0
    assert seconds.cpu["work"] > 0


def test_a_difference_is_over_the_same_rows_and_users(tmp_path: Path) -> None:
    """A way that ranks as training from nothing differs by nothing, with no spread."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from benchmarks.quality.report import KEYS

    rng, rows = np.random.default_rng(0), 60
    columns = {key: np.arange(rows) for key in KEYS} | {"user_id": np.arange(rows) % 12}
    columns |= {"label.is_click": rng.integers(0, 2, rows), "logit.is_click": rng.normal(size=rows)}
    for way in (FROM_NOTHING, "replay"):
        pq.write_table(pa.table(columns), tmp_path / f"{way}-{DATES[0]}-0.parquet")
    columns["logit.is_click"] = columns["label.is_click"] + 0.1 * columns["logit.is_click"]
    pq.write_table(pa.table(columns), tmp_path / f"newest-{DATES[0]}-0.parquet")

    keys = [(way, DATES[0], 0) for way in (FROM_NOTHING, "replay", "newest")]
    draws = day_by_day_report.UserDraws(tmp_path, keys, samples=20)
    same = day_by_day_report.difference(draws, "replay", DATES[:1], [0])
    assert same == {"auc": [0.0, 0.0, 0.0], "ne": [0.0, 0.0, 0.0]}
    better = day_by_day_report.difference(draws, "newest", DATES[:1], [0])
    assert 0 < better["auc"][1] <= better["auc"][0] <= better["auc"][2]


def test_intervals_of_seeds_whose_rows_are_gone_stay() -> None:
    def measured(way: str, seeds: list[int], auc: float) -> dict:
        entry = {"seeds": seeds, "auc": [auc] * 3, "ne": [0.0] * 3}
        return {"samples": 200, "ways": {way: {"test days": [entry]}}}

    kept = measured("replay", [0, 1], auc=0.1)
    joined = day_by_day_report.join_differences(kept, measured("replay", [2], auc=0.2))
    entries = joined["ways"]["replay"]["test days"]
    assert [(entry["seeds"], entry["auc"][0]) for entry in entries] == [([0, 1], 0.1), ([2], 0.2)]
    text = day_by_day_report.difference_text(joined, "replay", "test days", (2,))
    assert text.startswith("+0.2000 [+0.2000, +0.2000] / ")

    # measured anew, another way beside it
    joined = day_by_day_report.join_differences(joined, measured("replay", [1, 2], auc=0.3))
    joined = day_by_day_report.join_differences(joined, measured("newest", [0], auc=0.4))
    assert [entry["seeds"] for entry in joined["ways"]["replay"]["test days"]] == [[1, 2]]
    assert joined["ways"].keys() == {"replay", "newest"}
