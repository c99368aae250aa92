# ruff: noqa: SIM102  (an `if` of a constexpr stands alone: joined by `and`, both would be evaluated
# on the device)
"""Triton kernel of a linear layer whose epilogue does what would be a pass of its own: bias, SiLU,
residual, scales.

Suffixes: M rows of a tile, N outputs of a tile, K inputs of a step.
"""

import triton
import triton.language as tl

from kernels.triton_math import approximate_tanh, sigmoid


@triton.jit
def gate_of(x, FAST: tl.constexpr):
    """sigmoid(x). FAST takes one special-function instruction instead of two."""
    if FAST:
        y = 0.5 + 0.5 * approximate_tanh(0.5 * x)
    else:
        y = sigmoid(x)
    return y


@triton.jit
def load_tile(
    source,
    row,
    column,
    num_rows,
    num_columns,
    stride,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
):
    """[ROWS, COLUMNS] of a row-major matrix, zeros outside of it."""
    if TMA:
        tile = source.load([row, column])
    else:
        rows, columns = row + tl.arange(0, ROWS), column + tl.arange(0, COLUMNS)
        inside = (rows < num_rows)[:, None] & (columns < num_columns)[None, :]

        tile = tl.load(
            source + rows.to(tl.int64)[:, None] * stride + columns[None, :], mask=inside, other=0.0
        )
    return tile


@triton.jit
def _epilogue(
    acc, x_scales, row, column, out, slope, bias, residual, w_scale, num_rows, num_outputs,
    stride_out, stride_slope, stride_residual, silu_from, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SILU: tl.constexpr, SLOPE: tl.constexpr, RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr, FP8: tl.constexpr, FAST: tl.constexpr, EVEN: tl.constexpr,
    TMA_OUT: tl.constexpr,
):  # fmt: skip
    """Scales, bias, then SiLU or the residual, and the stores of a [BLOCK_M, BLOCK_N] of sums."""
    rows, columns = row + tl.arange(0, BLOCK_M), column + tl.arange(0, BLOCK_N)
    valid = columns < num_outputs
    inside = (rows < num_rows)[:, None]
    if not EVEN:
        inside = inside & valid[None, :]
    long_rows = rows.to(tl.int64)[:, None]

    if FP8:
        w_scales = tl.load(w_scale + columns, mask=valid, other=0.0)
        acc *= x_scales[:, None] * w_scales[None, :]
    elif SCALED:
        acc *= x_scales[:, None]
    acc += tl.load(bias + columns, mask=valid, other=0.0).to(tl.float32)[None, :]

    if SILU:
        if column + BLOCK_N > silu_from:
            gate = gate_of(acc, FAST)
            active = (columns >= silu_from)[None, :]
            if SLOPE:
                steep = gate * (1 + acc * (1 - gate))

                if TMA_OUT:  # there a tile is activated whole
                    slope.store([row, column - silu_from], steep.to(slope.dtype))
                else:
                    place = slope + long_rows * stride_slope + (columns - silu_from)[None, :]
                    tl.store(place, steep.to(slope.dtype.element_ty), mask=inside & active)
            acc *= gate if TMA_OUT else tl.where(active, gate, 1.0)

    if RESIDUAL:
        place = residual + long_rows * stride_residual + columns[None, :]
        acc += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if TMA_OUT:
        out.store([row, column], acc.to(out.dtype))
    else:
        tl.store(
            out + long_rows * stride_out + columns[None, :],
            acc.to(out.dtype.element_ty),
            mask=inside,
        )


@triton.jit(do_not_specialize=["num_rows"])
def linear(
    x,  # descriptor over [M, K], or a pointer
    w,  # descriptor over [N, K], or a pointer
    out,  # [M, N], with TMA_OUT a descriptor
    slope,  # [M, N - silu_from], likewise: SiLU's derivative where it was applied
    bias,  # [N]
    residual,  # [M, N]
    x_scale,  # float32 [M], with SCALED: what the sums of a row are multiplied by
    w_scale,  # float32 [N], with FP8: likewise of an output
    num_rows, num_outputs, num_inputs, stride_x, stride_w, stride_out, stride_slope,
    stride_residual, silu_from, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr, SILU: tl.constexpr, SLOPE: tl.constexpr, RESIDUAL: tl.constexpr,
    SCALED: tl.constexpr, FP8: tl.constexpr, TMA: tl.constexpr, FAST: tl.constexpr,
    EVEN: tl.constexpr, FLATTEN: tl.constexpr, TMA_OUT: tl.constexpr,
):  # fmt: skip
    """out = x wᵀ + bias, SiLU of the columns from `silu_from` on, or + residual.

    A program takes every `num_programs`-th tile, outputs fastest: the few row tiles at work share
    their x, and all
    of w stays in L2. The epilogue goes in PARTS halves, so that its registers fit.
    """
    across = tl.cdiv(num_outputs, BLOCK_N)
    tiles = tl.cdiv(num_rows, BLOCK_M) * across

    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        row, column = (tile // across) * BLOCK_M, (tile % across) * BLOCK_N
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_scales = row  # nobody's
        if SCALED:  # asked for before the product, behind which the epilogue would wait for them
            rows = row + tl.arange(0, BLOCK_M)
            x_scales = tl.load(x_scale + rows, mask=rows < num_rows, other=0.0)

        for k in range(0, num_inputs, BLOCK_K):
            a = load_tile(x, row, k, num_rows, num_inputs, stride_x, BLOCK_M, BLOCK_K, TMA)
            b = load_tile(w, column, k, num_outputs, num_inputs, stride_w, BLOCK_N, BLOCK_K, TMA)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        if PARTS == 2:
            left, right = tl.split(
                tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1))
            )
            _epilogue(
                left, x_scales, row, column, out, slope, bias, residual, w_scale, num_rows,
                num_outputs, stride_out, stride_slope, stride_residual, silu_from, BLOCK_M,
                BLOCK_N // 2, SILU, SLOPE, RESIDUAL, SCALED, FP8, FAST, EVEN, TMA_OUT
            )  # fmt: skip
            _epilogue(
                right, x_scales, row, column + BLOCK_N // 2, out, slope, bias, residual, w_scale,
                num_rows, num_outputs, stride_out, stride_slope, stride_residual, silu_from,
                BLOCK_M, BLOCK_N // 2, SILU, SLOPE, RESIDUAL, SCALED, FP8, FAST, EVEN, TMA_OUT
            )  # fmt: skip
        else:
            _epilogue(
                acc, x_scales, row, column, out, slope, bias, residual, w_scale, num_rows,
                num_outputs, stride_out, stride_slope, stride_residual, silu_from, BLOCK_M, BLOCK_N,
                SILU, SLOPE, RESIDUAL, SCALED, FP8, FAST, EVEN, TMA_OUT
            )  # fmt: skip
