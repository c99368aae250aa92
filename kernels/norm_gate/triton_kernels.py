"""Triton kernels of Norm(A) * SiLU(U): forward, and backward, which makes Y again for the output
layer's weights.

A program holds ROWS whole rows. The dropout mask is a hash of (seed, row, column) and is never
stored.
"""

import triton
import triton.language as tl

from kernels.layer_norm.triton_kernels import (
    fp8_columns,
    fp8_scale,
    normalise,
    normalise_backward,
    to_fp8,
)
from kernels.triton_math import sigmoid


@triton.jit
def _mix(x):
    """lowbias32, a bijection of uint32 in which every bit of the input moves every bit of the
    output.
    """
    x = (x ^ (x >> 16)) * tl.full((), 0x7FEB352D, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), 0x846CA68B, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _drop(x, seed, rows, columns, threshold, gain, DROPOUT: tl.constexpr):
    """x times `gain` where 24 random bits reach the threshold, else 0; the bits of
    `reference.dropout_mask`.
    """
    if DROPOUT:
        by_row = _mix((rows ^ seed).to(tl.uint32))
        draw = _mix(by_row[:, None] ^ _mix(columns.to(tl.uint32))[None, :]) >> 8
        x = tl.where(draw.to(tl.int32) >= threshold, x * gain, 0.0)
    return x


@triton.jit
def _seed(seed_at, DROPOUT: tl.constexpr):
    """The seed, 31 bits; 0 where nothing is dropped and `seed_at` is None."""
    if DROPOUT:
        return tl.load(seed_at).to(tl.int32)
    else:
        return 0


@triton.jit
def _read(x, place, inside):
    """Numbers at `place` in float32, 0 outside."""
    return tl.load(x + place, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])
