"""Logs from each kind of source: KuaiRand exactly as described, synthetic logs with something to
learn, own Parquet.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import config
from pipeline.config import RunConfig, SyntheticConfig, UserError
from pipeline.logs import import_logs, open_logs, plan_import, synthetic
from pipeline.logs.cleaning import LogRules, check_columns, normalise, row_digest
from pipeline.logs.kuairand import ACTIONS
from pipeline.schema import DAY_MS, EventColumns

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data" / "kuairand_pure_subset"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    runs_dir = tmp_path_factory.mktemp("sources")
    cfg = config.load(
        ROOT / "configs" / "demo.yaml", [f"runs_dir={runs_dir}", f"source.path={DATA}"]
    )
    import_logs(cfg)
    return cfg


def test_kuairand_events_become_rows_in_their_order(demo: RunConfig):
    log = pq.read_table(demo.log_dir / "log")
    timed = log.filter(~pc.field("order_only"))
    events = pq.read_table(DATA / "events.parquet")
    assert timed.num_rows == 185_177
    for ours, theirs in {
        "event_time": "time_ms",
        "watch_ms": "play_time_ms",
        "tab": "tab",
        "is_like": "is_like",
    }.items():
        assert timed[ours].to_pylist() == events[theirs].to_pylist()
    assert timed["tie_breaker"].to_pylist() == list(range(185_177))
    assert set(timed["known_mask"].to_pylist()) == {2 ** len(ACTIONS) - 1}
    exact = events.to_pandas().duplicated().sum()
    assert exact == 185_177 - len(np.unique(timed["row_digest"])) == 4682


def test_kuairand_histories_become_ordered_rows_with_two_known_actions(demo: RunConfig):
    log = pq.read_table(demo.log_dir / "log")
    rows = log.filter(log["order_only"]).to_pandas().groupby("user_id")
    histories = pq.read_table(DATA / "user_history.parquet").slice(0, 200).to_pylist()
    both_bits = sum(1 << demo.source.actions.index(name) for name in ("is_like", "long_view"))
    for history in histories:
        items = history["history_items"]
        found = rows.get_group(history["user_id"]).sort_values("event_time")
        times = [history["last_time_ms"] - (len(items) - 1 - i) * 1000 for i in range(len(items))]
        assert found["event_time"].tolist() == times
        assert found["item_id"].tolist() == items
        assert found["is_like"].tolist() == [item in history["liked_items"] for item in items]
        assert found["long_view"].tolist() == [item in history["long_view_items"] for item in items]
        assert found["is_click"].isna().all()
        assert set(found["known_mask"]) == {both_bits}


def test_kuairand_bad_histories_and_stray_tail_items_are_counted(demo: RunConfig):
    report = import_logs(demo)
    histories = pq.read_table(DATA / "user_history.parquet").to_pandas().set_index("user_id")
    first = pq.read_table(DATA / "events.parquet").to_pandas().groupby("user_id")["time_ms"].min()
    bad = histories.index[
        histories["last_time_ms"] >= first.reindex(histories.index).fillna(np.inf)
    ]
    assert report.quarantined == {"history_not_before_first_event": 3}
    quarantine = pq.read_table(demo.log_dir / "quarantine.parquet")
    assert sorted(quarantine["user_id"].to_pylist()) == sorted(bad) and len(bad) == 3
    good = histories.drop(bad)
    stray = sum(
        item not in row.history_items
        for row in good.itertuples()
        for item in (*row.liked_items, *row.long_view_items)
    )
    assert report.counts["tail_items_outside_history"] == stray
    assert report.rows == 185_177 + good["history_items"].map(len).sum()


def test_kuairand_items_come_without_the_counters_that_leak(demo: RunConfig):
    items = pq.read_schema(demo.log_dir / "items.parquet").names
    assert "author_id" in items
    assert not [name for name in items if name.endswith(("_cnt", "_num"))]


def test_kuairand_refuses_actions_and_folders_that_it_does_not_know(tmp_path: Path):
    raw = {
        "runs_dir": str(tmp_path),
        "source": {"kind": "kuairand", "path": str(DATA), "actions": ["is_click", "bought"]},
    }
    with pytest.raises(UserError, match=r"source.actions: KuaiRand has no \['bought'\]"):
        import_logs(config.from_dict(raw))
    raw["source"] = {"kind": "kuairand", "path": str(tmp_path / "nowhere")}
    with pytest.raises(UserError, match=r"source.path: .*nowhere/events.parquet cannot be read"):
        import_logs(config.from_dict(raw))
    pq.write_table(pa.table({"user_id": [1]}), tmp_path / "events.parquet")
    raw["source"] = {"kind": "kuairand", "path": str(tmp_path)}
    with pytest.raises(
        UserError, match=r"events.parquet has no columns \['item_id', .*found \['user_id'\]"
    ):
        import_logs(config.from_dict(raw))
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


# Importing once


def small_synthetic(folder: Path, **changes: object) -> RunConfig:
    settings = {
        "num_users": 60,
        "num_items": 300,
        "num_categories": 12,
        "max_history": 200,
        "rows_per_file": 500,
    } | changes
    source = {
        "kind": "synthetic",
        "actions": list(synthetic.ACTIONS),
        "request_columns": ["tab"],
        "synthetic": settings,
    }
    return config.from_dict({"runs_dir": str(folder), "source": source, "tasks": ["is_click"]})


def test_an_import_is_done_once(tmp_path: Path):
    cfg = small_synthetic(tmp_path)
    with pytest.raises(UserError, match=r"no imported logs .*run jobs.import_logs first"):
        open_logs(cfg.source, cfg.run_dir)
    first = import_logs(cfg)
    stamps = [file.stat().st_mtime_ns for file in sorted(cfg.log_dir.rglob("*.parquet"))]
    assert import_logs(cfg) == first
    assert [file.stat().st_mtime_ns for file in sorted(cfg.log_dir.rglob("*.parquet"))] == stamps
    other = dataclasses.replace(cfg, seed=1)
    with pytest.raises(
        UserError, match=r"holds logs of another source or other settings.*--overwrite"
    ):
        import_logs(other)
    assert import_logs(other, overwrite=True).fingerprint != first.fingerprint
    (cfg.log_dir / "import.json").write_text("{")
    with pytest.raises(UserError, match=r"import.json is broken"):
        open_logs(cfg.source, cfg.run_dir)


def test_an_import_that_dies_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    cfg = small_synthetic(tmp_path)
    first = import_logs(cfg)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(synthetic, "make_rows", die)
    with pytest.raises(KeyboardInterrupt):
        import_logs(dataclasses.replace(cfg, seed=1), overwrite=True)
    assert import_logs(cfg) == first
    assert sorted(path.name for path in cfg.run_dir.iterdir()) == ["logs"]


# Synthetic logs


def test_synthetic_logs_follow_seed_and_settings(tmp_path: Path):
    one, same, other = (small_synthetic(tmp_path / name) for name in "abc")
    other = dataclasses.replace(other, seed=1)
    tables = []
    for cfg in (one, same, other):
        assert import_logs(cfg).rows == plan_import(cfg.source, cfg.folders)["rows"]
        tables.append(pq.read_table(cfg.log_dir / "log"))
    assert tables[0].equals(tables[1])
    assert not tables[0].equals(tables[2])


def test_synthetic_files_hold_about_rows_per_file(tmp_path: Path):
    cfg = small_synthetic(tmp_path, max_history=200, num_users=300)
    report = import_logs(cfg)
    sizes = [pq.read_metadata(cfg.log_dir / file).num_rows for file in report.files]
    assert len(sizes) > 3
    assert max(sizes) <= 500 + 200
    assert pq.read_metadata(cfg.log_dir / "users.parquet").num_rows == 300


def test_synthetic_files_by_day_hold_the_same_rows(tmp_path: Path):
    by_user, by_day = (
        small_synthetic(tmp_path / str(by_day), by_day=by_day) for by_day in (False, True)
    )
    reports = [import_logs(cfg) for cfg in (by_user, by_day)]
    assert reports[0].rows == reports[1].rows == plan_import(by_day.source, by_day.folders)["rows"]
    assert len(reports[1].files) == plan_import(by_day.source, by_day.folders)["files"] == 12
    keys = [(name, "ascending") for name in ("user_id", "tie_breaker")]
    tables = [pq.read_table(cfg.log_dir / "log").sort_by(keys) for cfg in (by_user, by_day)]
    assert tables[0].equals(tables[1])
    start = config.parse_time("", by_day.source.synthetic.start)
    for number, file in enumerate(reports[1].files):
        times = pq.read_table(by_day.log_dir / file)["event_time"].to_numpy()
        assert (start + number * DAY_MS <= times).all() and (
            times < start + (number + 1) * DAY_MS
        ).all()


def test_synthetic_lengths_are_zipf_up_to_16384(tmp_path: Path):
    settings = SyntheticConfig(
        num_users=500, max_history=16_384, min_history=8, rows_per_file=20_000
    )
    chunks = list(synthetic.user_chunks(settings))
    lengths = np.concatenate([lengths for _, lengths in chunks])
    assert [first for first, _ in chunks] == np.cumsum([0, *(len(some) for _, some in chunks)])[
        :-1
    ].tolist()
    assert lengths[:3].tolist() == [16_384, 8192, 5461]
    assert lengths[-1] == 16_384 // 500
    cfg = small_synthetic(tmp_path, max_history=16_384, num_users=2, num_items=5000)
    import_logs(cfg)
    assert np.bincount(pq.read_table(cfg.log_dir / "log")["user_id"])[0] == 16_384


def test_synthetic_rows_make_sense(tmp_path: Path):
    cfg = small_synthetic(tmp_path, num_users=200)
    import_logs(cfg)
    log = (
        pq.read_table(cfg.log_dir / "log")
        .to_pandas()
        .sort_values(["user_id", "event_time", "tie_breaker"])
    )
    assert not log.duplicated(["user_id", "item_id", "event_time"]).any()
    requests = log.groupby(["user_id", "request_id"])["event_time"]
    assert (requests.nunique() == 1).all()
    assert requests.size().max() == cfg.source.synthetic.candidates_per_request
    assert log.groupby(["user_id", "event_time"])["request_id"].nunique().max() == 1
    start = config.parse_time("", cfg.source.synthetic.start)
    days = (log["event_time"] - start) / 86_400_000
    assert days.between(0, cfg.source.synthetic.num_days).all()
    assert log["item_id"][days < 1].max() < 0.5 * 300
    assert log["item_id"].max() > 0.8 * 300
    category = pq.read_table(cfg.log_dir / "items.parquet")["category"].to_numpy()
    categories = (
        log.assign(category=category[log["item_id"]]).groupby("user_id")["category"].nunique()
    )
    assert categories.max() <= synthetic.MAX_USER_CATEGORIES
    assert (log["watch_ms"] >= 0).all()


def test_synthetic_clicks_follow_the_interest_of_the_session(tmp_path: Path):
    """Given the item's category, a click on it in the last ten minutes says more of the next one
    than its absence.
    """
    cfg = small_synthetic(tmp_path, num_users=400, max_history=400, min_history=40)
    import_logs(cfg)
    log = pq.read_table(cfg.log_dir / "log").to_pandas()
    category = pq.read_table(cfg.log_dir / "items.parquet")["category"].to_numpy()
    log = log.assign(category=category[log["item_id"]]).sort_values(
        ["user_id", "category", "event_time", "tie_breaker"]
    )
    before = log.shift(1)
    same = (before["user_id"] == log["user_id"]) & (before["category"] == log["category"])
    recent = same & (log["event_time"] - before["event_time"]).between(1, 600_000)
    after_click = log[recent & (before["is_click"] == 1)]["is_click"].mean()
    after_none = log[recent & (before["is_click"] == 0)]["is_click"].mean()
    assert after_click - after_none > 0.1


def test_lasting_tastes_show_early_and_are_asked_once_long_after(tmp_path: Path):
    cfg = small_synthetic(
        tmp_path,
        num_users=40,
        max_history=320,
        min_history=320,
        lasting_categories=8,
        early_rows=96,
        quiet_rows=64,
    )
    import_logs(cfg)
    log = pq.read_table(cfg.log_dir / "log").to_pandas().rename(columns={"tie_breaker": "place"})
    category = pq.read_table(cfg.log_dir / "items.parquet")["category"].to_numpy()
    log = log.assign(category=category[log["item_id"]])
    lasting = log["category"] >= cfg.source.synthetic.num_categories
    assert lasting[log["place"] < 96].all()
    assert not lasting[log["place"].between(96, 96 + 64 - 1)].any()
    assert (log["lasting"].notna() == lasting).all()
    asked = log[lasting & (log["place"] >= 96 + 64)]
    assert asked["category"].nunique() == log["category"][lasting].nunique()
    assert (asked.groupby(["user_id", "category"])["request_id"].nunique() == 1).all()
    told_early = (
        log[log["place"] < 96].groupby(["user_id", "category"])["lasting"].mean().rename("early")
    )
    asked = asked.join(told_early, on=["user_id", "category"])
    assert asked["lasting"][asked["early"] > 0.5].mean() > 0.8
    assert asked["lasting"][asked["early"] < 0.5].mean() < 0.2


def test_synthetic_refuses_actions_that_it_does_not_make(tmp_path: Path):
    cfg = config.from_dict(
        {
            "runs_dir": str(tmp_path),
            "source": {"kind": "synthetic", "actions": ["bought"]},
            "tasks": ["bought"],
        }
    )
    with pytest.raises(UserError, match=r"source.actions: the synthetic logs have no \['bought'\]"):
        import_logs(cfg)


# Checks and digests of rows


def rules(**columns: str) -> LogRules:
    names = (
        "user_id",
        "item_id",
        "event_time",
        "click",
        "tab",
        "request_id",
        "watch_ms",
        "order_only",
        "known_mask",
    )
    return LogRules(
        columns={name: name for name in (*names, "tie_breaker", "row_digest")} | columns,
        events=EventColumns(actions=("click",), request=("tab",)),
        earliest_ms=1000,
        latest_ms=10_000,
        num_buckets=4,
    )


def block(**columns: object) -> pa.Table:
    return pa.table(
        {"user_id": [1], "item_id": [2], "event_time": [5000], "click": [1], "tab": [3]} | columns
    )


@pytest.mark.parametrize(
    ("columns", "reason"),
    [
        ({}, None),
        ({"user_id": pa.array([None], pa.int64())}, "null_user_id"),
        ({"item_id": [-2]}, "negative_item_id"),
        ({"user_id": pa.array([2**63], pa.uint64())}, "user_id_unreadable"),
        ({"event_time": [999]}, "event_time_before_range"),
        ({"event_time": [10_001]}, "event_time_in_future"),
        ({"event_time": [1000]}, None),
        ({"event_time": [10_000]}, None),
        ({"click": [2]}, "click_not_0_1"),
        ({"click": [300]}, "click_not_0_1"),
        ({"click": [0.5]}, "click_not_0_1"),
        ({"click": [float("nan")]}, None),
        ({"click": [1.0]}, None),
        ({"click": [True]}, None),
        ({"click": pa.array([None], pa.int8())}, None),
        ({"tab": [-1]}, "tab_out_of_range"),
        ({"tab": [2**31]}, "tab_out_of_range"),
        ({"watch_ms": [-5]}, "negative_watch_ms"),
        ({"known_mask": [2]}, "known_mask_out_of_range"),
        ({"user_id": [-1], "click": [7]}, "negative_user_id"),
    ],
)
def test_the_first_rule_that_a_row_breaks(columns: dict, reason: str | None):
    row = normalise(block(**columns), rules())
    assert row.schema.equals(rules().schema)
    assert row["reason"].to_pylist() == [reason]
    assert (row["source_row"][0].as_py() is None) == (reason is None)


def test_times_with_a_zone_are_read_as_milliseconds():
    micros = pa.array([5_000_999], pa.timestamp("us", "Asia/Shanghai"))
    assert normalise(block(event_time=micros), rules())["event_time"].to_pylist() == [5000]
    naive = block(event_time=pa.array([5000], pa.timestamp("ms")))
    with pytest.raises(
        UserError,
        match=r"f: column 'event_time' must be .* with a zone: .*, zone: UTC}.*timestamp\[ms\]",
    ):
        check_columns(naive.schema, rules(), "f")


def test_names_of_the_users_files():
    theirs = block().rename_columns({"user_id": "uid", "tab": "surface"})
    row = normalise(theirs, rules(user_id="uid", tab="surface"))
    assert row.select(["user_id", "tab"]).to_pylist() == [{"user_id": 1, "tab": 3}]
    bad = normalise(
        theirs.set_column(0, "uid", pa.array([-1])), rules(user_id="uid", tab="surface")
    )
    assert json.loads(bad["source_row"][0].as_py())["uid"] == -1


VALUES = {
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(allow_nan=False),
    pa.string(): st.text(max_size=4),
    pa.bool_(): st.booleans(),
    pa.list_(pa.int64()): st.lists(st.integers(0, 3), max_size=3),
    pa.struct([("a", pa.int64())]): st.fixed_dictionaries({"a": st.integers(0, 3)}),
    pa.timestamp("ms", "UTC"): st.integers(0, 2**40),
    pa.date32(): st.integers(0, 2**15),
    pa.decimal128(9, 2): st.decimals(0, 100, places=2),
}


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_row_digests_agree_exactly_where_rows_do(data: st.DataObject):
    size = data.draw(st.integers(1, 8))
    columns = {
        f"c{i}": pa.array(
            data.draw(st.lists(st.none() | VALUES[kind], min_size=size, max_size=size)), kind
        )
        for i, kind in enumerate(VALUES)
    }
    table = pa.table(columns)
    twice = pa.concat_tables([table, table.take(pa.array(range(size)[::-1]))])
    digest = row_digest(twice)
    assert digest[:size].tolist() == digest[size:][::-1].tolist()
    assert len(set(digest.tolist())) == len({repr(row) for row in table.to_pylist()})
    assert row_digest(table.select(table.column_names[::-1])).tolist() == digest[:size].tolist()


def test_row_digests_do_not_see_the_width_of_a_type():
    wide = pa.table({"a": [1, None], "b": ["x", "y"], "c": [1.5, 2.5]})
    narrow = pa.table(
        {
            "b": pa.array(["x", "y"]).dictionary_encode(),
            "a": pa.array([1, None], pa.int8()),
            "c": pa.array([1.5, 2.5], pa.float32()),
        }
    )
    assert row_digest(wide).tolist() == row_digest(narrow).tolist()
    swapped = wide.rename_columns(["c", "b", "a"])
    assert set(row_digest(swapped).tolist()).isdisjoint(row_digest(wide).tolist())
