"""An event store that does not answer costs the newest events, and no answer."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from pipeline.config import ServeConfig, UserError
from pipeline.model.artifact import load_model
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history.live import LiveHistory
from serve_app.history.published import PublishedSequences
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.metrics import ReplicaMetrics, exposition_text
from serve_app.ranking.outage import StoreOutage
from serve_app.ranking.ranker import Ranker
from serve_app.ranking.rollout import CHAMPION, Rollout, open_events
from serve_app.schemas import (
    Event,
    EventsRequest,
    EventsResponse,
    EventStatus,
    ModelInfo,
    Refusal,
    StoreDown,
)
from serve_app.web.api import make_api
from tests.support.exposition import sample
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config
from tests.worlds.web import Fixed, call

NOW_MS = 1_651_766_399_000
RANK = {"user_id": 3, "request_time_ms": NOW_MS, "candidates": [{"item_id": i} for i in range(5)]}
CLICK = {"user_id": 3, "item_id": 7, "event_time": NOW_MS - 1, "actions": {"is_click": True}}


class Breakable(SqliteEvents):
    """Answers until it is told not to."""

    is_down = False
    num_asked = 0

    def append(self, events: Sequence[Event]) -> list[EventStatus]:
        if self.is_down:
            raise StoreDown("not there")
        return super().append(events)

    def newest_of_user(self, *arguments, **options):
        self.num_asked += 1
        if self.is_down:
            raise StoreDown("not there")
        return super().newest_of_user(*arguments, **options)


class Whole(Fixed):
    """A replica without Ray over `log`."""

    def __init__(self, folder: Path, log: SqliteEvents) -> None:
        cfg = tiny_config(folder / "runs")
        publish_sequences(cfg)
        loaded = load_model(save_tiny_model(cfg, folder / "model"))
        published = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, folder / "cache")
        history = LiveHistory(published, log, cfg.sequences, max_events=100)
        self.counts = ReplicaMetrics()
        self.ranker = Ranker(loaded, history, 1, "tiny", ServeConfig())
        self.rollout = Rollout({CHAMPION: self.ranker}, {CHAMPION: ""}, 0.0, self.counts)

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        return self.rollout.rank([request])[0]

    async def append_events(self, request: EventsRequest) -> EventsResponse | Refusal:
        return self.rollout.append_events([request])[0]

    async def model_info(self) -> ModelInfo:
        return self.rollout.model_info()


def test_ranking_goes_on_from_published_rows_and_says_so(tmp_path: Path) -> None:
    log = Breakable(tmp_path / "events.sqlite")
    replica = Whole(tmp_path, log)
    replica.ranker.outage = StoreOutage(lambda: 0.0)  # the pause ends when the test says so
    api = make_api(replica)
    before = call(api, "POST", "/v1/rank", json=RANK).json()
    assert call(api, "POST", "/v1/events", json={"events": [CLICK]}).status_code == 200
    with_event = call(api, "POST", "/v1/rank", json=RANK).json()
    assert with_event["history_length"] == before["history_length"] + 1
    assert "live_events" not in with_event
    assert call(api, "GET", "/readyz").json()["live_events"] is True

    log.is_down = True
    answer = call(api, "POST", "/v1/rank", json=RANK)
    assert answer.status_code == 200
    of_this_request = {"live_events": False, "request_id": answer.json()["request_id"]}
    assert answer.json() == before | of_this_request
    assert call(api, "POST", "/v1/events", json={"events": [CLICK]}).status_code == 503
    ready = call(api, "GET", "/readyz")
    assert (ready.status_code, ready.json()["live_events"]) == (200, False)

    # it needs no store
    own = {"history": [], "candidates": RANK["candidates"]}
    assert "live_events" not in call(api, "POST", "/v1/rank", json=own).json()
    text = exposition_text(replica.counts.registry).decode()
    assert sample(text, "ranking_ranker_without_live_events_total", role="champion") == 1

    # back, once the pause is over
    log.is_down = False
    asked = log.num_asked
    assert call(api, "POST", "/v1/rank", json=RANK).json()["live_events"] is False
    assert log.num_asked == asked, "a store that is down is left alone"
    replica.ranker.outage = StoreOutage()
    again = call(api, "POST", "/v1/rank", json=RANK).json()
    assert again == with_event | {"request_id": again["request_id"]}
    assert call(api, "GET", "/readyz").json()["live_events"] is True


def test_a_store_is_asked_again_after_ten_times_as_long_as_it_took_to_fail() -> None:
    now = 100.0
    outage = StoreOutage(lambda: now)
    assert outage.begin_asking()

    for took_s, pause_s in ((0.001, 1.0), (5.0, 50.0)):
        now += took_s
        outage.begin(now - took_s, StoreDown("no"))
        now += pause_s - 0.01
        assert not outage.begin_asking()
        now += 0.02
        assert outage.begin_asking()
        assert not outage.begin_asking(), "one goes ahead, the others do not wait for it"

    outage.end()
    assert outage.begin_asking()
    assert outage.begin_asking()
    assert not outage.is_on


def test_broken_pages_of_sqlite_are_an_outage(tmp_path: Path) -> None:
    path = tmp_path / "events.sqlite"
    log = SqliteEvents(path)
    log.append([Event(user_id=3, item_id=i, event_time=NOW_MS - 9 - i) for i in range(500)])
    log.forget([])  # empties the write-ahead log

    pages = bytearray(path.read_bytes())
    pages[4096:] = b"\x5a" * (len(pages) - 4096)  # all but the first, which has the schema
    path.write_bytes(pages)

    api = make_api(Whole(tmp_path, SqliteEvents(path)))
    answer = call(api, "POST", "/v1/rank", json=RANK)
    assert answer.status_code == 200
    assert answer.json()["live_events"] is False
    answer = call(api, "POST", "/v1/events", json={"events": [CLICK]})
    assert answer.status_code == 503
    assert "sqlite" not in answer.text


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "events.sqlite").write_bytes(b"no database" * 1000)
    with pytest.raises(UserError, match=r"events\.sqlite cannot be read: .*move it away"):
        open_events(ServeConfig(), tmp_path)
