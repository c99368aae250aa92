"""What the sampled loss of a next item is measured against: a fused cross entropy in Triton, as it
is often written, each position against items of its own.

CCE− (arXiv:2509.09682), with atomic sums: ours, after the paper, not its authors' code. For the
benchmark alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


@triton.jit
def _indexed_scores(
    items, own_ids, user, positive, r, columns, dim, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr
):
    """Item rows [R, D], their numbers and scores [R]; −inf for a negative that is the positive."""
    col = tl.arange(0, BLOCK_D)
    item = tl.load(own_ids + r, mask=r < columns, other=0).to(tl.int64)
    mask = (r < columns)[:, None] & (col < dim)
    x = tl.load(items + item[:, None] * dim + col, mask=mask, other=0.0).to(tl.float32)
    counts = (r < columns) & ((r == 0) | (item != positive))
    score = tl.where(counts, tl.sum(x * user, 1), float("-inf"))
    return x, item, score


@triton.jit
def indexed_forward(
    users,  # [P, dim], scaled
    items,  # [N, dim]
    ids,  # int [P, columns]: the positive first
    lse,  # float32 [P] out
    score_of_positive,  # float32 [P] out
    columns,
    dim,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    user = tl.load(users + position * dim + col, mask=col < dim, other=0.0).to(tl.float32)
    own_ids = ids + position * columns
    positive = tl.load(own_ids).to(tl.int64)

    # the positive is in the first block, so that no maximum is −inf
    top = tl.full((), float("-inf"), tl.float32)
    total = tl.zeros((), tl.float32)
    for begin in range(0, columns, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        _, _, score = _indexed_scores(
            items, own_ids, user, positive, r, columns, dim, BLOCK_D, BLOCK_R
        )
        if begin == 0:
            tl.store(score_of_positive + position, tl.sum(tl.where(r == 0, score, 0.0), 0))
        new_top = tl.maximum(top, tl.max(score, 0))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(score - new_top), 0)
        top = new_top
    tl.store(lse + position, top + tl.log(total))


@triton.jit
def indexed_backward(
    users,
    items,
    ids,
    lse,
    factor,  # float32 [P]: gradient of a position's loss
    user_grad,  # float32 [P, dim] out
    item_grad,  # float32 [N, dim], added to
    columns,
    dim,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    user = tl.load(users + position * dim + col, mask=col < dim, other=0.0).to(tl.float32)
    own_ids = ids + position * columns
    positive = tl.load(own_ids).to(tl.int64)
    own_lse, own_factor = tl.load(lse + position), tl.load(factor + position)

    toward = tl.zeros((BLOCK_D,), tl.float32)
    for begin in range(0, columns, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        x, item, score = _indexed_scores(
            items, own_ids, user, positive, r, columns, dim, BLOCK_D, BLOCK_R
        )
        share = (tl.exp(score - own_lse) - tl.where(r == 0, 1.0, 0.0)) * own_factor
        toward += tl.sum(share[:, None] * x, 0)
        tl.atomic_add(
            item_grad + item[:, None] * dim + col,
            share[:, None] * user,
            mask=(r < columns)[:, None] & (col < dim),
        )
    tl.store(user_grad + position * dim + col, toward, mask=col < dim)


class IndexedLoss(torch.autograd.Function):
    """[P]: −log softmax of the first of `ids` [P, 1 + R]."""

    @staticmethod
    def forward(ctx, users: Tensor, items: Tensor, ids: Tensor) -> Tensor:
        lse, own = (torch.empty(len(users), device=users.device) for _ in range(2))
        ctx.sizes = _indexed_sizes(ids, users.shape[1])
        indexed_forward[(len(users),)](users, items, ids, lse, own, *ctx.sizes)
        ctx.save_for_backward(users, items, ids, lse)
        return lse - own

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        users, items, ids, lse = ctx.saved_tensors
        of_users = torch.empty(users.shape, device=users.device)
        of_items = torch.zeros(items.shape, device=users.device)
        indexed_backward[(len(users),)](
            users, items, ids, lse, grad.contiguous(), of_users, of_items, *ctx.sizes
        )
        return of_users.to(users.dtype), of_items.to(items.dtype), None


def _indexed_sizes(ids: Tensor, dim: int) -> tuple[int, int, int, int]:
    """columns, dim, BLOCK_D, BLOCK_R."""
    block_d = triton.next_power_of_2(dim)
    return ids.shape[1], dim, block_d, max(4096 // block_d, 1)
