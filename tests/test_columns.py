"""Columns as people have them: every time, action and number of the logs has one right value, or
one message that names the setting.
"""

import datetime
import json
import pickle
import time
from decimal import Decimal
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipeline import config
from pipeline.config import ColumnReading, ConfigError, RunConfig, UserError
from pipeline.logs.cleaning import LogRules, check_columns, normalise
from pipeline.logs.columns import text_code
from pipeline.logs.times import guess_unit, read_times
from pipeline.schema import EventColumns, outcome_column
from pipeline.sequences import build, store
from serve_app.columns import HEAD, RankColumns
from serve_app.history.posting import PostingRules
from serve_app.recommend.schemas import RecommendRequest
from serve_app.schemas import Event, RankRequest, Refusal, own_value
from tests.worlds.logs import NOON, config_for, here, log

__all__ = ["here"]

BERLIN = ZoneInfo("Europe/Berlin")
SUMMER = datetime.datetime(2022, 4, 15, 7, 20, 0, 123000)  # NOON and 123 ms, in Berlin


def reading(**options: object) -> ColumnReading:
    return config.from_dict(
        {"source": {"kind": "synthetic", "columns": {"event_time": {"column": "ts", **options}}}}
    ).source.readings["event_time"]


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([NOON], {}, [NOON]),
        ([NOON // 1000, None], {"unit": "s"}, [NOON, None]),
        ([NOON * 1000 + 999], {"unit": "us"}, [NOON]),
        ([NOON * 1_000_000 + 1], {"unit": "ns"}, [NOON]),
        ([NOON / 1000 + 0.123, float("nan")], {"unit": "s"}, [NOON + 123, None]),
        ([float(NOON)], {}, [NOON]),
        ([Decimal("1650000000.123")], {"unit": "s"}, [NOON + 123]),
        ([3], {"unit": "h", "start": "2022-04-15T02:20:00+00:00"}, [NOON]),
        ([2.5], {"unit": "d", "start": "2022-04-12T17:20:00+00:00"}, [NOON]),
        (pa.array([SUMMER], pa.timestamp("us")), {"zone": "Europe/Berlin"}, [NOON + 123]),
        (pa.array([SUMMER], pa.timestamp("ns")), {"zone": "UTC"}, [NOON + 7_200_123]),
        (pa.array([datetime.date(2022, 4, 15)]), {"zone": "UTC"}, [1_649_980_800_000]),
        (pa.array([NOON], pa.timestamp("ms", "Asia/Shanghai")), {"zone": "UTC"}, [NOON]),
        (["2022-04-15T05:20:00Z"], {}, [NOON]),
        (["2022-04-15 05:20:00 UTC", " 2022-04-15T07:20:00.123+02:00 "], {}, [NOON, NOON + 123]),
        (["2022-04-15 07:20:00", "2022-04-15"], {}, [None, None]),  # of no zone
        (["2022-04-15 07:20:00", "soon", ""], {"zone": "Europe/Berlin"}, [NOON, None, None]),
        (["1650000000", "1650000000.123"], {"unit": "s"}, [NOON, NOON + 123]),
        (
            ["4/15/2022 5:20:00 AM", "15.4.2022"],
            {"format": "%m/%d/%Y %I:%M:%S %p", "zone": "UTC"},
            [NOON, None],
        ),
        (["15.04.2022 07:20 +0200"], {"format": "%d.%m.%Y %H:%M %z"}, [NOON]),
    ],
)
def test_times_are_read_as_milliseconds(values: object, options: dict, expected: list):
    found = read_times(
        values if isinstance(values, pa.Array) else pa.array(values), reading(**options)
    )
    assert found.to_pylist() == expected


def test_a_local_hour_that_comes_twice_is_the_first_and_one_that_never_came_is_after_it():
    values = pa.array(["2022-10-30 02:30:00", "2022-03-27 02:30:00"])
    twice, never = read_times(values, reading(zone="Europe/Berlin")).to_pylist()
    first = datetime.datetime(2022, 10, 30, 2, 30, tzinfo=BERLIN, fold=0).timestamp()
    assert twice == first * 1000
    assert never == datetime.datetime(2022, 3, 27, 3, 0, tzinfo=BERLIN).timestamp() * 1000


