"""The finished points of a study with what a bootstrap says of their NE.

    point.json, work.json, users.json of each seed → `measured_points` → one `Measured` a key

All points are scored on the same draws of users, so what is hard about a draw is hard for all and
goes out of differences and slopes. Where a key has several seeds, seeds are drawn as well.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.config import UserError
from pipeline.study.plan import Point, StudyPlan
from pipeline.study.point import POINT, WORK, PointScores, PointWork
from pipeline.study.users import UserSums, read_users

# what a point costs: words, and the figure of a point
COSTS = {
    "train_gflop": "training GFLOP per item",
    "infer_gflop": "inference GFLOP per item",
    "train_ms_per_item": "training, ms per item",
    "score_ms_per_item": "scoring, ms per item",
}

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


def is_finished(point: Point) -> bool:
    return (point.trial.cfg.run_dir / POINT).exists()


def measured_points(plan: StudyPlan, points: Sequence[Point]) -> list[Measured]:
    """The points that have come to their ends, by key.

    Raises:
        UserError: two of them were scored on other rows.
    """
    by_key: dict[Key, list[Point]] = {}
    tables: dict[str, UserSums] = {}
    for point in points:
        if is_finished(point):
            by_key.setdefault(point.key, []).append(point)
            tables[point.trial.name] = read_users(point.trial.cfg.run_dir)
    if not tables:
        return []
    _refuse_other_rows(tables)

    rng = np.random.default_rng(0)
    num_users = len(next(iter(tables.values())).rows)
    weights = draw_users(num_users, plan.study.samples, rng)

    found = []
    for key, seeds in by_key.items():
        by_seed = []
        for point in seeds:
            by_seed.append(tables[point.trial.name].entropies(weights))
        drawn = _draw_seeds(np.stack(by_seed), rng)
        found.append(_measure(key, seeds, drawn))
    return found


def draw_users(num_users: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each user is in each draw, float64 [1 + samples, U]; each once in the first."""
    draws = [np.ones(num_users)]
    for _ in range(samples):
        draws.append(rng.multinomial(num_users, np.ones(num_users) / num_users).astype(float))
    return np.stack(draws)


def _draw_seeds(by_seed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The mean NE of as many seeds, drawn anew for each draw of users, float64 [S].

    `by_seed`, float64 [seeds, S], is the NE of each seed on each draw of users. The first draw is
    none: every seed is in it once.

        draws of users      0     1     2       seeds = 2
        seeds               0 1   1 1   0 1     the mean of these, column by column
    """
    num_seeds, num_draws = by_seed.shape
    chosen = rng.integers(num_seeds, size=(num_draws, num_seeds))
    chosen[0] = np.arange(num_seeds)
    return by_seed[chosen.T, np.arange(num_draws)].mean(axis=0)


def _measure(key: Key, seeds: Sequence[Point], ne: np.ndarray) -> Measured:
    """The points of these seeds as one, with their `ne`, float64 [S]."""
    facts, aucs, seconds, parameters = [], [], [], []
    for point in seeds:
        work, scores = read_work(point), read_scores(point)
        facts.append(asdict(work) | asdict(scores))
        aucs.append(scores.auc)
        seconds.append(scores.train_seconds)
        parameters.append(scores.parameters)

    costs = {}
    for cost in COSTS:
        by_point = [fact[cost] for fact in facts]
        costs[cost] = float(np.mean(by_point))

    return Measured(
        key=key,
        seeds=len(seeds),
        costs=costs,
        parameters=parameters[0],
        train_seconds=float(np.mean(seconds)),
        ne=ne,
        auc=float(np.mean(aucs)),
        aucs=tuple(aucs),
    )


def _refuse_other_rows(tables: dict[str, UserSums]) -> None:
    """Raises UserError where two points were scored on other rows."""
    first, *others = tables
    for name in others:
        if not tables[first].has_same_rows(tables[name]):
            raise UserError(f"points {first} and {name} were scored on other rows: --restart")


def read_scores(point: Point) -> PointScores:
    return PointScores(**json.loads((point.trial.cfg.run_dir / POINT).read_text()))


def read_work(point: Point) -> PointWork:
    return PointWork(**json.loads((point.trial.cfg.run_dir / WORK).read_text()))


def values_of(points: Sequence[Measured]) -> np.ndarray:
    """NE of the points side by side, float64 [S, P]."""
    return np.stack([point.ne for point in points], axis=1)


def costs_of(points: Sequence[Measured], cost: str) -> np.ndarray:
    """One of `COSTS`, float64 [P]."""
    return np.array([point.costs[cost] for point in points])
