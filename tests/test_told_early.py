"""Mistakes that are told before the work they would spoil, each in one message."""

import argparse
import dataclasses
import json
import logging
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import jobs.deploy
import jobs.drift
import jobs.mlflow_ui
import jobs.pipeline
import jobs.recommend
import jobs.verdict
from jobs import cli
from pipeline import config, tracking
from pipeline.config import ConfigError, Outage, RunConfig, UserError
from pipeline.sequences import build, preview, store
from pipeline.sequences.build import build_sequences
from pipeline.sequences.parts import find_part
from pipeline.tracking import Tracker
from pipeline.train.optim import refuse_long_warmup, resolve_warmup
from pipeline.train.periods import check_periods
from tests.worlds.logs import NOON, config_for, here, log
from tests.worlds.tiny import publish_sequences, tiny_config

__all__ = ["here"]  # a fixture

DAY = 24 * 3600 * 1000


def days_of_logs(folder: Path, num_days: int = 6) -> RunConfig:
    """One row an hour; `like` only on the first day."""
    hours = np.arange(num_days * 24)
    table = log(rows=len(hours))
    table = table.set_column(2, "event_time", pa.array(NOON + hours * DAY // 24))
    table = table.set_column(4, "like", pa.array((hours == 3).astype(np.int8)))
    cfg = config_for(folder, table)
    split = replace(cfg.split, t_val="2022-04-18T05:20:00Z", t_test="2022-04-19T05:20:00Z")
    return replace(cfg, split=split, tasks=("click", "like"))


def test_a_refused_build_keeps_its_parts(here: None, tmp_path: Path, monkeypatch) -> None:
    cfg = config_for(tmp_path, log())
    strict = replace(cfg, checks=replace(cfg.checks, min_rows=1_000_000))
    with pytest.raises(UserError, match="min_rows"):
        build_sequences(strict)
    kept = list((cfg.sequence_dir / "parts").glob("*.json"))
    assert len(kept) == 1
    assert find_part(cfg.sequence_dir, kept[0].stem) is not None
    assert not (cfg.sequence_dir / "buckets").exists()

    monkeypatch.setattr(build, "write_part", lambda *_, **__: pytest.fail("read again"))
    build_sequences(cfg)


def periods_of(cfg: RunConfig, *, validates: bool = False) -> dict[str, dict[str, int]]:
    return check_periods(cfg.sequence_dir, cfg.split, cfg.tasks, validates=validates)


def test_what_the_periods_hold_is_said(
    here: None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = days_of_logs(tmp_path)
    build_sequences(cfg)
    with caplog.at_level(logging.WARNING):
        found = periods_of(cfg)
    assert {name: counts["rows"] for name, counts in found.items()} == {
        "train": 72,
        "val": 24,
        "test": 48,
    }
    assert found["train"]["like"] == 1
    assert "like has no positive among its 24 known labels of the val period" in caplog.text
    assert "click" not in caplog.text

    late = replace(cfg.split, t_val="2022-05-01T00:00:00Z", t_test="2022-05-02T00:00:00Z")
    caplog.clear()
    periods_of(replace(cfg, split=late))
    assert "split.t_val: the val period holds no row, the events lie from 2022-04-15" in caplog.text
    early = replace(cfg.split, t_val="2022-01-01T00:00:00Z", t_test="2022-01-02T00:00:00Z")
    with pytest.raises(UserError, match=r"split\.t_val: no row lies before it, .* from 2022-04-15"):
        periods_of(replace(cfg, split=early))
    with pytest.raises(UserError, match=r"split\.t_val.*train\.validate_every has nothing"):
        periods_of(replace(cfg, split=late), validates=True)

    page = (cfg.run_dir / "report" / "validation.html").read_text()
    for line in ("<td>val: rows</td><td>24</td>", "<td>train: like</td><td>1 of 72</td>"):
        assert line in page


def test_the_plan_of_a_build_knows_the_largest_user(tmp_path: Path) -> None:
    plan = build.plan_build(config_for(tmp_path, log(num_users=1000, rows=9000)))
    assert plan["rows_looked_at"] == 9000
    assert plan["memory_mb_of_largest_bucket"] == plan["memory_mb_per_bucket"]

    table = log(num_users=1000, rows=9000, user_id=pa.array(np.r_[[7] * 6000, np.arange(3000)]))
    plan = build.plan_build(config_for(tmp_path, table))
    assert plan["rows_of_largest_user"] == 6001
    assert plan["memory_mb_of_largest_bucket"] > 1.9 * plan["memory_mb_per_bucket"] > 0


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (np.arange(1000, 1060), r"source\.items: the table has 0\.0% of the items .*id_column"),
        (np.arange(10, 20), r"20\.0% of the items .*checks\.min_joined_share is 0\.5"),
        ([1, 2, None], "'id' in .*is null in 1 rows"),
        ([1, 2, 2], "id 2 stands in several rows"),
        (["a", "b"], r"is text \(string\), item_id in the logs is a number"),
    ],
)
def test_the_plan_of_a_build_looks_into_side_tables(
    tmp_path: Path, ids: object, message: str
) -> None:
    pq.write_table(pa.table({"id": ids}), tmp_path / "items.parquet")
    items = {"path": str(tmp_path / "items.parquet"), "id_column": "id"}
    cfg = config_for(tmp_path, log(rows=200), items=items)
    with pytest.raises(UserError, match=message):
        build.plan_build(replace(cfg, checks=replace(cfg.checks, min_joined_share=0.5)))


def test_a_poor_join_of_some_rows_is_said_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(preview, "SAMPLE_ROWS", 100)
    pq.write_table(pa.table({"id": [f"i{i}" for i in range(40)]}), tmp_path / "items.parquet")
    items = {"path": str(tmp_path / "items.parquet"), "id_column": "id"}
    table = log(rows=200, item_id=pa.array([f"j{i % 30}" for i in range(200)]))
    plan = build.plan_build(config_for(tmp_path, table, items=items))
    assert plan["joined"] == {"items": 0.0}
    assert plan["rows_looked_at"] == 100
    assert "such as ['j0', 'j1', 'j2']; in the table there are ['i0', 'i1', 'i2']" in caplog.text


def test_items_that_the_item_table_knows_are_counted(here: None, tmp_path: Path) -> None:
    table = log(rows=200)
    pq.write_table(pa.table({"id": np.arange(10, 70)}), tmp_path / "items.parquet")
    items = {"path": str(tmp_path / "items.parquet"), "id_column": "id"}
    cfg = config_for(tmp_path, table, items=items)
    build_sequences(cfg)
    seen = np.unique(table["item_id"])
    page = (cfg.run_dir / "report" / "validation.html").read_text()
    assert f"<td>items</td><td>{len(seen)}</td>" in page
    known = (seen >= 10).sum()
    assert f"<td>items that the item table knows</td><td>{known}</td>" in page


def test_the_file_of_each_bad_row_is_named(here: None, tmp_path: Path) -> None:
    good = log(rows=50)
    bad = log(rows=50, seed=1, click=pa.array([2, 3, *[0] * 48], pa.int8()))
    cfg = config_for(tmp_path, good, bad)
    build_sequences(cfg)
    page = (cfg.run_dir / "report" / "validation.html").read_text()
    assert "in/1.parquet</td><td>click_not_0_1 2" in page
    assert "   1.parquet" in page


@pytest.mark.parametrize(("steps", "warmup"), [(25, 2), (647, 64), (4000, 100), (4, 0)])
def test_a_warm_up_is_a_part_of_the_run(steps: int, warmup: int) -> None:
    assert resolve_warmup(None, steps) == warmup
    assert resolve_warmup(7, steps) == 7
    refuse_long_warmup(None, steps)
    refuse_long_warmup(resolve_warmup(None, steps), steps)

    longest = steps // 10
    refuse_long_warmup(longest, steps)
    with pytest.raises(UserError, match=rf"train\.warmup_steps is {longest + 1}.*to {longest} or"):
        refuse_long_warmup(longest + 1, steps)


def damaged(path: Path) -> None:
    """Bytes of the column `tab` overwritten."""
    chunk = pq.ParquetFile(path).metadata.row_group(0).column(5)
    raw = bytearray(path.read_bytes())
    begin = chunk.dictionary_page_offset or chunk.data_page_offset
    raw[begin : begin + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(bytes(raw))


def test_a_damaged_page_is_one_message(here: None, tmp_path: Path) -> None:
    cfg = config_for(tmp_path, log(rows=50))
    file = tmp_path / "in" / "0.parquet"
    damaged(file)
    with pytest.raises(UserError, match=rf"{file}: column 'tab': ") as refused:
        build_sequences(cfg)
    assert "\n" not in str(refused.value)


def test_columns_of_one_name_are_one_message(here: None, tmp_path: Path) -> None:
    table = log(rows=5)
    doubled = pa.Table.from_arrays([*table.columns, table["tab"]], [*table.column_names, "tab"])
    cfg = config_for(tmp_path, doubled)
    with pytest.raises(UserError, match="several columns are called 'tab'"):
        build_sequences(cfg)


@pytest.mark.parametrize(
    "values", [pa.array([[1], [2], [3]]), pa.array([{"a": 1}] * 3), pa.array([b"\xff"] * 3)]
)
def test_a_feature_of_no_usable_type_is_one_message(
    here: None, tmp_path: Path, values: pa.Array
) -> None:
    from pipeline.batches.features import fit_features

    pq.write_table(pa.table({"id": [1, 2, 3], "kind": values}), tmp_path / "items.parquet")
    items = {"path": str(tmp_path / "items.parquet"), "id_column": "id"}
    cfg = config_for(tmp_path, log(rows=200), items=items)
    raw = dataclasses.replace(cfg, split=replace(cfg.split, t_val="2022-04-15T06:00:00Z"))
    build_sequences(raw)
    from pipeline.config import ColumnFeature

    features = replace(raw.features, item={"kind": ColumnFeature(dim=4)})
    with pytest.raises(UserError, match=r"features\.item\.kind"):
        fit_features(replace(raw, features=features))
    assert store.read_manifest(raw.sequence_dir).num_rows


@pytest.mark.parametrize("name", ["../../evil", "a/b", "a:b", "it's", "", " a"])
def test_names_that_mlflow_does_not_take_are_refused_when_they_are_read(name: str) -> None:
    with pytest.raises(ConfigError, match=r"tracking\.model_name"):
        config.from_dict({"tracking": {"model_name": name}})
    assert config.from_dict({"tracking": {"model_name": "my model-1.2"}})


@pytest.mark.parametrize("name", ["../../evil", "a/b", "", " a", "..", "it's", "50%", "a&b", "a?"])
def test_tasks_that_mlflow_has_no_metric_of_are_refused_when_they_are_read(name: str) -> None:
    """Else its message comes after the training, when the name cannot be changed any more."""
    source = {"kind": "parquet", "path": "x", "actions": [name]}
    with pytest.raises(ConfigError, match=r"tasks must be a name of letters.* source\.columns"):
        config.from_dict({"source": source, "tasks": [name]})


@pytest.mark.parametrize(
    ("job", "arguments", "said"),
    [
        (jobs.verdict, ["--canary", "2", "--max-slower", "nan"], r"--max-slower .* got nan"),
        (jobs.verdict, ["--canary", "2", "--max-slower", "-1"], r"--max-slower .* got -1"),
        (jobs.verdict, ["--canary", "2", "--promote-if", "liked"], r"--promote-if.*'liked'"),
        (jobs.mlflow_ui, ["--port", "70000"], r"--port .* got 70000"),
        (jobs.pipeline, ["--loop", "0"], r"--loop must be 5 or more.*got 0"),
        (jobs.drift, ["--days", "0"], r"--days .* got 0"),
        (jobs.drift, ["--after", "nowhere"], "nowhere"),
        (jobs.recommend, [], r"tasks: \[\]"),
    ],
)
def test_an_option_is_refused_before_anything_starts(
    tmp_path: Path, job: ModuleType, arguments: list[str], said: str
) -> None:
    """In a dry run too."""
    overrides = [f"runs_dir={tmp_path}"]
    if job is jobs.recommend:
        overrides += ["tasks=[]", "retrieval.enabled=true", "tracking.gate_max_ne={}"]
    cfg = config.load("configs/smoke.yaml", overrides)
    parser = argparse.ArgumentParser()
    job.add_options(parser)
    with pytest.raises(UserError, match=said):
        job.plan_job(cli.Job(cfg, parser.parse_args(arguments)))


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"order_by": "is_sold"}, r"order_by must be one of the tasks \['is_click'.*'is_sold'"),
        ({"request_features": {"tap": 1}}, r"request_features must be of .*'tap'"),
        ({"filter": {"made": {"above": 7, "below": 7}}}, r"filter\.made .*'above': 7, 'below': 7"),
        ({"n": 10_000}, r"--request n: at most .* got 10000"),
    ],
)
def test_lists_that_no_version_can_make_are_refused_before_mlflow_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: dict, said: str
) -> None:
    monkeypatch.setattr(tracking, "session", lambda cfg: pytest.fail("starts MLflow"))
    cfg = config.load("configs/smoke.yaml", [f"runs_dir={tmp_path}"])
    parser = argparse.ArgumentParser()
    jobs.recommend.add_options(parser)
    options = parser.parse_args(["--request", json.dumps(request_)])
    with pytest.raises(UserError, match=said):
        jobs.recommend.run_job(cli.Job(cfg, options))


