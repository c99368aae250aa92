"""Models beside each other, on the same rows: how much they differ, and whether that is chance.

    predictions of each run → the rows that all have scored → metrics, slices
                                                            → paired bootstrap over users

Users are drawn, not rows: the rows of one user are alike. Both models of a pair are scored on each
draw, so that what is hard about a draw is hard for both, and goes out of the difference.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from pipeline.batches.stored import StoredUsers
from pipeline.config import SplitConfig, UserError
from pipeline.evaluate.item_rates import ItemCounts, count_items, item_logits, merge_counts
from pipeline.evaluate.metrics import auc, grouped_auc, log_loss, normalised_entropy
from pipeline.logs.ids import id_codes

KEYS = ("user_id", "item_id", "event_time")
METRICS = ("ne", "auc", "gauc")
LESS_IS_BETTER = ("ne",)
HISTORY_BOUNDS = (0, 10, 30, 100, 1000)  # rows before the request: where slices begin


@dataclass(frozen=True, slots=True)
class ScoredRows:
    """Rows of one split, and the logits that each model gives them.

    `labels` has NaN where a label is unknown. N rows, K tasks.
    """

    tasks: tuple[str, ...]
    user_id: np.ndarray  # int64 [N], or text as the logs have it
    item_id: np.ndarray  # the same
    history_rows: np.ndarray  # int64 [N], of the user before the request
    user_is_new: np.ndarray  # bool [N], no row in the training period
    labels: np.ndarray  # float64 [N, K]
    logits: dict[str, np.ndarray]  # by model: float64 [N, K]

    def take(self, rows: np.ndarray) -> "ScoredRows":
        """Those where `rows`, bool [N], is true."""
        return ScoredRows(
            tasks=self.tasks,
            user_id=self.user_id[rows],
            item_id=self.item_id[rows],
            history_rows=self.history_rows[rows],
            user_is_new=self.user_is_new[rows],
            labels=self.labels[rows],
            logits={name: values[rows] for name, values in self.logits.items()},
        )

    def known(self, task: str) -> np.ndarray:
        """bool [N], true where the label of a task is known."""
        return ~np.isnan(self.labels[:, self.tasks.index(task)])


@dataclass(frozen=True, slots=True)
class Difference:
    """A model's metric minus another's, with the interval that holds 95 % of the draws."""

    value: float
    low: float
    high: float

    @property
    def is_clear(self) -> bool:
        """False where the interval holds 0, or one of its ends is not defined."""
        return self.low > 0 or self.high < 0


def require_predictions(name: str, folder: Path, split: str) -> Path:
    """The file of a run's predictions.

    Raises:
        UserError: it has none of this split.
    """
    path = folder / "evaluation" / "predictions" / f"{split}.parquet"
    if not path.exists():
        raise UserError(
            f"run {name!r} has no predictions of {split} ({path}): run jobs.evaluate for it, "
            "or jobs.compare with --evaluate"
        )
    return path


def read_scores(runs: Mapping[str, Path], split: str) -> ScoredRows:
    """The rows that all of these runs have scored, from the predictions in their folders.

    Raises:
        UserError: a run without predictions of the split, of other rows than the first, or two
        without a common task.
    """
    tables = {}
    for name, folder in runs.items():
        path = require_predictions(name, folder, split)
        tables[name] = pq.read_table(path).sort_by([(key, "ascending") for key in KEYS])

    (base, first), *others = tables.items()
    tasks = [column[6:] for column in first.column_names if column.startswith("label.")]
    for name, table in others:
        tasks = [task for task in tasks if f"label.{task}" in table.column_names]
        for key in KEYS:
            if not np.array_equal(table[key].to_numpy(), first[key].to_numpy()):
                raise UserError(
                    f"runs {base!r} and {name!r} were evaluated on other rows of {split} "
                    f"({len(first):,} and {len(table):,}): evaluate both on the same sequences and "
                    "split"
                )
    if not tasks:
        raise UserError(f"runs {list(runs)} have no task in common")

    def columns(table, kind: str) -> np.ndarray:
        found = [table[f"{kind}.{task}"].to_numpy(zero_copy_only=False) for task in tasks]
        return np.stack(found, axis=1).astype(np.float64)

    return ScoredRows(
        tasks=tuple(tasks),
        user_id=first["user_id"].to_numpy(),
        item_id=first["item_id"].to_numpy(),
        history_rows=first["history_rows"].to_numpy(),
        user_is_new=first["user_is_new"].to_numpy(zero_copy_only=False),
        labels=columns(first, "label"),
        logits={name: columns(table, "logit") for name, table in tables.items()},
    )


def item_rate_logits(stored: StoredUsers, split: SplitConfig, rows: ScoredRows) -> np.ndarray:
    """Log-odds of the item's smoothed rate in the training period, float64 [N, K]: the model that
    every other must beat.
    """
    task_bits = [stored.source.actions.index(task) for task in rows.tasks]
    parts: list[ItemCounts] = []
    for users in stored.by_bucket():
        parts.append(count_items(users, split, task_bits))
    # predictions name items as people do
    return item_logits(merge_counts(parts), id_codes(rows.item_id.tolist()))


def metric_of(name: str, logits: np.ndarray, labels: np.ndarray, users: np.ndarray) -> float:
    """`ne`, `auc` or `gauc` of one task's rows."""
    if name == "ne":
        return normalised_entropy(logits, labels)
    return auc(logits, labels) if name == "auc" else grouped_auc(logits, labels, users)[0]


