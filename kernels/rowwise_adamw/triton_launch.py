"""Launches of the row-wise AdamW kernels."""

import torch
from torch import Tensor

from kernels.launch import cdiv, next_power_of_2
from kernels.rowwise_adamw import triton_kernels
from kernels.rowwise_adamw.reference import Hyper

TILE = 2048  # numbers of a program's tile: 16 a thread, for each of gradient, moment and weight
LONGEST = 64  # places of a chunk
PARTIAL_TILE = 8192  # numbers of partial sums read at a time


def rowwise_adamw_triton(
    weight: Tensor,
    m: Tensor | None,
    v: Tensor,
    ids: Tensor,
    grads: Tensor,
    grad_scale: Tensor,
    hyper: Hyper,
    first_row: int = 0,
) -> None:
    num_ids, dim = grads.shape
    if num_ids == 0:
        return
    block_d = next_power_of_2(dim)
    block_n = min(max(TILE // block_d, 1), LONGEST)
    block_c = min(max(PARTIAL_TILE // block_d, 1), 128)
    chunks = cdiv(num_ids, block_n)
    ids = ids.int() if len(weight) < 2**31 else ids  # half the passes of a radix sort
    ids, order = torch.sort(ids, stable=True)
    partial = torch.empty(chunks, 2, dim, dtype=torch.float32, device=weight.device)
    shares = 1 - hyper.betas[0], 1 - hyper.betas[1]
    scalars = (
        num_ids,
        dim,
        first_row,
        hyper.step,
        hyper.lr,
        *shares,
        *hyper.corrections,
        hyper.eps,
        hyper.weight_decay,
    )
    flags = {"MOMENTUM": m is not None, "BLOCK_N": block_n, "BLOCK_D": block_d}
    tables = weight, v if m is None else m, v, grad_scale
    triton_kernels.update_rows[(chunks,)](
        ids, order, grads.contiguous(), partial, *tables, *scalars, **flags
    )
    triton_kernels.finish_rows[(chunks,)](ids, partial, *tables, *scalars, **flags, BLOCK_C=block_c)
