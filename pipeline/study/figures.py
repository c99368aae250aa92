"""What a study comes to, as plain values: slopes and their ratios, laws, predictions, fronts.

The interval of every figure holds 95 % of the draws of a bootstrap over users, and over seeds where
there are several. All points are scored on the same draws, so what is hard about a draw is hard for
all and goes out of differences and slopes.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batches.examples import user_events
from pipeline.batches.loader import split_bounds
from pipeline.config import RunConfig, UserError
from pipeline.evaluate.metrics import auc, normalised_entropy
from pipeline.evaluate.reachable import Reachable, reachable_task, reached_share
from pipeline.sequences import store
from pipeline.study.entropy import measure_quality
from pipeline.study.laws import (
    Law,
    fit_log,
    fit_power,
    fit_slopes,
    interval,
    pareto_front,
)
from pipeline.study.plan import Point, StudyPlan, plan_points, study_config
from pipeline.study.point import POINT, WORK, PointScores, PointWork
from pipeline.study.users import UserSums, read_users

# what a point costs: words, and the figure of a point
COSTS = {
    "train_gflop": "training GFLOP per item",
    "infer_gflop": "inference GFLOP per item",
    "train_ms_per_item": "training, ms per item",
    "score_ms_per_item": "scoring, ms per item",
}
FEWEST_SIZES = 4  # that a power law with three numbers is fitted to
PREDICTIONS = "predictions.json"  # in the study's folder

Key = tuple[str, str, int, float]  # encoder, size, length, share of the data


@dataclass(frozen=True, slots=True)
class Measured:
    """The points of one key, its seeds together. S draws, the first of them no draw."""

    key: Key
    seeds: int
    costs: dict[str, float]  # means over seeds, by `COSTS`
    parameters: int
    train_seconds: float
    ne: np.ndarray  # float64 [S]
    auc: float
    aucs: tuple[float, ...]  # by seed


def measured_points(plan: StudyPlan, points: Sequence[Point]) -> list[Measured]:
    """The points that have come to their ends, by key."""
    finished = [point for point in points if (point.trial.cfg.run_dir / POINT).exists()]
    by_key: dict[Key, list[Point]] = {}
    for point in finished:
        by_key.setdefault(point.key, []).append(point)

    tables: dict[str, UserSums] = {}
    for point in finished:
        tables[point.trial.name] = read_users(point.trial.cfg.run_dir)
    _refuse_other_rows(tables)

    rng = np.random.default_rng(0)
    num_users = len(next(iter(tables.values())).rows) if tables else 0
    draws = [np.ones(num_users)]
    for _ in range(plan.study.samples if num_users else 0):
        draws.append(rng.multinomial(num_users, np.ones(num_users) / num_users).astype(float))
    weights = np.stack(draws)

    found = []
    for key, group in by_key.items():
        sums = [tables[point.trial.name] for point in group]
        found.append(_measure(key, group, sums, weights, rng))
    return found


def _measure(
    key: Key,
    group: Sequence[Point],
    sums: Sequence[UserSums],
    weights: np.ndarray,
    rng: np.random.Generator,
) -> Measured:
    scores = [_read_scores(point) for point in group]
    works = [_read_work(point) for point in group]
    figures = [asdict(work) | asdict(score) for work, score in zip(works, scores, strict=True)]

    # NE of each seed on each draw; then a draw of seeds for each draw of users
    by_seed = np.stack([found.entropies(weights) for found in sums])
    chosen = rng.integers(len(group), size=(len(weights), len(group)))
    chosen[0] = np.arange(len(group))
    drawn = by_seed[chosen.T, np.arange(len(weights))].mean(axis=0)
    return Measured(
        key=key,
        seeds=len(group),
        costs={cost: float(np.mean([one[cost] for one in figures])) for cost in COSTS},
        parameters=scores[0].parameters,
        train_seconds=float(np.mean([score.train_seconds for score in scores])),
        ne=drawn,
        auc=float(np.mean([score.auc for score in scores])),
        aucs=tuple(score.auc for score in scores),
    )


def _refuse_other_rows(tables: dict[str, UserSums]) -> None:
    """Raises UserError where two points were scored on other rows."""
    first: tuple[str, UserSums] | None = None
    for name, sums in tables.items():
        if first is None:
            first = name, sums
        if not first[1].has_same_rows(sums):
            raise UserError(f"points {first[0]} and {name} were scored on other rows: --restart")


def _read_scores(point: Point) -> PointScores:
    return PointScores(**json.loads((point.trial.cfg.run_dir / POINT).read_text()))


def _read_work(point: Point) -> PointWork:
    return PointWork(**json.loads((point.trial.cfg.run_dir / WORK).read_text()))


def predict_largest(plan: StudyPlan, points: Sequence[Point]) -> dict[str, Any]:
    """NE of the largest size, from the laws through the smaller ones at the same length: by
    `encoder/length`. Read before a point of that size is run.
    """
    sizes = list(plan.sizes)
    smaller = [point for point in points if point.size != sizes[-1]]
    measured = {found.key: found for found in measured_points(plan, smaller)}
    gflop = {point.key: _read_work(point).train_gflop for point in points}

    found: dict[str, Any] = {}
    for encoder in plan.encoders:
        for length in plan.study.lengths:
            keys = [(encoder, size, length, 1.0) for size in sizes]
            if len(keys) - 1 < FEWEST_SIZES or not all(key in measured for key in keys[:-1]):
                continue
            flops = np.array([gflop[key] for key in keys[:-1]])
            values = np.stack([measured[key].ne for key in keys[:-1]], axis=1)
            aim = gflop[keys[-1]]
            entry: dict[str, Any] = {"train_gflop": aim, "from_sizes": sizes[:-1]}
            for law in (fit_log(flops, values), fit_power(flops, values)):
                entry[law.kind] = interval(law.values(np.array([aim]))[:, 0])
            found[f"{encoder}/{length}"] = entry
    return found


def study_figures(base: RunConfig, plan: StudyPlan, failed: dict[str, str]) -> dict[str, Any]:
    """Everything that the report shows, fit for JSON.

    Raises:
        UserError: no point has come to its end.
    """
    points = plan_points(base, plan)
    task = plan.study.task or base.tasks[0]
    measured = measured_points(plan, points)
    if not measured:
        raise UserError(f"no point of {study_config(base).name} came to its end: {failed}")

    whole = {found.key: found for found in measured if found.key[3] == 1.0}
    path = study_config(base).run_dir / PREDICTIONS
    predicted = json.loads(path.read_text()) if path.exists() else {}
    finished = [point for point in points if (point.trial.cfg.run_dir / POINT).exists()]
    sums = read_users(finished[0].trial.cfg.run_dir)
    return {
        "name": study_config(base).name,
        "split": plan.study.split,
        "task": task,
        "baseline": plan.study.baseline,
        "encoders": plan.names,
        "sizes": list(plan.sizes),
        "lengths": list(plan.study.lengths),
        "ladder": plan.ladder,
        "seeds": list(plan.study.seeds),
        "samples": plan.study.samples,
        "rows": int(sums.rows.sum()),
        "users": len(sums.rows),
        "failed": failed,
        "points": [_point_figures(found) for found in measured],
        "fronts": _fronts(list(whole.values())),
        "slopes": _slopes(plan, whole),
        "laws": _laws(plan, whole),
        "predictions": _held_against(plan, whole, predicted),
        "data": _data_figures(base, plan, measured),
        "reachable": _reachable(base, plan, task),
    }


def _point_figures(found: Measured) -> dict[str, Any]:
    encoder, size, length, share = found.key
    return {
        "encoder": encoder,
        "size": size,
        "length": length,
        "data_share": share,
        "seeds": found.seeds,
        "ne": interval(found.ne),
        "auc": found.auc,
        "auc_by_seed": list(found.aucs),
        "parameters": found.parameters,
        "train_seconds": found.train_seconds,
        **found.costs,
    }


def _fronts(found: Sequence[Measured]) -> dict[str, list[list[Any]]]:
    """By cost, the keys of the points that no other beats in cost and AUC."""
    values = np.array([one.auc for one in found])
    fronts: dict[str, list[list[Any]]] = {}
    for cost in COSTS:
        is_front = pareto_front(np.array([one.costs[cost] for one in found]), values)
        chosen = [one for one, inside in zip(found, is_front, strict=True) if inside]
        fronts[cost] = [list(one.key[:3]) for one in sorted(chosen, key=lambda one: one.auc)]
    return fronts


def _slopes(plan: StudyPlan, whole: dict[Key, Measured]) -> dict[str, Any]:
    """By cost and encoder, NE gain per unit on the ladder of sizes and lengths; and the ratio to
    the baseline's.
    """
    found: dict[str, Any] = {}
    steps = plan.ladder
    for cost in COSTS:
        slopes: dict[str, np.ndarray] = {}
        for encoder in plan.encoders:
            mine = [whole.get((encoder, *step, 1.0)) for step in steps]
            rungs = [one for one in mine if one is not None]
            if len(rungs) == len(steps) >= 2:
                costs = np.array([one.costs[cost] for one in rungs])
                slopes[encoder] = -fit_slopes(costs, np.stack([one.ne for one in rungs], axis=1))

        found[cost] = {}
        base = slopes.get(plan.study.baseline)
        for encoder, values in slopes.items():
            entry: dict[str, Any] = {"slope": interval(values), "ratio": None}
            if base is not None and encoder != plan.study.baseline:
                entry["ratio"] = _ratio(values, base)
            found[cost][encoder] = entry
    return found


def _ratio(values: np.ndarray, base: np.ndarray) -> dict[str, float | None] | None:
    """None where the baseline's slope may as well be 0: a ratio to it says nothing."""
    found = interval(base)
    low = found["low"]
    if low is None or low <= 0:
        return None
    return interval(values / base)


