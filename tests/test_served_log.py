"""What was served goes to files, and no answer waits for them."""

import json
import logging
import os
import queue
import threading
import time
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from serve_app.columns import RankColumns, RankedColumns
from serve_app.feedback import served_log
from serve_app.feedback.served_log import ServedLogSettings, forget_served, read_served
from serve_app.feedback.served_rows import FIXED
from serve_app.schemas import Refusal
from serve_app.web.api import make_api
from serve_app.web.replica import Unavailable
from serve_app.web.settings import ApiIdentity
from tests.support.exposition import sample
from tests.support.patience import wait_until
from tests.worlds.web import Fixed, call

ASKED = {
    "user_id": 3,
    "request_time_ms": 1_651_500_000_000,
    "request_features": {"tab": 1},
    "candidates": [
        {"item_id": 10},
        {"item_id": 11, "request_features": {"tab": 2}},
        {"item_id": 12},
    ],
}
OWN_HISTORY = {"history": [], "candidates": [{"item_id": 1}]}


class Scored(Fixed):
    """Puts the last candidate first."""

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        num = len(request)
        head = {"model_version": 7, "request_time_ms": request.head.request_time_ms}
        head |= {"ordered_by": "is_click", "unknown_items": 0, "unknown_user": False}
        head |= {"history_length": 4}
        scores = {"is_click": np.arange(num, dtype=np.float32) / 10}
        order = np.arange(num)[::-1]
        answer = RankedColumns(head, request.item_id, scores, order, 2.5)
        return replace(answer, role="canary", sequences="digest")


def api_with(folder: Path, **settings: object):
    wanted = ServedLogSettings(folder=str(folder), **settings)  # pyright: ignore[reportArgumentType]
    return make_api(Scored(), identity=ApiIdentity(name="one"), served_log=wanted)


def read_rows(folder: Path) -> list[dict]:
    columns = [*FIXED.names, "feature.tab", "score.is_click"]
    return read_served(str(folder), columns).to_pylist()


def test_the_best_places_of_an_answer_are_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    api = api_with(tmp_path, places=2)
    with caplog.at_level(logging.INFO, logger="ray.serve.requests"):
        answer = call(api, "POST", "/v1/rank", json=ASKED).json()
    assert json.loads(caplog.messages[-1])["served_as"] == answer["request_id"]
    assert call(api, "POST", "/v1/rank", json=OWN_HISTORY).status_code == 200
    call(api, "POST", "/v1/rank", json=ASKED | {"user_id": None, "history": []})
    api.state.served.close()

    rows = read_rows(tmp_path)
    assert [(row["item_id"], row["place"]) for row in rows] == [(12, 0), (11, 1)]
    assert [row["feature.tab"] for row in rows] == [1, 2]
    assert [round(row["score.is_click"], 3) for row in rows] == [0.2, 0.1]
    for row in rows:
        assert row["request_id"] == answer["request_id"]
        assert (row["user_id"], row["unit"], row["version"]) == (3, "3", 7)
        assert (row["role"], row["sequences"], row["history_length"]) == ("canary", "digest", 4)
        assert row["event_time"] == ASKED["request_time_ms"]
    text = call(api, "GET", "/metrics").text
    assert sample(text, "ranking_served_total", status="written") == 1

    # each answer has an id of its own, over Arrow too
    again = call(api, "POST", "/v1/rank", json=ASKED).json()
    assert again["request_id"] != answer["request_id"]


def test_what_the_page_looks_at_is_served_to_nobody(tmp_path: Path) -> None:
    api = api_with(tmp_path)
    for key in ("page-0", "session", "page-17"):
        call(api, "POST", "/v1/rank", json=ASKED | {"trial_key": key})
    api.state.served.close()
    assert {row["unit"] for row in read_rows(tmp_path)} == {"session"}


