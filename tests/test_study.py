"""A scaling study: its plan, its laws, its report, and a whole one of tiny points."""

import json
import math
import multiprocessing
import os
import re
import shutil
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml

from benchmarks.quality import study_points
from benchmarks.quality.study_report import front_at, join_earlier, one_seed_words
from pipeline import config
from pipeline.config import ConfigError, RunConfig, UserError
from pipeline.evaluate.metrics import normalised_entropy
from pipeline.search.trial import train_trial
from pipeline.study import opening, running
from pipeline.study.entropy import approximate_entropy, measure_quality
from pipeline.study.figures import ladder_slopes, study_figures
from pipeline.study.laws import fit_log, fit_power, fit_slopes, interval, pareto_front
from pipeline.study.measured import COSTS, Key, Measured, is_finished
from pipeline.study.page import console_table, draw_laws, next_lines, write_study
from pipeline.study.plan import Point, StudyPlan, even_ladder, plan_points, read_plan
from pipeline.study.point import WORK, count_work, run_point
from pipeline.study.predictions import predict_largest
from pipeline.study.users import UserSums, read_users, user_sums
from tests.worlds.tiny import publish_sequences, tiny_config

ROOT = Path(__file__).parents[1]
STUDY: dict[str, Any] = {
    "baseline": "hstu",
    "lengths": [2, 6],
    "samples": 20,
    "sizes": {
        "d2": {"model.d_model": 2},
        "d4": {"model.d_model": 4},
        "d6": {"model.d_model": 6},
        "d8": {"model.d_model": 8},
        "d12": {"model.d_model": 12},
    },
    "encoders": {
        "ultra": {},
        "hstu": {
            "model.encoder": "hstu",
            "model.attention.window": None,
            "model.truncate_after_layer": None,
        },
    },
}


def write_plan(folder: Path, **changes: object) -> Path:
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(STUDY | changes, sort_keys=False))
    return path


def study_base(folder: Path) -> RunConfig:
    """A preset whose histories may be cut: without rates of the user's own rows."""
    dense = {"item": {"by": ["item_id"], "prior": 3}}
    base = tiny_config(folder, features={"dense": dense})
    train = replace(base.train, epochs=1, batch_users=6, log_every=2, lr=0.01, warmup_steps=0)
    return replace(base, train=train)


# The plan


def test_points_are_the_grid_and_the_largest_on_less_data(tmp_path: Path) -> None:
    base = study_base(tmp_path)
    plan = read_plan(write_plan(tmp_path, seeds=[0, 1]), base.tasks)
    points = plan_points(base, plan)
    assert len(points) == 2 * (2 * 2 * 5 + 2)
    first = points[0]
    assert first.trial.name == "tiny-study-ultra-d2-2-s0"
    assert first.trial.cfg.examples.max_history == 2
    assert first.trial.cfg.model.d_model == 2
    assert first.trial.cfg.sequences.from_run == "tiny"
    assert {point.trial.cfg.seed for point in points} == {0, 1}

    less = points[-1]
    assert (less.share, less.size, less.length) == (0.5, "d12", 6)
    assert less.trial.cfg.train.replay_share == 0.5
    assert less.trial.cfg.train.since_ms == base.split.val_ms, "so all rows are older"
    assert len({point.trial.name for point in points}) == len(points)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "sasrec"}, r"baseline must be one of encoders \['ultra', 'hstu'\], got 'sas"),
        ({"lengths": [6, 2]}, r"lengths must be ascending numbers of rows, got \[6, 2\]"),
        ({"sizes": {}}, "sizes must be a mapping of names to settings"),
        ({"sizes": {"a": {"split.t_val": "x"}}}, r"sizes\.a must be a setting of model, features"),
        ({"sizes": {"a": {"train.init": "champion"}}}, "that a study may vary, got 'train.init'"),
        ({"sizes": {"a b": {}}}, "sizes must be letters, digits"),
        ({"task": "bought"}, r"task must be one of tasks \['is_click', 'is_like'\]"),
        ({"data_share": 1.5}, r"data_share must be null, or in \(0, 1\), got 1.5"),
        ({"lenghts": [1]}, "unknown configuration key 'lenghts'"),
    ],
)
def test_a_mistake_in_a_study_is_named(tmp_path: Path, changes: dict, message: str) -> None:
    path = write_plan(tmp_path, **changes)
    with pytest.raises(ConfigError, match=message) as refused:
        read_plan(path, study_base(tmp_path).tasks)
    assert str(path) in str(refused.value)


