"""The log of the summed exponentials of many scores in plain PyTorch, some items at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_SCORES = 2**27  # numbers in memory at once: 512 MB in float32


def chunked_log_partition(
    users_PD: Tensor,
    items_ND: Tensor,
    bias_N: Tensor | None = None,
    codes_N: Tensor | None = None,
    own_P: Tensor | None = None,
) -> Tensor:
    """[P]: log Σ_j exp(user · item_j + bias_j) over the N items.

    With `codes_N` and `own_P`, int, the items with a user's own code are left out of its sum; −inf
    where that leaves none. The scores, [P, N], exist for a chunk of items only, and again for each
    chunk in the backward pass. Gradients reach users and items.
    """
    return ChunkedLogPartition.apply(users_PD, items_ND, bias_N, codes_N, own_P)


class ChunkedLogPartition(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        users: Tensor,
        items: Tensor,
        bias: Tensor | None,
        codes: Tensor | None,
        own: Tensor | None,
    ) -> Tensor:
        total = users.new_full((len(users),), -torch.inf)
        for _, scores in _score_chunks(users, items, bias, codes, own):
            total = torch.logaddexp(total, torch.logsumexp(scores, dim=1))
        ctx.save_for_backward(users, items, bias, codes, own, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """d total / d score is the item's share of the sum."""
        users, items, bias, codes, own, total = ctx.saved_tensors
        # a sum over nothing has no shares
        total = total.masked_fill(total == -torch.inf, torch.inf)

        of_users, of_items = torch.zeros_like(users), torch.zeros_like(items)
        for part, scores in _score_chunks(users, items, bias, codes, own):
            share = scores.sub_(total[:, None]).exp_().mul_(grad[:, None])
            of_users.addmm_(share, items[part])
            of_items[part] = share.T @ users
        return of_users, of_items, None, None, None


def _score_chunks(
    users: Tensor, items: Tensor, bias: Tensor | None, codes: Tensor | None, own: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Some of the items, and the scores of every user and these."""
    size = max(MOST_SCORES // max(len(users), 1), 1)
    for begin in range(0, len(items), size):
        part = slice(begin, begin + size)
        scores = users @ items[part].T
        if bias is not None:
            scores += bias[part]
        if codes is not None and own is not None:
            scores.masked_fill_(codes[part] == own[:, None], -torch.inf)
        yield part, scores
