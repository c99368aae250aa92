"""Models beside each other, on the same rows: how much they differ, and whether that is chance.

    predictions of each run → the rows that all have scored → metrics, slices
                                                            → paired bootstrap over users

Users are drawn, not rows: the rows of one user are alike. Both models of a pair are scored on each
draw, so that what is hard about a draw is hard for both, and goes out of the difference.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.batches.stored import StoredUsers
from pipeline.config import SplitConfig, UserError
from pipeline.evaluate.item_rates import ItemCounts, count_items, item_logits, merge_counts
from pipeline.evaluate.metrics import auc, grouped_auc, log_loss, normalised_entropy
from pipeline.logs.ids import id_codes

LABEL = "label."
KEYS = ("user_id", "item_id", "event_time")
METRICS = ("ne", "auc", "gauc")
LESS_IS_BETTER = ("ne",)
HISTORY_BOUNDS = (0, 10, 30, 100, 1000)  # rows before the request: where slices begin
INTERVAL = (0.025, 0.975)  # quantiles of the draws: 95 % lie between


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
    # in one order, whatever order each run has written them in
    by_keys = [(key, "ascending") for key in KEYS]
    tables: dict[str, pa.Table] = {}
    for name, folder in runs.items():
        path = require_predictions(name, folder, split)
        tables[name] = pq.read_table(path).sort_by(by_keys)

    (base, first), *others = tables.items()
    for name, table in others:
        if not _have_equal_keys(first, table):
            raise UserError(
                f"runs {base!r} and {name!r} were evaluated on other rows of {split} "
                f"({len(first):,} and {len(table):,}): evaluate both on the same sequences and "
                "split"
            )

    tasks = _common_tasks(tables.values())
    if not tasks:
        raise UserError(f"runs {list(runs)} have no task in common")

    labels = _task_columns(first, "label", tasks)
    for name, table in others:
        _refuse_other_labels(tasks, labels, table, f"runs {base!r} and {name!r}")

    logits = {name: _task_columns(table, "logit", tasks) for name, table in tables.items()}
    return ScoredRows(
        tasks=tuple(tasks),
        user_id=first["user_id"].to_numpy(),
        item_id=first["item_id"].to_numpy(),
        history_rows=first["history_rows"].to_numpy(),
        user_is_new=first["user_is_new"].to_numpy(zero_copy_only=False),
        labels=labels,
        logits=logits,
    )


def _have_equal_keys(one: pa.Table, other: pa.Table) -> bool:
    return all(np.array_equal(one[key].to_numpy(), other[key].to_numpy()) for key in KEYS)


def _refuse_other_labels(
    tasks: Sequence[str], labels: np.ndarray, table: pa.Table, who: str
) -> None:
    """Raises UserError where the same rows have other labels in the table: outcomes that came late,
    an action that is read otherwise.
    """
    theirs = _task_columns(table, "label", tasks)
    for number, task in enumerate(tasks):
        ours = labels[:, number]
        same = (ours == theirs[:, number]) | (np.isnan(ours) & np.isnan(theirs[:, number]))
        if not same.all():
            raise UserError(
                f"{who} were evaluated on other labels of {task} ({(~same).sum():,} of "
                f"{len(same):,} rows): evaluate both on the same sequences"
            )


def _common_tasks(tables: Iterable[pa.Table]) -> list[str]:
    """The tasks of which every table has labels, in the order of the first."""
    first, *others = [table.column_names for table in tables]
    labels = [name for name in first if name.startswith(LABEL)]
    for columns in others:
        labels = [name for name in labels if name in columns]
    return [name.removeprefix(LABEL) for name in labels]


def _task_columns(table: pa.Table, kind: str, tasks: Sequence[str]) -> np.ndarray:
    """The columns `kind.task`, float64 [N, K]."""
    columns = [table[f"{kind}.{task}"].to_numpy(zero_copy_only=False) for task in tasks]
    return np.stack(columns, axis=1).astype(np.float64)


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
    if name == "auc":
        return auc(logits, labels)
    mean, *_ = grouped_auc(logits, labels, users)
    return mean


def measure_rows(rows: ScoredRows, model: str) -> dict[str, dict[str, float]]:
    """Metric by name and task, of one model, on the rows whose label is known."""
    found: dict[str, dict[str, float]] = {name: {} for name in METRICS}
    for number, task in enumerate(rows.tasks):
        known = rows.known(task)
        labels = rows.labels[known, number] > 0
        logits = rows.logits[model][known, number]
        users = rows.user_id[known]

        for name in METRICS:
            has_rows = len(labels) > 0
            found[name][task] = metric_of(name, logits, labels, users) if has_rows else math.nan
    return found


def mean_over_tasks(values: Mapping[str, float]) -> float:
    """Mean over the tasks on which the metric is defined; NaN where it is on none."""
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
    if len(labels) == 0:
        undefined = Difference(math.nan, math.nan, math.nan)
        return dict.fromkeys(METRICS, undefined)

    _, user = np.unique(rows.user_id[known], return_inverse=True)
    before = _Ranked.of(rows.logits[first][known, number], labels, user)
    after = _Ranked.of(rows.logits[second][known, number], labels, user)

    changes: dict[str, list[float]] = {name: [] for name in METRICS}
    for draw in _draw_users(int(user.max()) + 1, samples, seed):
        old, new = before.metrics(draw), after.metrics(draw)
        for name in METRICS:
            changes[name].append(new[name] - old[name])

    differences = {}
    for name, (of_the_rows, *of_draws) in changes.items():
        differences[name] = _difference(of_the_rows, of_draws)
    return differences


def _draw_users(num_users: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each user counts, float64 [U]: once each, then as each of `samples` draws has it.

    three users, two draws    1 1 1    0 1 2    2 1 0
    """
    once = np.ones(num_users)
    yield once

    rng = np.random.default_rng(seed)
    for _ in range(samples):
        yield rng.multinomial(num_users, once / num_users).astype(float)