def test_numbers_that_no_calendar_has_are_in_no_range():
    times = read_times(pa.array([2**63 - 1, -(2**63)]), reading(unit="d")).to_pylist()
    assert times[0] > 2**61
    assert times[1] < -(2**61)
    assert read_times(pa.array([float("inf")]), reading()).to_pylist()[0] > 2**61


@pytest.mark.parametrize(
    ("numbers", "unit"),
    [
        ([881_250_949], "s"),
        ([NOON], "ms"),
        ([NOON * 1000], "us"),
        ([NOON * 10**6], "ns"),
        ([17], None),
        ([NOON, 881_250_949], None),
    ],
)
def test_the_unit_is_told_by_the_century(numbers: list[int], unit: str | None):
    assert guess_unit(np.array(numbers)) == unit


EVENTS = EventColumns(("click", "liked"), ("tab",), (outcome_column("price", "float", 0.0),))


def clean(columns: dict[str, object], options: dict[str, dict]) -> dict:
    """The one row of `columns` as the build takes it: LOG column -> value, and the reason."""
    source = {"actions": list(EVENTS.actions), "request_columns": ["tab"], "columns": options}
    source["outcome_columns"] = {"price": {}}
    source = config.from_dict(
        {"source": {"kind": "synthetic", **source}, "tasks": ["click"]}
    ).source
    names = [column.name for column in EVENTS.log_columns]
    rules = LogRules(
        {name: source.column_name(name) for name in (*names, "row_digest")},
        source.events,
        0,
        2**60,
        1,
        source.readings,
    )
    table = pa.table(
        {"user_id": [1], "item_id": [2], "event_time": [NOON], "click": [1], "liked": [0]}
        | {"tab": [0]}
        | columns
    )
    check_columns(table.schema, rules, "file")
    return normalise(table, rules).to_pylist()[0]


PURCHASE = {"column": "event", "equals": "purchase"}
STARS = {"column": "stars", "at_least": 4}


@pytest.mark.parametrize(
    ("column", "value", "option", "expected"),
    [
        ("event", "purchase", PURCHASE, 1),
        ("event", "view", PURCHASE, 0),
        ("event", "", PURCHASE, None),
        ("event", None, PURCHASE, None),
        ("event", pa.array(["purchase"]).dictionary_encode(), PURCHASE, 1),
        ("event", pa.array(["purchase"], pa.string_view()), PURCHASE, 1),
        ("event", "cart", {"column": "event", "equals": ["cart", "purchase"]}, 1),
        ("event", 3, {"column": "event", "equals": [3, 4]}, 1),
        ("event", 3.0, {"column": "event", "equals": 3}, 1),
        ("event", True, {"column": "event", "equals": True}, 1),
        ("event", "-1", {"column": "event", "equals": "purchase", "unknown": "-1"}, None),
        ("stars", 4, STARS, 1),
        ("stars", 3.9, STARS, 0),
        ("stars", float("nan"), STARS, None),
        ("stars", "4.5", STARS, 1),
        ("stars", "", STARS, None),
        ("stars", Decimal("4.0"), STARS, 1),
        ("stars", 3, {"column": "stars", "at_least": 2, "at_most": 3}, 1),
        ("stars", -1, {"column": "stars", "at_least": 4, "unknown": -1}, None),
        ("stars", -1, {"column": "stars", "unknown": -1}, None),
        ("stars", 1.0, {"column": "stars", "unknown": [-1, 2]}, 1),
        ("paid_at", 5, {"column": "paid_at", "present": True, "unknown": -1}, 1),
        ("paid_at", -1, {"column": "paid_at", "present": True, "unknown": -1}, 0),
        ("paid_at", "", {"column": "paid_at", "present": True}, 0),
    ],
)
def test_actions_by_value_and_by_threshold(column: str, value, option: dict, expected):
    values = value if isinstance(value, pa.Array | pa.DictionaryArray) else pa.array([value])
    row = clean({column: values}, {"liked": option})
    assert (row["liked"], row["reason"]) == (expected, None)


