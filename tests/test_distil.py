"""An ensemble distilled into one model, and the choice on validation that leads to its test."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from benchmarks.quality import choose, ensemble, kuairand_report, report, train_plan
from benchmarks.quality.distil import TaughtLoader, Teacher, candidate_places
from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import ConfigError, RunConfig, UserError
from pipeline.evaluate.metrics import auc
from pipeline.figures import append_run, read_runs
from tests.worlds.tiny import publish_sequences, tiny_config


@pytest.fixture(scope="module")
def taught_plan(tmp_path_factory):
    """A plan of two teachers and what they teach, carried out; its folder and settings."""
    folder = tmp_path_factory.mktemp("taught")
    cfg = tiny_config(folder / "runs", train={"batch_users": 8, "epochs": 1})
    publish_sequences(cfg)
    (folder / "preset.yaml").write_text(yaml.safe_dump(config.to_dict(cfg)))
    plan = {
        "config": str(folder / "preset.yaml"),
        "runs": {"taught": {}, "plain": {}},  # the one that waits stands first
        "taught": {"taught": {"by": "plain", "seeds": [0, 1], "weight": 0.5}},
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    return cfg, planned(folder, cfg, seeds=[0, 1])


def planned(folder: Path, cfg: RunConfig, seeds: list[int]) -> list[train_plan.PlannedRun]:
    options = argparse.Namespace(
        overrides=[],
        seeds=seeds,
        store=str(cfg.sequence_dir),
        device="cpu",
        out=folder / "out.jsonl",
        predictions=folder / "predictions",
        teachers=folder / "teachers",
    )
    return train_plan.planned(folder / "plan.yaml", options)


def labels_of(batch: SequenceBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and their weights, [C, tasks] both."""
    assert batch.labels is not None and batch.label_weight is not None
    return batch.labels, batch.label_weight


def test_teachers_have_all_their_seeds_whatever_is_asked_for(taught_plan):
    cfg, runs = taught_plan
    found = [(run.cfg.name, run.cfg.seed) for run in planned(runs[0].out.parent, cfg, seeds=[1])]
    assert found == [("plain", 1), ("taught", 1), ("plain", 0)]


def test_a_teacher_is_the_mean_of_what_its_models_think_of_each_training_row(taught_plan):
    cfg, runs = taught_plan
    teachers = [run for run in runs if run.cfg.name == "plain"]
    student = next(run for run in runs if run.cfg.name == "taught")
    assert not student.is_ready
    for run in teachers:
        train_plan.carry_out(run)
    assert student.is_ready and student.taught is not None

    maps = fit_features(cfg)
    plain = TrainLoader(cfg, maps, step_plan(cfg))
    teacher = Teacher.of(student.taught.scores, cfg.tasks)
    taught = TaughtLoader(cfg, maps, plain.plan, teacher, 0.25)
    tables = [pq.read_table(path) for path in student.taught.scores]
    by_row = {}
    for row in range(len(tables[0])):
        key = tables[0]["user_id"][row].as_py(), tables[0]["position"][row].as_py()
        pair = [table[f"score.{cfg.tasks[0]}"][row].as_py() for table in tables]
        by_row[key] = sum(pair) / 2

    # every candidate of the epoch
    seen = 0
    for share, batch, other in zip(
        plain.epoch_shares(0), plain.batches(0), taught.batches(0), strict=True
    ):
        labels, weight = labels_of(batch)
        mixed, mixed_weight = labels_of(other)
        examples = share.examples
        at = 0
        for user, begin, end in zip(
            examples.user, examples.target_begin, examples.target_end, strict=True
        ):
            for row in range(begin, end):
                key = int(share.users.user_id[user]), int(share.users.events.position[row])
                expected = 0.75 * float(labels[at, 0]) + 0.25 * by_row[key]
                assert float(mixed[at, 0]) == pytest.approx(expected, abs=1e-6)
                at += 1
        seen += at
        assert torch.equal(weight, mixed_weight)
    assert seen == len(by_row)

    # rows without a label: the teacher's scores alone, at a quarter of a row's weight
    filled = TaughtLoader(cfg, maps, plain.plan, teacher, 0.25, unknown=0.25)
    elsewhere = pickle.loads(pickle.dumps(filled))  # as in a process that makes batches
    num_unknown = 0
    for share, batch, other, again in zip(
        plain.epoch_shares(0),
        taught.batches(0),
        filled.batches(0),
        elsewhere.batches(0),
        strict=True,
    ):
        labels, weight = labels_of(batch)
        filled_labels, filled_weight = labels_of(other)
        is_unknown = weight == 0
        num_unknown += int(is_unknown.sum())
        scores = torch.from_numpy(teacher.scores_of(*candidate_places(share)))
        assert torch.equal(filled_labels[is_unknown], scores[is_unknown])
        assert torch.equal(filled_labels[~is_unknown], labels[~is_unknown])
        assert (filled_weight[is_unknown] == 0.25).all()
        assert torch.equal(filled_weight[~is_unknown], weight[~is_unknown])
        assert torch.equal(filled_labels, labels_of(again)[0])
    assert num_unknown > 0

    with pytest.raises(UserError, match="1 of 1 training rows were not scored"):
        teacher.scores_of(np.array([10**9]), np.array([0]))