def _difference(value: float, of_draws: Sequence[float]) -> Difference:
    """A change with the interval of its draws, of those in which it is defined."""
    drawn = np.array(of_draws)
    defined = drawn[np.isfinite(drawn)]
    if len(defined) == 0:
        return Difference(value, math.nan, math.nan)
    low, high = np.quantile(defined, INTERVAL)
    return Difference(value, float(low), float(high))


@dataclass(frozen=True, slots=True)
class _Ranked:
    """One model on the rows of a task, sorted once for all draws.

    scores in order   .1 .4 .4 .7
    begin              0  1  1  3
    end                1  3  3  4
    """

    order: np.ndarray  # int64 [N], rows by rising score
    begin: np.ndarray  # int64 [N], where the run of equal scores begins in that order
    end: np.ndarray  # int64 [N], and where it ends
    labels: np.ndarray  # bool [N]
    user: np.ndarray  # int64 [N], 0 .. U - 1
    loss: np.ndarray  # float64 [N]
    user_auc: np.ndarray  # float64 [U], NaN where a class is missing
    user_rows: np.ndarray  # int64 [U]

    @classmethod
    def of(cls, logits: np.ndarray, labels: np.ndarray, user: np.ndarray) -> "_Ranked":
        order = np.argsort(logits, kind="stable")
        ordered = logits[order]

        # a user's own AUC is the same in every draw: only how often the user counts changes
        num_users = int(user.max()) + 1
        by_user = np.argsort(user, kind="stable")
        bounds = np.searchsorted(user[by_user], np.arange(num_users + 1))
        user_auc = np.full(num_users, np.nan)
        for number in range(num_users):
            mine = by_user[bounds[number] : bounds[number + 1]]
            user_auc[number] = auc(logits[mine], labels[mine])

        return cls(
            order=order,
            begin=np.searchsorted(ordered, ordered, side="left"),
            end=np.searchsorted(ordered, ordered, side="right"),
            labels=labels,
            user=user,
            loss=log_loss(logits, labels),
            user_auc=user_auc,
            user_rows=np.diff(bounds),
        )

    def metrics(self, draw: np.ndarray) -> dict[str, float]:
        """Each metric with every user as often as `draw`, float64 [U], says."""
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
            return math.nan  # one class alone

        of_rate = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return float((weight * self.loss).sum() / total / of_rate)

    def _auc(self, weight: np.ndarray) -> float:
        """A pair counts as often as its two rows together; a tie one half.

        scores in order    .1  .4  .4  .7        weights of 1
        labels              0   1   0   1
        negatives           0   1   1   2   2    before each place, and in all
        below                   1.5     2        of each positive
        AUC                 3.5 of 4 pairs
        """
        labels = self.labels[self.order]
        negatives = np.concatenate([[0.0], np.cumsum(weight * ~labels)])
        below = (negatives[self.begin] + negatives[self.end]) / 2

        positives = weight * labels
        pairs = positives.sum() * negatives[-1]
        if pairs == 0:
            return math.nan
        return float((positives * below).sum() / pairs)

    def _grouped_auc(self, draw: np.ndarray) -> float:
        """Mean of the users' own AUC, by their rows, over those that have both classes."""
        defined = np.isfinite(self.user_auc)
        weight = (draw * self.user_rows)[defined]
        if weight.sum() == 0:
            return math.nan
        return float((weight * self.user_auc[defined]).sum() / weight.sum())


def slice_rows(rows: ScoredRows) -> dict[str, np.ndarray]:
    """Parts of the rows by name, bool [N] each: users new and known, and lengths of history."""
    slices = {
        "users without a row in training": rows.user_is_new,
        "users of the training period": ~rows.user_is_new,
    }

    length = rows.history_rows
    for low, high in pairwise(HISTORY_BOUNDS):
        name = f"{low:,} to {high - 1:,} rows of history"
        slices[name] = (length >= low) & (length < high)
    longest = HISTORY_BOUNDS[-1]
    slices[f"{longest:,} rows of history and more"] = length >= longest

    return {name: inside for name, inside in slices.items() if inside.any()}
