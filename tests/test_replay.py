"""Past requests as they are sent again: the server's own code answers in the same process here."""

import time
from dataclasses import replace

import numpy as np
import pytest

from pipeline.config import ColumnReading, RunConfig, ServeConfig
from pipeline.model.artifact import load_model
from serve_app import replay
from serve_app.columns import RankColumns
from serve_app.history.published import PublishedSequences
from serve_app.ranking.ranker import Ranker
from serve_app.schemas import RankRequest
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Ranker]:
    folder = tmp_path_factory.mktemp("replay")
    cfg = tiny_config(
        folder / "runs", serve={"port": 0, "parity_requests": 20, "demo_candidates": 12}
    )
    publish_sequences(cfg)
    loaded = load_model(save_tiny_model(cfg, cfg.model_dir))
    return cfg, Ranker(
        loaded,
        PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, folder / "cache"),
        1,
        "tiny",
        cfg.serve,
    )


def past_requests(cfg: RunConfig) -> list[replay.PastRequest]:
    period, loaded = replay.PastPeriod.of_run(cfg), load_model(cfg.model_dir)
    return replay.past_requests(period, cfg.serve, loaded)


def demo_request(cfg: RunConfig) -> replay.DemoRequest:
    period = replay.PastPeriod.of_run(cfg)
    return replay.demo_request(period, cfg.model_dir, cfg.serve.demo_candidates)


def test_half_by_user_half_by_history_and_the_same_scores(world: tuple[RunConfig, Ranker]) -> None:
    cfg, ranker = world
    requests = past_requests(cfg)
    assert len(requests) == 20
    assert sum("history" in past.body for past in requests) == 10
    worst = 0.0
    for past in requests:
        request = RankColumns.of(RankRequest.model_validate(past.body))
        assert ranker.find_refusal(request) is None
        assert len(request) == cfg.serve.parity_candidates
        assert cfg.split.test_ms <= request.head.request_time_ms < time.time() * 1000
        (answer,) = ranker.rank([request])
        served = np.array([answer.scores[task] for task in cfg.tasks]).T
        assert np.ptp(served) > 0.01
        worst = max(worst, float(np.abs(served - past.scores).max()))
    assert worst < 1e-6


@pytest.mark.parametrize(
    ("limits", "stays"), [({}, True), ({"max_history": 2}, False), ({"max_body_bytes": 150}, False)]
)
def test_a_history_that_the_server_would_refuse_is_not_sent(limits: dict, stays: bool) -> None:
    """The default limits are each by itself: 16,384 rows can be more than 2 MB."""
    rows = [{"item_id": item, "event_time": item, "actions": {"click": True}} for item in range(3)]
    body = {"user_id": 3, "history": rows, "first_position": 5, "candidates": [{"item_id": 1}]}
    replay.leave_out_long_history(body, ServeConfig(**limits))
    assert ("history" in body) == ("first_position" in body) == stays
    assert body["user_id"] == 3


def test_a_skewed_server_is_noticed(world: tuple[RunConfig, Ranker]) -> None:
    """The sum of all this would be worthless if a request's time or history did not matter to the
    scores.
    """
    cfg, ranker = world
    worst = 0.0
    for past in past_requests(cfg):
        late = RankRequest.model_validate(past.body | {"request_time_ms": int(time.time() * 1000)})
        (answer,) = ranker.rank([RankColumns.of(late)])
        served = np.array([answer.scores[task] for task in cfg.tasks]).T
        worst = max(worst, float(np.abs(served - past.scores).max()))
    assert worst > 1e-3


def test_the_demo_asks_for_what_came_next_and_what_is_popular(
    world: tuple[RunConfig, Ranker],
) -> None:
    cfg, ranker = world
    demo = demo_request(cfg)
    body, did = demo.body, demo.happened
    items = [candidate["item_id"] for candidate in body["candidates"]]
    assert len(items) == len(set(items)) == 12
    assert items[: len(did)] == list(did)
    assert 0 < len(did) <= 6
    assert ranker.find_refusal(RankColumns.of(RankRequest.model_validate(body))) is None

    # of a column of text the store has codes, which are shown to nobody
    as_text = replace(cfg.source, columns={"tab": ColumnReading(column="tab", text=True)})
    asked = demo_request(replace(cfg, source=as_text)).body["request_features"]
    assert "tab" in body["request_features"]
    assert "tab" not in asked
