"""What was served becomes rows of the logs: exposures, with what did not come of them."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import ConfigError, ExposureConfig, RunConfig, ServeConfig, to_dict
from pipeline.logs import live_log_dir
from serve_app.columns import RankColumns, RankedColumns
from serve_app.feedback import exposures, served_log
from serve_app.feedback.exposures import ServedAnswers, settled_before
from serve_app.feedback.served_rows import Served
from serve_app.history.export import Export, export_events
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.ranking.rollout import read_limits
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import RecommendRequest
from serve_app.schemas import Event, RankRequest
from tests.worlds.live_events import START
from tests.worlds.own_logs import built, own_logs
from tests.worlds.tiny import tiny_config

HOUR_MS = 3_600_000
SHOWN = START + HOUR_MS
MASK = {"is_click": 1, "is_like": 2}


class Clock:
    """The time of the export."""

    now_ms = SHOWN

    def time(self) -> float:
        return self.now_ms / 1000


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(exposures, "time", clock)
    return clock


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return own_logs(tmp_path)


@pytest.fixture
def log(tmp_path: Path) -> SqliteEvents:
    return SqliteEvents(tmp_path / "events.sqlite")


def ranked(request_id: str, user: int | None, items: list[int], **head: object) -> Served:
    """An answer with the items in the order given."""
    fields = {"user_id": user, "request_time_ms": SHOWN, "request_features": {"tab": 2}} | head
    if user is None:
        fields["history"] = []
    candidates = [{"item_id": item} for item in items]
    request = RankColumns.of(RankRequest.model_validate(fields | {"candidates": candidates}))
    scores = {"is_click": np.zeros(len(items), np.float32)}
    order = np.arange(len(items))
    answer = RankedColumns(
        {"model_version": 1, "history_length": 0},
        request.item_id,
        scores,
        order,
        1.0,
        role="champion",
    )
    return Served(request, answer, request_id, SHOWN + 5)


def listed(request_id: str, user: int, items: list[int]) -> Served:
    request = RecommendRequest.model_validate({"user_id": user, "request_time_ms": SHOWN})
    head = {"model_version": 1, "history_length": 0, "took_ms": 2.0}
    num = len(items)
    zeros = np.zeros(num, np.float32)
    source = ["model"] * num
    answer = RecommendedList(head, np.array(items), zeros, zeros, source, task="is_click")
    return Served(request, answer, request_id, SHOWN + 5)


def write_served(tmp_path: Path, *served: Served, written_ms: int = SHOWN + 60_000) -> None:
    """A file for each, as an ingress writes them."""
    day = tmp_path / "served" / "2022-05-02"
    day.mkdir(parents=True, exist_ok=True)
    for one in served:
        number = len(list(day.iterdir()))
        pq.write_table(one.rows(100), day / f"one-{written_ms}-{number}.parquet")


def export(cfg: RunConfig, log: SqliteEvents, tmp_path: Path, **settings: object) -> Export:
    wanted = ExposureConfig(**{"places": 3, "wait_h": 2.0} | settings)  # pyright: ignore
    answers = ServedAnswers(str(tmp_path / "served"), wanted)
    return export_events(cfg.source, cfg.sequences, cfg.run_dir, log, answers)


def rows_of(cfg: RunConfig, user: int) -> dict[int, tuple[int, int, int, int]]:
    """Item -> time, known actions, actions, tab; as the next build has them."""
    (row,) = [row for row in built(cfg) if row["user_id"] == user]
    names = ("item_id", "event_time", "known_mask", "action_mask", "tab")
    return {item: tuple(rest) for item, *rest in zip(*(row[name] for name in names), strict=True)}


def test_what_was_posted_is_noted_for_exposures_alone_and_takes_little_memory(
    cfg: RunConfig, log: SqliteEvents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    posted = []
    for item in (10, 11, 12):
        event = {"user_id": 3, "item_id": item, "event_time": SHOWN, "actions": {"is_click": True}}
        posted.append(Event.model_validate(event | {"request_features": {"tab": item}}))
    log.append(posted)

    noted = exposures.Outcomes()
    noted.note_events(posted)
    names = list(noted.said.values())
    assert names == [{"tab"}] * 3
    assert all(one is names[0] for one in names), "one set for all events that say the same"

    def refuse(*_: object) -> None:
        raise AssertionError("nobody asks for it")

    monkeypatch.setattr(exposures.Outcomes, "note_events", refuse)
    assert export_events(cfg.source, cfg.sequences, cfg.run_dir, log).num_events == 3


def test_what_nobody_posted_did_not_happen(
    cfg: RunConfig, log: SqliteEvents, tmp_path: Path, clock: Clock
) -> None:
    write_served(tmp_path, ranked("a", 3, [10, 11, 12, 13]), listed("b", 4, [10, 20]))
    click = {"user_id": 3, "item_id": 10, "event_time": SHOWN, "request_id": "a"}
    late = {"user_id": 3, "item_id": 11, "event_time": SHOWN + 900, "request_id": "a"}
    late["request_features"] = {"tab": 1}
    did = {"actions": {"is_click": True}}
    log.append([Event.model_validate(one | did) for one in (click, late)])

    # within the wait: shown, and nothing else is known
    clock.now_ms = SHOWN + HOUR_MS
    first = export(cfg, log, tmp_path)
    assert (first.num_events, first.num_exposures) == (2, 5)
    assert first.left_out == {"not shown": 1}
    assert rows_of(cfg, 3) == {
        10: (SHOWN, 1, 1, 2),
        11: (SHOWN + 900, 1, 1, 1),
        12: (SHOWN, 0, 0, 2),
    }
    assert export(cfg, log, tmp_path).path is None

    # after it: no like, and no click of the third; nothing is doubled
    clock.now_ms = SHOWN + 3 * HOUR_MS
    assert export(cfg, log, tmp_path).num_exposures == 5
    assert rows_of(cfg, 3) == {
        10: (SHOWN, 3, 1, 2),
        11: (SHOWN + 900, 3, 1, 1),
        12: (SHOWN, 3, 0, 2),
    }
    assert rows_of(cfg, 4) == {10: (SHOWN, 3, 0, -1), 20: (SHOWN, 3, 0, -1)}
    assert export(cfg, log, tmp_path).path is None

    # an outcome that came later still
    log.append([Event.model_validate(click | {"actions": {"is_like": True}})])
    assert export(cfg, log, tmp_path).num_events == 1
    assert rows_of(cfg, 3)[10] == (SHOWN, 3, 3, 2)


def test_an_event_stays_until_its_exposure_is_final(
    cfg: RunConfig, log: SqliteEvents, tmp_path: Path, clock: Clock
) -> None:
    """A click at its own time, and a day that prunes what it has published."""
    write_served(tmp_path, ranked("a", 3, [10]))
    click = {"user_id": 3, "item_id": 10, "event_time": SHOWN + 900, "request_id": "a"}
    log.append([Event.model_validate(click | {"actions": {"is_click": True}})])
    wanted = ExposureConfig(places=3, wait_h=2.0, max_age_s=60.0)

    clicked = {10: (SHOWN + 900, 3, 1, 2)}
    for hours in (1, 3, 4):
        clock.now_ms = SHOWN + hours * HOUR_MS
        export(cfg, log, tmp_path)
        settled_ms = settled_before(live_log_dir(cfg.run_dir), wanted, flush_s=60.0)
        log.remove([event for event in log.of_user(3) if event.event_time < settled_ms])
    assert log.of_user(3) == []
    assert rows_of(cfg, 3) == clicked
    (user,) = [row for row in built(cfg) if row["user_id"] == 3]
    assert user["item_id"] == [10], "no second row, of a list that nobody clicked"


def test_what_is_no_exposure_is_counted_and_breaks_nothing(
    cfg: RunConfig, log: SqliteEvents, tmp_path: Path, clock: Clock
) -> None:
    clock.now_ms = SHOWN + 3 * HOUR_MS
    write_served(
        tmp_path,
        ranked("a", 2**62, [2**62 + 1], request_features={"tab": 2**31 - 1, "gone": 3}),
        ranked("b", 5, [1], request_features={"tab": -7}),
        ranked("c", None, [1]),
        ranked("d", 6, [1], request_time_ms=SHOWN - 2 * HOUR_MS),
        ranked("e", 2**62, [2**62 + 1]),
        ranked("f", "somebody", ["something"]),  # pyright: ignore[reportArgumentType]
    )
    done = export(cfg, log, tmp_path, actions=("is_click",))
    assert done.num_exposures == 2
    assert done.left_out == {"again": 1, "another time": 1, "no user_id": 1, "user_id": 1}
    assert rows_of(cfg, 2**62) == {2**62 + 1: (SHOWN, 1, 0, 2**31 - 1)}
    assert rows_of(cfg, 5) == {1: (SHOWN, 1, 0, -1)}


def test_where_the_first_row_of_an_event_stays_an_exposure_waits(
    cfg: RunConfig, log: SqliteEvents, tmp_path: Path, clock: Clock
) -> None:
    cfg = replace(cfg, sequences=replace(cfg.sequences, repeats="first"))
    write_served(tmp_path, ranked("a", 3, [10, 11]))
    log.append([Event(user_id=3, item_id=10, event_time=SHOWN, actions={"is_click": True})])
    clock.now_ms = SHOWN + HOUR_MS
    assert (export(cfg, log, tmp_path).num_exposures, len(rows_of(cfg, 3))) == (0, 1)
    clock.now_ms = SHOWN + 3 * HOUR_MS
    assert export(cfg, log, tmp_path).num_exposures == 1
    assert rows_of(cfg, 3) == {10: (SHOWN, 1, 1, -1), 11: (SHOWN, 3, 0, 2)}


def test_requests_of_one_answer_stay_together(
    cfg: RunConfig, log: SqliteEvents, tmp_path: Path, clock: Clock
) -> None:
    clock.now_ms = SHOWN + 3 * HOUR_MS
    write_served(tmp_path, ranked("a", 3, [10, 11]), listed("b", 3, [20, 21]))
    log.append([Event(user_id=3, item_id=11, event_time=SHOWN, request_id="a")])
    export(cfg, log, tmp_path)
    (row,) = [row for row in built(cfg) if row["user_id"] == 3]
    groups = dict(zip(row["item_id"], row["request_index"], strict=True))
    assert groups[10] == groups[11] != groups[20] == groups[21]


def test_a_list_in_the_served_log(tmp_path: Path) -> None:
    write_served(tmp_path, listed("b", 4, [10, 20]))
    columns = ["request_id", "kind", "item_id", "place", "source", "score.is_click"]
    assert served_log.read_served(str(tmp_path / "served"), columns) == pa.table(
        {
            "request_id": ["b", "b"],
            "kind": ["recommend", "recommend"],
            "item_id": [10, 20],
            "place": pa.array([0, 1], pa.int32()),
            "source": ["model", "model"],
            "score.is_click": pa.array([0.0, 0.0], pa.float32()),
        }
    )


@pytest.mark.parametrize(
    ("exposures", "serve", "named"),
    [
        ({"actions": ["buy"]}, {}, r"serve\.exposures\.actions"),
        ({}, {"served_log": False}, r"serve\.served_log"),
        ({}, {"served_share": 0.5}, r"serve\.served_share"),
        ({}, {"served_places": 9}, r"serve\.served_places"),
        ({"wait_h": 48.0}, {"served_days": 2.0}, r"serve\.served_days"),
    ],
)
def test_settings_that_would_lose_exposures_are_refused(
    tmp_path: Path, exposures: dict, serve: dict, named: str
) -> None:
    settings = serve | {"exposures": {"places": 10} | exposures}
    with pytest.raises(ConfigError, match=named):
        tiny_config(tmp_path, serve=settings)


def test_a_replica_reads_them_without_the_logs() -> None:
    settings = ServeConfig(exposures=ExposureConfig(places=1, actions=("an action of the logs",)))
    assert read_limits(to_dict(settings)) == settings