def test_a_size_that_an_encoder_refuses_is_named_before_anything_starts(tmp_path: Path) -> None:
    base = study_base(tmp_path)
    publish_sequences(base)
    plan = read_plan(write_plan(tmp_path, encoders={"hstu": {"model.encoder": "hstu"}}), base.tasks)
    with pytest.raises(UserError, match=r"hstu, d2, length 2 is refused: model.attention.window"):
        opening.check_study(plan_points(base, plan))


def test_sizes_and_lengths_climb_together() -> None:
    assert even_ladder("abcde", [64, 256, 1024]) == [("a", 64), ("c", 256), ("e", 1024)]
    assert even_ladder("ab", [8, 16]) == [("a", 8), ("b", 16)]
    assert even_ladder("abc", [8]) == [("a", 8), ("b", 8), ("c", 8)]


CROSS = {"at_length": 2, "of_size": "d4", "ladder": ["d2", "d8"], "variants": {"wide": {}}}


def test_a_crossed_study_has_its_two_lines_and_the_ladder(tmp_path: Path) -> None:
    plan = read_plan(write_plan(tmp_path, **CROSS), study_base(tmp_path).tasks)
    sizes_at_2 = [("d2", 2), ("d4", 2), ("d6", 2), ("d8", 2), ("d12", 2)]
    assert plan.places("hstu") == [*sizes_at_2, ("d4", 6), ("d8", 6)]
    assert plan.places("wide") == [("d4", 2), ("d4", 6)]
    assert plan.ladder == [("d2", 2), ("d8", 6)]
    points = plan_points(study_base(tmp_path), replace(plan, study=replace(plan.study, seeds=(0,))))
    assert len(points) == 2 * 7 + 2 + 2, "two encoders, the variant, less data for the encoders"


def test_a_variant_may_name_its_lengths(tmp_path: Path) -> None:
    variants = {"wide": {}, "deep": {"lengths": [6], "model.num_layers": 2}}
    base = study_base(tmp_path)
    plan = read_plan(write_plan(tmp_path, **(CROSS | {"variants": variants})), base.tasks)
    assert plan.variants == {"wide": {}, "deep": {"model.num_layers": 2}}
    assert plan.places("wide") == [("d4", 2), ("d4", 6)]
    assert plan.places("deep") == [("d4", 6)]
    assert plan.as_figures()["variant_lengths"] == {"deep": [6]}, "a study goes on with the same"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"of_size": None}, "of_size must be given with at_length, or both null, got null"),
        ({"of_size": "d5"}, "of_size must be one of sizes"),
        ({"at_length": 3}, r"at_length must be one of lengths \[2, 6\], or null, got 3"),
        ({"ladder": ["d2"]}, "ladder must be null, or a size of"),
        ({"variants": {"hstu": {}}}, r"variants must be names that no encoder has, got \['hstu'\]"),
        (
            {"variants": {"deep": {"lengths": [5]}}},
            r"deep.lengths must be some of lengths \[2, 6\]",
        ),
        ({"variants": {"deep": {"lengths": 6}}}, r"deep.lengths must be some of .*, got 6"),
    ],
)
def test_a_mistake_in_a_crossed_study_is_named(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_plan(write_plan(tmp_path, **(CROSS | changes)), study_base(tmp_path).tasks)


def test_a_study_goes_on_as_it_began(tmp_path: Path) -> None:
    base = study_base(tmp_path)
    publish_sequences(base)
    plan = read_plan(write_plan(tmp_path), base.tasks)
    opening.open_study(base, plan)
    opening.open_study(base, read_plan(write_plan(tmp_path, seeds=[0, 1], samples=50), base.tasks))
    other = read_plan(write_plan(tmp_path, lengths=[2, 5]), base.tasks)
    with pytest.raises(UserError, match=r"began with lengths = \[2, 6\] .*--restart"):
        opening.open_study(base, other)
    (tmp_path / "tiny-study-ultra-d2-2-s0").mkdir()
    running.forget_study(tmp_path / "tiny-study")
    assert [path.name for path in tmp_path.glob("tiny-study*")] == []
    opening.open_study(base, other)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "studies").glob("*.yaml")), ids=str)