def _laws(plan: StudyPlan, whole: dict[Key, Measured]) -> list[dict[str, Any]]:
    """Laws through all sizes of an encoder at a length, and what the next doubling would give."""
    found = []
    for encoder in plan.encoders:
        for length in plan.study.lengths:
            mine = [whole.get((encoder, size, length, 1.0)) for size in plan.sizes]
            sizes = [one for one in mine if one is not None]
            if len(sizes) < FEWEST_SIZES:
                continue
            flops = np.array([one.costs["train_gflop"] for one in sizes])
            values = np.stack([one.ne for one in sizes], axis=1)
            top = flops.max()
            entry: dict[str, Any] = {
                "encoder": encoder,
                "length": length,
                "sizes": len(sizes),
                "decades": float(np.log10(top / flops.min())),
            }
            for law in (fit_log(flops, values), fit_power(flops, values)):
                entry[law.kind] = _law_figures(law, top)
            found.append(entry)
    return found


def _law_figures(law: Law, top: float) -> dict[str, Any]:
    """The law's numbers, with C in training GFLOP per item, and the gain of the next doubling."""
    doubled = law.values(np.array([top, 2 * top]))
    numbers = {"a": interval(law.a), "b": interval(law.b)}
    if law.kind == "power":
        numbers["c"] = interval(law.c)
    return numbers | {"gain_of_doubling": interval(doubled[:, 0] - doubled[:, 1])}