def gate_forward(
    a, u,  # [T, E]
    weight, bias,  # [E]
    out,  # [T, Y], Y = E, or 3 E: U, A, Norm(A) * U
    out_fp8,  # e4m3 [T, Y]
    scale,  # float32 [T]
    seed_at,  # int64 [1] with DROPOUT: in memory, where a CUDA graph finds each step's own
    num_rows, width, stride_a, stride_u, threshold, gain, eps, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CONCAT: tl.constexpr, DROPOUT: tl.constexpr, OUT: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    valid = columns < width
    inside = (rows < num_rows)[:, None] & valid[None, :]
    long_rows = rows.to(tl.int64)[:, None]  # rows * width passes 2**31 on long batches
    a_RE = _read(a, long_rows * stride_a + columns[None, :], inside)
    u_RE = _read(u, long_rows * stride_u + columns[None, :], inside)
    w, b = _read(weight, columns, valid), _read(bias, columns, valid)

    seed = _seed(seed_at, DROPOUT)
    hat, _ = normalise(a_RE, inside, width, eps)
    u_RE *= sigmoid(u_RE)
    y = (hat * w[None, :] + b[None, :]) * u_RE

    if CONCAT:
        u_RE = _drop(u_RE, seed, rows, columns, threshold, gain, DROPOUT)
        a_RE = _drop(a_RE, seed, rows, columns + width, threshold, gain, DROPOUT)
        y = _drop(y, seed, rows, columns + 2 * width, threshold, gain, DROPOUT)
        place = long_rows * (3 * width) + columns[None, :]
    else:
        y = _drop(y, seed, rows, columns, threshold, gain, DROPOUT)
        place = long_rows * width + columns[None, :]

    if OUT:
        if CONCAT:
            tl.store(out + place, u_RE.to(out.dtype.element_ty), mask=inside)
            tl.store(out + place + width, a_RE.to(out.dtype.element_ty), mask=inside)
            tl.store(out + place + 2 * width, y.to(out.dtype.element_ty), mask=inside)
        else:
            tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)

    if FP8:
        largest = tl.max(tl.abs(y), 1)
        if CONCAT:
            largest = tl.maximum(
                largest, tl.maximum(tl.max(tl.abs(u_RE), 1), tl.max(tl.abs(a_RE), 1))
            )

        by_row = fp8_scale(largest)
        if CONCAT:
            place = long_rows * (3 * width) + fp8_columns(BLOCK)[None, :]
            tl.store(out_fp8 + place, to_fp8(u_RE, by_row), mask=inside)
            tl.store(out_fp8 + place + width, to_fp8(a_RE, by_row), mask=inside)
            tl.store(out_fp8 + place + 2 * width, to_fp8(y, by_row), mask=inside)
        else:
            place = long_rows * width + fp8_columns(BLOCK)[None, :]
            tl.store(out_fp8 + place, to_fp8(y, by_row), mask=inside)
        tl.store(scale + rows, by_row, mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_rows"])
def gate_backward(
    d_out,  # [T, Y]
    a, u,
    weight, bias,
    da,  # [T, E]
    du,  # [T, E], rows `stride_du` apart
    out,  # [T, Y], made again
    partial,  # float32 [programs, 3, E]: sums of d_weight, d_bias, du
    seed_at,  # int64 [1] with DROPOUT
    num_rows, width, stride_a, stride_u, stride_du, threshold, gain, eps, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, CONCAT: tl.constexpr, DROPOUT: tl.constexpr, OUT: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Sums over rows stay in registers until a program has seen all of its rows; the host adds the
    programs' sums.
    """
    columns = tl.arange(0, BLOCK)
    valid = columns < width
    w, b = _read(weight, columns, valid), _read(bias, columns, valid)
    seed = _seed(seed_at, DROPOUT)

    d_weight = tl.zeros((ROWS, BLOCK), tl.float32)
    d_bias = tl.zeros((ROWS, BLOCK), tl.float32)
    d_gate = tl.zeros((ROWS, BLOCK), tl.float32)

    for begin in tl.range(
        tl.program_id(0) * ROWS, num_rows, tl.num_programs(0) * ROWS, num_stages=STAGES
    ):
        rows = begin + tl.arange(0, ROWS)
        inside = (rows < num_rows)[:, None] & valid[None, :]
        long_rows = rows.to(tl.int64)[:, None]
        a_RE = _read(a, long_rows * stride_a + columns[None, :], inside)
        x = _read(u, long_rows * stride_u + columns[None, :], inside)

        hat, rstd = normalise(a_RE, inside, width, eps)
        normed = hat * w[None, :] + b[None, :]
        gate = sigmoid(x)
        u_RE = x * gate

        first = 0
        if CONCAT:
            first = 2 * width
            place = long_rows * (3 * width) + columns[None, :]
            d_u = _read(d_out, place, inside)
            d_a = _read(d_out, place + width, inside)
            d_u = _drop(d_u, seed, rows, columns, threshold, gain, DROPOUT)
            d_a = _drop(d_a, seed, rows, columns + width, threshold, gain, DROPOUT)

            if OUT:
                u_out = _drop(u_RE, seed, rows, columns, threshold, gain, DROPOUT)
                a_out = _drop(a_RE, seed, rows, columns + width, threshold, gain, DROPOUT)
                tl.store(out + place, u_out.to(out.dtype.element_ty), mask=inside)
                tl.store(out + place + width, a_out.to(out.dtype.element_ty), mask=inside)
            place += first
        else:
            place = long_rows * width + columns[None, :]

        d_y = _read(d_out, place, inside)
        if DROPOUT:
            d_y = _drop(d_y, seed, rows, columns + first, threshold, gain, DROPOUT)

        if OUT:
            y = _drop(normed * u_RE, seed, rows, columns + first, threshold, gain, DROPOUT)
            tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)

        d_normed = tl.where(inside, d_y * u_RE, 0.0)
        d_weight += d_normed * hat
        d_bias += d_normed

        grad_u = d_y * normed
        grad_a = normalise_backward(d_normed * w[None, :], hat, rstd, width)
        if CONCAT:
            grad_u += d_u
            grad_a += d_a
        grad_u *= gate + u_RE * (1 - gate)

        d_gate += grad_u
        tl.store(
            da + long_rows * width + columns[None, :], grad_a.to(da.dtype.element_ty), mask=inside
        )
        tl.store(
            du + long_rows * stride_du + columns[None, :],
            grad_u.to(du.dtype.element_ty),
            mask=inside,
        )

    base = partial + tl.program_id(0) * 3 * width + columns
    tl.store(base, tl.sum(d_weight, 0), mask=valid)
    tl.store(base + width, tl.sum(d_bias, 0), mask=valid)
    tl.store(base + 2 * width, tl.sum(d_gate, 0), mask=valid)