def test_the_studies_of_this_repository_fit_their_presets(path: Path) -> None:
    """Each says in its first lines which preset it is for."""
    found = re.search(r"configs/\w+\.yaml", path.read_text())
    assert found is not None
    base = config.load(ROOT / found.group())
    plan = read_plan(path, base.tasks)
    points = plan_points(base, plan)
    assert len(points) >= len(plan.sizes) * len(plan.study.lengths)


# Laws


def test_laws_find_the_numbers_that_made_the_points() -> None:
    flops = np.geomspace(1e-4, 1e-1, 6)
    noise = np.random.default_rng(0).normal(0, 1e-4, (50, 6))
    straight = fit_log(flops, 0.7 - 0.02 * np.log(flops) + noise)
    assert interval(straight.b)["value"] == pytest.approx(-0.02, abs=1e-3)
    curved = fit_power(flops, 0.6 + 0.01 * flops**-0.3 + noise)
    found = [interval(numbers) for numbers in (curved.a, curved.b, curved.c)]
    for entry, true in zip(found, (0.6, 0.01, 0.3), strict=True):
        low, high = entry["low"], entry["high"]
        assert low is not None and high is not None
        assert low <= true * 1.05 and high >= true * 0.95
    next_one = curved.values(np.array([1.0]))[:, 0]
    assert next_one[0] == pytest.approx(0.61, abs=2e-3)
    assert fit_slopes(np.array([1.0, 2.0, 3.0]), np.array([[2.0, 4.0, 6.0]])).tolist() == [2.0]


def test_an_interval_without_draws_has_no_ends() -> None:
    assert interval(np.array([math.nan, 1.0])) == {"value": None, "low": None, "high": None}
    assert interval(np.array([1.0])) == {"value": 1.0, "low": None, "high": None}


def test_the_front_is_what_no_other_beats() -> None:
    costs = np.array([1.0, 1.0, 2.0, 3.0, 4.0])
    values = np.array([0.5, 0.6, 0.6, 0.8, 0.7])
    assert pareto_front(costs, values).tolist() == [False, True, False, True, False]


def test_entropy_equals_the_definition_by_loops() -> None:
    rng = np.random.default_rng(3)
    ids = rng.integers(0, 4, 60)

    def phi(run: int) -> float:
        windows = [tuple(ids[i : i + run]) for i in range(len(ids) - run + 1)]
        shares = [windows.count(one) / len(windows) for one in windows]
        return float(np.mean(np.log(shares)))

    for run in (1, 2):
        assert approximate_entropy(ids, run) == pytest.approx(phi(run) - phi(run + 1))


def test_regular_sequences_are_worth_more_rows() -> None:
    rng = np.random.default_rng(0)
    regular = measure_quality([np.arange(200) % 3 for _ in range(8)])
    random = measure_quality([rng.integers(0, 4, 200) for _ in range(8)])
    assert regular.tokens == random.tokens == 1600
    assert regular.entropy < random.entropy
    assert not regular.effective_tokens < random.effective_tokens
    assert random.effective_tokens == pytest.approx(1600 / random.entropy)
    assert measure_quality([np.arange(3)]).users == 0, "too short to count"


