"""Whoever waits says so, and gives up at the limit with the name of what did not come."""

import logging
import time

import pytest

from pipeline import waiting


def test_it_returns_what_was_found():
    answers = iter([None, 0, "", "here"])
    assert waiting.wait_until(lambda: next(answers), "an answer", 60, pause_s=0) == "here"


def test_it_gives_up_at_the_limit():
    with pytest.raises(TimeoutError, match="an answer: not within 0 s"):
        waiting.wait_until(lambda: None, "an answer", 0.05, pause_s=0.01)


def test_it_says_what_it_waits_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(waiting, "PROGRESS_EVERY_S", 0.02)
    caplog.set_level(logging.INFO, "pipeline.waiting")
    with waiting.progress_lines("Ray's start", 90):
        time.sleep(0.2)
    said = caplog.messages
    assert len(said) > 1
    assert all(line.startswith("waiting for Ray's start: ") for line in said)
    assert said[0].endswith("of at most 90 s")
    time.sleep(0.1)
    assert caplog.messages == said, "silent afterwards"