def test_a_request_without_an_answer_is_a_row(tmp_path: Path) -> None:
    class Failing(Scored):
        async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
            raise Unavailable

    settings = ServedLogSettings(folder=str(tmp_path))
    api = make_api(Failing(), served_log=settings)
    assert call(api, "POST", "/v1/rank", json=ASKED).status_code == 503
    recommended = call(api, "POST", "/v1/recommend", json={"user_id": 4, "trial_key": "k"})
    assert recommended.status_code == 409
    api.state.served.close()
    rows = [(row["unit"], row["failure"], row["item_id"]) for row in read_rows(tmp_path)]
    assert rows == [("3", "Unavailable", None), ("k", "NoIndex", None)]
    assert forget_served(str(tmp_path), [3]) == 1


def test_histories_and_keys_of_clients_where_they_are_asked_for(tmp_path: Path) -> None:
    api = api_with(tmp_path, histories=True)
    call(api, "POST", "/v1/rank", json=OWN_HISTORY | {"trial_key": "session"})
    call(api, "POST", "/v1/rank", json=ASKED)
    api.state.served.close()
    units = {(row["unit"], row["user_id"]) for row in read_rows(tmp_path)}
    assert units == {("session", None), ("3", 3)}

    assert forget_served(str(tmp_path), [3, 4]) == 3
    assert {row["unit"] for row in read_rows(tmp_path)} == {"session"}


def test_no_answer_waits_for_a_disk_that_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served_log, "MAX_WAITING", 1)
    monkeypatch.setattr(served_log, "MAX_ROWS", 1)
    at_the_disk, go_on = threading.Event(), threading.Event()

    def full(self: served_log.ServedLog, table: pa.Table) -> None:
        at_the_disk.set()
        assert go_on.wait(60)
        raise OSError("No space left on device")

    monkeypatch.setattr(served_log.ServedLog, "_write_file", full)
    api = api_with(tmp_path)
    assert call(api, "POST", "/v1/rank", json=ASKED).status_code == 200
    assert at_the_disk.wait(60)
    statuses = [call(api, "POST", "/v1/rank", json=ASKED).status_code for _ in range(5)]
    assert statuses == [200] * 5, "one waits for the disk, four found no room"
    assert isinstance(api.state.served._waiting, queue.Queue)

    go_on.set()
    api.state.served.close()
    text = call(api, "GET", "/metrics").text
    assert sample(text, "ranking_served_total", status="dropped") == 6
    assert sample(text, "ranking_served_total", status="written") == 0


def test_old_files_go_and_the_log_outlives_one_that_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    day, now_ms = tmp_path / "2026-01-01", int(time.time() * 1000)
    day.mkdir()
    old = day / f"one-{now_ms - 3 * 86_400_000}-0.parquet"
    young = day / f"one-{now_ms - 86_400_000}-1.parquet"
    for path in (old, young, day / "of-somebody-else.parquet"):
        path.touch()
        os.utime(path, (now_ms / 1000, 0))  # forgetting a user writes a file anew
    served_log.remove_older(str(tmp_path), days=2)
    assert sorted(path.name for path in day.iterdir()) == ["of-somebody-else.parquet", young.name]

    def refuse(folder: str, days: float) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(served_log, "remove_older", refuse)
    monkeypatch.setattr(served_log, "MAX_ROWS", 1)
    api = api_with(tmp_path / "served")
    for times in (1, 2):
        call(api, "POST", "/v1/rank", json=ASKED)
        wait_until(
            lambda times=times: len(served_log.served_files(str(tmp_path / "served"))) == times,
            "the file of an answer",
        )
    api.state.served.close()
    assert "still there" in caplog.text


def test_answers_that_wait_for_their_file_hold_their_best_places_alone(tmp_path: Path) -> None:
    api = api_with(tmp_path, places=2)
    answers: list[weakref.ref[np.ndarray]] = []
    rank = api.state.replica.rank

    async def rank_and_watch(request: RankColumns) -> RankedColumns | Refusal:
        answer = await rank(request)
        answers.append(weakref.ref(answer.item_id))
        return answer

    api.state.replica.rank = rank_and_watch
    many = [{"item_id": item} for item in range(1000)]
    for _ in range(3):
        assert call(api, "POST", "/v1/rank", json=ASKED | {"candidates": many}).status_code == 200
    wait_until(lambda: all(answer() is None for answer in answers), "answers that nobody holds")

    api.state.served.close()
    assert len(read_rows(tmp_path)) == 3 * 2