def test_entropy_by_users_adds_up_to_that_of_all_rows() -> None:
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=200), rng.random(200) < 0.3
    known = rng.random(200) < 0.9
    table = pa.table(
        {
            "user_id": rng.integers(0, 9, 200),
            "logit.is_click": logits.astype(np.float32),
            "label.is_click": pa.array(labels.astype(np.int8), mask=~known),
        }
    )
    sums = user_sums(table, "is_click")
    assert len(sums.rows) == 9 and sums.rows.sum() == known.sum()
    expected = normalised_entropy(logits[known], labels[known])
    assert sums.entropies(np.ones((1, 9)))[0] == pytest.approx(expected, rel=1e-5)


# A whole study, without a cluster


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, StudyPlan, list[Point]]:
    """All points of a study in this process, in the order in which the job runs them; the largest
    is predicted on the way.
    """
    folder = tmp_path_factory.mktemp("study")
    base = study_base(folder)
    publish_sequences(base)
    plan = read_plan(write_plan(folder), base.tasks)
    points = plan_points(base, plan)
    opening.open_study(base, plan)
    for point in points:
        count_work(point.trial.cfg, "val", None)
    for is_largest in (False, True):
        if is_largest:
            found = predict_largest(plan, points) | {"made": "before"}
            (folder / "tiny-study" / "predictions.json").write_text(json.dumps(found))
        for point in points:
            if (point.size == "d12") is is_largest:
                cfg, settings = point.trial.cfg, point.trial.settings
                assert run_point(cfg, settings, "val", "is_click", None) == ""
    return base, plan, points


def test_a_report_says_what_the_points_were(
    studied: tuple[RunConfig, StudyPlan, list[Point]], tmp_path: Path
) -> None:
    base, plan, points = studied
    figures = study_figures(base, plan, {"tiny-study-x": "out of memory"})
    assert len(figures["points"]) == len(points) == 22
    by_key = {(p["encoder"], p["size"], p["length"], p["data_share"]): p for p in figures["points"]}

    # the larger, the longer, and two tokens an event: each costs more
    small, large = by_key["ultra", "d2", 2, 1.0], by_key["ultra", "d12", 6, 1.0]
    assert small["train_gflop"] < large["train_gflop"]
    assert by_key["hstu", "d12", 6, 1.0]["infer_gflop"] > large["infer_gflop"]
    saved = json.loads((points[0].trial.cfg.run_dir / "point.json").read_text())
    assert small["ne"]["value"] == pytest.approx(saved["ne"], rel=1e-5)

    held = figures["predictions"]["ultra/6"]
    assert held["from_sizes"] == ["d2", "d4", "d6", "d8"]
    assert held["made"] == "before"
    error = held["power"]["value"] - held["measured"]["value"]
    assert held["power_error"] == pytest.approx(error)
    assert {law["length"] for law in figures["laws"]} == {2, 6}
    assert figures["data"]["less"]["hstu"]["share"] == 0.5
    assert figures["reachable"] is None, "these are no generated logs"
    assert set(figures["slopes"]["infer_gflop"]) == {"ultra", "hstu"}

    page = write_study(tmp_path, figures).read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r"(src|href)=\"(?!data:)", page), "nothing is loaded from elsewhere"
    assert "out of memory" in page
    assert "1 seed a point" in page
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page), "an undefined number is a dash"
    assert json.loads((tmp_path / "figures.json").read_text())["task"] == "is_click"
    assert "predicted ultra/6 by power: NE " in console_table(figures)


def test_the_page_says_in_one_line_why_there_is_no_ratio_and_no_law(
    studied: tuple[RunConfig, StudyPlan, list[Point]], tmp_path: Path
) -> None:
    base, plan, _ = studied
    figures = study_figures(base, plan, {}) | {"laws": [], "predictions": {}}
    for high, why in ((-1.0, "hstu itself gets worse with more"), (1.0, "hstu's own gain is not")):
        slope = {"value": -2.0, "low": -3.0, "high": high}
        slopes = {"ultra": {"slope": slope, "ratio": None}, "hstu": {"slope": slope, "ratio": None}}
        page = write_study(tmp_path, figures | {"slopes": dict.fromkeys(COSTS, slopes)}).read_text()
        assert page.count("No ratio of gains") == 2, "for training and for inference"
        assert page.count(why) == 2
    assert page.count("data:image/png;base64,") == 2
    assert "No law and no prediction" in page


