"""Triton kernels of the position and time embedding: forward, and the sums of the tables'
gradients.

The tables are one in backward: rows of the position table, then of the time table, then those that
a caller brings, if any. A token has a key in each, the number of its row. Keys are sorted, and
`order` says whose each is. A program takes BLOCK_N places of that order, a chunk: runs of one key
inside the chunk are added and done with, a run that goes on in other chunks leaves a partial sum in
each, and a second kernel adds those. So sums have an order that the keys alone give, and a row that
every token has costs no more than others.
"""

import triton
import triton.language as tl

OCTAVES, MS_PER_BUCKET = tl.constexpr(32), tl.constexpr(60_000)  # as in `reference`


@triton.jit
def position_row(position, num_positions):
    """int32: the position modulo the table's rows."""
    at = (position % num_positions).to(tl.int32)
    return tl.where(at < 0, at + num_positions, at)


@triton.jit
def time_row(gap_ms, num_buckets, EVENT: tl.constexpr):
    """int32: the bucket of a gap, as in `reference`."""
    wide = tl.maximum(gap_ms, 0).to(tl.float64)
    if EVENT:
        per_octave = (num_buckets - 1).to(tl.float64) * (1 / OCTAVES)  # exact, a power of two
        bucket = tl.floor(tl.log2(1 + wide) * per_octave)
    else:
        bucket = tl.floor(tl.sqrt(wide / MS_PER_BUCKET))
    bucket = tl.minimum(1 + bucket.to(tl.int64), num_buckets - 1).to(tl.int32)
    return tl.where(gap_ms < 0, 0, bucket)