@pytest.mark.parametrize("is_dry", [False, True])
def test_a_cluster_that_does_not_answer_is_told_before_mlflow_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_dry: bool
) -> None:
    monkeypatch.setattr(tracking, "session", lambda cfg: pytest.fail("starts MLflow"))
    monkeypatch.setattr(tracking, "plan_session", lambda cfg: pytest.fail("asks MLflow"))
    cfg = tiny_config(tmp_path, ray={"address": "127.0.0.1:1"})
    publish_sequences(cfg)
    job = cli.Job(cfg, argparse.Namespace(rayservice=None))
    with pytest.raises(Outage, match=r"ray\.address: no Ray cluster to join at '127\.0\.0\.1:1'"):
        (jobs.deploy.plan_job if is_dry else jobs.deploy.run_job)(job)


@pytest.mark.parametrize(
    ("section", "key"),
    [("index", "columns"), ("index", "title_column"), ("serve", "page_title_column")],
)
def test_a_column_that_the_item_table_lacks_is_told_before_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, section: str, key: str
) -> None:
    value = ["colour"] if key == "columns" else "colour"
    cfg = tiny_config(tmp_path, **{section: {key: value}})
    publish_sequences(cfg)
    manifest = store.read_manifest(cfg.sequence_dir)
    monkeypatch.setattr(jobs.pipeline, "prepare_sequences", lambda cfg, append: manifest)
    monkeypatch.setattr(jobs.pipeline, "choose_start", lambda *_, **__: pytest.fail("trains"))
    with pytest.raises(UserError, match=rf"{section}\.{key}.* has no column 'colour'"):
        jobs.pipeline.run_chain(cfg, Tracker(cfg), "")
