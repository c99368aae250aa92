"""What the benchmark of the server under load counts."""

import numpy as np

from benchmarks.serving.killed import cost_of_kills
from serve_app.load_test import Answers, hop_figures


def test_a_kill_costs_what_was_under_way_and_what_came_until_the_next() -> None:
    due_s = np.array([0.5, 0.9, 1.1, 2.0, 6.0])
    answers = Answers.not_yet(5)
    answers.status[:] = [200, 0, 0, 200, 200]
    answers.latency_ms[:] = [10, 200, 1500, 700, 20]
    assert cost_of_kills(due_s, answers, [1.0, 5.0]) == [
        {"failed": 2, "longest_s": 1.5},
        {"failed": 0, "longest_s": 0.02},
    ]


def test_hops_of_answers_that_say_them() -> None:
    answers = Answers.not_yet(3)
    answers.latency_ms[:] = [10.0, 20.0, 30.0]
    answers.late_ms[:] = [1.0, 1.0, 1.0]
    answers.hops.update({0: {"ranker": 4.0, "total": 6.0}, 1: {"ranker": 5.0, "total": 9.0}, 2: {}})
    figures = hop_figures(answers)
    assert set(figures) == {"late", "network", "ranker", "total"}
    assert (figures["network"]["p50"], figures["network"]["max"]) == (6.5, 10.0)
    assert figures["ranker"]["max"] == 5.0
