"""The drift between two versions: counts against a plain loop, distances by hand, and the job's
verdict.
"""

import json
import runpy
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.config import DriftConfig, UserError
from pipeline.schema import DAY_MS
from pipeline.sequences import store
from pipeline.sequences.quality import drift
from tests.worlds.tiny import publish_sequences, tiny_config

HISTOGRAM = st.lists(st.integers(0, 1000), min_size=5, max_size=5).map(np.array)


@given(HISTOGRAM, HISTOGRAM)
def test_the_divergence_is_symmetric_bounded_and_blind_to_size(
    before: np.ndarray, after: np.ndarray
):
    found = drift.histogram_divergence(before, after)
    assert 0 <= found <= 1
    assert found == pytest.approx(drift.histogram_divergence(after, before))
    assert found == pytest.approx(drift.histogram_divergence(3 * before, after))
    assert drift.histogram_divergence(before, before) == pytest.approx(0)


def test_the_divergence_by_hand():
    assert drift.histogram_divergence(np.array([1, 0]), np.array([0, 5])) == 1
    # (1, 0) against (1/2, 1/2): the middle is (3/4, 1/4)
    expected = (np.log2(4 / 3) + (np.log2(2 / 3) + np.log2(2)) / 2) / 2
    assert drift.histogram_divergence(np.array([7, 0]), np.array([2, 2])) == pytest.approx(expected)
    assert drift.histogram_divergence(np.zeros(2), np.zeros(2)) == 0
    assert drift.histogram_divergence(np.zeros(2), np.array([1, 0])) == 1


def test_a_profile_counts_what_a_loop_over_the_rows_counts(tmp_path: Path):
    cfg = tiny_config(tmp_path)
    rows = publish_sequences(cfg).to_pylist()
    found = drift.count_profile(cfg.sequence_dir, store.read_manifest(cfg.sequence_dir))
    events = [(row, i) for row in rows for i in range(len(row["item_id"]))]
    timed = [(row, i) for row, i in events if not row["order_only"][i]]
    assert (found.users, found.rows, found.timed) == (len(rows), len(events), len(timed))
    for bit, action in enumerate(cfg.source.actions):
        assert found.known[action] == sum(row["known_mask"][i] >> bit & 1 for row, i in timed)
        assert found.positive[action] == sum(row["action_mask"][i] >> bit & 1 for row, i in timed)
    for counts, name in ((found.items, "item_id"), (found.request_values["tab"], "tab")):
        values, rows_of = np.unique([row[name][i] for row, i in events], return_counts=True)
        assert (counts.values.tolist(), counts.rows.tolist()) == (values.tolist(), rows_of.tolist())
    assert found.lengths[:6].tolist() == [
        sum(2**i <= len(row["item_id"]) < 2 ** (i + 1) for row in rows) for i in range(6)
    ]


def test_items_of_text_are_not_held_against_numbers(tmp_path: Path):
    """Codes of both would be counted together."""
    cfg = tiny_config(tmp_path)
    publish_sequences(cfg)
    numbers = drift.count_profile(cfg.sequence_dir, store.read_manifest(cfg.sequence_dir))
    texts = replace(numbers, text_ids=("item_id",))
    with pytest.raises(UserError, match=r"item_id: numbers in version \w+, text in \w+"):
        drift.compare_profiles(numbers, texts, cfg.drift)
    assert drift.compare_profiles(texts, texts, cfg.drift)


def test_only_the_newest_days(tmp_path: Path):
    cfg = tiny_config(tmp_path)
    rows = publish_sequences(cfg).to_pylist()
    manifest = store.read_manifest(cfg.sequence_dir)
    found = drift.count_profile(cfg.sequence_dir, manifest, days=2)
    since = manifest.last_event_ms - 2 * DAY_MS
    recent = [
        sum(
            time > since and not untimed
            for time, untimed in zip(row["event_time"], row["order_only"], strict=True)
        )
        for row in rows
    ]
    assert (found.rows, found.users) == (sum(recent), sum(map(bool, recent)))
    assert since < found.first_event_ms <= found.last_event_ms == manifest.last_event_ms


