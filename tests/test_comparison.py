"""Models beside each other: paired differences with intervals, against plain resampling."""

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.config import UserError
from pipeline.evaluate.compared import evaluate_missing, expand_searches
from pipeline.evaluate.comparison import (
    ScoredRows,
    compare_models,
    measure_rows,
    metric_of,
    read_scores,
    slice_rows,
)
from pipeline.evaluate.comparison_page import (
    console_table,
    differing_settings,
    make_comparison,
    read_facts,
    require_runs,
    write_page,
)
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config


def make_rows(num: int = 600, noise: float = 3.0) -> ScoredRows:
    """A model that knows something, one that knows less, and one that is the first once more."""
    rng = np.random.default_rng(0)
    truth = rng.normal(size=(num, 2))
    labels = (truth + rng.normal(size=(num, 2)) > 0).astype(float)
    labels[rng.random((num, 2)) < 0.1] = np.nan
    good = truth.round(1)  # with ties
    return ScoredRows(
        tasks=("is_click", "is_like"),
        user_id=rng.integers(0, 40, num),
        item_id=rng.integers(0, 9, num),
        history_rows=rng.integers(0, 60, num),
        user_is_new=rng.random(num) < 0.2,
        labels=labels,
        logits={"good": good, "worse": good + noise * rng.normal(size=(num, 2)), "same": good},
    )


def resampled(rows: ScoredRows, draw: np.ndarray) -> ScoredRows:
    """The rows of the drawn users, each as often as it was drawn, under a user of its own."""
    parts, users = [], []
    for number, user in enumerate(draw):
        mine = np.flatnonzero(rows.user_id == user)
        parts.append(mine)
        users.append(np.full(len(mine), number))
    chosen = np.concatenate(parts)
    taken = rows.take(chosen)
    return ScoredRows(
        taken.tasks,
        np.concatenate(users),
        taken.item_id,
        taken.history_rows,
        taken.user_is_new,
        taken.labels,
        taken.logits,
    )


