"""Exact search: one product of a user's vector with all items' vectors."""

from typing import Protocol

import numpy as np
import torch
from torch import Tensor


class VectorIndex(Protocol):
    """The vectors of N items, and the best of them for a user."""

    vectors: Tensor  # float32 [N, d]

    def search(self, query: Tensor, num: int, allowed: np.ndarray) -> np.ndarray:
        """Rows of the `num` largest products with `query`, float32 [d], the largest first, int64.

        Only rows where `allowed`, bool [N], is true are found; fewer than `num` where there are no
        more. Equal products are in the order of their rows.
        """
        ...


class ExactIndex:
    """A matrix product on the device of `vectors`, float32 [N, d]."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors

    def search(self, query: Tensor, num: int, allowed: np.ndarray) -> np.ndarray:
        """As `VectorIndex.search`; nothing is missed."""
        scores = self.vectors @ query.to(self.vectors.device)
        forbidden = torch.from_numpy(~allowed).to(scores.device)
        scores = scores.masked_fill(forbidden, -torch.inf)
        return top_rows(scores, min(num, int(np.count_nonzero(allowed)))).cpu().numpy()


def top_rows(scores: Tensor, num: int) -> Tensor:
    """Rows of the `num` largest of `scores`, [N], the largest first, ties by row, int64 [num].

    `torch.topk` alone leaves it open which of equal scores it takes.

        scores   3 9 3 9 3      num = 3
        topk     9 9 3          the third place is any of rows 0, 2 and 4
        rows     1 3 0
    """
    if num == 0:
        return torch.zeros(0, dtype=torch.int64, device=scores.device)
    if scores.device.type == "cpu":
        return torch.from_numpy(top_rows_on_host(scores.numpy(), num))
    return top_rows_on_device(scores, num)


def top_rows_on_host(scores: np.ndarray, num: int) -> np.ndarray:
    """`top_rows` by a selection: cheaper there than `topk`."""
    last = len(scores) - num
    smallest = np.partition(scores, last)[last]
    rows = np.flatnonzero(scores >= smallest)
    best_first = np.argsort(-scores[rows], kind="stable")
    return rows[best_first[:num]]


def top_rows_on_device(scores: Tensor, num: int) -> Tensor:
    """`top_rows` without a copy to the host."""
    smallest = torch.topk(scores, num).values[-1]
    rows = torch.nonzero(scores >= smallest).squeeze(1)
    best_first = torch.argsort(scores[rows], descending=True, stable=True)
    return rows[best_first[:num]]
