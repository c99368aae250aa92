"""An exposure is posted when it happens and its outcome later: the same rule in the event logs, in
the history that a rank sees, in the export and in the build.
"""

import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import RunConfig, SequenceConfig
from pipeline.logs import live_log_dir
from pipeline.logs.cleaning import LogRules, normalise
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.users import build_bucket
from serve_app.history.export import export_events
from serve_app.history.live import EventLog, LiveHistory
from serve_app.history.merging import merge_postings
from serve_app.history.posting import PostingRules
from serve_app.history.published import forget_copies
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.schemas import Event
from tests.test_events import Built, build, the_same
from tests.test_redis import DURABLE, SERVER, Server
from tests.worlds.live_events import NUM_USERS, START, event
from tests.worlds.tiny import publish_sequences, tiny_config


def posting(**values: object) -> Event:
    return Event.model_validate({"user_id": 1, "item_id": 2, "event_time": START} | values)


@pytest.fixture(params=["sqlite", "redis"])
def log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventLog]:
    if request.param == "sqlite":
        yield SqliteEvents(tmp_path / "events.sqlite")
        return
    redis_events = pytest.importorskip("serve_app.history.redis_events")
    if SERVER is None and "CI" not in os.environ:  # in CI its absence fails the tests
        pytest.skip("redis-server is not installed")
    server = Server(tmp_path, *DURABLE)
    yield redis_events.RedisEvents(server.url, "late")
    server.kill()


@pytest.mark.parametrize(
    ("kept", "posted", "merged"),
    [
        ({}, {"actions": {"is_click": True}}, {"actions": {"is_click": True}}),
        ({"actions": {"is_click": False}}, {"actions": {"is_click": True}}, ...),
        ({"actions": {"is_click": True}}, {"actions": {"is_click": False}}, "kept"),
        ({"watch_ms": 900}, {"watch_ms": 700}, "kept"),
        ({"outcomes": {"price": -2.0}}, {"outcomes": {"price": -1.0}}, ...),
        ({"request_features": {"tab": 1}}, {"request_id": "7"}, None),
        ({"request_features": {"tab": 1}}, {"request_features": {"tab": 2}}, "conflict"),
        ({"request_id": "7"}, {"request_id": "8"}, "conflict"),
    ],
)
def test_two_postings_of_one_event(
    log: EventLog, kept: dict, posted: dict, merged: dict | str | None
) -> None:
    one, other = posting(**kept), posting(**posted)
    expected = merge_postings(one, other)
    if merged == "conflict":
        assert expected is None
    elif merged == "kept":
        assert expected == one
    elif merged is ...:
        assert expected == other
    else:
        assert expected == posting(**(merged or kept | posted))

    status = {"conflict": "conflict", "kept": "already_there"}.get(str(merged), "merged")
    assert log.append([one, other, one]) == ["accepted", status, "already_there"]
    assert log.of_user(1) == [one if expected is None else expected]


