"""Launches of the full softmax's kernels: float32, contiguous tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.full_softmax import triton_kernels
from kernels.launch import cdiv, launch, next_power_of_2

PADDING = 128  # rows of a float16 tensor are a multiple of it, and of every block
PARTS = 512  # of a tensor, in each of which the largest number is found
PART_BLOCK = 1024
CONVERTED = 4096  # numbers of a program that makes float16
FACTS_BLOCK = 128


@dataclass(frozen=True, slots=True)
class HalfRows:
    """Vectors in float16, times a power of 2."""

    rows: Tensor  # float16 [a multiple of PADDING, D to a power of 2], zeros where nothing is
    scale: Tensor  # float32 [1]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows of a program, rows of the other side in one step, and the launch's options."""

    rows: int
    others: int
    num_warps: int
    num_stages: int


# by the width, to a power of 2 and at least 64
FORWARD = {
    64: Blocks(64, 128, 4, 3),
    128: Blocks(128, 64, 8, 3),
    256: Blocks(64, 32, 8, 2),
    512: Blocks(16, 16, 4, 2),
}
BACKWARD = {
    64: Blocks(64, 128, 4, 3),
    128: Blocks(128, 64, 8, 3),
    256: Blocks(64, 32, 8, 2),
    512: Blocks(32, 32, 8, 2),
}


def _largest_parts(rows: Tensor) -> Tensor:
    """float32 [PARTS or fewer]: the largest finite number of each part; at least one part."""
    num_rows, dim = rows.shape
    num_blocks = max(cdiv(num_rows * dim, PART_BLOCK), 1)
    of_part = cdiv(num_blocks, PARTS)
    num_parts = cdiv(num_blocks, of_part)
    parts = torch.empty(num_parts, dtype=torch.float32, device=rows.device)
    launch(
        triton_kernels.largest_part,
        num_parts,
        (rows, parts),
        (num_rows, of_part),
        (dim,),
        (PART_BLOCK,),
        device=rows.device,
        num_warps=4,
    )
    return parts


def half_rows(rows: Tensor) -> HalfRows:
    """The rows of float32 [n, D] as the kernels read them."""
    num_rows, dim = rows.shape
    block_d = max(next_power_of_2(dim), 16)
    block_r = min(CONVERTED // block_d, PADDING)
    padded = cdiv(max(num_rows, 1), PADDING) * PADDING
    parts = _largest_parts(rows)
    half = torch.empty(padded, block_d, dtype=torch.float16, device=rows.device)
    scale = torch.empty(1, dtype=torch.float32, device=rows.device)
    launch(
        triton_kernels.half_rows,
        cdiv(padded, block_r),
        (rows, parts, half, scale),
        (num_rows, len(parts)),
        (dim,),
        (PARTS, block_r, block_d),
        device=rows.device,
        num_warps=4,
    )
    return HalfRows(half, scale)


def log_partition(
    users: HalfRows, items: HalfRows, num_users: int, num_items: int, dim: int, *, with_mean: bool
) -> tuple[Tensor, Tensor | None]:
    """float32 [P], and the items' mean by their shares, float32 [P, D], which is the gradient
    towards the users.
    """
    device = users.rows.device
    lse = torch.empty(num_users, dtype=torch.float32, device=device)
    mean = torch.empty(num_users, dim, dtype=torch.float32, device=device) if with_mean else None
    if num_users == 0:
        return lse, mean

    block_d = users.rows.shape[1]
    blocks = FORWARD[max(block_d, 64)]
    launch(
        triton_kernels.log_partition,
        cdiv(num_users, blocks.rows),
        (users.rows, items.rows, users.scale, items.scale, lse, mean),
        (num_users, num_items),
        (dim,),
        (with_mean, blocks.rows, blocks.others, block_d),
        device=device,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return lse, mean


def item_gradients(
    users: HalfRows, items: HalfRows, lse: Tensor, factor: Tensor, num_items: int, dim: int
) -> Tensor:
    """float32 [N, D]: the gradient of `(lse * factor).sum()` towards the items."""
    device = items.rows.device
    grad = torch.empty(num_items, dim, dtype=torch.float32, device=device)
    num_users = len(lse)
    if num_items == 0:
        return grad
    if num_users == 0:
        return grad.zero_()

    num_padded, block_d = users.rows.shape
    parts = _largest_parts(factor[:, None])
    facts = torch.empty(2, num_padded, dtype=torch.float32, device=device)
    factor_scale = torch.empty(1, dtype=torch.float32, device=device)
    launch(
        triton_kernels.user_facts,
        num_padded // FACTS_BLOCK,
        (lse, factor, parts, facts, factor_scale),
        (num_users, num_padded, len(parts)),
        (),
        (PARTS, FACTS_BLOCK),
        device=device,
        num_warps=4,
    )

    blocks = BACKWARD[max(block_d, 64)]
    launch(
        triton_kernels.item_gradients,
        cdiv(num_items, blocks.rows),
        (items.rows, users.rows, items.scale, users.scale, facts, factor_scale, grad),
        (num_items, num_padded),
        (dim,),
        (blocks.rows, blocks.others, block_d),
        device=device,
        num_warps=blocks.num_warps,
        num_stages=blocks.num_stages,
    )
    return grad
