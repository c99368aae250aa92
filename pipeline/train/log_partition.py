"""The log of the summed exponentials of all scores, some items at a time."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MOST_SCORES = 2**27  # numbers in memory at once: 512 MB in float32


def log_partition(users_PD: Tensor, items_ND: Tensor) -> Tensor:
    """[P]: log Σ_j exp(user · item_j) over all N items.

    The scores, [P, N], exist for a chunk of items only, and again for each chunk in the backward
    pass.
    """
    return _LogPartition.apply(users_PD, items_ND)


class _LogPartition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, users: Tensor, items: Tensor) -> Tensor:
        total = users.new_full((len(users),), -torch.inf)
        for part in _chunks(users, items):
            total = torch.logaddexp(total, torch.logsumexp(users @ items[part].T, dim=1))
        ctx.save_for_backward(users, items, total)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        """d total / d score is the item's share of the sum."""
        users, items, total = ctx.saved_tensors
        of_users, of_items = torch.zeros_like(users), torch.zeros_like(items)
        for part in _chunks(users, items):
            share = (users @ items[part].T).sub_(total[:, None]).exp_().mul_(grad[:, None])
            of_users.addmm_(share, items[part])
            of_items[part] = share.T @ users
        return of_users, of_items


def _chunks(users: Tensor, items: Tensor) -> list[slice]:
    size = max(MOST_SCORES // max(len(users), 1), 1)
    return [slice(begin, begin + size) for begin in range(0, len(items), size)]
