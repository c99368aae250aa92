"""The benchmark of whole training jobs: what it tells a job, and how it reads its speed."""

import argparse
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from safetensors.numpy import save_file

from benchmarks.training.train_job import (
    BROKEN_AFTER,
    SIZES,
    TINY,
    JobCase,
    Trained,
    compare,
    grouped,
    job_config,
    run_part,
    section,
    speeds_alone,
    steady_speed,
    zipf_quantiles,
)
from pipeline import config
from pipeline.train.metrics import METRICS, MetricsLine


def line(step: int, step_ms: float, waiting: float = 0.0) -> MetricsLine:
    """A line of metrics of steps of 1,000 tokens, at the time when its last step ended."""
    values = {
        "train/step_ms": step_ms,
        "train/tokens_per_s": 1e6 / step_ms,
        "train/data_wait_share": waiting,
        "train/message_wait_share": 0.0,
    }
    return MetricsLine(step, step * step_ms / 1000, values)


def test_speed_is_of_all_steps_after_the_first_ones() -> None:
    lines = [line(10, 900.0), line(20, 60.0), line(30, 80.0, waiting=0.35), line(35, 60.0)]
    found = steady_speed(lines, warm_steps=10)

    assert found["steps"] == 25
    assert found["step_ms"] == pytest.approx((600 + 800 + 300) / 25)
    assert found["tokens_per_s"] == pytest.approx(25_000 / 1.7)
    assert found["data_wait_share"] == pytest.approx(0.35 * 0.8 / 1.7)


def test_lengths_are_the_quantiles_of_zipfs_law() -> None:
    assert zipf_quantiles(3, 64).tolist() == [2, 8, 32]

    # as many below 8 as above, and nothing beyond the ends
    many = zipf_quantiles(1000, 64)
    assert np.count_nonzero(many < 8) == pytest.approx(500, abs=60)
    assert (many.min(), many.max()) == (1, 64)


def test_a_worker_has_as_many_tokens_a_step_among_two_as_alone(tmp_path: Path) -> None:
    options = argparse.Namespace(**TINY)
    found = []
    for workers in (1, 2):
        cfg = job_config(JobCase(workers), tmp_path, options)
        preset = tmp_path / "preset.yaml"
        preset.write_text(yaml.safe_dump(config.to_dict(cfg)))
        found.append(config.load(preset))

    one, two = found
    assert one.train.batch_tokens == 2048
    assert two.train.batch_tokens == 4096
    assert two.train.num_workers == 2
    assert one.sequence_dir == two.sequence_dir
    assert one.train_dir != two.train_dir


def test_a_job_that_ended_before_its_worker_was_killed_is_no_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its losses would say that a job goes on as if nothing had happened."""
    monkeypatch.setattr("sys.executable", "true")  # in the job's place
    options = argparse.Namespace(**TINY, minutes_a_job=1.0)
    case = JobCase(2, is_killed=True)
    cfg = job_config(case, tmp_path, options)
    cfg.train_dir.mkdir(parents=True)
    (cfg.train_dir / METRICS).write_text(json.dumps({"step": BROKEN_AFTER}) + "\n")
    going_on = threading.Event()
    assert run_part(replace(case, is_killed=False), cfg, tmp_path, options, going_on) == 0
    with pytest.raises(RuntimeError, match="one of them killed: exit code 0"):
        run_part(case, cfg, tmp_path, options, going_on)


def test_the_ratio_is_to_the_faster_run_of_one_worker() -> None:
    def case(workers: int, tokens_per_s: float, **more: float) -> dict[str, float]:
        speed = {"workers": workers, "tokens_per_s": tokens_per_s, "step_ms": 10.0, "steps": 150}
        shares = {"message_wait_share": 0.01, "data_wait_share": 0.002, "graphs": 0}
        return {**speed, **shares, "seconds": 40.0, "longest_gap_s": 12.0, **more}

    run = {
        "command": "it",
        "environment": {"device": "a GPU", "cores": 16, "torch": "2", "ray": "2.60"},
        "sizes": {name: TINY[name] for name in SIZES},
        "cases": {
            "1 worker": case(1, 50.0),
            "2 workers": case(2, 95.0),
            "1 worker, CUDA graphs": case(1, 47.5),
            "2 workers, CUDA graphs": case(2, 96.0, furthest_loss=1e-6),
            "2 workers, one of them killed": case(
                2, 90.0, furthest_loss=0.0, furthest_weight=0.0, weight_rms=0.0
            ),
        },
    }
    without = {**run, "note": "an idle host", "cases": {"2 workers": case(2, 97.5)}}
    text = section([without, run])
    assert "| 2 workers | 10.0 | 95 | **1.90x** | 1.0% | 0.2% | 0 | 150 | 40 |" in text
    assert "| 2 workers | 10.0 | 98 | **1.95x** † | 1.0% |" in text
    assert "`it` (an idle host): a GPU, 16 cores" in text
    assert "within 0.0e+00 of the plain job's, the model's weights within 0.0e+00" in text
    assert "12 s" in text
    assert "| 2 workers, one of them killed" not in text

    # of graphs both the speed and the distance are told
    assert "| 2 workers, CUDA graphs | 10.0 | 96 | **1.92x** |" in text
    assert (
        "2 workers, CUDA graphs: Losses of all lines are within 1.0e-06 of the plain job's." in text
    )

    beside_others = section([{**run, "at_once": True}])
    assert "| 2 workers |" not in beside_others
    assert "2 workers, CUDA graphs: Losses" in beside_others


def test_a_ratio_is_to_runs_of_as_many_tokens_a_step() -> None:
    def run(events: int, workers: int, tokens_per_s: float) -> dict[str, Any]:
        case = {"workers": workers, "tokens_per_s": tokens_per_s}
        return {"sizes": {"events": events}, "cases": {"case": case}}

    runs = [run(65_536, 2, 90.0), run(65_536, 1, 50.0), run(262_144, 1, 70.0)]
    runs.append({**run(65_536, 1, 20.0), "at_once": True})  # beside others
    assert speeds_alone(runs[0], runs) == [50.0]


def test_jobs_that_are_broken_off_run_beside_each_other_and_others_alone() -> None:
    plain, graphs = JobCase(2), JobCase(2, cuda_graphs="on")
    killed, ended, single = JobCase(2, is_killed=True), JobCase(2, ended_by_one=True), JobCase(1)
    all_cases = [plain, graphs, killed, ended, single]
    groups = grouped(all_cases, all_at_once=False)
    assert groups == [[plain], [graphs], [killed, ended], [single]]
    assert grouped(all_cases, all_at_once=True) == [all_cases]


def test_runs_are_compared_by_losses_and_by_the_weights_of_complete_ones(tmp_path: Path) -> None:
    for name, third in (("plain", 3.0), ("other", 3.5)):
        (tmp_path / name).mkdir()
        weights = {"a": np.array([1.0, 2.0], np.float32), "b": np.array([[third, 4.0]], np.float32)}
        save_file(weights, tmp_path / name / "model.safetensors")

    plain = Trained({10: 0.5, 20: 0.4}, tmp_path / "plain", is_complete=True)
    other = Trained({10: 0.5, 20: 0.41, 30: 9.0}, tmp_path / "other", is_complete=True)
    found = compare(other, plain)
    assert found["furthest_loss"] == pytest.approx(0.025)
    assert found["furthest_weight"] == 0.5
    assert found["weight_rms"] == 0.25

    assert compare(plain, plain) == {"furthest_loss": 0, "furthest_weight": 0, "weight_rms": 0}
    assert list(compare(replace(other, is_complete=False), plain)) == ["furthest_loss"]
