"""Many runs without Ray: what a plan says, what is skipped, what a run leaves behind."""

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from tiny_world import publish_sequences, tiny_config

from benchmarks import quality
from pipeline import config
from pipeline.config import ConfigError, RunConfig, UserError


def write_plan(folder: Path, cfg: RunConfig, **plan: object) -> Path:
    (folder / "preset.yaml").write_text(yaml.safe_dump(config.to_dict(cfg)))
    path = folder / "plan.yaml"
    path.write_text(yaml.safe_dump({"config": str(folder / "preset.yaml")} | plan))
    return path


def test_a_plan_is_a_preset_shared_settings_and_those_of_each_run(tmp_path):
    runs = {"wide": {"model.d_model": 32}, "plain": None}
    path = write_plan(tmp_path, tiny_config(tmp_path), set={"train.lr": 0.5, "model.d_model": 8}, runs=runs)
    configs = quality.read_plan(path, ["train.epochs=7"])
    assert sorted((name, cfg.name, cfg.model.d_model) for name, cfg in configs.items()) == [
        ("plain", "plain", 8),
        ("wide", "wide", 32),
    ]
    assert all(cfg.train.lr == 0.5 and cfg.train.epochs == 7 for cfg in configs.values())
    with pytest.raises(ConfigError, match="must hold config, runs"):
        quality.read_plan(write_plan(tmp_path, tiny_config(tmp_path), rums={}))


def test_a_run_leaves_its_figures_and_is_not_made_twice(tmp_path):
    cfg = tiny_config(tmp_path / "runs", train={"batch_users": 8, "epochs": 1, "log_every": 2})
    publish_sequences(cfg)
    out = tmp_path / "figures"
    run = quality.Run(cfg, str(cfg.sequence_dir), "cpu", ("val", "test"), out, tmp_path / "predictions")
    assert not quality.finished(run)
    result = quality.carry_out(run)
    assert json.loads((out / "tiny-0.json").read_text()) == json.loads(json.dumps(result))
    metrics = result["metrics"]
    assert 0 < metrics["val/auc/is_click"] < 1
    assert metrics["train/gflop_per_example"] > 0
    assert metrics["test/rows"] == pq.read_metadata(tmp_path / "predictions" / "tiny-0-test.parquet").num_rows
    assert quality.finished(run)
    assert not quality.finished(replace(run, cfg=replace(cfg, seed=1)))
    with pytest.raises(UserError, match="other settings"):
        quality.finished(replace(run, cfg=replace(cfg, train=replace(cfg.train, lr=0.1))))
