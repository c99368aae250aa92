"""What the benchmark of the server under load counts."""

import json
from pathlib import Path

import numpy as np

from benchmarks.serving.gpu_load import (
    NUM_CANDIDATES,
    Asker,
    Trial,
    best_of,
    confirm_rate,
    find_highest_rate,
    plain_trial,
)
from benchmarks.serving.killed import cost_of_kills
from benchmarks.serving.posted_events import what_is_kept
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.load_test import Answers, hop_figures
from serve_app.schemas import Event


def test_a_kill_costs_what_was_under_way_and_what_came_until_the_next() -> None:
    due_s = np.array([0.5, 0.9, 1.1, 2.0, 6.0])
    answers = Answers.not_yet(5)
    answers.status[:] = [200, 0, 0, 200, 200]
    answers.latency_ms[:] = [10, 200, 1500, 700, 20]
    assert cost_of_kills(due_s, answers, [1.0, 5.0]) == [
        {"failed": 2, "longest_s": 1.5},
        {"failed": 0, "longest_s": 0.02},
    ]


def test_kept_events_are_held_against_what_was_acknowledged(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    log = SqliteEvents(path)
    clicked = Event(user_id=7, item_id=1, event_time=1, actions={"is_click": True})
    log.append([clicked, Event(user_id=7, item_id=2, event_time=1)])
    log.append([Event(user_id=6, item_id=1, event_time=1)])  # of an earlier run
    shown = {(7, 1), (7, 2), (7, 3)}
    assert what_is_kept(path, 7, shown, {(7, 1), (7, 2)}) == {
        "acknowledged": 3,
        "kept": 2,
        "acknowledged_and_lost": 1,
        "kept_twice": 0,
        "outcomes": 2,
        "outcomes_lost": 1,
    }


def test_hops_of_answers_that_say_them() -> None:
    answers = Answers.not_yet(3)
    answers.latency_ms[:] = [10.0, 20.0, 30.0]
    answers.late_ms[:] = [1.0, 1.0, 1.0]
    answers.hops.update({0: {"ranker": 4.0, "total": 6.0}, 1: {"ranker": 5.0, "total": 9.0}, 2: {}})
    figures = hop_figures(answers)
    assert set(figures) == {"late", "network", "ranker", "total"}
    assert (figures["network"]["p50"], figures["network"]["max"]) == (6.5, 10.0)
    assert figures["ranker"]["max"] == 5.0


def test_the_highest_rate_is_found_by_doubling_and_then_half_way() -> None:
    tried: list[float] = []

    def ask(rate: float) -> Trial:
        tried.append(round(rate))
        tail_ms = 40.0 if rate <= 130 else np.inf
        return Trial(rate, 100, 0, 10.0, tail_ms, 1.0)

    best = best_of(find_highest_rate(ask, 20.0))
    assert tried == [20, 40, 80, 160, 113, 135]
    assert best is not None and round(best.rate) == 113


def test_a_rate_below_the_first_is_found_by_halving() -> None:
    trials = find_highest_rate(lambda rate: Trial(rate, 9, 0, 9.0, 9.0 * rate, 1.0), 20.0)
    best = best_of(trials)
    assert [trial.rate for trial in trials[:3]] == [20, 10, 5]
    assert best is not None and best.rate == 5


def test_a_rate_that_does_not_hold_again_is_lowered() -> None:
    again = confirm_rate(lambda rate: Trial(rate, 9, 0, 9.0, 0.5 * rate, 1.0), 119.0)
    assert again.holds and round(again.rate) == 99
    again = confirm_rate(lambda rate: Trial(rate, 9, 0, 9.0, 99.0, 1.0), 144.0)
    assert not again.holds and round(again.rate) == 100


def test_no_rate_holds() -> None:
    trials = find_highest_rate(lambda rate: Trial(rate, 9, 9, np.inf, np.inf, 1.0), 20.0)
    assert best_of(trials) is None
    assert plain_trial(trials[0])["tail_ms"] is None


def test_cold_requests_are_of_histories_that_nobody_has_asked_for() -> None:
    newest_ms = {7: [30, 20], 8: [50, 40]}
    asker = Asker([7, 8], newest_ms, np.arange(1000), np.random.default_rng(0))
    asked = []
    for _ in range(4):
        body = json.loads(asker.cold_body())
        asked.append((body["user_id"], body["request_time_ms"]))
    assert asked == [(7, 30), (8, 50), (7, 20), (8, 40)]
    assert len(body["candidates"]) == NUM_CANDIDATES
