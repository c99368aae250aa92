"""Slices of an evaluation: the right rows in each, and what the card and MLflow show of them."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pyarrow as pa
import pytest

from pipeline.config import RunConfig
from pipeline.evaluate import evaluator
from pipeline.evaluate.item_rates import ItemCounts
from pipeline.evaluate.metrics import auc
from pipeline.evaluate.slices import Slice, range_names, read_slices, slice_lines
from pipeline.model.artifact import load_model, save_model
from pipeline.sequences import store
from pipeline.tracking import Tracker
from pipeline.tracking.evaluation import remove_predictions, split_counts
from pipeline.tracking.model_card import render_card
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config

HOUR = 3_600_000
ROWS = {
    "item_id": [1, 1, 2, 3, 1, 2],
    "event_time": [0, HOUR, HOUR, 25 * HOUR, 2 * HOUR, 2 * HOUR],
    "history_rows": [0, 1, 9, 10, 5000, 49],
    "user_is_new": [True, True, False, False, False, False],
    "label.click": [1, 0, 1, 0, None, 1],
    "score.click": [0.8, 0.4, 0.5, 0.5, 0.9, 0.2],
}


@pytest.fixture
def lines() -> dict[tuple[str, str], Slice]:
    scores = np.array(ROWS["score.click"])
    table = pa.table(ROWS | {"logit.click": np.log(scores / (1 - scores))})
    counts = ItemCounts(np.array([1, 2]), np.array([5, 100]), np.zeros((2, 2), np.int64))
    found = slice_lines(table, counts, ["click"], hour_utc_offset=1)
    return {(line.by, line.slice): line for line in found}


def test_each_row_is_in_one_slice_of_each_kind(lines: dict[tuple[str, str], Slice]) -> None:
    sizes = {key: line.rows for key, line in lines.items()}
    assert {key: rows for key, rows in sizes.items() if key[0] != "hour"} == {
        ("user", "known"): 3,
        ("user", "new"): 2,
        ("history", "0"): 1,
        ("history", "1–9"): 2,
        ("history", "10–49"): 2,
        ("history", "1000+"): 0,  # its one row has no known label
        ("popularity", "0"): 1,
        ("popularity", "1–9"): 2,
        ("popularity", "100–999"): 2,
    }
    assert {key[1]: rows for key, rows in sizes.items() if key[0] == "hour"} == {
        "01": 1,
        "02": 3,
        "03": 1,
    }


def test_the_figures_of_a_slice(lines: dict[tuple[str, str], Slice]) -> None:
    known = lines["user", "known"]
    assert (known.positives, known.mean_score) == (2, pytest.approx(0.4))
    assert known.calibration == pytest.approx(0.4 / (2 / 3))
    labels = np.array([True, False, True])
    assert known.auc == auc(np.array([0.5, 0.5, 0.2]), labels) == 0.25

    alike = lines["history", "0"]
    assert math.isnan(alike.auc)
    assert math.isnan(alike.ne)
    assert alike.calibration == pytest.approx(0.8)
    assert math.isnan(lines["popularity", "0"].calibration)


def test_names_of_ranges() -> None:
    assert range_names((1, 10, 50)) == ["0", "1–9", "10–49", "50+"]


def test_numbers_of_rows_are_tags_and_undefined_metrics_nothing() -> None:
    found = {"val/ne/a": 0.5, "val/ne/b": math.nan, "val/rows/a": 3, "val/gauc_users/a": 2}
    metrics, tags = split_counts(found | {"masked_pair_share": 0.1})
    assert metrics == {"val/ne/a": 0.5, "masked_pair_share": 0.1}
    assert tags == {"val/rows/a": "3", "val/gauc_users/a": "2"}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = tiny_config(tmp_path_factory.mktemp("runs"))
    publish_sequences(cfg)
    save_tiny_model(cfg, cfg.model_dir)
    evaluator.evaluate_model(cfg, cfg.model_dir)
    return cfg


def test_slices_lie_beside_the_weights_and_on_the_card(evaluated: RunConfig) -> None:
    cfg = evaluated
    found = read_slices(cfg.model_dir)
    metrics = evaluator.read_metrics(cfg.model_dir)
    for split, lines in found.items():
        for kind in ("user", "history", "popularity", "hour"):
            rows = sum(line.rows for line in lines if (line.by, line.task) == (kind, "is_click"))
            assert rows == metrics[f"{split}/rows/is_click"]
    assert (cfg.run_dir / "evaluation" / "slices_test.png").stat().st_size > 1000

    card = render_card(cfg, cfg.model_dir, metrics, "run")
    assert "| val NE of the item's rate | " in card
    assert "| test | is_click rows | AUC | calibration | is_like rows" in card
    (line,) = [line for line in found["test"] if (line.slice, line.task) == ("known", "is_click")]
    assert f"| user known | {line.rows} | {line.auc:.4f} | {line.calibration:.2f} |" in card

    # it says which encoder the version has
    assert "ULTRA-HSTU (arXiv:2602.16986): one user's history" in card
    baseline = replace(cfg, model=replace(cfg.model, encoder="sasrec"))
    of_baseline = render_card(baseline, cfg.model_dir, metrics, "run")
    assert "The encoder `sasrec`" in of_baseline
    assert "2602.16986" not in of_baseline


@pytest.mark.cluster
def test_an_evaluation_goes_into_the_run_that_trained_the_model(
    evaluated: RunConfig, tracked: RunConfig, tmp_path: Path
) -> None:
    cfg = replace(evaluated, tracking=tracked.tracking)
    tracker = Tracker(tracked)
    with tracker.start_run(tracked, store.read_manifest(tracked.sequence_dir)) as run:
        pass
    loaded = load_model(cfg.model_dir)
    made_by = {"mlflow_run_id": run.run_id, "steps": 70}
    save_model(tmp_path / "model", loaded.model, loaded.cfg, loaded.maps, made_by)

    metrics = evaluator.read_metrics(cfg.model_dir)
    folder = evaluator.evaluation_folder(cfg.run_dir, cfg.evaluate)
    assert tracker.log_evaluation(tmp_path / "model", metrics, folder) == run.run_id
    assert tracker.log_evaluation(tmp_path / "model", {"val/ne/is_click": 2.0}, folder, "other")

    client = mlflow.MlflowClient()
    found = client.get_run(run.run_id)
    (point,) = client.get_metric_history(run.run_id, "val/ne/is_click")
    assert (point.value, point.step) == (metrics["val/ne/is_click"], 70)
    assert found.data.metrics["other/val/ne/is_click"] == 2.0
    assert not [key for key in found.data.metrics if "/rows/" in key or "gauc_" in key]
    assert found.data.tags["val/rows/is_click"] == str(metrics["val/rows/is_click"])

    names = {file.path for file in client.list_artifacts(run.run_id, "evaluation")}
    assert {"evaluation/roc_val.png", "evaluation/slices_test.json"} <= names
    assert "evaluation/predictions" not in names

    def remove() -> int:
        return remove_predictions(tracker.server_url, tracker.cfg.tracking.experiment)

    # as tracking.log_predictions would have it, and jobs.forget_user must not leave it
    for place in ("evaluation/predictions", "evaluation/other/predictions"):
        run.log_artifacts(folder / "predictions", place)
    assert (remove(), remove()) == (2, 0)
    left = {file.path for file in client.list_artifacts(run.run_id, "evaluation")}
    assert left == names
    tables = json.loads(found.data.tags["mlflow.loggedArtifacts"])
    assert {"path": "evaluation/slices_val.json", "type": "table"} in tables

    shutil.rmtree(tmp_path / "model")
    save_model(tmp_path / "model", loaded.model, loaded.cfg, loaded.maps, {"mlflow_run_id": "no"})
    assert tracker.log_evaluation(tmp_path / "model", metrics, folder) is None
