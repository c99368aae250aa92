"""Many runs without Ray: what a plan says, what is skipped, what a run leaves behind."""

import argparse
import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from benchmarks.quality import report, train_plan
from benchmarks.report import write_section
from benchmarks.training import model
from pipeline import config
from pipeline.config import ConfigError, RunConfig, UserError
from pipeline.evaluate import metrics
from pipeline.figures import read_runs
from tests.worlds.tiny import publish_sequences, tiny_config


def write_plan(folder: Path, cfg: RunConfig, **plan: object) -> Path:
    (folder / "preset.yaml").write_text(yaml.safe_dump(config.to_dict(cfg)))
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"config": str(folder / "preset.yaml")} | plan))
    return path


def test_a_plan_is_a_preset_shared_settings_and_those_of_each_run(tmp_path):
    runs = {"wide": {"model.d_model": 32}, "plain": None}
    path = write_plan(
        tmp_path, tiny_config(tmp_path), set={"train.lr": 0.5, "model.d_model": 8}, runs=runs
    )
    configs = train_plan.read_plan(path, ["train.epochs=7"])
    assert sorted((name, cfg.name, cfg.model.d_model) for name, cfg in configs.items()) == [
        ("plain", "plain", 8),
        ("wide", "wide", 32),
    ]
    assert all(cfg.train.lr == 0.5 and cfg.train.epochs == 7 for cfg in configs.values())
    ablated = train_plan.read_plan(
        write_plan(tmp_path, tiny_config(tmp_path), runs={"plain": {}}, ablate="plain")
    )
    assert ablated["plain-window_0"].model.attention.window == 0
    assert ablated["plain-window_0"].name == "plain-window_0"
    with pytest.raises(ConfigError, match=r"must hold \['config', 'runs'\]"):
        train_plan.read_plan(write_plan(tmp_path, tiny_config(tmp_path), rums={}))


def test_a_run_leaves_its_figures_and_is_not_made_twice(tmp_path):
    cfg = tiny_config(tmp_path / "runs", train={"batch_users": 8, "epochs": 1, "log_every": 2})
    publish_sequences(cfg)
    out = tmp_path / "figures.jsonl"
    run = train_plan.PlannedRun(
        cfg,
        "plan.yaml",
        str(cfg.sequence_dir),
        "cpu",
        ("val", "test"),
        out,
        tmp_path / "predictions",
        {},
    )
    assert not train_plan.finished(run)
    (result,) = train_plan.carry_out(run)
    assert read_runs(out) == [json.loads(json.dumps(result))]
    found = result["metrics"]
    assert 0 < found["val/auc/is_click"] < 1
    assert found["train/gflop_per_example"] > 0
    assert (
        found["test/rows"]
        == pq.read_metadata(tmp_path / "predictions" / "tiny-0-test.parquet").num_rows
    )
    assert train_plan.finished(run)
    assert not train_plan.finished(replace(run, cfg=replace(cfg, seed=1)))
    with pytest.raises(UserError, match="other settings"):
        train_plan.finished(replace(run, cfg=replace(cfg, train=replace(cfg.train, lr=0.1))))

    # a line of an earlier version lacks what was added since
    older = copy.deepcopy(result)
    del (
        older["config"]["train"]["max_loss_ratio"],
        older["config"]["model"]["attention"]["attn_alpha"],
    )
    out.write_text(json.dumps(older) + "\n")
    assert cfg.model.attention.attn_alpha == RunConfig().model.attention.attn_alpha
    assert train_plan.finished(run)

    wider = replace(cfg, train=replace(cfg.train, max_loss_ratio=9.0))
    with pytest.raises(UserError, match="other settings"):
        train_plan.finished(replace(run, cfg=wider))
    older["config"]["train"]["gone"] = 1
    out.write_text(json.dumps(older) + "\n")
    with pytest.raises(UserError, match="other settings"):
        train_plan.finished(run)