def measure_rows(rows: ScoredRows, model: str) -> dict[str, dict[str, float]]:
    """Metric by name and task, of one model, on the rows whose label is known."""
    found: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for number, task in enumerate(rows.tasks):
        known = rows.known(task)
        labels = rows.labels[known, number] > 0
        logits = rows.logits[model][known, number]
        for name in METRICS:
            found[name][task] = math.nan
            if len(labels):
                found[name][task] = metric_of(name, logits, labels, rows.user_id[known])
    return found


def mean_over_tasks(values: Mapping[str, float]) -> float:
    """Of the tasks on which the metric is defined; NaN where it is on none."""
    defined = [value for value in values.values() if math.isfinite(value)]
    return float(np.mean(defined)) if defined else math.nan


def compare_models(
    rows: ScoredRows, first: str, second: str, task: str, samples: int, seed: int = 0
) -> dict[str, Difference]:
    """`second` minus `first` in each metric of a task, by paired bootstrap over users.

    users             a a b c        a draw of three users: b, c, c
    times each row    0 0 1 2
    """
    number, known = rows.tasks.index(task), rows.known(task)
    labels = rows.labels[known, number] > 0
    _, user = np.unique(rows.user_id[known], return_inverse=True)
    if len(labels) == 0:
        nothing = Difference(math.nan, math.nan, math.nan)
        return dict.fromkeys(METRICS, nothing)

    sides = []
    for model in (first, second):
        sides.append(_Ranked.of(rows.logits[model][known, number], labels, user))
    num_users = int(user.max()) + 1
    rng = np.random.default_rng(seed)
    ones = np.ones(num_users)
    draws = [ones]
    draws += [rng.multinomial(num_users, ones / num_users).astype(float) for _ in range(samples)]

    differences: dict[str, list[float]] = {name: [] for name in METRICS}
    for draw in draws:
        before, after = (side.metrics(draw) for side in sides)
        for name in METRICS:
            differences[name].append(after[name] - before[name])
    return {name: _difference(values) for name, values in differences.items()}


def _difference(values: Sequence[float]) -> Difference:
    """The first value is of the rows themselves, the others of the draws."""
    drawn = np.array(values[1:])
    defined = drawn[np.isfinite(drawn)]
    if len(defined) == 0:
        return Difference(values[0], math.nan, math.nan)
    low, high = np.quantile(defined, [0.025, 0.975])
    return Difference(values[0], float(low), float(high))


@dataclass(frozen=True, slots=True)
class _Ranked:
    """One model on the rows of a task, sorted once for all draws."""

    order: np.ndarray  # int64 [N], by score
    end: np.ndarray  # int64 [N], where a run of equal scores ends in that order
    begin: np.ndarray
    labels: np.ndarray  # bool [N]
    user: np.ndarray  # int64 [N], 0 .. U - 1
    loss: np.ndarray  # float64 [N]
    user_auc: np.ndarray  # float64 [U], NaN where a class is missing
    user_rows: np.ndarray  # int64 [U]

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, user: np.ndarray) -> "_Ranked":
        order = np.argsort(logits, kind="stable")
        ordered = logits[order]
        num_users = int(user.max()) + 1

        user_auc = np.full(num_users, np.nan)
        bounds = np.searchsorted(np.sort(user), np.arange(num_users + 1))
        by_user = np.argsort(user, kind="stable")
        for number in range(num_users):
            mine = by_user[bounds[number] : bounds[number + 1]]
            user_auc[number] = auc(logits[mine], labels[mine])

        return cls(
            order=order,
            end=np.searchsorted(ordered, ordered, side="right"),
            begin=np.searchsorted(ordered, ordered, side="left"),
            labels=labels,
            user=user,
            loss=log_loss(logits, labels),
            user_auc=user_auc,
            user_rows=np.diff(bounds),
        )

    def metrics(self, draw: np.ndarray) -> dict[str, float]:
        """With each user as often as `draw`, float64 [U], says."""
        weight = draw[self.user]
        return {
            "ne": self._entropy(weight),
            "auc": self._auc(weight[self.order]),
            "gauc": self._grouped_auc(draw),
        }

    def _entropy(self, weight: np.ndarray) -> float:
        total = weight.sum()
        rate = (weight * self.labels).sum() / total
        if not 0 < rate < 1:
            return math.nan
        entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return float((weight * self.loss).sum() / total / entropy)

    def _auc(self, weight: np.ndarray) -> float:
        """A pair counts as often as its two rows together; a tie one half."""
        labels = self.labels[self.order]
        negatives = np.concatenate([[0.0], np.cumsum(weight * ~labels)])
        below = (negatives[self.begin] + negatives[self.end]) / 2
        positives = weight * labels
        pairs = positives.sum() * negatives[-1]
        return float((positives * below).sum() / pairs) if pairs > 0 else math.nan

    def _grouped_auc(self, draw: np.ndarray) -> float:
        defined = np.isfinite(self.user_auc)
        weight = (draw * self.user_rows)[defined]
        if weight.sum() == 0:
            return math.nan
        return float((weight * self.user_auc[defined]).sum() / weight.sum())


def slice_rows(rows: ScoredRows) -> dict[str, np.ndarray]:
    """Parts of the rows by name, bool [N] each: users new and known, and lengths of history."""
    found = {
        "users without a row in training": rows.user_is_new,
        "users of the training period": ~rows.user_is_new,
    }
    for low, high in zip(HISTORY_BOUNDS, [*HISTORY_BOUNDS[1:], None], strict=True):
        inside = rows.history_rows >= low
        name = f"{low:,} rows of history and more"
        if high is not None:
            inside &= rows.history_rows < high
            name = f"{low:,} to {high - 1:,} rows of history"
        found[name] = inside
    return {name: inside for name, inside in found.items() if inside.any()}
