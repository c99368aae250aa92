"""Triton kernels of the token encoder without gradients: what plain PyTorch or training makes in
several passes over [T, E].

    codes ─look up→ [T, K] ─linear, norm, gate→ [T, N] ─(a library's product)→ [T, E]
    ─norm, + position + time + actions→ [tokens and context, E]
"""

import triton
import triton.language as tl

from kernels.jagged.triton_kernels import find_sequence
from kernels.layer_norm.triton_kernels import normalise
from kernels.linear.triton_kernels import gate_of, load_tile
from kernels.position_time.triton_kernels import position_row, time_row


@triton.jit(do_not_specialize=["num_rows"])
def look_up_column(
    codes,  # int [T], a column of a matrix
    table,  # [R, width]
    out,  # [T, width], columns of a wider matrix
    num_rows, width, stride_codes, stride_out, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    valid = rows < num_rows
    inside = valid[:, None] & (columns < width)[None, :]
    long_rows = rows.to(tl.int64)

    code = tl.load(codes + long_rows * stride_codes, mask=valid, other=0).to(tl.int64)
    x = tl.load(table + code[:, None] * width + columns[None, :], mask=inside, other=0.0)
    place = long_rows[:, None] * stride_out + columns[None, :]
    tl.store(out + place, x.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def linear_swish(
    x,  # descriptor over [M, K], or a pointer
    w,  # descriptor over [N, K], or a pointer
    factors,  # likewise over [2 P, K], of `FrozenSwish`
    shifts,  # float32 [P]
    bias,  # [N]
    norm_weight,  # [N]
    norm_bias,  # [N]
    out,  # [M, N], with TMA a descriptor
    num_rows, num_outputs, num_inputs, num_factors, stride_x, stride_w, eps,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, TMA: tl.constexpr,
    FAST: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """h * sigmoid(norm(h)) of h = x wᵀ + bias, whose rows are too long for a program to hold: their
    mean and variance come from a narrower map. K is a single step.
    """
    row = tl.program_id(0) * BLOCK_M
    rows = row + tl.arange(0, BLOCK_M)
    a = load_tile(x, row, 0, num_rows, num_inputs, stride_x, BLOCK_M, BLOCK_K, TMA)

    mean = tl.zeros((BLOCK_M,), tl.float32)
    squares = tl.zeros((BLOCK_M,), tl.float32)
    last = 2 * num_factors
    for number in tl.range(0, num_factors, BLOCK_N, num_stages=2):
        numbers = number + tl.arange(0, BLOCK_N)
        high = load_tile(factors, number, 0, last, num_inputs, num_inputs, BLOCK_N, BLOCK_K, TMA)
        part = tl.dot(a, high.T, input_precision="ieee")
        number += num_factors
        low = load_tile(factors, number, 0, last, num_inputs, num_inputs, BLOCK_N, BLOCK_K, TMA)
        part = tl.dot(a, low.T, part, input_precision="ieee")
        part += tl.load(shifts + numbers)[None, :]

        of_mean = (numbers == 0)[None, :]
        mean += tl.sum(tl.where(of_mean, part, 0.0), 1)
        squares += tl.sum(tl.where(of_mean, 0.0, part * part), 1)
    rstd = tl.rsqrt(squares / num_outputs + eps)

    for column in range(0, num_outputs, BLOCK_N):
        columns = column + tl.arange(0, BLOCK_N)
        valid = columns < num_outputs
        b = load_tile(w, column, 0, num_outputs, num_inputs, stride_w, BLOCK_N, BLOCK_K, TMA)
        h = tl.dot(a, b.T, input_precision="ieee")
        h += tl.load(bias + columns, mask=valid, other=0.0).to(tl.float32)[None, :]

        scale = tl.load(norm_weight + columns, mask=valid, other=0.0).to(tl.float32)
        shifted = tl.load(norm_bias + columns, mask=valid, other=0.0).to(tl.float32)
        normed = (h - mean[:, None]) * rstd[:, None] * scale[None, :] + shifted[None, :]
        y = h * gate_of(normed, FAST)
        if TMA:
            out.store([row, column], y.to(out.dtype))
        else:
            place = rows.to(tl.int64)[:, None] * num_outputs + columns[None, :]
            inside = (rows < num_rows)[:, None] & valid[None, :]
            tl.store(out + place, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "steps"])
def find_token_rows(
    position,  # int [T]
    gap_ms,  # int64 [T]
    action_mask,  # int32 [T]
    known_mask,  # int32 [T]
    seq_offsets,  # int64 [B + 1]
    num_targets,  # int32 [B]
    found,  # int32 [4, T] out: rows of the position, time and actions' table, and of the output
    num_rows, num_sequences, steps, num_positions, num_buckets, num_context,
    BLOCK: tl.constexpr, EVENT: tl.constexpr, ACTIONS: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """A token a thread. Of the actions' table a candidate has the last row, another token that of
    its state; MERGED actions are one."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < num_rows
    at = position_row(tl.load(position + row, mask=valid, other=0), num_positions)
    bucket = time_row(tl.load(gap_ms + row, mask=valid, other=0), num_buckets, EVENT)

    sequence = find_sequence(seq_offsets, seq_offsets, row, num_sequences, steps, False)
    end = tl.load(seq_offsets + sequence + 1, mask=valid, other=0)
    first_target = end - tl.load(num_targets + sequence, mask=valid, other=0)

    actions = tl.load(action_mask + row, mask=valid, other=0)
    known = tl.load(known_mask + row, mask=valid, other=0)
    if MERGED:
        actions = ((actions & known) != 0).to(tl.int32)
        known = (known != 0).to(tl.int32)
    state = tl.zeros((BLOCK,), tl.int32)
    power = 1
    for bit in tl.static_range(ACTIONS):
        digit = tl.where((known >> bit) & 1 != 0, (actions >> bit) & 1, 2)
        state += digit * power
        power *= 3
    state = tl.where(row >= first_target, power, state)

    tl.store(found + row, at, mask=valid)
    tl.store(found + num_rows + row, bucket, mask=valid)
    tl.store(found + 2 * num_rows + row, state, mask=valid)
    # behind the context of its own sequence and of those before
    tl.store(found + 3 * num_rows + row, row + num_context * (sequence + 1), mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def place_tokens(
    x,  # [T, E]
    weight, bias,  # [E], of the norm
    found,  # int32 [4, T]
    position_table,  # [P, E]
    time_table,  # [B, E]
    action_table,  # [N, E]
    out,  # [tokens and context, E]
    num_rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """norm(x) + a row of each table, rounded once, where `found` says."""
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    valid = rows < num_rows
    inside = valid[:, None] & (columns < width)[None, :]
    long_rows = rows.to(tl.int64)[:, None]  # rows * width passes 2**31 on long batches
    x_RE = tl.load(x + long_rows * width + columns[None, :], mask=inside, other=0.0)

    at = tl.load(found + rows, mask=valid, other=0).to(tl.int64)[:, None] * width
    of_position = tl.load(position_table + at + columns[None, :], mask=inside, other=0.0)
    at = tl.load(found + num_rows + rows, mask=valid, other=0).to(tl.int64)[:, None] * width
    of_time = tl.load(time_table + at + columns[None, :], mask=inside, other=0.0)
    at = tl.load(found + 2 * num_rows + rows, mask=valid, other=0).to(tl.int64)[:, None] * width
    of_actions = tl.load(action_table + at + columns[None, :], mask=inside, other=0.0)

    w = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)
    b = tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)
    hat, _ = normalise(x_RE.to(tl.float32), inside, width, eps)
    y = hat * w[None, :] + b[None, :]
    y += of_position.to(tl.float32) + of_time.to(tl.float32) + of_actions.to(tl.float32)

    at = tl.load(found + 3 * num_rows + rows, mask=valid, other=0).to(tl.int64)[:, None] * width
    tl.store(out + at + columns[None, :], y.to(out.dtype.element_ty), mask=inside)