def test_what_new_figures_lack_is_that_of_the_run_before(
    studied: tuple[RunConfig, StudyPlan, list[Point]],
) -> None:
    base, plan, _ = studied
    earlier = study_figures(base, plan, {})
    again = [point | {"auc": 0.99} for point in earlier["points"] if point["size"] == "d4"]
    new = earlier | {"points": again, "laws": [], "predictions": {}}

    joined = join_earlier(new, earlier)
    assert joined["earlier_points"] == len(earlier["points"]) - len(again) > 0
    for name in ("encoder", "size", "length"):
        order = [point[name] for point in joined["points"]]
        assert order == [point[name] for point in earlier["points"]]
    assert {p["auc"] for p in joined["points"] if p["size"] == "d4"} == {0.99}
    assert joined["laws"] == earlier["laws"] and joined["predictions"] == earlier["predictions"]

    # of all points, as the study itself finds them
    assert join_earlier(earlier, earlier)["fronts"] == earlier["fronts"]
    assert joined["fronts"]["infer_gflop"][-1][1] == "d4"
    with pytest.raises(SystemExit, match="--earlier has rows 7"):
        join_earlier(new, earlier | {"rows": 7})


def test_a_crossed_study_says_what_the_next_step_would_give() -> None:
    """Its laws are at one length, and its last step of length is of a size in the middle."""
    law = {"encoder": "ultra", "length": 2}
    law["power"] = {"gain_of_doubling": {"value": 0.01, "low": None, "high": None}}
    points = []
    for size, length, ne in (("d4", 2, 0.9), ("d4", 6, 0.8), ("d8", 2, 0.85)):
        place = {"encoder": "ultra", "size": size, "length": length, "data_share": 1.0}
        points.append(place | {"ne": {"value": ne}})
    figures = {"encoders": ["ultra"], "sizes": ["d4", "d8"], "lengths": [2, 6], "points": points}
    figures |= {"laws": [law], "data": {"less": {}}}
    assert next_lines(figures) == [
        "ultra: at 2 rows twice the training FLOP in a larger model would lower the NE by 0.0100; "
        "6 rows in the place of 2 lowered the NE of d4 by 0.1000."
    ]

    # a length before the last two is the best
    short = {"encoder": "ultra", "size": "d4", "length": 1, "data_share": 1.0}
    points.append(short | {"ne": {"value": 0.7}})
    figures |= {"lengths": [1, 2, 6], "laws": []}
    assert next_lines(figures) == [
        "ultra: 6 rows in the place of 2 lowered the NE of d4 by 0.1000; of its lengths 1 rows "
        "have the lowest NE."
    ]


def test_the_picture_of_laws_has_the_lengths_that_have_one(
    studied: tuple[RunConfig, StudyPlan, list[Point]],
) -> None:
    base, plan, _ = studied
    figures = study_figures(base, plan, {})
    titles = [axes.get_title() for axes in draw_laws(figures).axes]
    assert titles == ["2 rows", "6 rows"]
    at_6 = [law for law in figures["laws"] if law["length"] == 6]
    titles = [axes.get_title() for axes in draw_laws(figures | {"laws": at_6}).axes]
    assert titles == ["6 rows"], "as in a study whose sizes are all at one length"


def test_points_of_another_machine_give_the_same_report(
    studied: tuple[RunConfig, StudyPlan, list[Point]], tmp_path: Path
) -> None:
    base, plan, points = studied
    there = study_points.OpenStudy(base, plan, list(points))
    lines = tmp_path / "points.jsonl"
    for point in points:
        study_points.pack(point, lines)
    made = json.loads((there.folder / "predictions.json").read_text())
    study_points.append_line(lines, there.folder.name, {"predictions.json": made})

    here = replace(base, runs_dir=str(tmp_path / "here"))
    publish_sequences(here)
    left = plan_points(here, plan)
    assert study_points.unpack([study_points.OpenStudy(here, plan, left)], lines) == len(points)
    carried, own = study_figures(here, plan, {}), study_figures(base, plan, {})
    assert carried["points"] == own["points"]
    assert carried["predictions"] == own["predictions"]


