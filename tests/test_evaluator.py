"""Evaluation: the same numbers however it is spread, and never those of other labels or rows."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.batches.examples import user_events
from pipeline.batches.loader import evaluation_batches
from pipeline.config import RunConfig, UserError
from pipeline.evaluate import evaluator, parts, spread
from pipeline.evaluate.item_rates import PRIOR, baseline_metrics, count_items, item_logits
from pipeline.evaluate.metrics import TaskMetrics, auc
from pipeline.model.artifact import load_model
from pipeline.model.flops import Flops
from pipeline.model.work import count_work
from pipeline.sequences import store
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config

SPLITS = ("val", "test")


@pytest.fixture(scope="module")
def cfg(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    cfg = tiny_config(tmp_path_factory.mktemp("runs"))
    publish_sequences(cfg)
    save_tiny_model(cfg, cfg.model_dir)
    (cfg.model_dir / "metrics.json").unlink()
    return cfg


def copied(cfg: RunConfig, name: str) -> RunConfig:
    """The same store and model, and what was found of it, under a name of its own."""
    copy = replace(cfg, name=name)
    shutil.copytree(cfg.run_dir, copy.run_dir)
    return copy


@pytest.fixture(scope="module")
def evaluated(cfg: RunConfig) -> RunConfig:
    """Both periods evaluated, in one go."""
    copy = copied(cfg, "evaluated")
    evaluator.evaluate_model(copy, copy.model_dir)
    return copy


def predictions(cfg: RunConfig, split: str) -> pa.Table:
    return pq.read_table(cfg.run_dir / "evaluation" / "predictions" / f"{split}.parquet")


# Speed without other numbers


@pytest.mark.parametrize("rows_of_a_part", [30, 10**6])
def test_no_cut_of_the_work_changes_the_numbers(
    cfg: RunConfig, evaluated: RunConfig, monkeypatch: pytest.MonkeyPatch, rows_of_a_part: int
) -> None:
    whole = evaluator.read_metrics(evaluated.model_dir)

    monkeypatch.setattr(parts, "ROWS_OF_A_PART", rows_of_a_part)
    other = copied(cfg, f"other-{rows_of_a_part}")
    cut = evaluator.evaluate_model(other, other.model_dir)
    num_parts = len(parts.plan_parts(store.read_manifest(cfg.sequence_dir)))
    assert num_parts > 4 if rows_of_a_part == 30 else num_parts == 2

    assert cut == pytest.approx(whole, abs=1e-6, nan_ok=True)
    for split in SPLITS:
        ours, theirs = predictions(evaluated, split), predictions(other, split)
        names = ["user_id", "item_id", "event_time", "history_rows", "user_is_new"]
        assert ours.select(names) == theirs.select(names)


def test_one_pass_over_both_periods_gives_the_logits_of_a_pass_each(cfg: RunConfig) -> None:
    loaded = load_model(cfg.model_dir)
    together = evaluator.score_store(cfg, loaded, SPLITS)
    for split in SPLITS:
        alone = evaluator.score_store(cfg, loaded, [split]).splits[split]
        ours, theirs = together.splits[split].predictions, alone.predictions
        assert len(ours) > 30 and ours.schema == theirs.schema
        for name in ours.column_names:
            if name.startswith(("logit.", "score.")):
                np.testing.assert_allclose(ours[name], theirs[name], atol=1e-5, rtol=0)
            else:
                assert ours[name] == theirs[name], name
        assert together.splits[split].metrics.result() == pytest.approx(
            alone.metrics.result(), abs=1e-5, nan_ok=True
        )


def test_the_threads_of_an_evaluation_leave_those_of_pytorch_as_they_were(cfg: RunConfig) -> None:
    before = torch.get_num_threads()
    copy = copied(cfg, "threads")
    evaluator.evaluate_model(copy, copy.model_dir)
    assert torch.get_num_threads() == before


def test_work_is_that_of_requests_one_by_one(cfg: RunConfig) -> None:
    """It says what a request costs in serving, whichever way the scores were made."""
    loaded = load_model(cfg.model_dir)
    found = evaluator.score_store(cfg, loaded, SPLITS)
    for split in SPLITS:
        work = Flops()
        for part in evaluation_batches(cfg, loaded.maps, split):
            work.add(count_work(part.batch, cfg))
        assert found.work[split] == work


@pytest.mark.cluster
def test_workers_of_a_cluster_give_the_numbers_of_one_process(
    cfg: RunConfig, evaluated: RunConfig, local_ray: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = evaluator.read_metrics(evaluated.model_dir)

    monkeypatch.setattr(spread, "LARGE_STORE", 1)
    monkeypatch.setattr(parts, "ROWS_OF_A_PART", 60)
    shared = copied(cfg, "shared")
    planned = parts.plan_parts(store.read_manifest(shared.sequence_dir))
    assert spread.is_worth_workers("auto", planned)
    found = evaluator.evaluate_model(shared, shared.model_dir)
    assert found == pytest.approx(expected, abs=1e-6, nan_ok=True)

    (shared.model_dir / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="corrupted"):
        evaluator.evaluate_model(shared, shared.model_dir)


def test_progress_says_what_is_done() -> None:
    planned = [parts.EvaluationPart(0, 0, 1, 100), parts.EvaluationPart(1, 0, 1, 300)]
    progress = spread.Progress(planned)
    assert "0 of 2 parts, 0 % of the rows" in progress.line()
    assert "no part done yet" in progress.line()
    progress.add_part(1)
    assert "1 of 2 parts, 75 % of the rows" in progress.line()
    assert "s left" in progress.line()


def test_a_sample_is_of_whole_users_and_leaves_the_metrics_of_the_whole(
    evaluated: RunConfig,
) -> None:
    copy = copied(evaluated, "sampled")
    before = (copy.model_dir / "metrics.json").read_text()
    every = predictions(copy, "val")

    sample = replace(copy, evaluate=replace(copy.evaluate, sample=0.5))
    found = evaluator.evaluate_model(sample, copy.model_dir)
    assert found["sample_share"] == 0.5
    assert (copy.model_dir / "metrics.json").read_text() == before
    folder = copy.run_dir / "evaluation" / "sample"
    assert json.loads((folder / "metrics.json").read_text())["sample_share"] == 0.5
    assert predictions(copy, "val") == every

    some = pq.read_table(folder / "predictions" / "val.parquet")
    users = set(some["user_id"].to_pylist())
    assert 0 < len(users) < len(set(every["user_id"].to_pylist()))
    expected = [row for row in every.to_pylist() if row["user_id"] in users]
    assert len(expected) == len(some)


def test_metrics_say_that_negatives_are_drawn(
    cfg: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = copied(cfg, "drawn")
    few = replace(copy, evaluate=replace(copy.evaluate, sample=0.1))
    loaded = load_model(copy.model_dir)
    drawing = replace(loaded.cfg, examples=replace(loaded.cfg.examples, negatives=4))
    monkeypatch.setattr(evaluator, "load_model", lambda _: replace(loaded, cfg=drawing))
    assert evaluator.evaluate_model(few, copy.model_dir)["drawn_negatives"] == 4


def test_the_users_of_a_sample_are_drawn_by_the_seed() -> None:
    users = np.arange(100_000)
    chosen = parts.sampled_users(users, 0.1, seed=0)
    assert chosen.mean() == pytest.approx(0.1, abs=0.01)
    assert (parts.sampled_users(users[::-1], 0.1, seed=0)[::-1] == chosen).all()
    assert (parts.sampled_users(users, 0.1, seed=1) != chosen).any()


# Never the labels of another task, nor other rows in the place of the model's


def test_labels_come_from_the_model_and_a_difference_is_refused(evaluated: RunConfig) -> None:
    copy = copied(evaluated, "labels")
    metrics = evaluator.read_metrics(copy.model_dir)
    before = (copy.model_dir / "metrics.json").read_bytes()

    source = replace(copy.source, actions=("is_like", "is_click"))
    others = {
        r"tasks: the model was trained with \['is_click', 'is_like'\], got \['is_like'\]": replace(
            copy, tasks=("is_like",)
        ),
        r"source\.actions: the model was trained with": replace(copy, source=source),
    }
    for message, other in others.items():
        with pytest.raises(UserError, match=message):
            evaluator.evaluate_model(other, copy.model_dir)
    assert (copy.model_dir / "metrics.json").read_bytes() == before
    assert evaluator.evaluate_model(copy, copy.model_dir) == pytest.approx(metrics, nan_ok=True)


def test_features_are_the_models_whatever_the_configuration_says(evaluated: RunConfig) -> None:
    copy = copied(evaluated, "features")
    metrics = evaluator.read_metrics(copy.model_dir)
    bare = replace(copy, features=replace(copy.features, dense={}, watch_seconds=()))
    assert evaluator.evaluate_model(bare, copy.model_dir) == pytest.approx(metrics, nan_ok=True)


def test_other_rows_and_settings_have_a_name_of_their_own(evaluated: RunConfig) -> None:
    copy = copied(evaluated, "rows")
    before = (copy.model_dir / "metrics.json").read_bytes()

    later = replace(copy.split, t_test="2022-05-04T00:00:00+08:00")
    others = {
        r"split\.t_test is '.*' of the model and '2022-05-04": replace(copy, split=later),
        r"evaluate\.precision is 'fp32' of the model and 'bf16' here": replace(
            copy, evaluate=replace(copy.evaluate, precision="bf16")
        ),
    }
    for message, other in others.items():
        with pytest.raises(UserError, match=message + r"[^$]*--as NAME"):
            evaluator.evaluate_model(other, copy.model_dir)
        found = evaluator.evaluate_model(other, copy.model_dir, name="other")
        assert found["val/rows/is_click"] > 0
        assert (copy.run_dir / "evaluation" / "other" / "metrics.json").exists()
        assert (copy.model_dir / "metrics.json").read_bytes() == before


def test_sequences_come_from_the_configuration_wherever_the_model_had_its_own(
    evaluated: RunConfig,
) -> None:
    copy = copied(evaluated, "owner")
    metrics = evaluator.read_metrics(copy.model_dir)
    shared = replace(copy.sequences, from_run=copy.name)
    borrower = replace(copy, name="borrower", sequences=shared)  # it has none itself
    found = evaluator.evaluate_model(borrower, copy.model_dir, name="borrowed")
    assert found["val/ne/is_click"] == metrics["val/ne/is_click"]
    assert evaluator.score_model(borrower, copy.model_dir)["is_click"] == metrics["val/ne/is_click"]


def test_a_split_alone_leaves_the_other_one(cfg: RunConfig, evaluated: RunConfig) -> None:
    one = copied(cfg, "one-by-one")
    evaluator.evaluate_model(one, one.model_dir, ["val"])
    evaluator.evaluate_model(one, one.model_dir, ["test"])
    whole = evaluator.read_metrics(evaluated.model_dir)
    assert evaluator.read_metrics(one.model_dir) == pytest.approx(whole, nan_ok=True)


def test_an_empty_split_is_told_first_and_the_other_one_is_scored(
    cfg: RunConfig, caplog: pytest.LogCaptureFixture
) -> None:
    copy = copied(cfg, "empty")
    split = replace(cfg.split, t_test="2030-01-01T00:00:00+00:00", t_end=None)
    found = evaluator.evaluate_model(replace(copy, split=split), copy.model_dir, name="late")
    said = caplog.records[0].message
    assert "split.t_test: the test period holds no request, the sequences are of 2022-" in said
    assert found["val/rows/is_click"] > 0
    assert not [key for key in found if key.startswith("test/")]


def test_metrics_are_json_and_undefined_ones_null(cfg: RunConfig, tmp_path: Path) -> None:
    evaluator.write_metrics(tmp_path / "metrics.json", {"val/ne/a": math.nan, "val/ne/b": 0.5})
    text = (tmp_path / "metrics.json").read_text()

    def refuse(name: str) -> None:
        raise AssertionError(name)

    assert json.loads(text, parse_constant=refuse) == {"val/ne/a": None, "val/ne/b": 0.5}
    found = evaluator.read_metrics(tmp_path)
    assert math.isnan(found["val/ne/a"])
    assert found["val/ne/b"] == 0.5


@pytest.mark.parametrize("labels", [[True, False, True], [False, True, True]])
def test_auc_of_scores_that_are_no_numbers_is_undefined(labels: list[bool]) -> None:
    scores = np.array([0.1, np.nan, 0.3])
    assert math.isnan(auc(scores, np.array(labels)))
    metrics = TaskMetrics()
    metrics.add(scores, np.array(labels), np.zeros(3, np.int64))
    assert math.isnan(metrics.result()["gauc"])


# The baseline


def test_the_baseline_is_the_items_smoothed_rate_on_the_same_rows(
    cfg: RunConfig, evaluated: RunConfig
) -> None:
    users = user_events(store.read_sequences(cfg.sequence_dir), cfg.source, cfg.features)
    counts = count_items(users, cfg.split, cfg.task_bits)

    # by hand, row by row
    events, known, positive = users.events, {}, {}
    for row, item in enumerate(events.item_id.tolist()):
        if users.request_time[row] >= cfg.split.train_end_ms or events.order_only[row]:
            continue
        if events.known_mask[row] & 1:
            known[item] = known.get(item, 0) + 1
            positive[item] = positive.get(item, 0) + int(events.action_mask[row] & 1)
    base = sum(positive.values()) / sum(known.values())

    items = np.array([*sorted(known)[:5], 10**9])
    logits = item_logits(counts, items)[:, 0]
    for item, logit in zip(items.tolist(), logits.tolist(), strict=True):
        rate = (positive.get(item, 0) + PRIOR * base) / (known.get(item, 0) + PRIOR)
        assert logit == pytest.approx(math.log(rate / (1 - rate)))

    metrics = evaluator.read_metrics(evaluated.model_dir)
    table = predictions(evaluated, "val")
    found = baseline_metrics(counts, table, cfg.tasks)
    assert metrics["val/baseline_ne/is_click"] == pytest.approx(found["baseline_ne/is_click"])
