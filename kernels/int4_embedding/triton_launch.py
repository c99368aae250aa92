"""Launch of the INT4 look-up."""

import torch
from torch import Tensor

from kernels.int4_embedding import triton_kernels
from kernels.launch import cdiv, launch, next_power_of_2

TILE = 2048  # numbers a program writes: 16 a thread


def look_up_triton(packed: Tensor, ids: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    """Rows `ids` of the table, [N, dim] in `dtype`."""
    # codes of a batch are columns of one tensor
    packed, ids = packed.contiguous(), ids.contiguous()
    out = torch.empty(len(ids), dim, dtype=dtype, device=packed.device)

    if len(ids):
        code_words = next_power_of_2(packed.shape[1] - 1)
        block = max(TILE // (8 * code_words), 1)
        launch(
            triton_kernels.look_up,
            cdiv(len(ids), block),
            (packed, ids, out),
            (len(ids),),
            (dim, packed.shape[1]),
            (block, code_words),
            device=packed.device,
            num_warps=4,
            num_stages=3,
        )

    return out