def test_many_writers_add_to_one_event(log: EventLog) -> None:
    """Whatever order they come in, nothing is lost."""
    names = [f"a{i}" for i in range(8)]

    def write(name: str) -> None:
        log.append([posting(actions={name: True}), posting(watch_ms=int(name[1:]))])

    threads = [threading.Thread(target=write, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    (kept,) = log.of_user(1)
    assert kept.actions == dict.fromkeys(names, True)
    assert kept.watch_ms == 7


def test_what_was_added_to_is_not_removed(log: EventLog) -> None:
    shown = posting()
    log.append([shown, posting(item_id=3)])
    log.append([posting(actions={"is_click": True})])  # between the reading and the removing
    assert log.remove([shown, posting(item_id=3)]) == 1
    assert [e.actions for e in log.of_user(1)] == [{"is_click": True}]


def rows_in_two_postings(rng: np.random.Generator, num: int) -> tuple[list[dict], list[dict]]:
    """LOG rows as they were shown, and most of them again with an outcome."""
    shown, later = [], []
    keys = {tuple(rng.integers((NUM_USERS, 30, 25)).tolist()) for _ in range(num)}
    for user, item, minute in sorted(keys):
        row = {"user_id": user, "item_id": item, "event_time": START + 60_000 * minute}
        tab = {"tab": int(item % 3)}
        shown.append(row | (tab if rng.random() < 0.7 else {}))
        if rng.random() < 0.8:
            outcome = {"is_click": int(rng.integers(2)), "watch_ms": int(rng.integers(9))}
            later.append(row | outcome | (tab if rng.random() < 0.5 else {}))
    return shown, later


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = tiny_config(tmp_path_factory.mktemp("late") / "runs")
    publish_sequences(cfg)
    return cfg


@pytest.mark.parametrize("cap", [16_384, 9])
def test_outcomes_of_published_rows_are_where_a_rebuild_would_have_them(
    tiny: RunConfig, tmp_path: Path, cap: int
) -> None:
    cfg = replace(tiny, sequences=replace(tiny.sequences, max_rows_per_user=cap))
    shown, later = rows_in_two_postings(np.random.default_rng(0), 300)
    published, rebuilt = Built(build(shown, cfg), cfg), Built(build(shown + later, cfg), cfg)
    history = LiveHistory(published, SqliteEvents(tmp_path / "e"), cfg.sequences, max_events=1000)

    statuses = history.append([event(row) for row in later])
    again = history.append([event(row) for row in shown[::3]])
    if cap > len(shown):  # of rows beyond the cap nothing is published
        assert (set(statuses), set(again)) == ({"merged"}, {"already_there"})
    for user in rebuilt.rows:
        found, expected = history.sequence(user), rebuilt.sequence(user)
        assert found is not None
        assert expected is not None
        the_same(found, expected, cfg, uncounted=0)


def test_a_late_outcome_reaches_the_next_export_and_the_build(
    tiny: RunConfig, tmp_path: Path
) -> None:
    log = SqliteEvents(tmp_path / "events.sqlite")
    run_dir = tmp_path / "run"

    def export() -> tuple[int, dict[str, int]]:
        done = export_events(tiny.source, tiny.sequences, run_dir, log)
        return done.num_events, done.refused

    log.append([posting(), posting(item_id=3)])
    assert export() == (2, {})
    assert export() == (0, {})
    log.append([posting(actions={"is_click": True}), posting(item_id=3, watch_ms=5)])
    assert export() == (2, {})
    assert export() == (0, {})

    names = {name: name for name in tiny.source.events.log_schema().names}
    rules = LogRules(names, tiny.source.events, 0, 2**60, 1)
    files = live_log_dir(run_dir).glob("*.parquet")
    blocks = [normalise(pq.read_table(file), rules) for file in files]
    rows = pa.concat_tables(blocks)
    (user,) = build_bucket(rows, rules, 100, RepeatRule()).sequences.to_pylist()
    assert user["item_id"] == [2, 3]
    assert user["action_mask"] == [1, 0]
    assert user["watch_ms"] == [-1, 5]


def test_only_what_is_published_whole_is_pruned(tiny: RunConfig, tmp_path: Path) -> None:
    manifest_rows = Built(build([{"user_id": 1, "item_id": 2, "event_time": START}], tiny), tiny)
    history = LiveHistory(
        manifest_rows, SqliteEvents(tmp_path / "e"), tiny.sequences, max_events=10
    )
    assert history.append([posting()]) == ["already_there"]
    assert history.append([posting(actions={"is_click": True})]) == ["merged"]

    first = replace(tiny.sequences, repeats="first")  # the builder would not take it
    stays = LiveHistory(manifest_rows, SqliteEvents(tmp_path / "f"), first, max_events=10)
    assert stays.append([posting(actions={"is_click": True})]) == ["already_there"]


def test_one_bad_event_does_not_stop_the_export(tiny: RunConfig, tmp_path: Path) -> None:
    """Events of before a setting was changed: counted by what is wrong, and left in the log."""
    log = SqliteEvents(tmp_path / "events.sqlite")
    old_action = posting(item_id=4, actions={"is_sold": True, "is_click": True})
    large = posting(item_id=5, request_features={"tab": 2**31 - 1}, watch_ms=2**62)
    log.append([posting(), posting(event_time=START + 10**9), old_action, large])
    limit = "2022-05-03T00:00:00+00:00"
    sequences = replace(tiny.sequences, latest_time=limit)
    assert tiny.sequences.latest_time is None

    done = export_events(tiny.source, sequences, tmp_path / "run", log)
    assert (done.num_events, done.dropped, done.refused) == (3, {"is_sold": 1}, {"event_time": 1})
    assert len(log.of_user(1)) == 4


def test_the_latest_time_is_known_when_events_are_posted(tiny: RunConfig, tmp_path: Path) -> None:
    sequences = SequenceConfig(latest_time="2022-05-03T00:00:00+00:00")
    rules = PostingRules.of(sequences, tiny.source.events)
    late = posting(event_time=START + 10**9)
    refusal = rules.find_refusal(late, ["body"], now_ms=START + 10**10)
    assert refusal is not None
    assert refusal.loc == ["body", "event_time"]
    assert "sequences.latest_time" in refusal.msg
    assert rules.find_refusal(posting(), [], now_ms=START + 10**10) is None


def test_files_under_way_of_killed_writers_are_swept(tiny: RunConfig, tmp_path: Path) -> None:
    half = tmp_path / ".sequences-0123.arrow.abcd"
    half.write_bytes(b"rows of users")
    assert forget_copies(tmp_path) == 1
    assert not half.exists()