def test_a_student_waits_for_its_teachers_and_says_who_they_were(taught_plan):
    _, runs = taught_plan
    waiting = [run for run in runs if not train_plan.finished(run)]
    assert train_plan.run_all(waiting, 1, budget_s=0) == len(waiting)  # none begins
    student = next(run for run in runs if run.cfg.name == "taught")
    (line,) = train_plan.carry_out(student)
    assert line["config"]["taught"] == {"by": "plain", "seeds": [0, 1], "weight": 0.5}
    assert train_plan.finished(student)
    plain = next(one for one in read_runs(student.out) if one["name"] == "plain")
    assert "taught" not in plain["config"]
    assert plain["losses"] != line["losses"]

    # the one beside the other on the same rows
    found = report.measure_differences(
        ["plain"], student.out, student.predictions, "plain", "val", 5
    )
    assert found["beside"] == "plain"
    assert found["models"]["plain"][student.cfg.tasks[0]]["auc"] == (0, 0, 0)
    other = report.measure_differences(
        ["taught"], student.out, student.predictions, "plain", "val", 5
    )
    assert other["models"]["taught"][student.cfg.tasks[0]]["ne"][0] != 0
    assert "Against plain, paired bootstrap of 5 samples" in report.difference_text(other)[0]

    # the teachers together: each row's mean chance
    together = ensemble.mean_run("plain", student.out, student.predictions, "val")
    task, by_row, labels = student.cfg.tasks[0], {}, {}
    for seed in (0, 1):
        table = pq.read_table(student.predictions / f"plain-{seed}-val.parquet")
        for row in table.to_pylist():
            if row[f"label.{task}"] is None:
                continue
            key = tuple(row[name] for name in report.KEYS)
            chance = 1 / (1 + np.exp(-np.float64(row[f"logit.{task}"])))
            by_row[key] = by_row.get(key, 0) + chance / 2
            labels[key] = row[f"label.{task}"] > 0
    means, known = np.array(list(by_row.values())), np.array(list(labels.values()))
    assert (together["name"], together["seeds"]) == ("plain-mean2", [0, 1])
    assert together["seed"] is None, "not compared with one of its seeds"
    assert together["metrics"][f"val/auc/{task}"] == pytest.approx(auc(means, known))
    seed_gflop = next(r for r in read_runs(student.out) if r["name"] == "plain")["metrics"]
    costs = "forward_gflop_per_candidate"
    assert together["metrics"][costs] == pytest.approx(2 * seed_gflop[costs])
    with pytest.raises(SystemExit, match="has 1 seeds of 'taught' on val"):
        ensemble.mean_run("taught", student.out, student.predictions, "val")

    # what it taught is gone, and its line is there: another student would wait for ever
    other = next(run for run in runs if run.cfg.name == "taught" and not train_plan.finished(run))
    train_plan.refuse_lost_teachers([other])
    teacher = next(run for run in runs if run.teaches == student.taught.scores[0])
    teacher.teaches.unlink()
    with pytest.raises(UserError, match=r"taught: what its teacher thinks, .* is not there"):
        train_plan.refuse_lost_teachers([other])
    train_plan.refuse_lost_teachers([other, teacher])


def test_a_plan_whose_teacher_is_taught_or_missing_is_refused(tmp_path):
    def taught(**said: object) -> Path:
        path = tmp_path / "plan.yaml"
        path.write_text(
            yaml.safe_dump({"config": "x.yaml", "runs": {"a": {}, "b": {}}, "taught": {"a": said}})
        )
        return path

    right = {"by": "b", "seeds": [0], "weight": 0.5}
    assert train_plan.plan_taught(taught(**right), ["a", "b"])["a"].seeds == (0,)
    for change, message in (
        ({"by": "a"}, "by must be a run that is not taught, got a"),
        ({"weight": 0}, "weight must be above 0 and at most 1, got 0"),
        ({"unknown": 2}, "taught.a.unknown must be within 0 and 1, got 2"),
        ({"unkown": 1}, "may hold unknown"),
        ({"seeds": []}, "needs by, seeds and weight"),
    ):
        with pytest.raises(ConfigError, match=message):
            train_plan.plan_taught(taught(**right | change), ["a", "b"])


