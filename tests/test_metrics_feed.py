"""Metrics of a training: the file is the truth, and a tracker that was away misses nothing."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config import Outage
from pipeline.train.metrics import LINES_PER_REQUEST, MetricsFeed, MetricsFile, MetricsLine
from tests.support.patience import wait_until


class Tracker:
    """Takes lines unless it is down."""

    def __init__(self) -> None:
        self.lines: list[MetricsLine] = []
        self.down = False
        self.asked = 0

    def take_lines(self, lines: Sequence[MetricsLine]) -> None:
        self.asked += 1
        if self.down:
            raise Outage("nobody answers")
        self.lines += lines

    @property
    def steps(self) -> list[int]:
        return [line.step for line in self.lines]


def log_steps(folder: Path, resumed_at: int, steps: range) -> MetricsFile:
    file = MetricsFile(folder / "metrics.jsonl", resumed_at)
    for step in steps:
        file.append(step, {"train/loss": 1 / step})
    return file


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log_steps(tmp_path, 0, range(2, 8, 2))
    with path.open("a") as file:
        file.write('{"step": 8, "train/lo')  # the line at which it was killed
    MetricsFile(path, resumed_at=4).append(6, {"train/loss": 0.5})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [2, 4, 6]


def test_an_undefined_number_is_not_written(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.append(1, {"train/loss": math.nan, "train/grad_norm": math.inf, "train/lr": 0.5})
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written.keys() == {"step", "at_seconds", "train/lr"}


def test_what_a_tracker_missed_is_sent_once_it_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.train.metrics.RETRY_AFTER_S", 0.01)
    tracker = Tracker()
    feed = MetricsFeed(tmp_path, "run", tracker.take_lines)
    feed.start()

    file = log_steps(tmp_path, 0, range(1, 4))
    feed.notify()
    wait_until(lambda: tracker.steps == [1, 2, 3], "the first lines")

    tracker.down, asked = True, tracker.asked
    for step in range(4, 2 * LINES_PER_REQUEST):
        file.append(step, {"train/loss": 1 / step})
        feed.notify()  # returns at once
    wait_until(lambda: tracker.asked > asked + 1, "two tries")
    tracker.down = False
    wait_until(lambda: len(tracker.lines) == 2 * LINES_PER_REQUEST - 1, "the rest")
    feed.close()

    assert tracker.steps == list(range(1, 2 * LINES_PER_REQUEST)), "each once, in order"
    assert tracker.lines[3].values == {"train/loss": 1 / 4}


def test_the_driver_sends_what_a_worker_could_not(tmp_path: Path) -> None:
    tracker = Tracker()
    tracker.down = True
    feed = MetricsFeed(tmp_path, "run", tracker.take_lines)
    feed.start()
    log_steps(tmp_path, 0, range(1, 6))
    feed.notify()
    feed.close()
    assert tracker.lines == []

    with pytest.raises(Outage):
        MetricsFeed(tmp_path, "run", tracker.take_lines).send_rest()
    tracker.down = False
    MetricsFeed(tmp_path, "run", tracker.take_lines).send_rest()
    MetricsFeed(tmp_path, "run", tracker.take_lines).send_rest()
    assert tracker.steps == [1, 2, 3, 4, 5]


def test_an_attempt_that_goes_on_repeats_no_step(tmp_path: Path) -> None:
    """The tracker has step 5, the checkpoint was of step 3: steps 4 and 5 are done again."""
    tracker = Tracker()
    log_steps(tmp_path, 0, range(1, 6))
    MetricsFeed(tmp_path, "run", tracker.take_lines).send_rest()
    log_steps(tmp_path, 3, range(4, 9))
    MetricsFeed(tmp_path, "run", tracker.take_lines).send_rest()
    assert tracker.steps == [1, 2, 3, 4, 5, 6, 7, 8]

    MetricsFeed(tmp_path, "another run", tracker.take_lines).send_rest()
    assert tracker.steps[8:] == [1, 2, 3, 4, 5, 6, 7, 8], "one that has nothing gets all"
