"""What a study comes to, as plain values: slopes and their ratios, laws, predictions, fronts.

    `measured_points` → `study_figures` → figures.json, the page, RESULTS.md

The interval of every figure holds 95 % of the draws of a bootstrap over users, and over seeds where
there are several.
"""

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batches.loader import split_bounds
from pipeline.batches.stored import StoredUsers
from pipeline.config import RunConfig, SyntheticConfig, UserError
from pipeline.config.folders import LOG_FOLDER
from pipeline.evaluate.metrics import auc, normalised_entropy
from pipeline.evaluate.reachable import Reachable, reachable_task, reached_share
from pipeline.study.entropy import measure_quality
from pipeline.study.laws import Law, fit_log, fit_power, fit_slopes, interval, pareto_front
from pipeline.study.measured import (
    COSTS,
    Key,
    Measured,
    costs_of,
    is_finished,
    measured_points,
    values_of,
)
from pipeline.study.plan import StudyPlan, plan_points, study_config
from pipeline.study.predictions import FEWEST_SIZES, PREDICTIONS, held_against
from pipeline.study.users import read_users


def study_figures(base: RunConfig, plan: StudyPlan, failed: dict[str, str]) -> dict[str, Any]:
    """Everything that the report shows, fit for JSON.

    Raises:
        UserError: no point has come to its end.
    """
    own = study_config(base)
    points = plan_points(base, plan)
    task = plan.study.task or base.tasks[0]
    measured = measured_points(plan, points)
    if not measured:
        raise UserError(f"no point of {own.name} came to its end: {failed}")

    # the points that were trained on all data
    whole = {one.key: one for one in measured if one.key[3] == 1.0}
    path = own.run_dir / PREDICTIONS
    predicted = json.loads(path.read_text()) if path.exists() else {}

    reachable = None  # known of a log that is made here, on the task that its tastes decide
    if reachable_task(base.source, base.tasks) == task:
        log_dir = own.sequence_dir.parent / LOG_FOLDER
        period = split_bounds(base.split, plan.study.split)
        reachable = _reachable(base.source.synthetic, log_dir, period, plan.study.lengths)

    stored = StoredUsers(own.sequence_dir, base.source, base.features)
    first = next(point for point in points if is_finished(point))
    sums = read_users(first.trial.cfg.run_dir)
    return {
        "name": own.name,
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
        "points": [_point_figures(one) for one in measured],
        "fronts": _fronts(list(whole.values())),
        "slopes": {cost: ladder_slopes(plan, whole, cost) for cost in COSTS},
        "laws": _laws(plan, whole),
        "predictions": held_against(plan, whole, predicted),
        "data": {
            "quality": asdict(measure_quality(_training_items(stored, base.split.train_end_ms))),
            "less": _less_data(plan, measured),
        },
        "reachable": reachable,
    }


def _point_figures(one: Measured) -> dict[str, Any]:
    encoder, size, length, share = one.key
    return {
        "encoder": encoder,
        "size": size,
        "length": length,
        "data_share": share,
        "seeds": one.seeds,
        "ne": interval(one.ne),
        "auc": one.auc,
        "auc_by_seed": list(one.aucs),
        "parameters": one.parameters,
        "train_seconds": one.train_seconds,
        **one.costs,
    }


def _fronts(points: Sequence[Measured]) -> dict[str, list[list[Any]]]:
    """By cost, the keys of the points that no other beats in cost and AUC, the worst first."""
    aucs = np.array([one.auc for one in points])
    fronts: dict[str, list[list[Any]]] = {}
    for cost in COSTS:
        chosen = np.flatnonzero(pareto_front(costs_of(points, cost), aucs))
        by_auc = chosen[np.argsort(aucs[chosen], kind="stable")]
        fronts[cost] = [list(points[number].key[:3]) for number in by_auc]
    return fronts


def ladder_slopes(plan: StudyPlan, whole: Mapping[Key, Measured], cost: str) -> dict[str, Any]:
    """By encoder that has all of the ladder, NE gain per unit of cost on it; and the ratio to
    the baseline's.
    """
    slopes: dict[str, np.ndarray] = {}
    for encoder in plan.names:
        rungs = []
        for size, length in plan.ladder:
            one = whole.get((encoder, size, length, 1.0))
            if one is not None:
                rungs.append(one)
        if len(rungs) == len(plan.ladder) >= 2:
            slopes[encoder] = -fit_slopes(costs_of(rungs, cost), values_of(rungs))

    found: dict[str, Any] = {}
    base = slopes.get(plan.study.baseline)
    for encoder, values in slopes.items():
        entry: dict[str, Any] = {"slope": interval(values), "ratio": None}
        if base is not None and encoder != plan.study.baseline:
            entry["ratio"] = _ratio(values, base)
        found[encoder] = entry
    return found


