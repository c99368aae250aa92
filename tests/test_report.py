"""The validation report: counts that add up over buckets, and a page that stands alone."""

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pytest

from pipeline import config
from pipeline.config import CheckConfig, RunConfig
from pipeline.logs import ImportReport
from pipeline.logs.cleaning import LogRules, normalise
from pipeline.schema import EventColumns
from pipeline.sequences.quality import charts, report
from pipeline.sequences.quality.checks import run_checks
from pipeline.sequences.quality.statistics import (
    Statistics,
    count_bucket,
    length_quantiles,
    log_hints,
    merge_statistics,
)
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.users import build_bucket

NOON = 1_650_024_000_000  # 2022-04-15 12:00 UTC
DAY = 86_400_000
RULES = LogRules(
    columns={
        name: name
        for name in (
            *(
                "user_id",
                "item_id",
                "event_time",
                "click",
                "like",
                "tab",
                "request_id",
                "watch_ms",
                "order_only",
            ),
            *("known_mask", "tie_breaker", "row_digest"),
        )
    },
    events=EventColumns(actions=("click", "like"), request=("tab",)),
    earliest_ms=NOON - 10 * DAY,
    latest_ms=NOON + 10 * DAY,
    num_buckets=1,
)


def log() -> pa.Table:
    return pa.table(
        {
            "user_id": [1, 1, 1, 2, 2, 2, None],
            "item_id": [1, 2, 2, 1, 5, 6, 7],
            "event_time": [NOON, NOON, NOON, NOON + DAY, NOON + DAY, NOON // 1000, NOON],
            "click": pa.array([1, 0, 0, 1, None, 0, 1], pa.int8()),
            "like": pa.array([0, 0, 0, 1, 0, 0, 0], pa.int8()),
            "tab": pa.array([1, 1, 1, None, 2, 2, 2], pa.int32()),
            "order_only": [True, False, False, False, False, False, False],
            "note": ["<script>", "", "", "", "", "<b>", ""],
        }
    )


def counted(rows: pa.Table, utc_offset_ms: int = 0) -> Statistics:
    built = build_bucket(normalise(rows, RULES), RULES, 100, RepeatRule())
    return count_bucket(built, RULES, utc_offset_ms)


def test_counts_of_a_bucket():
    found = counted(log())
    assert (
        found.rows_in,
        found.rows_kept,
        found.rows_capped,
        found.order_only_rows,
        found.requests,
    ) == (7, 4, 0, 1, 2)
    assert found.quarantined == {
        "exact_duplicate": 1,
        "event_time_before_range": 1,
        "null_user_id": 1,
    }
    assert found.lengths == {"2": 2}
    assert found.heaviest == {"1": 2, "2": 2}
    assert found.day_rows == {"2022-04-15": 1, "2022-04-16": 2}
    assert found.day_known == {
        "2022-04-15 click": 1,
        "2022-04-16 click": 1,
        "2022-04-15 like": 1,
        "2022-04-16 like": 2,
    }
    assert found.day_positive == {"2022-04-16 click": 1, "2022-04-16 like": 1}
    assert (found.first_event_ms, found.last_event_ms) == (NOON, NOON + DAY)
    assert (
        found.nulls["user_id"],
        found.nulls["click"],
        found.nulls["tab"],
        found.nulls["watch_ms"],
    ) == (1, 1, 1, 5)
    assert found.samples["event_time_before_range"][0]["row"]["note"] == "<b>"


def test_days_begin_at_midnight_of_the_offset():
    assert list(counted(log(), utc_offset_ms=13 * 3600 * 1000).day_rows) == [
        "2022-04-16",
        "2022-04-17",
    ]


def test_buckets_add_up():
    rows = log()
    whole = counted(rows)
    users = np.array([user or 0 for user in rows["user_id"].to_pylist()])
    parts = [counted(rows.filter(pa.array(users == user))) for user in (0, 1, 2)]
    assert merge_statistics(parts) == merge_statistics([whole])
    assert merge_statistics([]) == Statistics()


def test_length_quantiles():
    assert length_quantiles({"1": 50, "2": 45, "9": 4, "30": 1}) == {
        "min": 1,
        "p50": 1,
        "p90": 2,
        "p99": 9,
        "max": 30,
    }
    assert length_quantiles({}) == {}


def test_hints_name_the_unit_only_when_all_samples_agree():
    assert log_hints(counted(log()), RULES) == [
        "event_time looks like seconds, it must be in milliseconds since 1970, UTC"
    ]
    rows = log().set_column(2, "event_time", pa.array([NOON // 1000, 5] + [NOON] * 5))
    assert log_hints(counted(rows), RULES) == []


@pytest.fixture
def cfg(tmp_path: Path) -> RunConfig:
    return config.from_dict({"name": "<run>", "runs_dir": str(tmp_path)})


def test_the_page_stands_alone_and_says_what_happened(cfg: RunConfig):
    imported = ImportReport(
        kind="x", rows=7, files=[], quarantined={"bad_history": 3}, counts={"strays": 1234}
    )
    page = report.write_report(
        cfg.run_dir,
        cfg.name,
        merge_statistics([counted(log())]),
        RULES,
        imported,
        run_checks(CheckConfig(max_quarantined_share=0.4), merge_statistics([counted(log())])),
        report.InputFiles(),
        report.PeriodReport(),
    ).read_text()
    assert page.count("<svg") == 2
    assert not re.findall(r"<(?:script|link|img|iframe)\b", page)
    assert not re.findall(r"(?:src|href)=\"https?:", page)
    for text in (
        "exact_duplicate",
        "null_user_id",
        "bad_history",
        "1,234",
        "looks like seconds",
        "&lt;run&gt;",
        "FAILS, limit 0.4: 42.86%",
    ):
        assert text in page
    content = json.loads((cfg.run_dir / "report" / "validation.json").read_text())
    assert content["quarantined"] == {
        "event_time_before_range": 1,
        "exact_duplicate": 1,
        "null_user_id": 1,
    }
    assert content["import_quarantined"] == {"bad_history": 3}
    assert content["length_quantiles"]["max"] == 2
    assert [check["key"] for check in content["checks"] if not check["passed"]] == [
        "checks.max_quarantined_share"
    ]


def test_the_page_of_logs_without_one_good_row(cfg: RunConfig):
    rows = log().set_column(0, "user_id", pa.nulls(7, pa.int64()))
    totals = merge_statistics([counted(rows)])
    page = report.write_report(
        cfg.run_dir, cfg.name, totals, RULES, None, [], report.InputFiles(), report.PeriodReport()
    ).read_text()
    assert "no users" in page
    assert "null_user_id" in page


def test_the_same_counts_give_the_same_page(cfg: RunConfig):
    totals = merge_statistics([counted(log())])
    first = report.write_report(
        cfg.run_dir, cfg.name, totals, RULES, None, [], report.InputFiles(), report.PeriodReport()
    ).read_text()
    again = report.write_report(
        cfg.run_dir, cfg.name, totals, RULES, None, [], report.InputFiles(), report.PeriodReport()
    ).read_text()
    assert first == again


def drawn(svg: str, kind: str) -> list[dict[str, str]]:
    return [dict(shape.attrib) for shape in ElementTree.fromstring(svg).iter(kind)]


def test_ticks_are_round():
    assert charts.Axis(0, 93, 0, 1).ticks() == [0, 20, 40, 60, 80]
    assert charts.Axis(0, 1, 0, 1).ticks() == [0, 1]
    assert charts.Axis(3, 700, 0, 1, is_log=True).ticks() == [10, 100]
    assert charts.Axis(3, 70, 0, 1, is_log=True).ticks() == [5, 10, 20, 50]


def test_bars_are_as_high_as_their_counts():
    bars = drawn(charts.length_chart({"1": 30, "2": 60, "900": 15}), "rect")
    heights = [float(bar["height"]) for bar in bars]
    assert heights == [80, 160, 40]
    assert all(float(bar["y"]) + float(bar["height"]) == 170 for bar in bars)


def test_a_rate_that_is_not_known_interrupts_its_line():
    days = ["2022-04-15", "2022-04-16", "2022-04-17", "2022-04-18"]
    rates = {"<a>": np.array([0.1, np.nan, 0.2, 0.4]), "b": np.full(4, np.nan)}
    svg = charts.day_chart(days, [5, 0, 10, 1], rates)
    assert [bar["height"] for bar in drawn(svg, "rect")] == ["80.0", "0.0", "160.0", "16.0"]

    (line,) = [path["d"] for path in drawn(svg, "path") if path.get("fill") == "none"]
    assert re.findall("[ML]", line) == ["M", "M", "L"]
    heights = [float(dot["cy"]) for dot in drawn(svg, "circle")]
    # twice as often is as far up, wherever it begins
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], abs=0.2)


def test_a_figure_without_one_rate():
    svg = charts.day_chart(["2022-04-15"], [3], {"a": np.array([np.nan])})
    assert "no action happened" in svg
    assert drawn(svg, "circle") == []