def test_the_largest_size_waits_for_what_it_is_predicted_from(tmp_path: Path) -> None:
    base = study_base(tmp_path)
    plan = read_plan(write_plan(tmp_path, data_share=None, seeds=[0, 1], **CROSS), base.tasks)
    points = plan_points(base, plan)
    study = study_points.OpenStudy(base, plan, list(points))
    of_seed = [point for point in points if point.seed == 0]
    (largest, _) = [point for point in of_seed if point.size == "d12"]
    smaller = [point for point in of_seed if study.predicts(point)]
    assert {point.length for point in smaller} == {2}
    assert {point.encoder for point in smaller} == {"ultra", "hstu"}

    assert not study.is_ready(largest)
    assert all(study.is_ready(point) for point in smaller)
    study.waiting, study.running = [largest], smaller[:1]
    assert not study.is_ready(largest), "one is still running"
    study.running = []
    assert study.is_ready(largest)
    study.waiting = points[len(of_seed) :]
    assert study.is_ready(largest), "other seeds have a largest of their own"


def test_a_seed_is_whole_before_the_next_and_its_encoders_before_its_variants(
    tmp_path: Path,
) -> None:
    base = study_base(tmp_path)
    plan = read_plan(write_plan(tmp_path, data_share=None, seeds=[0, 1], **CROSS), base.tasks)
    points = plan_points(base, plan)
    for gflop, point in enumerate(points):
        point.trial.cfg.run_dir.mkdir(parents=True)
        work = {"train_gflop": gflop, "infer_gflop": 0.0}
        (point.trial.cfg.run_dir / "work.json").write_text(json.dumps(work))

    study = study_points.OpenStudy(base, plan, list(points))
    order = [point for _, point in study_points._in_order([study])]
    assert [point.seed for point in order] == [0] * len(of(points, 0)) + [1] * len(of(points, 1))
    first = of(order, 0)
    assert {(point.length, point.size == "d12") for point in first[:8]} == {(2, False)}
    assert [point.encoder for point in first[8:]] == ["ultra"] * 3 + ["hstu"] * 3 + ["wide"] * 2
    assert [(point.size, point.length) for point in first[8:11]] == [
        ("d8", 6),
        ("d4", 6),
        ("d12", 2),
    ], "those with the most FLOP first"


def test_points_are_chosen_by_their_names(
    studied: tuple[RunConfig, StudyPlan, list[Point]], tmp_path: Path
) -> None:
    base, _, points = studied
    preset = tmp_path / "preset.yaml"
    preset.write_text(yaml.safe_dump(config.to_dict(replace(base, runs_dir=str(tmp_path)))))
    publish_sequences(replace(base, runs_dir=str(tmp_path)))
    pair = f"{preset}:{write_plan(tmp_path)}"

    names = [point.trial.name for point in points]
    (study,) = study_points.open_studies([pair], [], None, ["*-hstu-*", names[0]])
    chosen = [point.trial.name for point in study.waiting]
    assert chosen == [name for name in names if "-hstu-" in name or name == names[0]]
    with pytest.raises(UserError, match=r"--only: 'd5' matches no point, such as "):
        study_points.open_studies([pair], [], None, ["d5"])


def test_the_largest_size_is_predicted_from_whole_seeds(
    studied: tuple[RunConfig, StudyPlan, list[Point]], tmp_path: Path
) -> None:
    base, plan, points = studied
    copied = replace(base, runs_dir=str(tmp_path / "runs"))
    shutil.copytree(base.runs_dir, copied.runs_dir)
    predictions = tmp_path / "runs" / "tiny-study" / "predictions.json"
    of_one_seed = json.loads(predictions.read_text())

    # of the second seed one size alone has ended, and its scores are another's
    begun = tmp_path / "runs" / points[0].trial.name.replace("-s0", "-s1")
    shutil.copytree(tmp_path / "runs" / points[8].trial.name, begun)
    two_seeds = replace(plan, study=replace(plan.study, seeds=(0, 1)))
    study_points._predict(study_points.OpenStudy(copied, two_seeds, []), tmp_path / "lines")
    found = json.loads(predictions.read_text())
    assert found | {"made": None} == of_one_seed | {"made": None}


