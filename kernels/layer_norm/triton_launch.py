"""Launches of the LayerNorm kernels."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.layer_norm import triton_kernels

FP8 = torch.float8_e4m3fn
# bytes of a row: several of longer ones would fill a multiprocessor's shared memory
LONGEST_STAGED = 4096


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of a program and their warps where a row is at most 512 long; longer rows are fewer, and
    have more warps.

    `per_sm` and `stages`: of a kernel that sums over rows, programs on a multiprocessor and steps
    of its loop that are under way at once. Measured on an H100 (benchmarks/NOTES.md).
    """

    rows: int
    warps: int
    per_sm: int = 0
    stages: int = 1

    @cache  # noqa: B019  # some constants of modules, and the widths of a model
    def of(self, width: int) -> tuple[int, int, int]:
        """Rows, row length as a power of two, warps."""
        block = max(16, next_power_of_2(width))
        longer = max(1, block // 512)
        return max(1, self.rows // longer), block, min(8, self.warps * max(1, longer // self.rows))

    def stages_of(self, x_TE: Tensor) -> int:
        """1 for rows of no whole vectors too: copied ahead under a mask, such rows came out wrong
        in attention.
        """
        width = x_TE.shape[1]
        return (
            self.stages if width % 16 == 0 and width * x_TE.element_size() <= LONGEST_STAGED else 1
        )

    def programs(self, device: torch.device) -> int:
        """A number of the device's, so that sums repeat on it."""
        return _multiprocessors(device) * self.per_sm


FORWARD, BACKWARD = Rows(2, 1), Rows(2, 2, per_sm=6, stages=3)
SWISH_BACKWARD = Rows(1, 1, per_sm=4, stages=3)


@cache
def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


def launch_layer_norm(
    x_TE: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    dtype: torch.dtype,
    *,
    out: bool = True,
    fp8: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """LayerNorm(x) in `dtype`, as FP8 rows, and their scales; None for what was not asked."""
    num_rows, width = x_TE.shape
    device = x_TE.device
    y = torch.empty(num_rows, width, dtype=dtype, device=device) if out else None
    codes = torch.empty(num_rows, width, dtype=FP8, device=device) if fp8 else None
    scale = torch.empty(num_rows, dtype=torch.float32, device=device) if fp8 else None

    if num_rows:
        rows, block, warps = FORWARD.of(width)
        launch(
            triton_kernels.norm_forward, cdiv(num_rows, rows),
            (x_TE, weight, bias, y, codes, scale), (num_rows,), (width, x_TE.stride(0), eps),
            (rows, block, out, fp8), device=device, num_warps=warps,
        )  # fmt: skip
    return y, codes, scale


def launch_row_scales(x_TE: Tensor, eps: float) -> Tensor:
    """float32 [T]: 1 / sqrt(var + eps) of each row, for a product in which the norm is folded
    (`kernels.linear.weights.FoldedLinear`).
    """
    num_rows, width = x_TE.shape
    scale = torch.empty(num_rows, dtype=torch.float32, device=x_TE.device)

    if num_rows:
        rows, block, warps = FORWARD.of(width)
        launch(
            triton_kernels.row_scales, cdiv(num_rows, rows), (x_TE, scale), (num_rows,),
            (width, x_TE.stride(0), eps), (rows, block), device=x_TE.device, num_warps=warps,
        )  # fmt: skip
    return scale


def launch_quantize(x_TE: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, width = x_TE.shape
    codes = torch.empty(num_rows, width, dtype=FP8, device=x_TE.device)
    scale = torch.empty(num_rows, dtype=torch.float32, device=x_TE.device)

    if num_rows:
        rows, block, warps = FORWARD.of(width)
        launch(
            triton_kernels.quantize, cdiv(num_rows, rows), (x_TE, codes, scale), (num_rows,),
            (width, x_TE.stride(0)), (rows, block), device=x_TE.device, num_warps=warps,
        )  # fmt: skip
    return codes, scale


def launch_layer_norm_backward(
    d_out: Tensor, x_TE: Tensor, d_residual: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx (with `d_residual` added), d_weight, d_bias, and the sum of `d_residual` over rows; sums
    are float32 [E].
    """
    num_rows, width = x_TE.shape
    dx = torch.empty(num_rows, width, dtype=x_TE.dtype, device=x_TE.device)
    programs = BACKWARD.programs(x_TE.device)
    partial = torch.empty(programs, 3, width, dtype=torch.float32, device=x_TE.device)

    rows, block, warps = BACKWARD.of(width)
    launch(
        triton_kernels.norm_backward, programs, (d_out, x_TE, d_residual, weight, dx, partial),
        (num_rows,), (width, x_TE.stride(0), eps),
        (rows, block, d_residual is not None, BACKWARD.stages_of(x_TE)), device=x_TE.device,
        num_warps=warps,
    )  # fmt: skip
    d_weight, d_bias, passed = partial.sum(0).unbind(0)
    return dx, d_weight, d_bias, passed


def launch_swish(x_TE: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x * sigmoid(LayerNorm(x)), in x's type."""
    num_rows, width = x_TE.shape
    y = torch.empty(num_rows, width, dtype=x_TE.dtype, device=x_TE.device)

    if num_rows:
        rows, block, warps = FORWARD.of(width)
        launch(
            triton_kernels.swish_forward, cdiv(num_rows, rows), (x_TE, weight, bias, y),
            (num_rows,), (width, x_TE.stride(0), eps), (rows, block), device=x_TE.device,
            num_warps=warps,
        )  # fmt: skip
    return y


def launch_swish_backward(
    d_out: Tensor, x_TE: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, d_weight, d_bias; sums are float32 [E]."""
    num_rows, width = x_TE.shape
    dx = torch.empty(num_rows, width, dtype=x_TE.dtype, device=x_TE.device)
    programs = SWISH_BACKWARD.programs(x_TE.device)
    partial = torch.empty(programs, 2, width, dtype=torch.float32, device=x_TE.device)

    rows, block, warps = SWISH_BACKWARD.of(width)
    launch(
        triton_kernels.swish_backward, programs, (d_out, x_TE, weight, bias, dx, partial),
        (num_rows,), (width, x_TE.stride(0), eps), (rows, block, SWISH_BACKWARD.stages_of(x_TE)),
        device=x_TE.device, num_warps=warps,
    )  # fmt: skip
    d_weight, d_bias = partial.sum(0).unbind(0)
    return dx, d_weight, d_bias


class LayerNorm(torch.autograd.Function):
    """Of (x, weight, bias, eps)."""

    @staticmethod
    def forward(ctx, x_TE, weight, bias, eps):
        ctx.save_for_backward(x_TE, weight, bias)
        ctx.eps = eps
        return launch_layer_norm(x_TE, weight, bias, eps, x_TE.dtype)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        dx, d_weight, d_bias, _ = launch_layer_norm_backward(
            grad.contiguous(), x, None, weight, ctx.eps
        )
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None


class SwishLayerNorm(torch.autograd.Function):
    """Of (x, weight, bias, eps)."""

    @staticmethod
    def forward(ctx, x_TE, weight, bias, eps):
        ctx.save_for_backward(x_TE, weight, bias)
        ctx.eps = eps
        return launch_swish(x_TE, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight, bias = ctx.saved_tensors
        dx, d_weight, d_bias = launch_swish_backward(grad.contiguous(), x, weight, bias, ctx.eps)
        return dx, d_weight.to(weight.dtype), d_bias.to(bias.dtype), None
