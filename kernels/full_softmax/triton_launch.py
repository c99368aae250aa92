"""Launches of the full softmax's kernels: float32, contiguous tensors."""

import torch
from torch import Tensor

from kernels.full_softmax import triton_kernels
from kernels.launch import cdiv, launch, next_power_of_2

TILE = 8192  # numbers of a block of vectors
MOST_ROWS = 64  # of a program
MOST_ITEMS = 128  # of a step of the forward pass
MOST_OTHERS = 64  # rows of a step of the backward pass: with more, registers spill


def _blocks(dim: int, *, backward: bool) -> tuple[int, int, int]:
    """BLOCK_P, BLOCK_N, BLOCK_D: powers of 2, and 16 or more, as a matrix product takes them.

    dim        64    128   256   512
    rows       64    64    32    16
    forward    128   64    32    16
    backward   64    32    16    16
    """
    block_d = max(next_power_of_2(dim), 16)
    rows = TILE // block_d
    most, step = (MOST_OTHERS, rows // 2) if backward else (MOST_ITEMS, rows)
    return max(min(rows, MOST_ROWS), 16), max(min(step, most), 16), block_d


def log_partition(users: Tensor, items: Tensor) -> Tensor:
    """float32 [P]: of users [P, D] and items [N, D]."""
    num_users, dim = users.shape
    lse = torch.empty(num_users, dtype=torch.float32, device=users.device)
    if num_users == 0:
        return lse

    blocks = _blocks(dim, backward=False)
    launch(
        triton_kernels.log_partition,
        cdiv(num_users, blocks[0]),
        (users, items, lse),
        (num_users, len(items)),
        (dim,),
        blocks,
        device=users.device,
        num_warps=4,
        num_stages=3,
    )
    return lse


def user_gradients(users: Tensor, items: Tensor, lse: Tensor, factor: Tensor) -> Tensor:
    """[P, D]: the gradient of `(lse * factor).sum()` towards the users."""
    return _gradient(users, items, lse, factor, of_users=True)


def item_gradients(users: Tensor, items: Tensor, lse: Tensor, factor: Tensor) -> Tensor:
    """[N, D]: the same towards the items."""
    return _gradient(items, users, lse, factor, of_users=False)


def _gradient(
    rows: Tensor, others: Tensor, lse: Tensor, factor: Tensor, *, of_users: bool
) -> Tensor:
    num_rows, dim = rows.shape
    grad = torch.empty(num_rows, dim, dtype=torch.float32, device=rows.device)
    if num_rows == 0:
        return grad

    blocks = _blocks(dim, backward=True)
    launch(
        triton_kernels.gradient,
        cdiv(num_rows, blocks[0]),
        (rows, others, lse, factor, grad),
        (num_rows, len(others)),
        (dim,),
        (of_users, *blocks),
        device=rows.device,
        num_warps=4,
        num_stages=3,
    )
    return grad
