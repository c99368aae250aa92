"""The two alignments of LARES (arXiv:2505.16865), first stage of its training; the
second is reinforcement.py.

    L = L_next + α · NCE(a, b) + γ · NCE(a, s),   NCE in both directions, half each

a is the row before a next item in a second pass, with other noise and dropout and another number of
steps; b the row of the first pass before the same item in another place of the batch; s the row
after one of a's steps. All rows of the step are each other's negatives. The paper takes b from an
augmented sequence; that it is another sequence with the same target is our reading of its code.
"""

import torch
from torch import Tensor

MOST_ROWS = 2048  # of a step that are aligned, drawn at random: their pairs are all scored


def partners(item: Tensor) -> Tensor:
    """int64 [P]: for each place another with the same item, its own number where there is none.

    Places with one item are taken in a circle.

        item       7 5 7 5 9 7
        partner    2 3 5 1 4 0
    """
    order = item.argsort(stable=True)
    same = item[order]
    number = torch.arange(len(item), device=item.device)

    is_first = torch.ones_like(same, dtype=torch.bool)
    is_first[1:] = same[1:] != same[:-1]
    first = torch.where(is_first, number, 0).cummax(0).values
    is_last = is_first.roll(-1)
    following = torch.where(is_last, first, number + 1)
    return torch.empty_like(order).scatter_(0, order, order[following])


def contrast(a: Tensor, b: Tensor, item: Tensor, temperature: float) -> Tensor:
    """NCE in both directions, half each, over n pairs of rows [n, d]; a number.

    A pair with the same next item is no negative.
    """
    a, b = torch.nn.functional.normalize(a, dim=1), torch.nn.functional.normalize(b, dim=1)
    scores = a @ b.T / temperature
    number = torch.arange(len(item), device=item.device)
    same = (item[:, None] == item) & (number[:, None] != number)
    scores = scores.masked_fill(same, -torch.inf)
    forward = torch.nn.functional.cross_entropy(scores, number)
    return (forward + torch.nn.functional.cross_entropy(scores.T, number)) / 2


def draw_rows(num_rows: int, device: torch.device) -> Tensor:
    """int64: numbers of the rows that a step aligns, all of them or `MOST_ROWS` at random."""
    return torch.randperm(num_rows, device=device)[:MOST_ROWS]
