"""Live events: merged as a rebuild would have them, and what was acknowledged is there once,
whatever is killed.
"""

import itertools
import multiprocessing
import os
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import RunConfig, ServeConfig
from pipeline.logs.cleaning import LogRules, normalise
from pipeline.model.artifact import LoadedModel, load_model
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.users import build_bucket
from serve_app.columns import RankColumns
from serve_app.history.live import LiveHistory
from serve_app.history.published import histories
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.ranking.ranker import Ranker
from serve_app.schemas import Event, EventsRequest, RankHead, RankResponse
from tests.worlds.live_events import NUM_USERS, START, event, logged
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config

ROOT = Path(__file__).parent.parent
NEVER_PUBLISHED = 11  # has live events only


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    folder = tmp_path_factory.mktemp("events")
    cfg = tiny_config(folder / "runs")
    publish_sequences(cfg)
    return load_model(save_tiny_model(cfg, folder / "model"))


@pytest.fixture
def log(tmp_path: Path) -> SqliteEvents:
    return SqliteEvents(tmp_path / "events.sqlite")


class Built:
    """A store over SEQUENCE rows in memory."""

    digest = "built"

    def __init__(self, table: pa.Table, cfg: RunConfig) -> None:
        self.columns = cfg.source.events
        self.rows = {
            row["user_id"][0].as_py(): row for row in (table.slice(i, 1) for i in range(len(table)))
        }

    def sequence(self, user_id: int) -> pa.RecordBatch | None:
        row = self.rows.get(user_id)
        return None if row is None else row.combine_chunks().to_batches()[0]


def build(rows: list[dict], cfg: RunConfig) -> pa.Table:
    """What the build job makes of LOG rows."""
    log_schema = cfg.source.events.log_schema()
    rules = LogRules({name: name for name in log_schema.names}, cfg.source.events, 0, 2**60, 1)
    schema = pa.schema(list(log_schema)[:-1])
    table = pa.Table.from_pylist(rows, schema=schema)
    return build_bucket(
        normalise(table, rules), rules, cfg.sequences.max_rows_per_user, RepeatRule()
    ).sequences


def the_same(one: pa.RecordBatch, other: pa.RecordBatch, cfg: RunConfig, uncounted: int) -> None:
    assert one["first_position"][0].as_py() + uncounted == other["first_position"][0].as_py()
    for name in cfg.source.events.sequence_lists():
        assert one[name].to_pylist() == other[name].to_pylist(), name


def older_than_cut(rows: list[dict], published: pa.RecordBatch | None, user: int) -> int:
    if published is None or published["first_position"][0].as_py() == 0:
        return 0
    oldest = (published["event_time"][0][0].as_py(), published["item_id"][0][0].as_py())
    return sum(
        (row["event_time"], row["item_id"]) < oldest for row in rows if row["user_id"] == user
    )


@pytest.mark.parametrize("cap", [16_384, 9])
@pytest.mark.parametrize("seed", range(6))
def test_live_rows_are_where_a_rebuild_would_have_them(
    loaded: LoadedModel, log: SqliteEvents, seed: int, cap: int
) -> None:
    """Published rows have no request_id, because a publication does not keep it; events may have
    one.

    Where the publication was cut, events older than it are not counted: a rebuild's first_position
    has them.
    """
    rng = np.random.default_rng(seed)
    cfg = replace(loaded.cfg, sequences=replace(loaded.cfg.sequences, max_rows_per_user=cap))
    rows = logged(rng, 400, request_ids=False)
    late = rng.random(len(rows)) < rng.random()
    old = [
        r
        for r, is_late in zip(rows, late, strict=True)
        if not is_late and r["user_id"] != NEVER_PUBLISHED
    ]
    new = [r for r in rows if r not in old]
    if seed % 2:
        new = [
            row | {"request_id": int(rng.integers(3))} if rng.random() < 0.5 else row for row in new
        ]
    # some user is not empty
    old.append({"user_id": 0, "item_id": 29, "event_time": START + 10**8, "is_click": 1})
    rebuilt = Built(build(old + new, cfg), cfg)
    published = Built(build(old, cfg), cfg)
    history = LiveHistory(published, log, cfg.sequences, max_events=1000)
    history.append([event(new[i]) for i in rng.permutation(len(new))])
    log.append([event(row) for row in old[::3]])  # published meanwhile: not doubled
    assert set(rebuilt.rows) == {
        user for user in range(NUM_USERS + 1) if history.sequence(user) is not None
    }
    times = np.array([START + 60_000 * minute for minute in (0, 7, 8, 24, 26)])
    for user in rebuilt.rows:
        found, expected = history.sequence(user), rebuilt.sequence(user)
        assert found is not None
        assert expected is not None
        uncounted = older_than_cut(new, published.sequence(user), user)
        the_same(found, expected, cfg, uncounted)
        one, other = (
            histories([row] * len(times), times, cfg.source, cfg.features, 6)
            for row in (found, expected)
        )
        assert (one.first_position + uncounted).tolist() == other.first_position.tolist()
        for name in (
            "offsets",
            "item_id",
            "event_time",
            "order_only",
            "action_mask",
            "known_mask",
            "gap_ms",
        ):
            assert getattr(one.events, name).tolist() == getattr(other.events, name).tolist(), name
        assert (one.events.position + uncounted).tolist() == other.events.position.tolist()
        assert one.events.request["tab"].tolist() == other.events.request["tab"].tolist()


