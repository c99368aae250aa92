"""The largest size, predicted from the smaller ones before a point of it is run.

smaller sizes → `predict_largest` → predictions.json … its training … → `held_against`
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from pipeline.study.laws import fit_log, fit_power, interval
from pipeline.study.measured import Key, Measured, measured_points, read_work, values_of
from pipeline.study.plan import Point, StudyPlan

FEWEST_SIZES = 4  # that a power law with three numbers is fitted to
PREDICTIONS = "predictions.json"  # in the study's folder


def predict_largest(plan: StudyPlan, points: Sequence[Point]) -> dict[str, Any]:
    """NE of the largest size, from the laws through the smaller ones at the same length: by
    `encoder/length`.
    """
    *smaller, largest = plan.sizes
    if len(smaller) < FEWEST_SIZES:
        return {}

    gflop: dict[Key, float] = {}
    small_points = []
    for point in points:
        gflop[point.key] = read_work(point).train_gflop
        if point.size != largest:
            small_points.append(point)

    by_key: dict[Key, Measured] = {}
    for one in measured_points(plan, small_points):
        by_key[one.key] = one

    found: dict[str, Any] = {}
    for encoder, length in itertools.product(plan.encoders, plan.study.lengths):
        flops, measured = [], []
        for size in smaller:
            key = encoder, size, length, 1.0
            if key in by_key:
                flops.append(gflop[key])
                measured.append(by_key[key])
        if len(measured) < len(smaller):  # a point has not come to its end
            continue

        aim = gflop[encoder, largest, length, 1.0]
        entry: dict[str, Any] = {"train_gflop": aim, "from_sizes": smaller}
        costs, values = np.array(flops), values_of(measured)
        for law in (fit_log(costs, values), fit_power(costs, values)):
            entry[law.kind] = interval(law.values(np.array([aim]))[:, 0])
        found[f"{encoder}/{length}"] = entry
    return found


def held_against(
    plan: StudyPlan, whole: Mapping[Key, Measured], predicted: Mapping[str, Any]
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
