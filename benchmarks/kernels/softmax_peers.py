"""What the loss of a next item is measured against: fused cross entropy in Triton, as it is often
written, without scores in memory.

    indexed   each position against items of its own: CCE− (arXiv:2509.09682), with atomic sums
    full      each position against all items: cut cross entropy (arXiv:2411.09009), one kernel for
              the gradient of either side

Ours, after the papers, not their authors' code. Matrix products are TF32, sums float32. For the
benchmark alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK_P = 64  # users of a program
BLOCK_N = 128  # items of a step of the forward pass
BLOCK_GRAD_N = 64  # rows of a step of the backward pass: with more, registers spill


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


@triton.jit
def full_forward(
    users,  # [P, dim], scaled
    items,  # [N, dim]
    lse,  # float32 [P] out
    num_users,
    num_items,
    dim,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    col = tl.arange(0, BLOCK_D)
    of_users = (p < num_users)[:, None] & (col < dim)
    user = tl.load(users + p.to(tl.int64)[:, None] * dim + col, mask=of_users, other=0.0)

    top = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for begin in range(0, num_items, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        mask = (n < num_items)[:, None] & (col < dim)
        item = tl.load(items + n.to(tl.int64)[:, None] * dim + col, mask=mask, other=0.0)
        score = tl.dot(user, tl.trans(item), input_precision="tf32")
        score = tl.where((n < num_items)[None, :], score, float("-inf"))

        new_top = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(score - new_top[:, None]), 1)
        top = new_top
    tl.store(lse + p, top + tl.log(total), mask=p < num_users)


@triton.jit
def full_gradient(
    rows,  # [num_rows, dim]: users or items
    others,  # [num_others, dim]: the other of them
    lse,  # float32, of the users
    factor,  # float32, of the users: gradient of their lse
    out,  # float32 [num_rows, dim]
    num_rows,
    num_others,
    dim,
    OF_USERS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Gradient of the sum of factor · lse towards the rows: Σ over others of share · other."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    col = tl.arange(0, BLOCK_D)
    place = p.to(tl.int64)[:, None] * dim + col
    of_rows = (p < num_rows)[:, None] & (col < dim)
    row = tl.load(rows + place, mask=of_rows, other=0.0)
    if OF_USERS:
        own_lse = tl.load(lse + p, mask=p < num_rows, other=float("inf"))
        own_factor = tl.load(factor + p, mask=p < num_rows, other=0.0)

    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for begin in range(0, num_others, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        valid = n < num_others
        mask = valid[:, None] & (col < dim)
        other = tl.load(others + n.to(tl.int64)[:, None] * dim + col, mask=mask, other=0.0)
        score = tl.dot(row, tl.trans(other), input_precision="tf32")
        if OF_USERS:
            share = tl.exp(score - own_lse[:, None]) * own_factor[:, None]
            share = tl.where(valid[None, :], share, 0.0)
        else:
            other_lse = tl.load(lse + n, mask=valid, other=float("inf"))
            share = tl.exp(score - other_lse[None, :])
            share *= tl.load(factor + n, mask=valid, other=0.0)[None, :]
        total += tl.dot(share.to(other.dtype), other, input_precision="tf32")
    tl.store(out + place, total, mask=of_rows)


class FullPartition(torch.autograd.Function):
    """[P]: log of the summed exponentials of the scores of all items."""

    @staticmethod
    def forward(ctx, users: Tensor, items: Tensor) -> Tensor:
        lse = torch.empty(len(users), device=users.device)
        grid = (triton.cdiv(len(users), BLOCK_P),)
        sizes = len(users), len(items), users.shape[1]
        block_d = _block_d(users.shape[1])
        full_forward[grid](users, items, lse, *sizes, block_d, BLOCK_P, BLOCK_N)
        ctx.save_for_backward(users, items, lse)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        users, items, lse = ctx.saved_tensors
        grad, block_d = grad.contiguous(), _block_d(users.shape[1])
        found = []
        for of_users, rows, others in ((True, users, items), (False, items, users)):
            out = torch.empty(rows.shape, device=rows.device)
            grid = (triton.cdiv(len(rows), BLOCK_P),)
            sizes = len(rows), len(others), rows.shape[1]
            blocks = block_d, BLOCK_P, BLOCK_GRAD_N
            full_gradient[grid](rows, others, lse, grad, out, *sizes, of_users, *blocks)
            found.append(out.to(rows.dtype))
        return tuple(found)


def _block_d(dim: int) -> int:
    """A matrix product takes 16 numbers or more."""
    return max(triton.next_power_of_2(dim), 16)