def test_a_run_is_scored_in_every_way_that_its_weights_are_served(tmp_path, monkeypatch):
    # the tables of a few users are small
    monkeypatch.setattr("pipeline.model.inference.quantize.WORTH_BYTES", 1)
    cfg = tiny_config(tmp_path / "runs", train={"batch_users": 8, "epochs": 1})
    publish_sequences(cfg)
    path = write_plan(
        tmp_path, cfg, runs={"plain": {}}, served={"plain": {"int4": {"int4_tables": True}}}
    )
    options = {
        "store": str(cfg.sequence_dir),
        "device": "cpu",
        "out": tmp_path / "out.jsonl",
        "predictions": None,
    }
    (run,) = train_plan.planned(path, argparse.Namespace(overrides=[], seeds=[0], **options))
    plain, int4 = train_plan.carry_out(run)
    assert [run["name"] for run in read_runs(tmp_path / "out.jsonl")] == ["plain", "plain-int4"]
    assert plain["losses"] == int4["losses"]
    assert plain["metrics"]["val/ne/is_click"] != int4["metrics"]["val/ne/is_click"]
    with pytest.raises(ConfigError, match="served names 'plane'"):
        train_plan.read_plan(write_plan(tmp_path, cfg, runs={"plain": {}}, served={"plane": {}}))


def test_the_bootstrap_counts_users_and_pairs_both_sides():
    """Weights that count rows twice are the metrics of the rows repeated; a model gains nothing
    over itself.
    """
    rng = np.random.default_rng(0)
    labels, logits = rng.random(300) < 0.3, np.round(rng.normal(size=300), 1)  # with ties
    weight = rng.integers(0, 3, 300)
    rows = np.repeat(np.arange(300), weight)
    ranked = report.Ranked.of(logits, labels)
    assert ranked.auc(labels, weight) == pytest.approx(metrics.auc(logits[rows], labels[rows]))
    assert ranked.ne(labels, weight) == pytest.approx(
        metrics.normalised_entropy(logits[rows], labels[rows])
    )
    users = rng.integers(0, 40, 300)
    found = report.paired_bootstrap([logits], [logits], labels, users, samples=20)
    assert found == {"auc": (0, 0, 0), "ne": (0, 0, 0)}
    better = logits + labels  # higher where the label is set
    gain, low, high = report.paired_bootstrap([better], [logits], labels, users, samples=200)["auc"]
    assert 0 < low < gain < high


def test_other_rows_are_refused():
    keys = {"user_id": [1, 2], "item_id": [3, 4], "event_time": [5, 6]}
    with pytest.raises(ValueError, match="anchor: 2 rows, not the same 2"):
        report.same_rows(pa.table(keys), pa.table(keys | {"item_id": [3, 5]}), "anchor")


def test_a_section_is_replaced_and_nothing_else(tmp_path):
    path = tmp_path / "RESULTS.md"
    path.write_text("# Results\n\nbefore\n")
    write_section("speed", "first", path)
    path.write_text(path.read_text() + "\nafter\n")
    write_section("speed", "second", path)
    assert path.read_text() == (
        "# Results\n\nbefore\n\n<!-- speed: begin -->\nsecond\n<!-- speed: end -->\n\nafter\n"
    )


def test_whole_model_speed_is_told_from_what_was_measured(tmp_path):
    """Two models at two lengths, as small as can be, as a section with ratios and slopes."""
    size = {
        "events": 128,
        "candidates": 2,
        "layers": 6,
        "heads": 1,
        "width": 8,
        "repeats": 1,
        "kernels": 0,
    }
    size["kernels"] = 0
    options = argparse.Namespace(**size, device="cpu", lengths=[32, 64], transfers=True)
    found = {
        name: {
            str(length): model.measure(model.MODELS[name], length, options) for length in (32, 64)
        }
        for name in ("HSTU, merged", "ULTRA-HSTU")
    }
    assert all(
        numbers["train_ms"] > 0 and numbers["infer_ms"] > 0
        for by in found.values()
        for numbers in by.values()
    )
    run = {
        "command": "x",
        "environment": train_plan.environment("cpu"),
        "sizes": size,
        "models": found,
    }
    text = model.section(run)
    assert "ULTRA-HSTU over HSTU, merged" in text
    # constant tokens
    assert model.slope({"2": {"train_ms": 1.0}, "8": {"train_ms": 1.0}}, "train") == pytest.approx(
        1
    )
    assert model.slope({"2": {"train_ms": 1.0}, "8": {"train_ms": 4.0}}, "train") == pytest.approx(
        2
    )
    assert model.ratio({"a": {"t": 1.0}, "b": {"t": 4.0}}, "a", "b", "t") == 4