def validation_line(name: str, seed: int, auc: float) -> dict:
    metrics = {"val/auc/x": auc, "val/ne/x": 1 - auc}
    return {"name": name, "seed": seed, "config": {"tasks": ["x"]}, "metrics": metrics}


def test_the_best_on_validation_is_of_the_seeds_that_all_have():
    lines = []
    for seed in range(3):
        lines.append(validation_line("preset", seed, 0.70 + 0.01 * seed))
        lines.append(validation_line("better", seed, 0.72 + 0.01 * seed))
    lines.append(validation_line("preset", 3, 0.99))  # a seed that the other has not
    lines.append(validation_line("lucky", 0, 0.98))  # too few

    names = ["preset", "better", "lucky"]
    best, preset = choose.compare_runs(lines, names, "preset", num_seeds=3)
    assert (best.name, best.seeds, best.auc) == ("better", (0, 1, 2), pytest.approx(0.73))
    assert preset.auc == pytest.approx(0.71)
    assert best.gains == pytest.approx([0.02] * 3)
    with pytest.raises(UserError, match="preset: it has 4 seeds of 5"):
        choose.compare_runs(lines, names, "preset", num_seeds=5)


def test_the_plan_of_the_test_has_the_best_with_its_teachers_and_the_one_beside():
    plan = {
        "config": "x.yaml",
        "set": {"train.lr": 0.1},
        "runs": {"preset": {}, "teacher": {"train.epochs": 2}, "taught": {"train.epochs": 3}},
        "taught": {"taught": {"by": "teacher", "seeds": [0], "weight": 0.5}},
    }
    found = choose.plan_of_test(plan, "taught", "preset")
    assert found["splits"] == ["test"]
    assert found["set"] == {"train.lr": 0.1, "split.refit": True}
    assert found["runs"] == {
        "preset_test": {},
        "teacher_test": {"train.epochs": 2},
        "taught_test": {"train.epochs": 3},
    }
    assert found["taught"]["taught_test"]["by"] == "teacher_test"
    assert list(choose.plan_of_test(plan, "preset", "preset")["runs"]) == ["preset_test"]


def test_the_sections_say_what_was_chosen_and_show_its_test(tmp_path):
    """Lines as the plans' runs leave them, of one task."""
    runs_file = tmp_path / "kuairand.jsonl"
    costs = {"train/gflop_per_example": 0.001, "forward_gflop_per_candidate": 0.0001}
    costs |= {"masked_pair_share": 0.3, "truncated_token_share": 0.2, "train/step_ms": 70.0}

    def leave(name: str, seed: int | None, split: str, auc: float) -> None:
        metrics = costs | {f"{split}/auc/x": auc, f"{split}/ne/x": 1 - auc / 4}
        line = {"name": name, "seed": seed, "command": "c", "metrics": metrics}
        line |= {"config": {"tasks": ["x"]}, "environment": {"device": "a machine"}}
        append_run(runs_file, line)

    for seed in range(5):
        leave("preset", seed, "val", 0.70 + 0.001 * seed)
        leave("distilled", seed, "val", 0.71 + 0.001 * seed)
        leave("preset_test", seed, "test", 0.60)
        leave("distilled_test", seed, "test", 0.61)
        leave("rates_test", seed, "test", 0.99)  # not what validation chose
    leave("preset-mean5", None, "val", 0.72)
    leave("masks", 0, "val", 0.7)
    leave("masks-window_0", 0, "val", 0.6)
    leave("ml1m", 0, "val", 0.8)

    text = kuairand_report.variants_section(runs_file, taught_file=tmp_path / "none")
    assert "| preset-mean5 |" in text, "what the seeds are worth together"
    assert "It is `distilled`." in text
    assert "| distilled | 0.7120 | +0.0100 ± 0.0000 |" in text
    assert "| distilled_test | 0.6100 ± 0.0000 / 0.8475 ± 0.0000 |" in text
    assert "rates_test" not in text

    assert "One model taught by" not in text
    taught = kuairand_report.variants_section(runs_file, taught_file=runs_file)
    assert "One model taught by 5 seeds" in taught
    assert "By the same rule the best of these is `distilled`." in taught
    assert taught.count("| distilled_test | 0.6100 ± 0.0000 / 0.8475 ± 0.0000 |") == 2
    assert "+0.0100 ± 0.0000 / -0.0025 ± 0.0000" in taught, "distilled, less the preset's"

    masks = kuairand_report.masks_section(runs_file)
    assert masks.index("KuaiRand subset") < masks.index("MovieLens-1M")
    assert "| masks-window_0 | 0.6000 / 0.8500 |" in masks