def _held_against(
    plan: StudyPlan, whole: dict[Key, Measured], predicted: dict[str, Any]
) -> dict[str, Any]:
    """The predictions with what was measured afterwards."""
    largest = list(plan.sizes)[-1]
    found: dict[str, Any] = {}
    for name, entry in predicted.items():
        if name == "made":
            continue
        encoder, length = name.split("/")
        measured = whole.get((encoder, largest, int(length), 1.0))
        held = dict(entry) | {"made": predicted["made"], "measured": None}
        if measured is not None:
            held["measured"] = interval(measured.ne)
            for kind in ("log", "power"):
                held[f"{kind}_error"] = entry[kind]["value"] - float(measured.ne[0])
        found[name] = held
    return found


def _data_figures(base: RunConfig, plan: StudyPlan, measured: Sequence[Measured]) -> dict[str, Any]:
    """Quality of the training rows, and what less of them cost each encoder."""
    sequence_dir = study_config(base).sequence_dir
    manifest = store.read_manifest(sequence_dir)

    def sequences():
        for bucket in range(len(manifest.buckets)):
            table = store.read_bucket(sequence_dir, manifest, bucket)
            users = user_events(table, base.source, base.features)
            trained = users.request_time < base.split.train_end_ms
            for begin, end in zip(users.events.offsets[:-1], users.events.offsets[1:], strict=True):
                inside = trained[begin:end]
                yield users.events.item_id[begin:end][inside]

    found: dict[str, Any] = {"quality": asdict(measure_quality(sequences())), "less": {}}
    by_key = {one.key: one for one in measured}
    share = plan.study.data_share
    if share is None:
        return found
    for encoder in plan.encoders:
        key = encoder, list(plan.sizes)[-1], plan.study.lengths[-1]
        less, all_of_it = by_key.get((*key, share)), by_key.get((*key, 1.0))
        if less is not None and all_of_it is not None:
            entry = {"share": share, "ne": interval(less.ne)}
            found["less"][encoder] = entry | {"lost": interval(less.ne - all_of_it.ne)}
    return found


def _reachable(base: RunConfig, plan: StudyPlan, task: str) -> dict[str, Any] | None:
    """The best AUC and NE from histories of each length; None where nobody knows them."""
    if reachable_task(base) != task:
        return None
    source_run = Path(base.runs_dir).absolute() / (base.sequences.from_run or base.name)
    log_dir = source_run / "logs"
    if not log_dir.exists():
        return None

    reachable = Reachable(base, log_dir)
    wanted, labels = reachable.rows_between(*split_bounds(base.split, plan.study.split))
    found = {}
    for length in (*plan.study.lengths, None):
        scores = reachable.scores(wanted, length)
        name = "all" if length is None else str(length)
        found[name] = {"auc": auc(scores, labels), "ne": normalised_entropy(scores, labels)}
    return found


def share_reached(figures: dict[str, Any], point: dict[str, Any]) -> float | None:
    """Share of the AUC that any score could reach from the whole history; None where unknown."""
    if figures["reachable"] is None:
        return None
    return reached_share(point["auc"], figures["reachable"]["all"]["auc"])