def scores(ranker: Ranker, requests: list[RankColumns]) -> list[RankResponse]:
    return [answer.response() for answer in ranker.rank(requests)]


def test_scores_after_events_are_those_after_a_rebuild(
    loaded: LoadedModel, log: SqliteEvents
) -> None:
    cfg = loaded.cfg
    rows = logged(np.random.default_rng(1), 300, request_ids=False)
    history = LiveHistory(Built(build(rows[:150], cfg), cfg), log, cfg.sequences, max_events=1000)
    rankers = [
        Ranker(loaded, store, 1, "tiny", ServeConfig())
        for store in (history, Built(build(rows, cfg), cfg))
    ]
    requests = [
        RankColumns(
            RankHead(user_id=user, request_time_ms=START + 60_000 * minute), np.array([1, 7]), {}
        )
        for user, minute in itertools.product(range(NUM_USERS), (3, 14, 30))
    ]
    before = scores(rankers[0], requests)
    history.append([event(row) for row in rows[150:]])
    after, rebuilt = (scores(ranker, requests) for ranker in rankers)
    assert after == rebuilt
    assert after != before


def test_published_order_and_order_only_rows_stay(loaded: LoadedModel, log: SqliteEvents) -> None:
    """A tie_breaker had put item 5 before 3; rows that are only ordered keep their flag."""
    cfg = loaded.cfg
    base = {"user_id": 1, "event_time": START, "is_click": 1}
    old = [base | {"item_id": item, "tie_breaker": tie} for item, tie in ((5, 0), (3, 1), (9, 2))]
    old += [base | {"item_id": 8, "event_time": START - 1, "order_only": True}]
    history = LiveHistory(Built(build(old, cfg), cfg), log, cfg.sequences, max_events=10)
    history.append([event(base | {"item_id": item}) for item in (4, 7)])
    found = history.sequence(1)
    assert found is not None
    assert found["item_id"][0].as_py() == [8, 4, 5, 3, 7, 9]
    assert found["order_only"][0].as_py() == [True] + [False] * 5
    assert found["request_index"][0].as_py() == [0] + [1] * 5


def test_an_event_is_kept_once_and_the_answer_says_so(
    loaded: LoadedModel, log: SqliteEvents
) -> None:
    row = {"user_id": 1, "item_id": 2, "event_time": START, "is_click": 1}
    published = Built(build([row], loaded.cfg), loaded.cfg)
    history = LiveHistory(published, log, loaded.cfg.sequences, max_events=10)
    other = row | {"item_id": 3}
    assert history.append([event(other), event(row), event(other)]) == [
        "accepted",
        "already_there",
        "already_there",
    ]
    assert history.append([event(other | {"is_click": 0})]) == ["already_there"]
    assert history.append([event(other | {"tab": 1}), event(other | {"tab": 2})]) == [
        "merged",
        "conflict",
    ]
    assert [(e.actions, e.request_features) for e in log.of_user(1)] == [
        ({"is_click": True}, {"tab": 1})
    ]
    assert log.of_user(2) == []


