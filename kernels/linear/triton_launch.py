"""Launches of the linear kernel."""

from dataclasses import dataclass
from functools import cache, lru_cache

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels.launch import cdiv, descriptor_like, launch
from kernels.linear import triton_kernels


@dataclass(frozen=True, slots=True)
class LinearTile:
    """Tile sizes: `rows` tokens, `outputs`, `inputs` of a step; `parts` of the epilogue; programs
    per multiprocessor, each of which takes many tiles, or 0 for one program a tile."""

    rows: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    parts: int = 1
    per_sm: int = 0
    flatten: bool = False
    tma_out: bool = False


def tile_size(*, outputs: int, fp8: bool, residual: bool, half: bool, hopper: bool) -> LinearTile:
    """The static table, measured on an H100 (benchmarks/NOTES.md)."""
    if not half:
        return LinearTile(64, 64, 32, 4, 2)
    if not hopper:
        return LinearTile(128, 128, 32, 8, 3)
    if residual and fp8:
        return LinearTile(128, 128, 64, 4, 4, parts=2, per_sm=2, flatten=True, tma_out=True)
    if residual and outputs > 128:
        return LinearTile(128, 256, 64, 8, 4, parts=2, per_sm=1, flatten=True)
    return LinearTile(
        128, 128, 128 if fp8 else 64, 4, 3, parts=2, per_sm=2, flatten=True, tma_out=True
    )


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def _multiprocessors(device: torch.device) -> int:
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 2
    )


@lru_cache(512)
def _matrix_template(
    dtype: torch.dtype, shape: tuple[int, int], stride: int, box: tuple[int, int]
) -> TensorDescriptor:
    return TensorDescriptor(torch.empty(0, dtype=dtype), list(shape), [stride, 1], list(box))


def matrix_descriptor(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """A descriptor of a matrix where `by_descriptor`, read in boxes of `rows` by `columns`."""
    template = _matrix_template(x.dtype, tuple(x.shape), x.stride(0), (rows, columns))
    return descriptor_like(template, x)


def is_hopper(device: torch.device) -> bool:
    return _capability(device)[0] == 9


def by_descriptor(x: Tensor) -> bool:
    """True where a matrix lies as descriptors ask for."""
    rows_aligned = x.stride(0) * x.element_size() % 16 == 0
    return x.stride(1) == 1 and rows_aligned and x.data_ptr() % 16 == 0


@dataclass(frozen=True, slots=True)
class PreparedLinear:
    """All of a launch but its tensors, and how these are read: by a descriptor, or where there is
    none by a pointer.
    """

    programs: int
    descriptors: tuple[TensorDescriptor | None, ...]  # of x, w, out, slope, over no tensor
    fixed: tuple[int, ...]
    constants: tuple[object, ...]


@lru_cache(512)  # a batch has its own number of rows, its layers have one form
def _prepare(
    shape: tuple[int, int, int],  # rows, outputs, inputs
    strides: tuple[int, int, int, int, int],  # of rows of x, w, out, slope, residual
    given: tuple[torch.dtype, torch.dtype, bool, bool],  # types of x and out; scales of x and w
    silu_from: int | None,
    sloped: bool,
    residual: bool,
    tma: bool,
    aligned_out: bool,
    tile: LinearTile,
    device: torch.device,
) -> PreparedLinear:
    num_rows, num_outputs, num_inputs = shape
    x_dtype, dtype, scaled, fp8 = given
    part = tile.outputs // tile.parts
    tma_out = tma and tile.tma_out and aligned_out and (silu_from or 0) % part == 0

    def template(
        dtype: torch.dtype, rows: int, columns: int, stride: int, box: list[int]
    ) -> TensorDescriptor:
        return TensorDescriptor(torch.empty(0, dtype=dtype), [rows, columns], [stride, 1], box)

    of_x = of_w = of_out = of_slope = None
    if tma:
        of_x = template(x_dtype, num_rows, num_inputs, strides[0], [tile.rows, tile.inputs])
        of_w = template(x_dtype, num_outputs, num_inputs, strides[1], [tile.outputs, tile.inputs])

    if tma_out:
        of_out = template(dtype, num_rows, num_outputs, strides[2], [tile.rows, part])
    if tma_out and sloped and silu_from is not None:
        of_slope = template(dtype, num_rows, num_outputs - silu_from, strides[3], [tile.rows, part])
    tiles = cdiv(num_rows, tile.rows) * cdiv(num_outputs, tile.outputs)
    programs = min(tiles, _multiprocessors(device) * tile.per_sm) if tile.per_sm else tiles
    fast, even = dtype.itemsize == 2 and device.type == "cuda", num_outputs % tile.outputs == 0
    silu, silu_from = silu_from is not None, num_outputs if silu_from is None else silu_from

    return PreparedLinear(
        programs=programs, descriptors=(of_x, of_w, of_out, of_slope),
        fixed=(num_outputs, num_inputs, *strides, silu_from),
        constants=(
            tile.rows, tile.outputs, tile.inputs, tile.parts, silu, sloped, residual, scaled, fp8,
            tma, fast, even, tile.flatten, tma_out,
        ),
    )  # fmt: skip


def launch_linear(
    x_TK: Tensor,
    w_NK: Tensor,
    bias: Tensor,
    *,
    silu_from: int | None = None,
    keep_slope: bool = False,
    residual: Tensor | None = None,
    scales: tuple[Tensor, Tensor | None] | None = None,
    dtype: torch.dtype | None = None,
    tile: LinearTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """x wᵀ + bias [T, N] in `dtype` (x's by default), and SiLU's derivative [T, N - silu_from] with
    `keep_slope`.

    `scales`: float32, of the rows of x; and of those of w, both of which then are FP8.
    """
    num_rows, num_inputs = x_TK.shape
    num_outputs, device = w_NK.shape[0], x_TK.device
    dtype = dtype or x_TK.dtype
    out = torch.empty(num_rows, num_outputs, dtype=dtype, device=device)

    slope = None
    if keep_slope and silu_from is not None:
        slope = torch.empty(num_rows, num_outputs - silu_from, dtype=dtype, device=device)

    if not num_rows:
        return out, slope
    of_slope, of_residual = (0 if t is None else t.stride(0) for t in (slope, residual))

    hopper = is_hopper(device)
    x_scale, w_scale = scales or (None, None)
    fp8 = w_scale is not None
    if tile is None:
        half = x_TK.element_size() < 4
        tile = tile_size(
            outputs=num_outputs, fp8=fp8, residual=residual is not None, half=half, hopper=hopper
        )

    prepared = _prepare(
        (num_rows, num_outputs, num_inputs),
        (x_TK.stride(0), w_NK.stride(0), num_outputs, of_slope, of_residual),
        (x_TK.dtype, dtype, x_scale is not None, fp8),
        silu_from,
        slope is not None,
        residual is not None,
        hopper and by_descriptor(x_TK) and by_descriptor(w_NK),
        by_descriptor(out),
        tile,
        device,
    )

    pairs = zip((x_TK, w_NK, out, slope), prepared.descriptors, strict=True)
    tensors = [x if form is None or x is None else descriptor_like(form, x) for x, form in pairs]
    launch(
        triton_kernels.linear, prepared.programs,
        (*tensors, bias, residual, x_scale, w_scale), (num_rows,), prepared.fixed,
        prepared.constants, device=device, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out, slope
