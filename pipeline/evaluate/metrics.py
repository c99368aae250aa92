"""NE, AUC and GAUC of one task, exact and mergeable: parts computed anywhere are added, then
summarised once.

- **NE**: mean log loss over the rows ÷ entropy of the positive rate of those same rows.
- **AUC**: share of (positive, negative) pairs in the right order, a tie counting one half.
- **GAUC**: AUC per user averaged by that user's rows; users with one class are left out, and the
  numbers of users and rows that remain are told.
"""

from dataclasses import dataclass, field

import numpy as np


@dataclass
class TaskMetrics:
    """Scores of one task; `add` and `merge` keep all rows, since an exact AUC needs their order.

    >>> metrics = TaskMetrics()
    >>> metrics.add(np.array([2.0, -1.0, 0.5]), np.array([1, 0, 0]), np.array([7, 7, 8]))
    >>> found = metrics.result()
    >>> found["auc"], found["gauc_users"], found["rows"]
    (1.0, 1, 3)
    """

    logits: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    users: list[np.ndarray] = field(default_factory=list)

    def add(self, logits: np.ndarray, labels: np.ndarray, users: np.ndarray) -> None:
        """Rows with a known label: float [n], 0/1 [n], int64 [n]."""
        self.logits.append(logits.astype(np.float64))
        self.labels.append(labels.astype(bool))
        self.users.append(users)

    def merge(self, other: "TaskMetrics") -> None:
        """Take in the other's rows, behind one's own."""
        self.logits += other.logits
        self.labels += other.labels
        self.users += other.users

    def result(self) -> dict[str, float]:
        """ne, auc, gauc, the rows behind ne and auc, the users and rows behind gauc.

        NaN where a value isn't defined: a single class, no user with both, a score that is NaN.
        """
        if not self.logits:
            none: dict[str, float] = {"ne": np.nan, "auc": np.nan, "rows": 0}
            return none | {"gauc": np.nan, "gauc_users": 0, "gauc_rows": 0}

        logits = np.concatenate(self.logits)
        labels = np.concatenate(self.labels)
        users = np.concatenate(self.users)
        gauc, gauc_users, gauc_rows = grouped_auc(logits, labels, users)
        return {
            "ne": normalised_entropy(logits, labels),
            "auc": auc(logits, labels),
            "rows": len(labels),
            "gauc": gauc,
            "gauc_users": gauc_users,
            "gauc_rows": gauc_rows,
        }


def log_loss(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Per row, float64; from logits, so that a sure score keeps its precision.

    >>> log_loss(np.array([0.0, 100.0]), np.array([True, False])).round(4).tolist()
    [0.6931, 100.0]
    """
    with np.errstate(invalid="ignore"):  # NaN stays NaN
        return np.logaddexp(0, logits) - np.where(labels, logits, 0)


def normalised_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Mean log loss ÷ entropy of the rows' positive rate; NaN where all labels are the same.

    1 is no better than the rate itself, here one in four:

    >>> labels = np.array([True, False, False, False])
    >>> round(normalised_entropy(np.full(4, np.log(1 / 3)), labels), 6)
    1.0
    >>> round(normalised_entropy(np.array([2.0, -2.0, -2.0, -2.0]), labels), 3)
    0.226
    """
    rate = labels.mean()
    if rate in (0, 1):
        return float("nan")
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float(log_loss(logits, labels).mean() / entropy)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Share of (positive, negative) pairs in the right order; NaN where a class is missing.

    Of these two positives and two negatives three pairs are in order, and one is tied:

    >>> auc(np.array([0.9, 0.4, 0.4, 0.1]), np.array([True, True, False, False]))
    0.875
    """
    return grouped_auc(scores, labels, np.zeros(len(labels), np.int64))[0]


def grouped_auc(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[float, int, int]:
    """AUC per group averaged by rows over groups with both classes, and how many groups and rows
    those are.

    User 1 has AUC 1 with two rows, user 2 has 0.5 with three, user 3 has no negative:

    >>> scores = np.array([0.9, 0.1, 0.5, 0.7, 0.3, 0.8])
    >>> labels = np.array([True, False, True, False, False, True])
    >>> grouped_auc(scores, labels, np.array([1, 1, 2, 2, 2, 3]))
    (0.7, 2, 5)
    """
    if np.isnan(scores).any():
        # NaN has no rank: sorted last, it would be whatever the order of the rows makes of it
        return float("nan"), 0, 0
    _, group = np.unique(groups, return_inverse=True)
    order = np.lexsort((scores, group))
    score, label, group = scores[order], labels[order].astype(np.float64), group[order]

    # ranks from 1 inside each group
    rows = np.bincount(group)
    rank = _average_ranks(score, group) - (np.cumsum(rows) - rows)[group]

    positives = np.bincount(group, label)
    negatives = rows - positives
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return float("nan"), 0, 0

    # Mann-Whitney U: the positives' ranks, less what they would be without a negative
    wins = np.bincount(group, label * rank) - positives * (positives + 1) / 2
    area = wins[both] / (positives * negatives)[both]
    return float(np.average(area, weights=rows[both])), int(both.sum()), int(rows[both].sum())


def _average_ranks(score: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Ranks from 1 over rows sorted by (group, score); equal scores of a group share the mean of
    their ranks.

        group    0    0    0    1
        score  0.1  0.4  0.4  0.4
        rank     1  2.5  2.5    4
    """
    starts = np.ones(len(score), bool)
    starts[1:] = (score[1:] != score[:-1]) | (group[1:] != group[:-1])
    tie = np.cumsum(starts) - 1

    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(score))
    return ((first + 1 + last) / 2)[tie]