def changed(table: pa.Table, **columns: object) -> pa.Table:
    for name, change in columns.items():
        values = [[change(value) for value in row] for row in table[name].to_pylist()]
        table = table.set_column(
            table.schema.get_field_index(name),
            table.schema.field(name),
            pa.array(values, table.schema.field(name).type),
        )
    return table


@pytest.fixture
def compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """compared(changes to the columns, arguments...) -> (exit code, the report): jobs.drift on two
    stores.
    """

    def run(changes: dict, *arguments: str) -> tuple[int, dict]:
        old, new = tiny_config(tmp_path), tiny_config(tmp_path, name="new")
        rows = publish_sequences(old)
        publish_sequences(new, 1, changed(rows, **changes))
        preset = tmp_path / "new.yaml"
        preset.write_text(json.dumps(asdict(new)))
        before = ["--before", str(old.run_dir)]
        monkeypatch.setattr(sys, "argv", ["drift", "--config", str(preset), *before, *arguments])
        code = 0
        try:
            runpy.run_module("jobs.drift", run_name="__main__")
        except SystemExit as stop:
            code = int(stop.code or 0)
        printed = capsys.readouterr()
        report = new.run_dir / "report" / "drift.json"
        if code == 2:
            return code, {"error": printed.err}
        assert f"report={report}" in printed.out
        return code, json.loads(report.read_text())

    return run


def test_the_same_rows_do_not_drift(compared):
    code, report = compared({})
    assert code == 0
    assert report["crossed"] == []
    assert all(change["distance"] == 0 for change in report["changes"])


def test_what_drifts_is_named_and_the_exit_code_is_1(compared):
    changes = {
        "item_id": lambda item: item + 1000,
        "action_mask": lambda mask: mask & 1,
        "tab": lambda tab: 0,
    }
    code, report = compared(changes, "--set", "drift.items=0.9")
    assert code == 1
    assert report["crossed"] == [
        "action_rate.is_like",
        "request_values.tab",
        "items",
        "new_item_rows",
    ]
    by_name = {change["quantity"]: change for change in report["changes"]}
    assert by_name["new_item_rows"]["distance"] == 1
    assert by_name["action_rate.is_like"]["after"] == 0
    assert by_name["action_rate.is_click"]["distance"] == 0


def test_a_limit_of_null_is_shown_and_not_checked(compared):
    code, report = compared(
        {"item_id": lambda item: item + 1000}, "--set", "drift.new_item_rows=null"
    )
    assert code == 0
    assert next(c for c in report["changes"] if c["quantity"] == "new_item_rows")["distance"] == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--days", "0", "--days must be 1 or more, got 0"),
        ("--before", "/nowhere", "no sequences are published at /nowhere"),
        ("--set", "drift.rows=3", "drift.rows must be between 0 and 1, or null, got 3.0"),
    ],
)
def test_a_mistake_is_one_message_and_exit_code_2(compared, option: str, value: str, message: str):
    code, report = compared({}, option, value)
    assert code == 2
    assert report["error"].startswith(f"error: {message}")


def test_an_action_and_a_column_that_only_one_version_has():
    nothing = drift.Counts.add_parts([])
    one = drift.Counts.count_values(np.array([3, 3, 4]))
    common = {
        "digest": "",
        "users": 1,
        "rows": 3,
        "first_event_ms": 0,
        "last_event_ms": 1,
        "timed": 3,
        "items": one,
    }
    lengths = np.bincount([1], minlength=64)
    before = drift.Profile(known={}, positive={}, request_values={}, lengths=lengths, **common)
    after = drift.Profile(
        known={"a": 3}, positive={"a": 1}, request_values={"tab": one}, lengths=lengths, **common
    )
    crossed = {
        change.quantity
        for change in drift.compare_profiles(before, after, DriftConfig())
        if change.crossed
    }
    assert crossed == {"action_rate.a", "known_share.a", "request_values.tab"}
    assert (len(nothing.values), one.values.tolist(), one.rows.tolist()) == (0, [3, 4], [2, 1])