@triton.jit(do_not_specialize=["num_rows"])
def find_keys(
    position,  # int [T]
    gap_ms,  # int64 [T]
    third,  # int [T]: the row of the third table; of no meaning without THIRD
    keys,  # int [2 or 3, T] out
    num_rows, num_positions, num_buckets,
    BLOCK: tl.constexpr, EVENT: tl.constexpr, THIRD: tl.constexpr,
):  # fmt: skip
    """A token a thread: in the kernel that adds whole rows, many threads would each take the
    float64 logarithm of one row.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < num_rows
    at = position_row(tl.load(position + row, mask=valid, other=0), num_positions)
    bucket = time_row(tl.load(gap_ms + row, mask=valid, other=0), num_buckets, EVENT)

    kind = keys.dtype.element_ty
    tl.store(keys + row, at.to(kind), mask=valid)
    tl.store(keys + num_rows + row, (num_positions + bucket).to(kind), mask=valid)
    if THIRD:
        key = num_positions + num_buckets + tl.load(third + row, mask=valid, other=0)
        tl.store(keys + 2 * num_rows + row, key.to(kind), mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def add_rows(
    x,  # [T, E]
    keys,  # int [2 or 3, T]
    position_table,  # [P, E]
    time_table,  # [B, E]
    third_table,  # [N, E], of no meaning without THIRD
    out,  # [T, E]
    num_rows, width, stride_x, num_positions, num_buckets,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, THIRD: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    valid = rows < num_rows
    inside = valid[:, None] & (columns < width)[None, :]
    long_rows = rows.to(tl.int64)[:, None]  # rows * width passes 2**31 on long batches
    x_RE = tl.load(x + long_rows * stride_x + columns[None, :], mask=inside, other=0.0)

    position = tl.load(keys + rows, mask=valid, other=0).to(tl.int64)
    bucket = tl.load(keys + num_rows + rows, mask=valid, other=0).to(tl.int64) - num_positions
    at = position[:, None] * width + columns[None, :]
    of_position = tl.load(position_table + at, mask=inside, other=0.0).to(tl.float32)
    at = bucket[:, None] * width + columns[None, :]
    of_time = tl.load(time_table + at, mask=inside, other=0.0).to(tl.float32)

    y = x_RE.to(tl.float32) + of_position + of_time
    if THIRD:
        third = tl.load(keys + 2 * num_rows + rows, mask=valid, other=0).to(tl.int64)
        at = (third - num_positions - num_buckets)[:, None] * width + columns[None, :]
        y += tl.load(third_table + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + long_rows * width + columns[None, :], y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "steps"])
def name_rows(
    keys,  # int [2 T or 3 T], sorted
    # int64 [K] out: a row's own number in its table, or of a row without tokens that of another
    # with some
    ids,
    sums,  # float32 [K, E] out: zeros in rows without tokens
    num_rows, steps, width, num_positions, num_buckets, num_keys,
    BLOCK_R: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A sparse gradient must say how many rows it has, and the host does not know which have
    tokens. So it has all, and a row without tokens adds zeros to one that has some."""
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    valid = row < num_keys
    num_placed = num_positions + num_buckets
    # the row's table: its first row, and the first place of its keys
    begin = tl.where(row < num_positions, 0, tl.where(row < num_placed, num_positions, num_placed))
    first = tl.where(row < num_positions, 0, tl.where(row < num_placed, num_rows, 2 * num_rows))
    last = first + num_rows - 1
    low, high = first, last  # the first place whose key is at least the row, or the table's last

    for _ in range(steps):
        middle = (low + high) // 2
        reached = tl.load(keys + middle, mask=valid, other=0).to(tl.int32) >= row
        high = tl.where(reached, middle, high)
        low = tl.where(reached, low, tl.minimum(middle + 1, last))
    found = tl.load(keys + low, mask=valid, other=0).to(tl.int32)

    tl.store(ids + row, (found - begin).to(tl.int64), mask=valid)
    empty = valid & (found != row)
    place = sums + row.to(tl.int64)[:, None] * width

    for column in range(0, width, BLOCK_E):
        columns = column + tl.arange(0, BLOCK_E)
        mask = empty[:, None] & (columns < width)[None, :]
        tl.store(place + columns[None, :], tl.zeros((BLOCK_R, BLOCK_E), tl.float32), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_places"])
def sum_runs(
    keys,  # int [2 T or 3 T], sorted
    order,  # int64 [2 T or 3 T]: which key of the unsorted each was
    grad,  # [T, E]
    sums,  # float32 [K, E] out, of keys whose run is inside a chunk
    # float32 [chunks, 2, E] out: sums of runs that began before the chunk, and that go on after it
    partial,
    num_rows, num_places, width, stride_grad, BLOCK_N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(width, BLOCK_E)
    chunk = tl.program_id(0) // blocks
    columns = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    first, lane = chunk * BLOCK_N, tl.arange(0, BLOCK_N)
    place = first + lane
    valid = place < num_places
    key = tl.load(keys + place, mask=valid, other=-1).to(tl.int32)
    before = tl.load(keys + place - 1, mask=valid & (place > 0), other=-1).to(tl.int32)
    key_before = tl.load(keys + first - 1, mask=first > 0, other=-1).to(tl.int32)
    key_after = tl.load(keys + first + BLOCK_N, mask=first + BLOCK_N < num_places, other=-1).to(
        tl.int32
    )
    token = tl.load(order + place, mask=valid, other=0) % num_rows
    mask = valid[:, None] & (columns < width)[None, :]
    rows = tl.load(grad + token[:, None] * stride_grad + columns[None, :], mask=mask, other=0.0)
    # number of each place's run in the chunk
    run = tl.cumsum(((key != before) | (lane == 0)).to(tl.int32), 0) - 1
    is_of = (lane[:, None] == run[None, :]) & valid[None, :]  # [runs, places]
    # float32 sums: a product by 0 or 1 is exact, of finite numbers; others stay with their own run
    is_broken = tl.max(tl.where(tl.abs(rows.to(tl.float32)) < float("inf"), 0, 1), 1) > 0
    rows = tl.where(is_broken[:, None], 0.0, rows).to(rows.dtype)
    total_of = tl.dot(is_of.to(rows.dtype), rows, input_precision="ieee")
    broken_of = tl.max(tl.where(is_of & is_broken[None, :], 1, 0), 1) > 0
    total_of = tl.where(broken_of[:, None], float("nan"), total_of)
    key_of = tl.max(tl.where(is_of, key[None, :], -1), 1)
    came, goes_on = key_of == key_before, key_of == key_after
    there = key_of >= 0
    whole = there & ~came & ~goes_on
    row = tl.maximum(key_of, 0).to(tl.int64)[:, None] * width + columns[None, :]

    tl.store(sums + row, total_of, mask=whole[:, None] & (columns < width)[None, :])
    # A run that came from before lies in half 0, whether or not it goes on; one that begins here
    # and goes on in half 1.
    half = (chunk.to(tl.int64) * 2 + tl.where(came, 0, 1))[:, None] * width + columns[None, :]
    tl.store(
        partial + half,
        total_of,
        mask=(there & (came | goes_on))[:, None] & (columns < width)[None, :],
    )


@triton.jit(do_not_specialize=["num_places"])
def finish_runs(
    keys, partial, sums, num_places, width, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr
):  # fmt: skip
    """One program a chunk and block of columns: the row whose run begins there and goes on, if
    there is one.
    """
    blocks = tl.cdiv(width, BLOCK_E)
    chunk = (tl.program_id(0) // blocks).to(tl.int64)
    end = (chunk + 1) * BLOCK_N
    if end >= num_places:
        return
    key = tl.load(keys + end - 1).to(tl.int32)
    if tl.load(keys + end).to(tl.int32) != key:
        return
    begin = chunk * BLOCK_N
    if tl.load(keys + begin - 1, mask=begin > 0, other=-1).to(tl.int32) == key:
        return  # it began earlier
    columns = tl.program_id(0) % blocks * BLOCK_E + tl.arange(0, BLOCK_E)
    inside = columns < width
    began = tl.load(partial + (chunk * 2 + 1) * width + columns, mask=inside, other=0.0)
    added = tl.zeros((BLOCK_C, BLOCK_E), tl.float32)
    next_chunk = chunk + 1
    more = True
    while more:
        each = next_chunk + tl.arange(0, BLOCK_C)
        same = (
            tl.load(keys + each * BLOCK_N, mask=each * BLOCK_N < num_places, other=-1).to(tl.int32)
            == key
        )
        mask = same[:, None] & inside[None, :]
        added += tl.load(
            partial + (each * 2)[:, None] * width + columns[None, :], mask=mask, other=0.0
        )
        next_chunk += BLOCK_C
        more = tl.sum(same.to(tl.int32), 0) == BLOCK_C
    tl.store(sums + key.to(tl.int64) * width + columns, began + tl.sum(added, 0), mask=inside)
