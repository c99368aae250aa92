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
    """Scores of one task; `add` and `merge` keep all rows, since an exact AUC needs their order."""

    logits: list[np.ndarray] = field(default_factory=list)
    labels: list[np.ndarray] = field(default_factory=list)
    users: list[np.ndarray] = field(default_factory=list)

    def add(self, logits: np.ndarray, labels: np.ndarray, users: np.ndarray) -> None:
        """Rows with a known label: float [n], 0/1 [n], int64 [n]."""
        self.logits.append(logits.astype(np.float64))
        self.labels.append(labels.astype(bool))
        self.users.append(users)

    def merge(self, other: "TaskMetrics") -> None:
        self.logits += other.logits
        self.labels += other.labels
        self.users += other.users

    def result(self) -> dict[str, float]:
        """ne, auc, gauc, the rows behind ne and auc, the users and rows behind gauc.

        NaN where a value isn't defined: a single class, or no user with both.
        """
        if not self.logits:
            return {
                "ne": np.nan,
                "auc": np.nan,
                "rows": 0,
                "gauc": np.nan,
                "gauc_users": 0,
                "gauc_rows": 0,
            }
        logits, labels, users = (
            np.concatenate(parts) for parts in (self.logits, self.labels, self.users)
        )
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
    """Per row, float64; from logits, so that a sure score keeps its precision."""
    return np.logaddexp(0, logits) - np.where(labels, logits, 0)


def normalised_entropy(logits: np.ndarray, labels: np.ndarray) -> float:
    rate = labels.mean()
    if rate in (0, 1):
        return float("nan")
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate))
    return float(log_loss(logits, labels).mean() / entropy)


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    return grouped_auc(scores, labels, np.zeros(len(labels), np.int64))[0]


def grouped_auc(
    scores: np.ndarray, labels: np.ndarray, groups: np.ndarray
) -> tuple[float, int, int]:
    """AUC per group averaged by rows over groups with both classes, and how many groups and rows
    those are.
    """
    _, group = np.unique(groups, return_inverse=True)
    order = np.lexsort((scores, group))
    score, label, group = scores[order], labels[order].astype(np.float64), group[order]
    rows = np.bincount(group)
    # from 1 inside each group
    rank = _average_ranks(score, group) - (np.cumsum(rows) - rows)[group]
    positives = np.bincount(group, label)
    negatives = rows - positives
    both = (positives > 0) & (negatives > 0)
    if not both.any():
        return float("nan"), 0, 0
    wins = np.bincount(group, label * rank) - positives * (positives + 1) / 2
    area = wins[both] / (positives * negatives)[both]
    return float(np.average(area, weights=rows[both])), int(both.sum()), int(rows[both].sum())


def _average_ranks(score: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Ranks from 1 over rows sorted by (group, score); equal scores of a group share the mean of
    their ranks.
    """
    starts = np.ones(len(score), bool)
    starts[1:] = (score[1:] != score[:-1]) | (group[1:] != group[:-1])
    tie = np.cumsum(starts) - 1
    first = np.flatnonzero(starts)
    last = np.append(first[1:], len(score))
    return ((first + 1 + last) / 2)[tie]