def test_what_cannot_be_read_is_quarantined_by_its_column():
    assert clean({"stars": ["good"]}, {"liked": STARS})["reason"] == "liked_unreadable"
    late = {"event_time": {"column": "event_time", "zone": "UTC"}}
    assert clean({"event_time": ["soon"]}, late)["reason"] == "event_time_unreadable"
    assert clean({"tab": [1.5]}, {})["reason"] == "tab_unreadable"
    assert clean({"watch_ms": [0.5]}, {})["reason"] == "watch_ms_unreadable"


@pytest.mark.parametrize(
    ("value", "option", "expected"),
    [
        ("web", {"column": "tab", "text": True}, text_code("web")),
        ("", {"column": "tab", "text": True}, None),
        (True, "tab", 1),
        (2.0, "tab", 2),
        (float("nan"), "tab", None),
        (-1, {"column": "tab", "unknown": -1}, None),
    ],
)
def test_request_columns_of_text_booleans_and_floats(value, option, expected):
    row = clean({"tab": [value]}, {"tab": option})
    assert (row["tab"], row["reason"]) == (expected, None)


def test_numbers_that_mean_unknown_and_watch_times_in_seconds():
    row = clean(
        {"paid": [-1.0], "seconds": [1.5]},
        {
            "price": {"column": "paid", "unknown": -1},
            "watch_ms": {"column": "seconds", "unit": "s"},
        },
    )
    assert (row["price"], row["watch_ms"], row["reason"]) == (None, 1500, None)


def test_actions_as_a_mapping_are_a_list_and_their_columns():
    long = {"actions": {"bought": PURCHASE, "click": None}}
    source = config.from_dict({"source": {"kind": "synthetic", **long}, "tasks": ["bought"]}).source
    assert source.actions == ("bought", "click")
    assert source.readings["bought"].equals == ("purchase",)
    again = config.from_dict({"source": config.to_dict(source), "tasks": ["bought"]})
    assert again.source == source


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"click": {"column": "c", "unit": "s"}}, "source.columns.click.unit must be left out"),
        ({"user_id": {"column": "c", "equals": 1}}, "source.columns.user_id.equals must be left"),
        ({"event_time": {"column": "t", "zone": "Europe/Bonn"}}, "event_time.zone must be a zone"),
        ({"event_time": {"column": "t", "unit": "w"}}, "event_time.unit must be one of"),
        ({"event_time": {"unit": "s"}}, "source.columns.event_time.column must be given"),
        ({"click": {"column": "c", "equals": 1, "at_least": 1}}, "left out beside another rule"),
        ({"event_time": {"column": "t", "start": "2020"}}, "event_time.start must be an ISO"),
        ({"nothing": {"column": "t", "unit": "s"}}, "source.columns must be one of the log's"),
    ],
)
def test_options_that_fit_no_column_are_refused(columns: dict, message: str):
    with pytest.raises(ConfigError) as refused:
        config.from_dict(
            {
                "source": {"kind": "synthetic", "actions": ["click"], "columns": columns},
                "tasks": ["click"],
            }
        )
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("times", "option", "words"),
    [
        (
            np.arange(881_250_949, 881_251_349),  # ML-100K: seconds of 1997
            None,
            [
                "881250949, 881250950, 881250951",
                "looks like seconds",
                "unit: s}",
                "sequences.earliest_time=1996-01-01T00:00:00+00:00",
            ],
        ),
        (np.arange(400), None, ["They count from another start", "start: "]),
        (NOON * 10**6 + np.arange(400), None, ["looks like nanoseconds", "unit: ns}"]),
        (NOON + np.arange(400), {"unit": "s"}, ["looks like milliseconds", "unit: ms}"]),
        (["2022-04-15 07:20:00"] * 400, None, ["carries no offset", "zone: UTC}"]),
        (["15.4.22"] * 400, {"zone": "UTC"}, ["no time can be read", "format: "]),
        (pa.array([SUMMER] * 400), None, ["must be a time with a zone", "zone: UTC}"]),
    ],
)
def test_a_wrong_guess_is_one_message_with_values_and_the_setting(
    here: None, tmp_path: Path, times, option: dict | None, words: list[str]
):
    columns = {"event_time": {"column": "event_time", **option}} if option else {}
    cfg = config_for(tmp_path, log(event_time=times), columns=columns)
    for call in (build.plan_build, build.build_sequences):
        with pytest.raises(UserError) as refused:
            call(cfg)
        for word in words:
            assert word in str(refused.value)


