"""The log of the summed exponentials of all scores, without the scores in memory.

Forward, one program a block of users: all items block by block, with a running maximum and sum.
Backward, one program a block of users, and in a second launch one a block of items: each score anew
from the two vectors, its share of the user's sum, and the shares' product with the other side.
Sums have a fixed order: no atomics. After cut cross entropy (arXiv:2411.09009).

Suffixes: P users of a block, N items or, in the backward pass, rows of the other side, D the width.
Products are TF32, sums float32: on Hopper the blocks of exact float32 products do not fit in
registers.
"""

import triton
import triton.language as tl


@triton.jit
def _load_rows(rows, number, num_rows, dim, BLOCK_D: tl.constexpr):
    """Rows [numbers, D]; zeros behind the last row and the last column."""
    col = tl.arange(0, BLOCK_D)
    # int64: number * dim passes 2**31 in large catalogues
    place = number.to(tl.int64)[:, None] * dim + col
    return tl.load(rows + place, mask=(number < num_rows)[:, None] & (col < dim), other=0.0)


@triton.jit(do_not_specialize=["num_users", "num_items"])
def log_partition(
    users,  # [P, dim]
    items,  # [N, dim]
    lse,  # float32 [P] out
    num_users,
    num_items,
    dim,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    user = _load_rows(users, p, num_users, dim, BLOCK_D)

    top = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    for begin in range(0, num_items, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        item = _load_rows(items, n, num_items, dim, BLOCK_D)
        score = tl.dot(user, tl.trans(item), input_precision="tf32")  # [P, N]
        score = tl.where((n < num_items)[None, :], score, float("-inf"))

        new_top = tl.maximum(top, tl.max(score, 1))
        total = total * tl.exp(top - new_top) + tl.sum(tl.exp(score - new_top[:, None]), 1)
        top = new_top
    tl.store(lse + p, top + tl.log(total), mask=p < num_users)


@triton.jit(do_not_specialize=["num_rows", "num_others"])
def gradient(
    rows,  # [num_rows, dim]: users, or items
    others,  # [num_others, dim]: the other of them
    lse,  # float32, of the users
    factor,  # float32, of the users: gradient of their lse
    grad,  # float32 [num_rows, dim] out
    num_rows,
    num_others,
    dim,
    OF_USERS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradient of Σ factor · lse towards the rows: Σ over the others of factor · share · other."""
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    row = _load_rows(rows, p, num_rows, dim, BLOCK_D)
    if OF_USERS:
        own_lse = tl.load(lse + p, mask=p < num_rows, other=float("inf"))
        own_factor = tl.load(factor + p, mask=p < num_rows, other=0.0)

    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for begin in range(0, num_others, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        valid = n < num_others
        other = _load_rows(others, n, num_others, dim, BLOCK_D)
        score = tl.dot(row, tl.trans(other), input_precision="tf32")  # [P, N]

        if OF_USERS:
            share = tl.exp(score - own_lse[:, None]) * own_factor[:, None]
            share = tl.where(valid[None, :], share, 0.0)
        else:
            # behind the last user the share is exp(-inf)
            other_lse = tl.load(lse + n, mask=valid, other=float("inf"))
            share = tl.exp(score - other_lse[None, :])
            share *= tl.load(factor + n, mask=valid, other=0.0)[None, :]
        total += tl.dot(share, other, input_precision="tf32")

    col = tl.arange(0, BLOCK_D)
    place = p.to(tl.int64)[:, None] * dim + col
    tl.store(grad + place, total, mask=(p < num_rows)[:, None] & (col < dim))
