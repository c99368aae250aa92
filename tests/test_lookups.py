"""A user's posted events are bounded, and looked up beside the thread that ranks."""

import asyncio
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import ServeConfig
from pipeline.model.artifact import LoadedModel, load_model
from serve_app.app import Ranking
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history.live import LiveHistory
from serve_app.history.published import PublishedSequences, histories
from serve_app.history.rows import event_columns
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.load_test import read_timing
from serve_app.metrics import ReplicaMetrics
from serve_app.ranking.batching import TokenBatcher
from serve_app.ranking.lookups import Lookups
from serve_app.ranking.outage import StoreOutage
from serve_app.ranking.ranker import Ranker
from serve_app.ranking.rollout import CHAMPION, Rollout
from serve_app.schemas import END_OF_TIME, Event, HistoryRow, RankHead, StoreDown
from serve_app.web.api import make_api
from serve_app.web.rank import HOPS
from tests.support.patience import PATIENCE_S
from tests.worlds.live_events import event, logged
from tests.worlds.tiny import NOT_A_USER, publish_sequences, save_tiny_model, tiny_config
from tests.worlds.web import RANK, call

START = 1_651_500_000_000


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[LoadedModel, PublishedSequences]:
    folder = tmp_path_factory.mktemp("lookups")
    cfg = tiny_config(folder / "runs")
    publish_sequences(cfg)
    published = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, folder / "cache")
    return load_model(save_tiny_model(cfg, folder / "model")), published


def clicks(user: int, times: Sequence[int]) -> list[Event]:
    return [Event(user_id=user, item_id=i % 7, event_time=time) for i, time in enumerate(times)]


