"""The relative bias of HSTU inside the attention kernels: looked up score by score, its tables'
gradients as sums.

Suffixes: M rows (queries) of a tile, N keys of a tile.
"""

import math

import triton
import triton.language as tl

from kernels.semi_local_attention.types import LOG_BUCKET

LATEST = tl.constexpr(2**31 - 1)
CELLS = tl.constexpr(2**11)  # of `time_steps`
BUCKETS_PER_OCTAVE = tl.constexpr(math.log(2) / LOG_BUCKET)


@triton.jit(do_not_specialize=["num_positions", "num_times", "reach"])
def spread_tables(
    position_table, time_table,  # float32 [P], [N]
    steps,  # int32 [CELLS, 2], of `time_steps`
    positions,  # float32 [2 reach + 1] out: half the entry of distance i - reach
    cells,  # int32 [CELLS, 4] out: step, half the entries below and from it on, both buckets
    num_positions, num_times, reach, BLOCK: tl.constexpr,
):  # fmt: skip
    """The bias tables as the kernels look things up: without a logarithm, and a distance without
    its bounds.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    distance = tl.minimum(tl.maximum(i - reach, 0), num_positions - 1)
    tl.store(positions + i, 0.5 * tl.load(position_table + distance), mask=i <= 2 * reach)

    inside = i < CELLS
    step, both = (
        tl.load(steps + 2 * i, mask=inside, other=0),
        tl.load(steps + 2 * i + 1, mask=inside, other=0),
    )
    below, above = tl.minimum(both & 0xFFFF, num_times - 1), tl.minimum(both >> 16, num_times - 1)

    place = cells + 4 * i
    tl.store(place, step, mask=inside)
    tl.store(place + 1, (0.5 * tl.load(time_table + below)).to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 2, (0.5 * tl.load(time_table + above)).to(tl.int32, bitcast=True), mask=inside)
    tl.store(place + 3, below | (above << 16), mask=inside)


@triton.jit
def bias_of(positions, cells, distance, seconds, ON_GPU: tl.constexpr):
    """Half of the bias, and the time bucket; `distance` counts from `-reach`, `seconds` have a
    sign.

    The upper 11 bits of a float, sign, exponent and two more, are a cell in which the time bucket
    changes at most once. In assembly since `tl.load` moves to a layout of its own and back, and is
    pipelined like an operand.
    """
    if ON_GPU:
        near = tl.inline_asm_elementwise(
            """{ .reg .b64 place;
            mad.wide.s32 place, $1, 4, $2;
            ld.global.nc.f32 $0, [place]; }""",
            "=f,r,l", [distance, positions.to(tl.int64)], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip

        late, bucket = tl.inline_asm_elementwise(
            """{ .reg .f32 number; .reg .b32 cell, step, below, above, both; .reg .b64 place;
            .reg .pred from;
            cvt.rn.f32.s32 number, $2;
            mov.b32 cell, number;
            shr.u32 cell, cell, 21;
            mad.wide.u32 place, cell, 16, $3;
            ld.global.nc.v4.b32 {step, below, above, both}, [place];
            setp.ge.s32 from, $2, step;
            selp.b32 $0, above, below, from;
            shr.u32 cell, both, 16;
            and.b32 both, both, 65535;
            selp.b32 $1, cell, both, from; }""", "=f,=r,r,l", [seconds,
            cells.to(tl.int64)], dtype=(tl.float32, tl.int32), is_pure=True, pack=1,
        )  # fmt: skip
    else:
        near = tl.load(positions + distance)
        place = cells + 4 * (
            (seconds.to(tl.float32).to(tl.int32, bitcast=True) >> 21) & (CELLS - 1)
        )
        stepped = seconds >= tl.load(place)
        late = tl.where(stepped, tl.load(place + 2), tl.load(place + 1)).to(
            tl.float32, bitcast=True
        )
        bucket = tl.where(stepped, tl.load(place + 3) >> 16, tl.load(place + 3) & 0xFFFF)
    return near + late, bucket


@triton.jit
def _raise_to_largest(
    place, x, num_rows, stride_t, stride_h, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < HEADS * WIDTH)[None, :]
    of_rows = rows.to(tl.int64)[:, None] * stride_t
    of_columns = (columns // WIDTH * stride_h + columns % WIDTH)[None, :]
    numbers = tl.load(x + of_rows + of_columns, mask=inside, other=0.0).to(tl.float32)

    # without their signs, bits are in the order of the numbers, and a NaN's are above all
    bits = numbers.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    tl.atomic_max(place, tl.max(tl.max(bits, 1), 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_rows"])
def largest_numbers(
    grad, v, dq,  # [T, H, V], [T, H, V], [T, H, D]
    largest,  # int32 [3], zeros: the bits of the largest |number| of each, as float32
    num_rows, stride_gt, stride_gh, stride_vt, stride_vh, stride_qt, stride_qh,
    HEADS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """A program for each ROWS rows of each of the three; BLOCK is no less than a row's numbers."""
    which = tl.program_id(1)
    place = largest + which
    if which == 0:
        _raise_to_largest(place, grad, num_rows, stride_gt, stride_gh, HEADS, V, ROWS, BLOCK)
    elif which == 1:
        _raise_to_largest(place, v, num_rows, stride_vt, stride_vh, HEADS, V, ROWS, BLOCK)
    else:
        _raise_to_largest(place, dq, num_rows, stride_qt, stride_qh, HEADS, D, ROWS, BLOCK)


@triton.jit
def add_fixed(table, index, value, per_unit, mask):
    """Whole numbers add to the same sum in every order; floats do not."""
    tl.atomic_add(
        table + index, tl.floor(value * per_unit + 0.5).to(tl.int64), mask=mask, sem="relaxed"
    )


@triton.jit
def add_position_grads(
    d_score, rank, first_rank, last_rank, near, d_position, per_unit, num_positions,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds a tile's [M, N] along its diagonals; the distance of row r and key n is near + rank[r] -
    first_rank - n.

    Each row is turned until equal distances, but for whole laps of N, stand below each other.
    """
    turn = tl.arange(0, BLOCK_N)
    shift = (rank - first_rank)[:, None] - turn[None, :]
    turned = tl.gather(d_score, shift & (BLOCK_N - 1), 1)

    for lap in range(-1, (last_rank - first_rank) // BLOCK_N + 1):
        total = tl.sum(
            tl.where((shift >= lap * BLOCK_N) & (shift < (lap + 1) * BLOCK_N), turned, 0.0), 0
        )
        distance = tl.minimum(tl.maximum(near + turn + lap * BLOCK_N, 0), num_positions - 1)
        add_fixed(d_position, distance, total, per_unit, total != 0)


@triton.jit
def time_buckets(asked_first, asked_last, happened, valid, num_times):
    """The first and the last bucket of a tile, rather one too many: those of the ends of the rows'
    and keys' times.
    """
    first = tl.min(tl.where(valid, happened, LATEST), 0)
    last = tl.max(tl.where(valid, happened, -LATEST), 0)
    longest = tl.maximum(asked_last - first, last - asked_first)
    shortest = tl.maximum(asked_first - last, first - asked_last)

    low = tl.log2(tl.maximum(shortest, 1).to(tl.float32)) * BUCKETS_PER_OCTAVE - 1e-3
    high = tl.log2(tl.maximum(longest, 1).to(tl.float32)) * BUCKETS_PER_OCTAVE + 1e-3
    return tl.minimum(tl.maximum(low, 0.0).to(tl.int32), num_times - 1), tl.minimum(
        high.to(tl.int32), num_times - 1
    )