def test_the_same_logs_in_other_columns_make_the_same_sequences(here: None, tmp_path: Path):
    """Seconds, a local time, an event type and stars, in files of several schemas."""
    plain = log()
    theirs = pa.table(
        {
            "tab": plain["tab"].cast(pa.float64()),
            "uid": plain["user_id"].cast(pa.int32()),
            "item_id": plain["item_id"].cast(pa.int16()).dictionary_encode(),
            "ts": pa.array(
                [
                    datetime.datetime.fromtimestamp(time / 1000, BERLIN).replace(tzinfo=None)
                    for time in plain["event_time"].to_pylist()
                ]
            ),
            "event": pa.array(np.where(plain["click"], "click", "view"), pa.large_string()),
            "stars": np.where(plain["like"], 5, 2),
        }
    )
    actions = {
        "click": {"column": "event", "equals": "click"},
        "like": {"column": "stars", "at_least": 4},
    }
    columns = {"user_id": "uid", "event_time": {"column": "ts", "zone": "Europe/Berlin"}}
    pieces = theirs.slice(0, 150), theirs.slice(150).select(theirs.column_names[::-1])

    for folder in ("plain", "theirs"):
        (tmp_path / folder).mkdir()
    first = config_for(tmp_path / "plain", plain)
    second = config_for(tmp_path / "theirs", *pieces, actions=actions, columns=columns)
    pq.write_table(
        pieces[0], tmp_path / "theirs/in/0.parquet", use_deprecated_int96_timestamps=True
    )
    tables = []
    for cfg in (first, second):
        manifest = build.build_sequences(cfg)
        assert manifest.rows_in == 400
        tables.append(store.read_sequences(cfg.sequence_dir).sort_by("user_id"))
    assert tables[0].equals(tables[1])