class Noted(SqliteEvents):
    """Notes how many events a look-up decodes, and may hang."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.num_found: list[int] = []
        self.go_on = threading.Event()
        self.go_on.set()

    def newest_of_user(self, *arguments, **options):
        assert self.go_on.wait(PATIENCE_S)
        found = super().newest_of_user(*arguments, **options)
        self.num_found.append(len(found.get("item_id", ())))
        return found


@pytest.mark.parametrize("user", [3, NOT_A_USER])
def test_the_newest_rows_of_a_time_and_no_more_are_read(tiny, tmp_path: Path, user: int) -> None:
    loaded, published = tiny
    log = Noted(tmp_path / "events.sqlite")
    history = LiveHistory(published, log, loaded.cfg.sequences, 1000)
    posted = clicks(user, [START + 1000 * (i // 2) for i in range(60)])  # two of a time
    history.append(posted)
    bounded = replace(loaded.cfg.sequences, max_rows_per_user=9)
    short = LiveHistory(published, log, bounded, 1000)

    for before_ms in (START, START + 7000, START + 29_500, START + 10**9):
        whole = history.sequence(user, before_ms)
        cut = short.sequence(user, before_ms)
        if whole is None:
            assert cut is None
            continue

        assert cut is not None
        time = np.array([before_ms], np.int64)
        source, features = loaded.cfg.source, loaded.cfg.features
        expected = histories([whole], time, source, features, 9)
        found = histories([cut], time, source, features, 9)
        # the last rows of the past; where later ones were published, fewer are left of it
        num = len(found.events.item_id)
        assert num in (9, len(expected.events.item_id)) or user == 3
        assert found.events.item_id.tolist() == expected.events.item_id[-num:].tolist()
        assert found.events.position.tolist() == expected.events.position[-num:].tolist()
    assert max(log.num_found[1::2]) <= 10, "all of the oldest time, and nothing older"


def test_events_beyond_the_newest_are_counted_and_not_read(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, published = tiny
    log = SqliteEvents(tmp_path / "events.sqlite")
    history = LiveHistory(published, log, replace(loaded.cfg.sequences, max_rows_per_user=9), 1000)
    history.append(clicks(3, [START + i for i in range(200)]))
    row = published.sequence(3)
    assert row is not None

    read = []
    of_log = log.keys_of_user
    monkeypatch.setattr(log, "keys_of_user", lambda *of: read.append(of_log(*of)) or read[-1])
    cut = history.sequence(3)
    assert cut is not None
    assert read == [[]], "all of them are later than what is published"
    length = row["item_id"].value_lengths()[0].as_py()
    assert cut["first_position"][0].as_py() == length + 200 - 9


def test_logged_rows_are_read_as_events_are_and_in_parts(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, _ = tiny
    columns = loaded.cfg.source.events
    log = SqliteEvents(tmp_path / "events.sqlite")
    rows = [row | {"user_id": 1} for row in logged(np.random.default_rng(0), 900, request_ids=True)]
    log.append([event(row) for row in rows])
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)

    found = log.newest_of_user(1, END_OF_TIME, 1000, columns)
    assert len(pauses) == len(found["item_id"]) // 256 > 1, "others go on between its parts"
    expected = event_columns(log.of_user(1), columns)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name].tolist() == values.tolist(), name
        assert found[name].dtype == values.dtype, name


def test_a_quota_of_events_that_what_is_there_does_not_need(tiny, tmp_path: Path) -> None:
    loaded, published = tiny
    log = SqliteEvents(tmp_path / "events.sqlite")
    history = LiveHistory(published, log, loaded.cfg.sequences, 1000, max_user_events=5)
    times = [START + i for i in range(8)]

    assert history.append(clicks(3, times[:4])) == ["accepted"] * 4
    mixed = clicks(3, times) + clicks(4, times[:2])
    assert history.append(mixed) == [
        *["already_there"] * 4,
        "accepted",
        *["over_quota"] * 3,
        *["accepted"] * 2,
    ]
    assert log.count_events([3, 4, 5]) == [5, 2, 0]


def test_a_store_that_hangs_holds_up_nobody_else(tiny, tmp_path: Path) -> None:
    loaded, published = tiny
    log = Noted(tmp_path / "events.sqlite")
    limits = ServeConfig(lookup_timeout_s=5)
    history = LiveHistory(published, log, loaded.cfg.sequences, 1000)
    ranker = Ranker(loaded, history, 1, "tiny", limits)
    rollout = Rollout({CHAMPION: ranker}, {CHAMPION: ""}, 0.0, ReplicaMetrics())

    items = np.arange(3)
    of_user = RankColumns(RankHead(user_id=3, request_time_ms=START), items, {})
    row = HistoryRow(item_id=1, event_time=START - 1)
    with_history = RankColumns(RankHead(history=[row], request_time_ms=START), items, {})

    async def main() -> None:
        look_up = Lookups()
        batcher = TokenBatcher(
            lambda received: received.prepare(), rollout.answer_jobs, lambda: 1000
        )

        async def rank(request: RankColumns) -> RankedColumns:
            return await batcher(await look_up(rollout.receive(request)))

        log.go_on.clear()
        waiting = asyncio.create_task(rank(of_user))
        await asyncio.sleep(0)
        others = [await rank(with_history) for _ in range(3)]
        assert not waiting.done(), "they have their answers while it waits"
        assert all(answer.live_events for answer in others)

        assert not (await waiting).live_events
        assert not (await rank(of_user)).live_events, "nobody asks a store that is down"
        assert log.num_found == []

        log.go_on.set()
        ranker.outage.end()
        assert (await rank(of_user)).live_events

    asyncio.run(main())


def test_the_thread_that_ranks_never_asks_a_store_that_was_left_alone(tiny, tmp_path: Path) -> None:
    """The pause after a failure may end while a request waits for its pass."""
    loaded, published = tiny
    log = Noted(tmp_path / "events.sqlite")
    history = LiveHistory(published, log, loaded.cfg.sequences, 1000)
    ranker = Ranker(loaded, history, 1, "tiny", ServeConfig())
    rollout = Rollout({CHAMPION: ranker}, {CHAMPION: ""}, 0.0, ReplicaMetrics())
    request = RankColumns(RankHead(user_id=3, request_time_ms=START), np.arange(3), {})

    now_s = 0.0
    ranker.outage = StoreOutage(lambda: now_s)
    ranker.outage.begin(0.0, StoreDown("no answer"))
    received = asyncio.run(Lookups()(rollout.receive(request)))
    now_s = StoreOutage.SHORTEST_S
    (answer,) = rollout.answer_jobs([received.prepare()])

    assert isinstance(answer, RankedColumns) and not answer.live_events
    assert log.num_found == []
    (answer,) = rollout.answer_jobs([asyncio.run(Lookups()(rollout.receive(request))).prepare()])
    assert isinstance(answer, RankedColumns) and answer.live_events, "the next one looks it up"


def test_a_long_history_holds_up_nobody_else(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is encoded in a thread of its own, whether it was posted, published or sent."""
    loaded, published = tiny
    log = SqliteEvents(tmp_path / "events.sqlite")
    history = LiveHistory(published, log, loaded.cfg.sequences, 1000)
    history.append(clicks(NOT_A_USER, [START + i for i in range(60)]))
    ranker = Ranker(loaded, history, 1, "tiny", ServeConfig(long_history=50))
    ranking = Ranking()
    ranking.rollout = Rollout({CHAMPION: ranker}, {CHAMPION: ""}, 0.0, ReplicaMetrics())

    now = START + 1000
    items = np.arange(3)
    posted = RankColumns(RankHead(user_id=NOT_A_USER, request_time_ms=now), items, {})
    rows = [HistoryRow(item_id=1, event_time=START + i) for i in range(60)]
    sent = RankColumns(RankHead(history=rows, request_time_ms=now), items, {})
    short = RankColumns(RankHead(history=rows[:50], request_time_ms=now), items, {})

    go_on = threading.Event()
    score = ranker.score_requests

    def score_slowly(prepared):
        if any(one.history_length > 50 for one in prepared):
            assert go_on.wait(PATIENCE_S)
        return score(prepared)

    monkeypatch.setattr(ranker, "score_requests", score_slowly)

    async def main() -> None:
        slow = [asyncio.create_task(ranking.rank(request)) for request in (posted, sent)]
        async with asyncio.timeout(PATIENCE_S / 2):
            answers = [await ranking.rank(short) for _ in range(3)]
        assert not any(one.done() for one in slow)
        go_on.set()
        answers += await asyncio.gather(*slow)
        lengths = [answer.head["history_length"] for answer in answers]  # pyright: ignore
        assert lengths == [50, 50, 50, 60, 60]

    asyncio.run(main())


def test_an_answer_says_where_its_time_went(tiny, tmp_path: Path) -> None:
    loaded, published = tiny
    history = LiveHistory(
        published, SqliteEvents(tmp_path / "events.sqlite"), loaded.cfg.sequences, 1000
    )
    ranker = Ranker(loaded, history, 1, "tiny", ServeConfig())
    ranking = Ranking()
    ranking.rollout = Rollout({CHAMPION: ranker}, {CHAMPION: ""}, 0.0, ReplicaMetrics())

    api = make_api(ranking)  # pyright: ignore[reportArgumentType]
    answer = call(api, "POST", "/v1/rank", json=RANK)
    took_ms = read_timing(answer.headers["Server-Timing"])
    total_ms = took_ms.pop("total")
    assert list(took_ms) == list(HOPS)
    assert took_ms["ranker"] > 0
    assert sum(took_ms.values()) == pytest.approx(total_ms, abs=0.1)  # each is rounded
