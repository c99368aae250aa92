"""Metrics of retrieval: where the items that users took stand among all items.

    scores of all items ─▶ `positive_ranks` ─┐
                       └─▶ `top_items` ──────┴▶ RetrievalMetrics

Items are numbers from 0, in the order of their codes. Items of equal score stand in that order, so
that every run of a model gives the same lists.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def remove_seen(scores_UN: Tensor, user: Tensor, item: Tensor) -> None:
    """Give the pairs of user and item, int64 [S] each, the last place of all, in place."""
    scores_UN[user, item] = -torch.inf


def positive_ranks(scores_UN: Tensor, user: Tensor, item: Tensor) -> Tensor:
    """int64 [P]: the place of each pair's item in its user's list, 0 for the first.

    scores of a user   .5 .9 .5 .1      items 0 1 2 3
    list               1 0 2 3          0 before 2: equal, and the smaller number
    rank of item 2     2
    """
    scores = scores_UN.numpy(force=True)
    ranks = np.empty(len(user), np.int64)
    for number, (of_user, place) in enumerate(zip(user.tolist(), item.tolist(), strict=True)):
        row, own = scores[of_user], scores[of_user, place]
        # of the items with smaller numbers those of the same score come first, too
        smaller = np.count_nonzero(row[:place] >= own)
        ranks[number] = smaller + np.count_nonzero(row[place:] > own)
    return torch.from_numpy(ranks)


def top_items(scores_UN: Tensor, k: int) -> Tensor:
    """int64 [U, k]: the first items of each user's list."""
    scores = scores_UN.numpy(force=True)
    num_users, num_items = scores.shape
    k = min(k, num_items)

    # the items as good as the k-th, more than k where several are
    least = np.partition(scores, num_items - k, axis=1)[:, num_items - k]
    place = np.flatnonzero(scores >= least[:, None])
    user, item = np.divmod(place, num_items)
    order = np.lexsort((-scores.ravel()[place], user))  # stable: equal scores stay by number
    user, item = user[order], item[order]

    begins = np.searchsorted(user, np.arange(num_users))
    return torch.from_numpy(item[begins[:, None] + np.arange(k)])


class RetrievalMetrics:
    """HR@K, NDCG@K, recall@K, MRR, coverage, popularity and novelty over users.

    Each user counts once, however many items they took:

        HR@K        1 where one of them is among the first K
        recall@K    share of them, of at most K, that is
        NDCG@K      sum of 1 / log2(place + 1) over those among the first K, over the largest
                    that so many items could have
        MRR         1 / place of the first of them

    and of the lists themselves:

        coverage@K      share of all items that are in one of the lists
        popularity@K    mean popularity of the listed items over that of the taken ones: above 1
                        the lists are more popular than what users take
        novelty@K       mean of −log2 of the share of training events that are of a listed item

    Args:
        counts: int64 [N], how often each item was taken in the training period.
    """

    def __init__(self, counts: np.ndarray, cutoffs: Sequence[int]) -> None:
        self.counts, self.cutoffs = counts, tuple(cutoffs)
        self.sums: dict[str, float] = {}
        self.listed = {k: np.zeros(len(counts), np.int64) for k in self.cutoffs}
        self.taken = np.zeros(len(counts), np.int64)
        self.num_users = 0

    def add(self, num_positives: np.ndarray, ranks: np.ndarray, items: np.ndarray,
            top: np.ndarray) -> None:  # fmt: skip
        """Some users: how many items each took, [U], and those items, [P], user after user, with
        their ranks; and the users' lists, [U, largest K].
        """
        user = np.repeat(np.arange(len(num_positives)), num_positives)
        first = np.full(len(num_positives), np.iinfo(np.int64).max)
        np.minimum.at(first, user, ranks)
        self._sum("mrr", 1 / (first + 1.0))

        for k in self.cutoffs:
            among = ranks < k
            hits = np.bincount(user, among, minlength=len(num_positives))
            gain = np.where(among, 1 / np.log2(ranks + 2.0), 0)
            gains = np.bincount(user, gain, minlength=len(num_positives))
            most = np.minimum(num_positives, k)
            best = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2.0))])

            self._sum(f"hr_{k}", hits > 0)
            self._sum(f"recall_{k}", hits / most)
            self._sum(f"ndcg_{k}", gains / best[most])
            self.listed[k] += np.bincount(top[:, :k].ravel(), minlength=len(self.counts))

        self.taken += np.bincount(items, minlength=len(self.counts))
        self.num_users += len(num_positives)

    def _sum(self, name: str, values: np.ndarray) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + float(values.sum())

    def merge(self, other: "RetrievalMetrics") -> None:
        """Take in the users of another part."""
        for name, total in other.sums.items():
            self.sums[name] = self.sums.get(name, 0.0) + total
        for k, listed in other.listed.items():
            self.listed[k] += listed
        self.taken += other.taken
        self.num_users += other.num_users

    def result(self) -> dict[str, float]:
        """`hr_10`, `ndcg_10` and so on, and `users`; NaN where nothing was added."""
        found: dict[str, float] = {"users": self.num_users}
        for name, total in self.sums.items():
            found[name] = total / self.num_users

        share = self.counts / max(self.counts.sum(), 1)
        # an item that nobody took is as novel as one taken once
        novelty = -np.log2(np.maximum(self.counts, 1) / max(self.counts.sum(), 1))
        usual = _weighted_mean(share, self.taken)
        for k, listed in self.listed.items():
            found[f"coverage_{k}"] = float(np.count_nonzero(listed) / len(listed))
            found[f"popularity_{k}"] = _weighted_mean(share, listed) / usual if usual else math.nan
            found[f"novelty_{k}"] = _weighted_mean(novelty, listed)
        return found


def _weighted_mean(values: np.ndarray, weights: np.ndarray) -> float:
    total = weights.sum()
    return float((values * weights).sum() / total) if total else math.nan
