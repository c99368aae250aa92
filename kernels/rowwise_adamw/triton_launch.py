"""Launches of the row-wise AdamW kernels."""

import torch
from torch import Tensor

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.rowwise_adamw import triton_kernels
from kernels.rowwise_adamw.types import Hyper

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
    """As `op.rowwise_adamw`, in two launches behind a sort."""
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

    momentum = m is not None
    tables = weight, m if momentum else v, v, grad_scale
    shares = 1 - hyper.betas[0], 1 - hyper.betas[1]
    settings = hyper.lr, *shares, *hyper.corrections, hyper.eps, hyper.weight_decay
    varying = num_ids, first_row, hyper.step, *map(float, settings)
    options = {"device": weight.device, "num_warps": 4, "num_stages": 3}
    launch(
        triton_kernels.update_rows,
        chunks,
        (ids, order, grads.contiguous(), partial, *tables),
        varying,
        (dim,),
        (momentum, block_n, block_d),
        **options,
    )
    launch(
        triton_kernels.finish_rows,
        chunks,
        (ids, partial, *tables),
        varying,
        (dim,),
        (momentum, block_n, block_c, block_d),
        **options,
    )