BAD_EVENTS = {
    "an unknown action": (
        {"actions": {"is_sold": True}},
        ["body", "events", 0, "actions"],
        "is_sold",
    ),
    "an unknown column": (
        {"request_features": {"tap": 1}},
        ["body", "events", 0, "request_features"],
        "tap",
    ),
    "seconds for ms": (
        {"event_time": START // 1000},
        ["body", "events", 0, "event_time"],
        str(START // 1000),
    ),
    "the far future": ({"event_time": 2**52}, ["body", "events", 0, "event_time"], str(2**52)),
}


@pytest.mark.parametrize("name", BAD_EVENTS)
def test_what_the_sequences_have_no_place_for(
    loaded: LoadedModel, log: SqliteEvents, name: str
) -> None:
    changes, loc, value = BAD_EVENTS[name]
    history = LiveHistory(
        Built(build([], loaded.cfg), loaded.cfg), log, loaded.cfg.sequences, max_events=2
    )
    good = {"user_id": 1, "item_id": 2, "event_time": START}
    bad = EventsRequest.model_validate({"events": [good | changes]})
    refusal, answer = history.append_all([bad, EventsRequest.model_validate({"events": [good]})])
    assert (refusal.loc, refusal.input) == (loc, value)  # pyright: ignore[reportAttributeAccessIssue]
    assert answer.status == ["accepted"]  # pyright: ignore[reportAttributeAccessIssue]
    many = history.find_refusal(EventsRequest.model_validate({"events": [good] * 3}))
    assert many is not None
    assert (many.loc, many.input) == (["body", "events"], "3")


def test_all_or_nothing(log: SqliteEvents) -> None:
    bad = Event.model_construct(user_id=1, item_id=None, event_time=START)
    with pytest.raises((sqlite3.Error, AttributeError)):
        log.append([Event(user_id=1, item_id=2, event_time=START), bad])
    assert log.of_user(1) == []
    assert log.append([Event(user_id=1, item_id=2, event_time=START)]) == ["accepted"]


def test_forgotten_events_are_in_no_file(log: SqliteEvents, tmp_path: Path) -> None:
    strange = 1_234_567_890_123  # a value whose bytes are nowhere else
    log.append(
        [
            Event(user_id=user, item_id=strange - user, event_time=START + i)
            for user in (1, 2)
            for i in range(9)
        ]
    )
    other = SqliteEvents(tmp_path / "events.sqlite")  # the server
    assert len(other.of_user(1)) == 9
    assert log.forget([1, 5]) == 9
    assert log.forget([1]) == 0
    assert other.of_user(1) == []
    assert len(other.of_user(2)) == 9
    left = b"".join(file.read_bytes() for file in sorted(tmp_path.glob("events.sqlite*")))
    assert (strange - 1).to_bytes(6, "big") not in left
    assert (strange - 2).to_bytes(6, "big") in left


def _write_many(path: Path, writer: int, num: int) -> None:
    log = SqliteEvents(path)
    for i in range(num):  # half of the events are everybody's, half this writer's own
        own = Event(user_id=writer, item_id=i, event_time=START)
        log.append([own, Event(user_id=100, item_id=i, event_time=START)])


def test_writers_of_several_processes_at_once(tmp_path: Path) -> None:
    """They also create the file at once."""
    path, num = tmp_path / "new" / "events.sqlite", 50
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(path, writer, num)) for writer in range(4)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    log = SqliteEvents(path)
    assert [len(log.of_user(user)) for user in (0, 1, 2, 3, 100)] == [num] * 5


WRITER = """
import itertools, sys
from pathlib import Path
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.schemas import Event
log = SqliteEvents(Path(sys.argv[1]))
for i in itertools.count(int(sys.argv[2])):
    log.append([Event(user_id=1, item_id=i, event_time=1_651_500_000_000)])
    print(i, flush=True)
"""


def test_a_killed_writer_loses_nothing_acknowledged(tmp_path: Path) -> None:
    path, acknowledged = tmp_path / "events.sqlite", []
    for begin in (0, 1_000_000):  # the second finds what the first left behind
        command = [sys.executable, "-c", WRITER, str(path), str(begin)]
        writer = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        acknowledged += [int(line) for line in itertools.islice(writer.stdout, 50)]
        os.kill(writer.pid, signal.SIGKILL)
        acknowledged += [int(line) for line in writer.stdout if line.endswith("\n")]
        assert writer.wait(60) == -signal.SIGKILL
        writer.stdout.close()
    kept = [event.item_id for event in SqliteEvents(path).of_user(1)]
    assert len(kept) == len(set(kept))
    assert set(acknowledged) <= set(kept)
    assert len(kept) - len(acknowledged) <= 2, "at most the one that each was writing"


def test_the_settings_of_the_file(log: SqliteEvents) -> None:
    assert log._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert log._writer.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