def test_an_action_that_older_files_lack_is_unknown_there(
    here: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    old, new = log(rows=50, seed=1).drop_columns(["like", "tab"]), log(rows=50, seed=2)
    cfg = config_for(tmp_path, old, new)
    build.build_sequences(cfg)
    assert "like: 1 of 2 files have no such column" in caplog.text
    rows = store.read_sequences(cfg.sequence_dir)
    known = rows["known_mask"].combine_chunks().flatten().to_numpy()
    tabs = rows["tab"].combine_chunks().flatten().to_numpy()
    assert np.bincount(known, minlength=4).tolist() == [0, 50, 0, 50]
    assert (tabs == -1).sum() == 50


def test_requests_give_the_text_of_a_request_column():
    posted = {"user_id": 1, "item_id": 2, "event_time": NOON, "request_features": {"tab": "home"}}
    event = Event.model_validate(posted)
    assert event.request_features == {"tab": text_code("home")}
    between_processes = pickle.loads(pickle.dumps(event)).request_features["tab"]
    assert own_value(between_processes) == "home"
    for wrong in ("", None, 1.5, True, 2**31):
        with pytest.raises(ValidationError):
            Event.model_validate(posted | {"request_features": {"tab": wrong}})


def test_text_for_a_column_of_numbers_is_refused():
    source = {"kind": "parquet", "path": "x", "request_columns": ["tab"]}
    posted = {"user_id": 1, "item_id": 2, "event_time": NOON, "request_features": {"tab": "5"}}
    event = Event.model_validate(posted)
    numbers = config.from_dict({"source": source})
    refusal = find_posting_refusal(numbers, event)
    assert refusal is not None
    assert refusal.loc == ["body", "events", 0, "request_features", "tab"]
    assert "must be an integer" in refusal.msg
    assert refusal.input == "5"

    text = config.from_dict(
        {"source": source | {"columns": {"tab": {"column": "tab", "text": True}}}}
    )
    assert text.source.events.text_request == ("tab",)
    assert find_posting_refusal(text, event) is None


def find_posting_refusal(cfg: RunConfig, event: Event) -> Refusal | None:
    rules = PostingRules.of(cfg.sequences, cfg.source.events)
    return rules.find_refusal(event, ["body", "events", 0], NOON)


def test_arrow_bodies_take_the_text_of_a_request_column():
    """As JSON does, null and '' as the request has it."""
    head = {"user_id": 3, "request_features": {"tab": "away"}}
    tabs = ["home", None, "away", ""]
    table = pa.table({"item_id": [5, 6, 7, 8], "tab": tabs}).replace_schema_metadata(
        {HEAD: json.dumps(head)}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    found = RankColumns.from_arrow(sink.getvalue().to_pybytes())

    candidates = []
    for item, tab in zip([5, 6, 7, 8], tabs, strict=True):
        candidates.append({"item_id": item} | ({"request_features": {"tab": tab}} if tab else {}))
    same = RankColumns.of(RankRequest.model_validate(head | {"candidates": candidates}))
    assert found.feature("tab").tolist() == same.feature("tab").tolist()
    assert found.feature("tab")[0] == text_code("home")
    assert own_value(found.feature_texts["tab"]) == own_value(same.feature_texts["tab"]) == "home"


def test_files_of_every_age_read_as_the_plain_form_does(here: None, tmp_path: Path):
    """Columns added, dropped, widened, reordered and encoded, under partitions: one digest."""
    rows = log(rows=150)
    parts = [rows.slice(50 * place, 50) for place in range(3)]
    for folder in ("plain", "mixed"):
        (tmp_path / folder).mkdir()
    plain = build.build_sequences(config_for(tmp_path / "plain", *parts))

    first = parts[0].append_column("note", pa.array(["x"] * 50, pa.string_view()))
    second = parts[1].select(rows.column_names[::-1])
    third = parts[2].append_column("tags", pa.array([["a"]] * 50, pa.large_list(pa.large_string())))
    for name, dtype in (("user_id", pa.int32()), ("item_id", pa.uint16()), ("tab", pa.int64())):
        place = second.column_names.index(name)
        second = second.set_column(place, name, second[name].cast(dtype))
    for name in ("item_id", "click", "tab"):
        place = third.column_names.index(name)
        third = third.set_column(place, name, third[name].dictionary_encode())

    mixed = config_for(tmp_path / "mixed")
    for day, part in enumerate((first, second, third)):
        folder = tmp_path / "mixed" / "in" / f"day={day}"
        folder.mkdir()
        pq.write_table(part, folder / "part.parquet")
    assert build.build_sequences(mixed).digest == plain.digest


def test_text_in_a_request_column_is_refused_by_the_files_name(here: None, tmp_path: Path):
    rows = log(tab=["home", "search"] * 200).rename_columns(
        ["Surface" if n == "tab" else n for n in log().column_names]
    )
    cfg = config_for(tmp_path, rows, columns={"tab": "Surface"})
    with pytest.raises(UserError, match=r"columns.tab=\{column: Surface, text: true\}"):
        build.plan_build(cfg)


def test_a_request_without_a_time_keeps_that_of_its_arrival_between_processes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Pickled within the millisecond that it came in, and read in a later one."""
    clock = [1_651_766_399.0]
    monkeypatch.setattr(time, "time", lambda: clock[0])
    for request in (RecommendRequest(user_id=3), RecommendRequest(history=[], n=2)):
        pickled = pickle.dumps(request)
        clock[0] += 1
        assert pickle.loads(pickled) == request
