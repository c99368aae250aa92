"""Launches of the LayerNorm kernels."""

from functools import cache

import torch
import triton
from torch import Tensor

from kernels.layer_norm import triton_kernels

FP8 = torch.float8_e4m3fn
PROGRAMS_PER_SM = 4  # of the backward kernels, whose sums stay in registers


@cache
def backward_programs(device: torch.device) -> int:
    """Programs of a kernel that sums over rows. A number of the device's, so that results repeat on it."""
    if device.type != "cuda":
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count * PROGRAMS_PER_SM


def row_block(width: int, elements: int) -> tuple[int, int]:
    """Rows of a program, and its row length, a power of two: about `elements` numbers in all."""
    block = max(16, triton.next_power_of_2(width))
    return max(1, elements // block), block


def launch_layer_norm(
    x_TE: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, *, out: bool = True, fp8: bool = False
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """LayerNorm(x) in `dtype`; the same as FP8 rows, and their scales; None for what was not asked."""
    num_rows, width = x_TE.shape
    device = x_TE.device
    y = torch.empty(num_rows, width, dtype=dtype, device=device) if out else None
    codes = torch.empty(num_rows, width, dtype=FP8, device=device) if fp8 else None
    scale = torch.empty(num_rows, dtype=torch.float32, device=device) if fp8 else None
    if num_rows:
        rows, block = row_block(width, 2048)
        triton_kernels.forward[(triton.cdiv(num_rows, rows),)](
            x_TE, weight, bias, y, codes, scale, num_rows, width, x_TE.stride(0), eps, ROWS=rows, BLOCK=block, OUT=out,
            FP8=fp8, num_warps=4,
        )  # fmt: skip
    return y, codes, scale


def launch_quantize(x_TE: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, width = x_TE.shape
    codes = torch.empty(num_rows, width, dtype=FP8, device=x_TE.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x_TE.device)
    if num_rows:
        rows, block = row_block(width, 2048)
        triton_kernels.quantize[(triton.cdiv(num_rows, rows),)](
            x_TE, codes, scale, num_rows, width, x_TE.stride(0), ROWS=rows, BLOCK=block, num_warps=4
        )
    return codes, scale


def launch_layer_norm_backward(
    d_out: Tensor, x_TE: Tensor, d_residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (with `d_residual` added), d_weight, d_bias, and the sum of `d_residual` over rows; sums are float32 [E]."""
    num_rows, width = x_TE.shape
    dx = torch.empty(num_rows, width, dtype=x_TE.dtype, device=x_TE.device)
    programs = backward_programs(x_TE.device)
    partial = torch.empty(programs, 3, width, dtype=torch.float32, device=x_TE.device)
    rows, block = row_block(width, 2048)
    triton_kernels.backward[(programs,)](
        d_out, x_TE, d_residual, weight, dx, partial, num_rows, width, x_TE.stride(0), eps, ROWS=rows, BLOCK=block,
        RESIDUAL=d_residual is not None, num_warps=4,
    )  # fmt: skip
    d_weight, d_bias, passed = partial.sum(0).unbind(0)
    return dx, d_weight, d_bias, passed
