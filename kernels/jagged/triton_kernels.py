"""Copies of whole rows between packed tensors. A program finds the sequence of each of its rows by
bisection, so no list of tiles is needed and sequences of any length, empty ones too, share the work
evenly.

Backward of a copy is the copy the other way round: no row is written twice, so nothing is added and
no atomics occur."""

import triton
import triton.language as tl


@triton.jit
def find_sequence(offsets, other, row, num_sequences, steps, TWO: tl.constexpr):
    """The sequence of each row: offsets[found] <= row < offsets[found + 1]; with TWO, of the sum of
    both offsets.
    """
    low = (row * 0).to(tl.int32)
    high = low + num_sequences
    for _ in range(steps):
        middle = (low + high) // 2
        begin = tl.load(offsets + middle)
        if TWO:
            begin += tl.load(other + middle)
        low = tl.where(begin <= row, middle, low)
        high = tl.where(begin <= row, high, middle)
    return low


# other lengths, the same program
@triton.jit(do_not_specialize=["num_rows", "num_sequences", "steps"])
def concatenate_or_split(
    whole,  # [T, E]
    left,  # [rows, E]
    right,  # [T - rows, E]
    left_offsets,  # int64 [B + 1]
    right_offsets,  # int64 [B + 1]
    num_rows,
    num_sequences,
    steps,
    width,
    SPLIT: tl.constexpr,  # whole → left, right; otherwise left, right → whole
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    col = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    seq = find_sequence(left_offsets, right_offsets, row, num_sequences, steps, True)
    left_begin, right_begin = tl.load(left_offsets + seq), tl.load(right_offsets + seq)
    length = tl.load(left_offsets + seq + 1) - left_begin

    at = row - left_begin - right_begin
    is_left = at < length
    left_at = (left_begin + at)[:, None] * width + col
    right_at = (right_begin + at - length)[:, None] * width + col
    inside = (row < num_rows)[:, None] & (col < width)
    in_left, in_right = inside & is_left[:, None], inside & ~is_left[:, None]
    whole_at = row[:, None] * width + col

    if SPLIT:
        x = tl.load(whole + whole_at, mask=inside)
        tl.store(left + left_at, x, mask=in_left)
        tl.store(right + right_at, x, mask=in_right)
    else:
        x = tl.load(left + left_at, mask=in_left)
        x = tl.where(is_left[:, None], x, tl.load(right + right_at, mask=in_right))
        tl.store(whole + whole_at, x, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_sequences", "steps", "num_context"])
def truncate_tail(
    long,  # [T, E]
    short,  # [rows, E]
    offsets,  # int64 [B + 1], of long
    new_offsets,  # int64 [B + 1], of short
    num_rows,  # of what is written
    num_sequences,
    steps,
    num_context,
    width,
    BACKWARD: tl.constexpr,  # short → long, zeros where nothing was kept; otherwise long → short
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    col = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    written = offsets if BACKWARD else new_offsets
    seq = find_sequence(written, written, row, num_sequences, steps, False)

    begin, new_begin = tl.load(offsets + seq), tl.load(new_offsets + seq)
    length, new_length = (
        tl.load(offsets + seq + 1) - begin,
        tl.load(new_offsets + seq + 1) - new_begin,
    )

    dropped = length - new_length
    inside = (row < num_rows)[:, None] & (col < width)
    here = row[:, None] * width + col

    if BACKWARD:
        at = row - begin
        is_tail = at >= num_context + dropped
        kept = is_tail | (at < num_context)
        source = (new_begin + at - tl.where(is_tail, dropped, 0))[:, None] * width + col
        x = tl.load(short + source, mask=inside & kept[:, None], other=0.0)
        tl.store(long + here, x, mask=inside)
    else:
        at = row - new_begin
        source = (begin + at + tl.where(at >= num_context, dropped, 0))[:, None] * width + col
        tl.store(short + here, tl.load(long + source, mask=inside), mask=inside)
