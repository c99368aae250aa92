"""Launches of the linear kernel."""

from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import launch
from kernels.linear import triton_kernels


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile sizes: `rows` tokens, `outputs`, `inputs` of a step; `parts` of the epilogue; programs per multiprocessor,
    each of which takes many tiles, or 0 for one program a tile."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    parts: int = 1
    per_sm: int = 0
    flatten: bool = False
    tma_out: bool = False


def tile_size(*, outputs: int, fp8: bool, residual: bool, half: bool, hopper: bool) -> Tile:
    """The static table, measured on an H100 (benchmarks/NOTES.md)."""
    if not half:
        return Tile(64, 64, 32, 4, 2)
    if not hopper:
        return Tile(128, 128, 32, 8, 3)
    if residual and fp8:
        return Tile(128, 128, 64, 4, 4, parts=2, per_sm=2, flatten=True, tma_out=True)
    if residual and outputs > 128:
        return Tile(128, 256, 64, 8, 3, parts=2, per_sm=1, flatten=True, tma_out=True)
    return Tile(128, 128, 128 if fp8 else 64, 4, 3, parts=2, per_sm=2, flatten=True, tma_out=True)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


def _by_descriptor(x: Tensor) -> bool:
    rows_aligned = x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and rows_aligned and x.data_ptr() % 16 == 0


def launch_linear(
    x_TK: Tensor,
    w_NK: Tensor,
    bias: Tensor,
    *,
    silu_from: int | None = None,
    keep_slope: bool = False,
    residual: Tensor | None = None,
    scales: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype | None = None,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x wᵀ + bias [T, N] in `dtype` (x's by default), and SiLU's derivative [T, N - silu_from] with `keep_slope`.

    `scales`: of the rows of x and of w, which then are FP8.
    """
    num_rows, num_inputs = x_TK.shape
    num_outputs, device = len(w_NK), x_TK.device
    dtype = dtype or x_TK.dtype
    out = torch.empty(num_rows, num_outputs, dtype=dtype, device=device)
    slope = None
    if keep_slope and silu_from is not None:
        slope = torch.empty(num_rows, num_outputs - silu_from, dtype=dtype, device=device)
    if not num_rows:
        return out, slope
    hopper = _capability(device)[0] == 9
    if tile is None:
        tile = tile_size(
            outputs=num_outputs, fp8=scales is not None, residual=residual is not None,
            half=x_TK.element_size() < 4, hopper=hopper,
        )  # fmt: skip
    tma = hopper and _by_descriptor(x_TK) and _by_descriptor(w_NK)
    x, w = x_TK, w_NK
    if tma:
        x = TensorDescriptor(x_TK, list(x_TK.shape), [x_TK.stride(0), 1], [tile.rows, tile.inputs])
        w = TensorDescriptor(w_NK, list(w_NK.shape), [w_NK.stride(0), 1], [tile.outputs, tile.inputs])
    part = tile.outputs // tile.parts
    tma_out = tma and tile.tma_out and _by_descriptor(out) and (silu_from or 0) % part == 0
    out_to, slope_to = out, slope
    if tma_out:
        out_to = TensorDescriptor(out, list(out.shape), [out.stride(0), 1], [tile.rows, part])
        if slope is not None:
            slope_to = TensorDescriptor(slope, list(slope.shape), [slope.stride(0), 1], [tile.rows, part])
    tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_outputs, tile.outputs)
    programs = min(tiles, _multiprocessors(device) * tile.per_sm) if tile.per_sm else tiles
    strides = [0 if t is None else t.stride(0) for t in (x_TK, w_NK, out, slope, residual)]
    fp8, even = scales is not None, num_outputs % tile.outputs == 0
    fast = dtype.itemsize == 2 and x_TK.is_cuda
    silu, silu_from = silu_from is not None, num_outputs if silu_from is None else silu_from
    launch(
        triton_kernels.linear, programs, (x, w, out_to, slope_to, bias, residual, *(scales or (None, None))),
        (num_rows,), (num_outputs, num_inputs, *strides, silu_from),
        (tile.rows, tile.outputs, tile.inputs, tile.parts, silu, slope is not None, residual is not None, fp8, tma,
         fast, even, tile.flatten, tma_out),
        device=device, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, slope