def _ratio(values: np.ndarray, base: np.ndarray) -> dict[str, float | None] | None:
    """None where the baseline's slope may as well be 0: a ratio to it says nothing."""
    low = interval(base)["low"]
    if low is None or low <= 0:
        return None
    return interval(values / base)


def _laws(plan: StudyPlan, whole: Mapping[Key, Measured]) -> list[dict[str, Any]]:
    """Laws through all sizes of an encoder at a length, and what the next doubling would give."""
    found = []
    for encoder in plan.encoders:
        for length in plan.study.lengths:
            sizes = []
            for size in plan.sizes:
                one = whole.get((encoder, size, length, 1.0))
                if one is not None:
                    sizes.append(one)
            if len(sizes) >= FEWEST_SIZES:
                found.append({"encoder": encoder, "length": length} | _law_figures(sizes))
    return found


def _law_figures(sizes: Sequence[Measured]) -> dict[str, Any]:
    """Both laws through these points, with C in training GFLOP per item."""
    flops, values = costs_of(sizes, "train_gflop"), values_of(sizes)
    found: dict[str, Any] = {
        "sizes": len(sizes),
        "decades": float(np.log10(flops.max() / flops.min())),
    }
    for law in (fit_log(flops, values), fit_power(flops, values)):
        found[law.kind] = _law_numbers(law, flops.max())
    return found


def _law_numbers(law: Law, top: float) -> dict[str, Any]:
    """The law's numbers, and the gain of doubling the FLOP of its top point."""
    doubled = law.values(np.array([top, 2 * top]))
    numbers = {"a": interval(law.a), "b": interval(law.b)}
    if law.kind == "power":
        numbers["c"] = interval(law.c)
    return numbers | {"gain_of_doubling": interval(doubled[:, 0] - doubled[:, 1])}


def _training_items(stored: StoredUsers, train_end_ms: int) -> Iterator[np.ndarray]:
    """Item ids of each user's training rows, oldest first, int64 [rows]."""
    for users in stored.by_bucket():
        trained = users.request_time < train_end_ms

        offsets = users.events.offsets
        for begin, end in itertools.pairwise(offsets):
            yield users.events.item_id[begin:end][trained[begin:end]]


def _less_data(plan: StudyPlan, measured: Sequence[Measured]) -> dict[str, Any]:
    """By encoder, what its largest point loses when it is trained on a share of the data."""
    found: dict[str, Any] = {}
    share = plan.study.data_share
    if share is None:
        return found

    by_key = {one.key: one for one in measured}
    place = list(plan.sizes)[-1], plan.study.lengths[-1]
    for encoder in plan.encoders:
        less, all_of_it = by_key.get((encoder, *place, share)), by_key.get((encoder, *place, 1.0))
        if less is not None and all_of_it is not None:
            entry = {"share": share, "ne": interval(less.ne)}
            found[encoder] = entry | {"lost": interval(less.ne - all_of_it.ne)}
    return found


def _reachable(
    made_by: SyntheticConfig, log_dir: Path, period: tuple[int, int], lengths: Sequence[int]
) -> dict[str, Any] | None:
    """The best AUC and NE in a period, [from, to) in ms UTC, from histories of each length; None
    where the log is not there.
    """
    if not log_dir.exists():
        return None

    reachable = Reachable(made_by, log_dir)
    wanted, labels = reachable.rows_between(*period)
    found = {}
    for length in (*lengths, None):
        scores = reachable.scores(wanted, length)
        name = "all" if length is None else str(length)
        found[name] = {"auc": auc(scores, labels), "ne": normalised_entropy(scores, labels)}
    return found


def share_reached(figures: dict[str, Any], point: dict[str, Any]) -> float | None:
    """Share of the AUC that any score could reach from the whole history; None where unknown."""
    if figures["reachable"] is None:
        return None
    return reached_share(point["auc"], figures["reachable"]["all"]["auc"])
