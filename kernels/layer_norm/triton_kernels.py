"""Triton kernels of LayerNorm. A program holds ROWS whole rows, so statistics need no second pass
over memory, and backward makes them anew from x instead of keeping them."""

import triton
import triton.language as tl

from kernels.triton_math import LOG2_E, sigmoid

FP8_MAX = tl.constexpr(448.0)  # of e4m3


@triton.jit
def normalise(x, inside, width, eps):
    """(x - mean) / sqrt(var + eps) of float32 rows [ROWS, BLOCK], 0 outside, and 1 / sqrt(var +
    eps) [ROWS].
    """
    centred = tl.where(inside, x - (tl.sum(x, 1) / width)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    return centred * rstd[:, None], rstd


@triton.jit
def normalise_backward(d_hat, hat, rstd, width):
    """The gradient of x from that of its normalised rows `hat`; both 0 outside."""
    mean = (tl.sum(d_hat, 1) / width)[:, None]
    along = (tl.sum(d_hat * hat, 1) / width)[:, None]
    return (d_hat - mean - hat * along) * rstd[:, None]


@triton.jit
def fp8_scale(largest):
    """The scale of a row whose largest magnitude is given; 1 for a row of zeros."""
    return tl.where(largest > 0, largest / FP8_MAX, 1.0)


@triton.jit
def to_fp8(x, scale):
    """Rows x [ROWS, BLOCK] over their scales [ROWS], as e4m3."""
    y = x / scale[:, None]  # rounding may pass the largest number, which has no successor but NaN
    y = tl.maximum(y, -FP8_MAX, propagate_nan=tl.PropagateNan.ALL)
    # a NaN stays one: otherwise it would become the largest number
    return tl.minimum(y, FP8_MAX, propagate_nan=tl.PropagateNan.ALL).to(tl.float8e4nv)


@triton.jit
def fp8_columns(BLOCK: tl.constexpr):
    """Columns of a row's codes, stored 8 at a time as the wider rows beside them: 16 codes are one
    store too, but all that leads there would be laid out for it, and a row's sums added in another
    order than where there are no codes."""
    return tl.max_contiguous(tl.arange(0, BLOCK), 8)


@triton.jit(do_not_specialize=["num_rows"])
def norm_forward(
    x,  # [T, E]
    weight, bias,  # [E]
    out,  # [T, E]
    out_fp8,  # e4m3 [T, E]
    scale,  # float32 [T]
    num_rows, width, stride_x, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, OUT: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    valid = columns < width
    inside = (rows < num_rows)[:, None] & valid[None, :]
    long_rows = rows.to(tl.int64)[:, None]  # rows * width passes 2**31 on long batches
    x_RE = tl.load(x + long_rows * stride_x + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    w = tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=valid, other=0.0).to(tl.float32)

    hat, _ = normalise(x_RE, inside, width, eps)
    y = hat * w[None, :] + b[None, :]
    place = long_rows * width + columns[None, :]
    if OUT:
        tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)

    if FP8:
        by_row = fp8_scale(tl.max(tl.abs(y), 1))
        tl.store(
            out_fp8 + long_rows * width + fp8_columns(BLOCK)[None, :],
            to_fp8(y, by_row),
            mask=inside,
        )
        tl.store(scale + rows, by_row, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def row_scales(
    x,  # [T, E]
    scale,  # float32 [T]: 1 / sqrt(var + eps)
    num_rows, width, stride_x, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    place = rows.to(tl.int64)[:, None] * stride_x + columns[None, :]
    x_RE = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)

    mean = tl.sum(x_RE, 1) / width
    centred = tl.where(inside, x_RE - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)
    tl.store(scale + rows, rstd, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def quantize(x, out_fp8, scale, num_rows, width, stride_x, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows as e4m3 with a scale each."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    x_RE = tl.load(x + long_rows * stride_x + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    by_row = fp8_scale(tl.max(tl.abs(x_RE), 1))
    tl.store(out_fp8 + long_rows * width + columns[None, :], to_fp8(x_RE, by_row), mask=inside)
    tl.store(scale + rows, by_row, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def norm_backward(
    d_out,  # [T, E] gradient of the normalised rows
    x,
    d_residual,  # [T, E] gradient that reaches x past the layer
    weight,
    dx,  # [T, E]
    partial,  # float32 [programs, 3, E]: sums of d_weight, d_bias, d_residual
    num_rows, width, stride_x, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, RESIDUAL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over rows stay in registers until a program has seen all of its rows; the host adds the
    programs' sums.
    """
    columns = tl.arange(0, BLOCK)
    valid = columns < width
    w = tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)

    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    d_passed = tl.zeros((ROWS, BLOCK), tl.float32)

    for begin in tl.range(
        tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES
    ):
        rows = begin + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & valid[None, :]
        long_rows = rows.to(tl.int64)[:, None]
        place = long_rows * width + columns[None, :]
        d = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
        x_RE = tl.load(x + long_rows * stride_x + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )
        hat, rstd = normalise(x_RE, inside, width, eps)

        d_weight += d * hat
        d_bias += d
        grad = normalise_backward(d * w[None, :], hat, rstd, width)
        if RESIDUAL:
            passed = tl.load(d_residual + place, mask=inside, other=0.0).to(tl.float32)
            d_passed += passed
            grad += passed
        tl.store(dx + place, grad.to(dx.dtype.element_ty), mask=inside)

    base = partial + tl.program_id(0) * 3 * width + columns
    tl.store(base, tl.sum(d_weight, 0), mask=valid)
    tl.store(base + width, tl.sum(d_bias, 0), mask=valid)
    tl.store(base + 2 * width, tl.sum(d_passed, 0), mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def swish_forward(
    x,  # [T, E]
    weight, bias,  # [E]
    out,  # [T, E]
    num_rows, width, stride_x, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """x * sigmoid(norm(x))"""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    valid = columns < width
    inside = (rows < num_rows)[:, None] & valid[None, :]
    long_rows = rows.to(tl.int64)[:, None]
    x_RE = tl.load(x + long_rows * stride_x + columns[None, :], mask=inside, other=0.0).to(
        tl.float32
    )
    w = tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=valid, other=0.0).to(tl.float32)
    hat, _ = normalise(x_RE, inside, width, eps)
    y = x_RE / (1 + tl.exp2((hat * w[None, :] + b[None, :]) * -LOG2_E))
    tl.store(out + long_rows * width + columns[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def swish_backward(
    d_out,  # [T, E]
    x,
    weight, bias,
    dx,  # [T, E]
    partial,  # float32 [programs, 2, E]: sums of d_weight, d_bias
    num_rows, width, stride_x, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over rows as in `norm_backward`."""
    columns = tl.arange(0, BLOCK)
    valid = columns < width
    w = tl.load(weight + columns, mask=valid, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=valid, other=0.0).to(tl.float32)
    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)

    for begin in tl.range(
        tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES
    ):
        rows = begin + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & valid[None, :]
        long_rows = rows.to(tl.int64)[:, None]
        place = long_rows * width + columns[None, :]
        d = tl.load(d_out + place, mask=inside, other=0.0).to(tl.float32)
        x_RE = tl.load(x + long_rows * stride_x + columns[None, :], mask=inside, other=0.0).to(
            tl.float32
        )

        hat, rstd = normalise(x_RE, inside, width, eps)
        gate = sigmoid(hat * w[None, :] + b[None, :])
        d_normed = d * x_RE * gate * (1 - gate)

        d_weight += d_normed * hat
        d_bias += d_normed
        grad = d * gate + normalise_backward(d_normed * w[None, :], hat, rstd, width)
        tl.store(dx + place, grad.to(dx.dtype.element_ty), mask=inside)

    base = partial + tl.program_id(0) * 2 * width + columns
    tl.store(base, tl.sum(d_weight, 0), mask=valid)
    tl.store(base + width, tl.sum(d_bias, 0), mask=valid)