def test_a_draw_is_the_metric_of_the_drawn_users_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against copies of the rows, ties and repeated users included."""
    rows = make_rows(200)
    known = rows.take(rows.known("is_click"))
    users = np.unique(known.user_id)
    drawn = np.random.default_rng(3).choice(users, len(users))
    counts = np.array([np.count_nonzero(drawn == user) for user in users])

    class Drawn:
        def multinomial(self, *_: object) -> np.ndarray:
            return counts

    monkeypatch.setattr(np.random, "default_rng", lambda _: Drawn())
    found = compare_models(rows, "good", "worse", "is_click", samples=1)
    copies = resampled(known, drawn)
    for name, difference in found.items():
        values = []
        for model in ("good", "worse"):
            logits, labels = copies.logits[model][:, 0], copies.labels[:, 0] > 0
            values.append(metric_of(name, logits, labels, copies.user_id))
        assert difference.low == pytest.approx(values[1] - values[0]), name


def test_the_difference_itself_is_of_all_rows_and_has_a_sign() -> None:
    rows = make_rows()
    found = compare_models(rows, "good", "worse", "is_click", samples=200)
    for name, difference in found.items():
        before, after = (measure_rows(rows, model)[name]["is_click"] for model in ("good", "worse"))
        assert difference.value == pytest.approx(after - before), name
        assert difference.low < difference.value < difference.high
        assert difference.is_clear
    assert found["ne"].value > 0 > found["auc"].value
    nothing = compare_models(rows, "good", "same", "is_like", samples=20)
    assert all((d.value, d.low, d.high, d.is_clear) == (0, 0, 0, False) for d in nothing.values())


def test_slices_are_of_users_and_of_histories() -> None:
    rows = make_rows()
    found = slice_rows(rows)
    assert found["users without a row in training"].sum() == rows.user_is_new.sum()
    assert (
        found["10 to 29 rows of history"].tolist()
        == ((rows.history_rows >= 10) & (rows.history_rows < 30)).tolist()
    )
    lengths = [inside for name, inside in found.items() if "history" in name]
    assert sum(inside.sum() for inside in lengths) == len(rows.user_id)
    assert "1,000 rows of history and more" not in found


def write_predictions(folder: Path, rows: ScoredRows, model: str, items: np.ndarray) -> Path:
    columns: dict[str, object] = {
        "user_id": rows.user_id,
        "item_id": items,
        "event_time": np.arange(len(items)),
        "history_rows": rows.history_rows,
        "user_is_new": rows.user_is_new,
    }
    for number, task in enumerate(rows.tasks):
        label = rows.labels[:, number]
        columns[f"label.{task}"] = pa.array(
            np.nan_to_num(label).astype(np.int8), mask=np.isnan(label)
        )
        columns[f"logit.{task}"] = rows.logits[model][:, number].astype(np.float32)
    path = folder / "evaluation" / "predictions" / "test.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pa.table(columns), path)
    return folder


def test_only_the_same_rows_are_compared(tmp_path: Path) -> None:
    rows = make_rows(50)
    first = write_predictions(tmp_path / "a", rows, "good", rows.item_id)
    second = write_predictions(tmp_path / "b", rows, "worse", rows.item_id)
    found = read_scores({"a": first, "b": second}, "test")
    assert found.tasks == rows.tasks
    order = np.lexsort((np.arange(50), rows.item_id, rows.user_id))
    np.testing.assert_array_equal(found.labels, rows.labels[order])
    np.testing.assert_allclose(found.logits["b"], rows.logits["worse"][order], rtol=1e-6)

    other = write_predictions(tmp_path / "c", rows, "good", rows.item_id + 1)
    with pytest.raises(UserError, match="'a' and 'c' were evaluated on other rows of test"):
        read_scores({"a": first, "c": other}, "test")
    # the same rows after outcomes that came late
    labels = rows.labels.copy()
    labels[3:5, 1] = 1 - np.nan_to_num(labels[3:5, 1])
    late = write_predictions(tmp_path / "e", replace(rows, labels=labels), "good", rows.item_id)
    with pytest.raises(UserError, match=r"'a' and 'e' .* other labels of is_like \(2 of"):
        read_scores({"a": first, "e": late}, "test")
    with pytest.raises(UserError, match=r"run 'd' has no predictions of test .* jobs\.evaluate"):
        read_scores({"a": first, "d": tmp_path / "d"}, "test")


def test_what_a_comparison_lacks_is_known_before_it(tmp_path: Path) -> None:
    rows = make_rows(9)
    folder = write_predictions(tmp_path / "a", rows, "good", rows.item_id)
    with pytest.raises(UserError, match=r"run 'a' has no model at .*: train it first"):
        require_runs(str(tmp_path), ["a"], "test", scored=True)

    (folder / "model").mkdir()
    (folder / "model" / "artifact.json").write_text("{}")
    require_runs(str(tmp_path), ["a"], "test", scored=True)
    require_runs(str(tmp_path), ["a"], "val", scored=False)
    with pytest.raises(UserError, match=r"run 'a' has no predictions of val .* --evaluate"):
        require_runs(str(tmp_path), ["a"], "val", scored=True)


def test_the_page_needs_no_other_file_and_says_what_is_clear(tmp_path: Path) -> None:
    rows = make_rows()
    facts = {}
    for name, width in (("good", 16), ("worse", 8)):
        folder = tmp_path / name
        (folder / "model").mkdir(parents=True)
        (folder / "train").mkdir()
        settings = {"name": name, "model": {"encoder": "<hstu>", "num_layers": 2, "d_model": width}}
        (folder / "model" / "config.json").write_text(json.dumps(settings))
        extra = {"steps": 30, "train_seconds": 7.5, "mlflow_run_id": "0" * 32}
        (folder / "model" / "artifact.json").write_text(json.dumps({"extra": extra}))
        lines = [{"step": step, "train/loss": 1 / step} for step in (10, 20, 30)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "train" / "metrics.jsonl").write_text(text)
        facts[name] = read_facts(name, folder)

    comparison = make_comparison(rows, facts, "test", samples=50)
    assert differing_settings(facts) == {"model.d_model": {"good": 16, "worse": 8}}
    page = write_page(tmp_path, comparison).read_text()
    assert 'src="data:image/png;base64,' in page
    assert not re.search(r"(src|href)=\"(?!data:)", page), "nothing is loaded from elsewhere"
    assert "&lt;hstu&gt;" in page
    assert 'class="worse"' in page
    assert "smoothed rate" not in page

    said = console_table(comparison).splitlines()
    assert said[1].startswith("good") and said[1].endswith("held against")
    assert said[2].startswith("worse") and said[2].endswith("0 / 6 of 6")
    figures = json.loads((tmp_path / "comparison.json").read_text())
    assert figures["metrics"]["good/auc/is_click"] == comparison.metrics["good"]["auc"]["is_click"]
    assert figures["costs"]["worse"]["train_seconds"] == 7.5
    assert comparison.run_ids == {"good": "0" * 32, "worse": "0" * 32}


def test_a_search_stands_for_its_trials_best_first(tmp_path: Path) -> None:
    trials = [
        {"name": "demo-tune-02", "status": "finished"},
        {"name": "demo-tune-00", "status": "finished"},
        {"name": "demo-tune-01", "status": "ended early"},
    ]
    (tmp_path / "demo-tune").mkdir()
    (tmp_path / "demo-tune" / "trials.json").write_text(json.dumps(trials))
    found = expand_searches(str(tmp_path), ["demo", "demo-tune", "demo-tune-00"])
    assert found == ["demo", "demo-tune-02", "demo-tune-00"]

    (tmp_path / "demo-tune" / "trials.json").write_text(json.dumps(trials[2:]))
    with pytest.raises(UserError, match="'demo-tune': no trial was trained to its end"):
        expand_searches(str(tmp_path), ["demo-tune"])


def test_what_has_no_predictions_is_scored_and_the_rest_is_left(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    publish_sequences(cfg)
    trained = replace(cfg, name="one", sequences=replace(cfg.sequences, from_run="tiny"))
    save_tiny_model(trained, trained.model_dir)
    (trained.model_dir / "metrics.json").unlink()
    told: list[tuple[Path, bool]] = []

    def tell(model_dir: Path, metrics: dict[str, float], folder: Path) -> None:
        assert (folder / "predictions" / "val.parquet").exists()
        told.append((model_dir, {"val/ne/is_click", "test/ne/is_click"} <= metrics.keys()))

    for _ in range(2):  # the second time there is nothing to do
        evaluate_missing(cfg.runs_dir, ["one", "not trained"], cfg.evaluate, "val", tell)
    assert told == [(trained.model_dir, True)]