def of(points: Sequence[Point], seed: int) -> list[Point]:
    return [point for point in points if point.seed == seed]


def test_a_finished_point_is_not_run_again(
    studied: tuple[RunConfig, StudyPlan, list[Point]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, _, points = studied
    monkeypatch.setattr("pipeline.study.point.train_trial", None)
    assert run_point(points[0].trial.cfg, {}, "val", "is_click", None) == ""


def test_less_data_is_a_share_of_the_training_sequences(
    studied: tuple[RunConfig, StudyPlan, list[Point]],
) -> None:
    _, _, points = studied
    steps = {}
    for point in points:
        if (point.encoder, point.size, point.length) == ("ultra", "d12", 6):
            plan = json.loads((point.trial.cfg.train_dir / "steps.json").read_text())
            steps[point.share] = sum(plan["steps"])
    assert 0 < steps[0.5] < steps[1.0]


def test_points_of_other_rows_are_not_compared(
    studied: tuple[RunConfig, StudyPlan, list[Point]], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, plan, _ = studied
    calls: list[Path] = []

    def other_users(folder: Path) -> UserSums:
        calls.append(folder)
        sums = read_users(folder)
        return replace(sums, rows=sums.rows + len(calls) % 2)

    monkeypatch.setattr("pipeline.study.measured.read_users", other_users)
    with pytest.raises(UserError, match="were scored on other rows"):
        study_figures(base, plan, {})


def test_processes_take_the_visible_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    started = multiprocessing.get_context("spawn").Value("i", 0)
    taken = []
    for _ in range(3):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
        study_points.take_gpu(started, 2)
        taken.append(os.environ["CUDA_VISIBLE_DEVICES"])
    assert taken == ["2", "5", "2"]

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    study_points.take_gpu(started, 2)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "1", "the fourth process of GPUs 0 and 1"


def test_more_gpus_than_are_visible_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study_points.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr("sys.argv", ["study_points", "a.yaml:b.yaml", "--gpus", "3"])
    with pytest.raises(SystemExit, match="2"):
        study_points.main()
    assert "--gpus 3: 2 visible here" in capsys.readouterr().err


def front_point(encoder: str, length: int, gflop: float, auc: float, seeds: int) -> dict[str, Any]:
    place = {"encoder": encoder, "size": "d8", "length": length, "data_share": 1.0}
    return place | {"infer_gflop": gflop, "auc": auc, "seeds": seeds}


def test_results_say_which_points_no_other_of_their_length_beats_and_which_have_one_seed() -> None:
    points = [
        front_point("dear", 64, 3.0, 0.8, 3),
        front_point("cheap", 64, 1.0, 0.7, 1),
        front_point("beaten", 64, 2.0, 0.6, 3),
        front_point("long", 256, 9.0, 0.7, 3),
    ]
    assert front_at({"points": points}, 64) == ["cheap d8", "dear d8"]
    assert front_at({"points": points}, 256) == ["long d8"], "worse and dearer, but the only one"
    assert front_at({"points": points}, 1024) == []

    assert one_seed_words({"points": points}).endswith("alone: cheap d8 at 64.")
    assert one_seed_words({"points": points[1:2]}).endswith("alone: all points.")
    assert one_seed_words({"points": points[2:]}) == ""


def test_a_variant_that_has_the_whole_ladder_has_a_slope_too(tmp_path: Path) -> None:
    variants = {"wide": {}, "deep": {"lengths": [6], "model.num_layers": 2}}
    changes = CROSS | {"ladder": ["d4", "d4"], "variants": variants}
    plan = read_plan(write_plan(tmp_path, **changes), study_base(tmp_path).tasks)

    whole: dict[Key, Measured] = {}
    for encoder in plan.names:
        for size, length in plan.places(encoder):
            costs = dict.fromkeys(COSTS, float(length))
            ne = np.array([1 - length / 10, 0.99 - length / 10])
            key = encoder, size, length, 1.0
            whole[key] = Measured(key, 1, costs, 1, 1.0, ne, 0.5, (0.5,))

    slopes = ladder_slopes(plan, whole, "infer_gflop")
    assert set(slopes) == {"ultra", "hstu", "wide"}, "deep lacks the short length"
    assert slopes["wide"]["slope"]["value"] == pytest.approx(0.1)
    assert slopes["wide"]["ratio"]["value"] == pytest.approx(1)


def test_a_point_whose_process_had_an_error_of_cuda_goes_on_in_a_fresh_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = study_base(tmp_path)
    publish_sequences(base)
    plan = read_plan(write_plan(tmp_path, data_share=None), base.tasks)
    opening.open_study(base, plan)
    study = study_points.OpenStudy(base, plan, plan_points(base, plan)[:2])
    study_points.count_points([study], 1)

    calls = []

    def fail(cfg: RunConfig, *_: object) -> None:
        calls.append(cfg.name)
        raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")

    # in this process alone: a fresh one has what is in the files
    monkeypatch.setattr("pipeline.study.point.train_trial", fail)
    monkeypatch.setattr(study_points, "_HAD_ERROR", threading.Event())
    for point in study.waiting:
        assert study_points._carry_out(*study_points._arguments(study, point)) == ""
        assert is_finished(point)
    assert len(calls) == 1, "the next point did not begin in the process that had the error"


def test_later_seeds_have_the_flop_that_were_counted_for_the_first(tmp_path: Path) -> None:
    base = study_base(tmp_path)
    publish_sequences(base)
    plan = read_plan(write_plan(tmp_path, data_share=None, seeds=[0, 1]), base.tasks)
    opening.open_study(base, plan)
    points = plan_points(base, plan)
    earlier, *_ = [point for point in points if point.seed == 0]
    later, *_ = [point for point in points if point.seed == 1 and point.key == earlier.key]

    # counted elsewhere, where that seed was run
    work = {"train_gflop": 7.0, "infer_gflop": 3.0}
    earlier.trial.cfg.run_dir.mkdir(parents=True)
    (earlier.trial.cfg.run_dir / WORK).write_text(json.dumps(work))
    study_points.count_points([study_points.OpenStudy(base, plan, [later])], 1)
    assert json.loads((later.trial.cfg.run_dir / WORK).read_text()) == work


def test_an_error_that_is_not_of_cuda_is_the_points_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = study_base(tmp_path)
    publish_sequences(base)
    plan = read_plan(write_plan(tmp_path, data_share=None), base.tasks)
    opening.open_study(base, plan)
    study = study_points.OpenStudy(base, plan, plan_points(base, plan)[:2])
    study_points.count_points([study], 1)
    wrong, right = [study_points._arguments(study, point) for point in study.waiting]
    trained = []

    def train_second(cfg: RunConfig, *options: Any) -> None:
        trained.append(cfg.name)
        if len(trained) == 1:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied (4x8 and 16x8)")
        train_trial(cfg, *options)

    monkeypatch.setattr("pipeline.study.point.train_trial", train_second)
    monkeypatch.setattr(study_points, "_HAD_ERROR", threading.Event())
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        study_points._carry_out(*wrong)
    assert not is_finished(study.waiting[0]), "no fresh process has tried it again"

    assert study_points._carry_out(*right) == ""
    assert len(trained) == 2, "this process takes the next point"


@pytest.mark.parametrize(
    ("error", "is_cudas"),
    [
        (torch.AcceleratorError("operation failed due to a previous error during capture"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm`"),
            True,
        ),
        (RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered"), True),
        (RuntimeError("Offset increment outside graph capture encountered unexpectedly."), True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False),
        (NotImplementedError("could not run 'aten::foo' with arguments from the CPU"), False),
    ],
)
def test_errors_of_cuda_are_told_from_others(error: RuntimeError, is_cudas: bool) -> None:
    assert study_points.is_cuda_error(error) == is_cudas
