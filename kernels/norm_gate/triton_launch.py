"""Launches of the norm and gate kernels."""

import torch
from torch import Tensor

from kernels.launch import cdiv, launch
from kernels.layer_norm.triton_launch import FP8, Rows
from kernels.norm_gate import triton_kernels
from kernels.norm_gate.reference import dropout_threshold


class PairedRows(Rows):
    """Two rows of 512 a program, one after the other on the same threads; others one by one."""

    def of(self, width: int) -> tuple[int, int, int]:
        rows, block, warps = super().of(width)
        return 2 * rows if block == 512 else rows, block, warps


# A row lies on threads alike in both: only then are its sums added in one order, and Y made again
# is Y to the last bit.
FORWARD, BACKWARD = PairedRows(1, 1), Rows(1, 1, per_sm=8, stages=4)


def launch_norm_gate(
    a_TE: Tensor, u_TE: Tensor, weight: Tensor, bias: Tensor, *, eps: float, concat_ua: bool,
    p: float, seed: Tensor | None, out: bool = True, fp8: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Y in u's type; the same as FP8 rows, and their scales; None for what was not asked.

    `seed`, int64 [1] on the device, is needed where p > 0.
    """
    num_rows, width = a_TE.shape
    shape, device = (num_rows, width * (3 if concat_ua else 1)), a_TE.device
    y = torch.empty(shape, dtype=u_TE.dtype, device=device) if out else None
    codes = torch.empty(shape, dtype=FP8, device=device) if fp8 else None
    scale = torch.empty(num_rows, dtype=torch.float32, device=device) if fp8 else None

    if num_rows:
        rows, block, warps = FORWARD.of(width)
        launch(
            triton_kernels.gate_forward, cdiv(num_rows, rows),
            (a_TE, u_TE, weight, bias, y, codes, scale, seed), (num_rows,),
            (width, a_TE.stride(0), u_TE.stride(0), dropout_threshold(p), 1 / (1 - p), eps),
            (rows, block, concat_ua, p > 0, out, fp8), device=device, num_warps=warps,
        )  # fmt: skip
    return y, codes, scale


def launch_norm_gate_backward(
    d_out: Tensor, a_TE: Tensor, u_TE: Tensor, weight: Tensor, bias: Tensor, du: Tensor, *,
    eps: float, concat_ua: bool, p: float, seed: Tensor | None, out: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:  # fmt: skip
    """da in u's type, Y made again if asked, d_weight, d_bias and the sum of du over rows.

    Fills du, whose rows may lie apart.
    """
    num_rows, width = a_TE.shape
    da = torch.empty(num_rows, width, dtype=u_TE.dtype, device=a_TE.device)
    y = torch.empty(d_out.shape, dtype=u_TE.dtype, device=a_TE.device) if out else None

    programs = BACKWARD.programs(a_TE.device)
    partial = torch.empty(programs, 3, width, dtype=torch.float32, device=a_TE.device)
    rows, block, warps = BACKWARD.of(width)
    stages = 1 if concat_ua else BACKWARD.stages_of(a_TE)  # five rows a step spill as it is

    strides = a_TE.stride(0), u_TE.stride(0), du.stride(0)
    launch(
        triton_kernels.gate_backward, programs,
        (d_out, a_TE, u_TE, weight, bias, da, du, y, partial, seed), (num_rows,),
        (width, *strides, dropout_threshold(p), 1 / (1 - p), eps),
        (rows, block, concat_ua, p > 0, out, stages), device=a_TE.device, num_warps=warps,
    )  # fmt: skip
    d_weight, d_bias, of_gate = partial.sum(0).unbind(0)
    return da, y, d_weight, d_bias, of_gate
