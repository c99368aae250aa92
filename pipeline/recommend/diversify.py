"""The items of a list, chosen one after another so that it is not all of one kind."""

import math

import numpy as np
import torch
from torch import Tensor

from pipeline.index.catalogue import ItemColumn


def capped_order(
    best_first: np.ndarray, column: ItemColumn, rows: np.ndarray, at_most: int, num: int
) -> np.ndarray:
    """The first `num` candidates with at most `at_most` of each value of `column`, int64.

    An item whose value is unknown is a kind of its own.

        author, best first   a a a b a b c      at_most = 2, num = 4
        chosen               a a   b   b

    Args:
        best_first: int64 [C], places of candidates.
        rows: int64 [C], the row of each place in the catalogue.
    """
    counts: dict[int | float | bool, int] = {}
    chosen = []
    for place in best_first.tolist():
        if len(chosen) == num:
            break
        row = rows[place]
        if column.known[row]:
            value = column.values[row].item()
            counts[value] = counts.get(value, 0) + 1
            if counts[value] > at_most:
                continue
        chosen.append(place)
    return np.array(chosen, np.int64)


def marginal_order(scores: np.ndarray, vectors: Tensor, weight: float, num: int) -> np.ndarray:
    """Places of `num` of C candidates by maximal marginal relevance (Carbonell and Goldstein 1998).

    Each next item is the one of largest

        weight * relevance - (1 - weight) * (its largest cosine with an item chosen before)

    where relevance is the score, stretched to 0..1 over the candidates. Ties go to the earlier
    candidate. With weight 1 the order is that of the scores.

    Args:
        scores: float32 [C].
        vectors: float32 [C, d], of the same items.
    """
    low, high = float(scores.min()), float(scores.max())
    relevance = torch.from_numpy(scores - low) / ((high - low) or 1.0)
    unit = torch.nn.functional.normalize(vectors.cpu().float(), dim=1)

    chosen: list[int] = []
    nearest = torch.zeros(len(scores))  # nothing is near before the first
    left = torch.ones(len(scores), dtype=torch.bool)
    for _ in range(min(num, len(scores))):
        value = weight * relevance - (1 - weight) * nearest
        value[~left] = -math.inf
        place = int(torch.nonzero(value == value.max())[0])
        chosen.append(place)
        left[place] = False

        cosine = unit @ unit[place]
        nearest = cosine if len(chosen) == 1 else torch.maximum(nearest, cosine)
    return np.array(chosen, np.int64)
