"""Posted events on their way into the logs, and out of the log once the sequences hold them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ColumnReading, RunConfig
from pipeline.logs import open_logs
from serve_app.history.export import export_events, prune_events
from serve_app.history.live import LiveHistory
from serve_app.history.published import PublishedSequences
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.schemas import Event
from tests.worlds.live_events import START, event, logged
from tests.worlds.own_logs import built, own_logs
from tests.worlds.tiny import publish_sequences, tiny_config


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return own_logs(tmp_path)


def test_the_next_build_has_them_as_the_server_had(cfg: RunConfig, tmp_path: Path) -> None:
    log = SqliteEvents(tmp_path / "events.sqlite")
    rows = logged(np.random.default_rng(0), 120, request_ids=True)
    events = [event(row) for row in rows]
    log.append(events[:80])
    first = export_events(cfg.source, cfg.sequences, cfg.run_dir, log)
    assert (first.num_events, first.dropped, first.refused) == (80, {}, {})
    log.append(events[80:])
    second = export_events(cfg.source, cfg.sequences, cfg.run_dir, log)
    assert second.num_events == len(events) - 80 > 0
    assert export_events(cfg.source, cfg.sequences, cfg.run_dir, log).path is None
    assert first.path is not None
    assert second.path is not None
    assert open_logs(cfg.source, cfg.run_dir).files == [
        str(tmp_path / "own" / "log.parquet"),
        str(first.path),
        str(second.path),
    ]
    found = {
        (user["user_id"], time, item): (mask, known, tab)
        for user in built(cfg)
        for time, item, mask, known, tab in zip(
            *(user[name] for name in ("event_time", "item_id", "action_mask", "known_mask", "tab")),
            strict=True,
        )
    }
    bits = {"is_click": 1, "is_like": 2}
    for e in events:
        mask = sum(bits[name] for name, did in e.actions.items() if did)
        expected = (mask, sum(bits[name] for name in e.actions), e.request_features.get("tab", -1))
        assert found.pop((e.user_id, e.event_time, e.item_id)) == expected
    assert list(found) == [(0, START, 1)]


def test_events_of_logs_that_are_read_by_rules_are_exported_as_they_are(
    cfg: RunConfig, tmp_path: Path
) -> None:
    """No row of one `event_type` could hold an event that was clicked and liked."""
    log_file = tmp_path / "own" / "log.parquet"
    rows = pq.read_table(log_file).append_column("kind", pa.array(["click"]))
    local = rows["shown_at"].cast(pa.timestamp("ms", "UTC")).cast(pa.timestamp("ms"))
    pq.write_table(rows.set_column(2, "shown_at", local), log_file)
    columns = {
        "user_id": "uid",
        "request_id": "",
        "event_time": ColumnReading(column="shown_at", zone="UTC"),
        "is_click": ColumnReading(column="kind", equals=("click",)),
        "is_like": ColumnReading(column="kind", equals=("like",)),
    }
    cfg = replace(cfg, source=replace(cfg.source, columns=columns))

    log = SqliteEvents(tmp_path / "events.sqlite")
    log.append(
        [
            Event(
                user_id=7,
                item_id=8,
                event_time=START,
                actions={"is_click": True, "is_like": True},
                watch_ms=5,
            )
        ]
    )
    assert export_events(cfg.source, cfg.sequences, cfg.run_dir, log).dropped == {}
    assert export_events(cfg.source, cfg.sequences, cfg.run_dir, log).path is None
    users = {user["user_id"]: user for user in built(cfg)}
    assert (users[0]["action_mask"], users[0]["known_mask"]) == ([1], [3])
    assert (users[7]["action_mask"], users[7]["event_time"]) == ([3], [START])
    assert users[7]["watch_ms"] == [5]


def test_an_export_never_takes_the_place_of_another(cfg: RunConfig, tmp_path: Path) -> None:
    log = SqliteEvents(tmp_path / "events.sqlite")
    events = [event(row) for row in logged(np.random.default_rng(0), 90, request_ids=False)]
    paths = []
    for number in range(3):
        log.append(events[30 * number : 30 * number + 30])
        path = export_events(cfg.source, cfg.sequences, cfg.run_dir, log).path
        assert path is not None
        paths.append(path)
        if number == 1:
            paths[0].unlink()  # its rows are built
    assert len({*paths}) == 3
    kept = [pq.read_table(path)["event_time"] for path in paths[1:]]
    assert [len(times) > 0 for times in kept] == [True, True]


def test_only_what_the_sequences_hold_is_forgotten(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "runs")
    table = publish_sequences(cfg)
    log = SqliteEvents(tmp_path / "events.sqlite")
    user, time, item = (table[name][5].as_py() for name in ("user_id", "event_time", "item_id"))
    held = Event(user_id=user, event_time=time[0], item_id=item[0])
    others = [
        Event(user_id=user, event_time=time[0], item_id=10_000),
        Event(user_id=999, event_time=START, item_id=1),
    ]
    log.append([held, *others])
    history = LiveHistory(
        PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path),
        log,
        cfg.sequences,
        max_events=10,
    )
    before = history.sequence(user)
    # an exposure may still ask for it
    assert prune_events(cfg.sequence_dir, cfg.sequences, log, settled_ms=held.event_time) == 0
    assert prune_events(cfg.sequence_dir, cfg.sequences, log, held.event_time + 1) == 1
    assert (log.of_user(user), log.of_user(999)) == (others[:1], others[1:])
    assert history.sequence(user) == before
    assert prune_events(cfg.sequence_dir, cfg.sequences, log) == 0
