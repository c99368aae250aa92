"""What a worker takes of its machine, as metrics of the tracker's run."""

import time

import pytest
import torch

from pipeline.config import Outage
from pipeline.train.usage import ProcessClock, UsageMonitor
from tests.support.patience import wait_until

CPU = torch.device("cpu")


def test_a_sample_names_its_rank_and_what_the_process_takes() -> None:
    told = []
    monitor = UsageMonitor(lambda values, step: told.append((step, values)), 10, CPU, 3, 4)
    monitor.send_sample()
    monitor.send_sample()
    assert [step for step, _ in told] == [0, 1]
    assert told[0][1].keys() == {"system/rank_3/cpu_percent", "system/rank_3/memory_mb"}
    assert 10 < told[0][1]["system/rank_3/memory_mb"] < 100_000  # this process has imported torch


def test_samples_come_while_the_block_runs_and_none_at_0() -> None:
    told = []
    with UsageMonitor(lambda values, step: told.append(step), 0.01, CPU, 0, 1):
        wait_until(lambda: len(told) > 2, "three samples")
    with UsageMonitor(lambda values, step: pytest.fail("sent"), 0, CPU, 0, 1) as monitor:
        assert not monitor.thread.is_alive()
    # sixteen ranks send half as often as eight
    assert UsageMonitor(lambda values, step: None, 10, CPU, 0, 16).every_s == 20


def test_a_tracker_that_is_gone_loses_samples_and_nothing_else() -> None:
    def gone(values: dict[str, float], step: int) -> None:
        raise Outage("no answer")

    monitor = UsageMonitor(gone, 10, CPU, 0, 1)
    monitor.send_sample()
    assert monitor.number == 1


def test_cpu_percent_is_of_the_time_since_the_last_look(monkeypatch: pytest.MonkeyPatch) -> None:
    wall, used = iter([100.0, 110.0, 114.0]), iter([7.0, 12.0, 18.0])
    monkeypatch.setattr(time, "monotonic", lambda: next(wall))
    monkeypatch.setattr(time, "process_time", lambda: next(used))
    clock = ProcessClock()
    assert [clock.cpu_percent(), clock.cpu_percent()] == [50.0, 150.0]
