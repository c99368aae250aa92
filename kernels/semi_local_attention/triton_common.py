# evaluated on the device)
"""What the attention kernels share: loading rows, the activation, and sums of cut tiles."""

import triton
import triton.language as tl

from kernels.triton_math import LOG2_E, approximate_tanh

FAR = tl.constexpr(2**30)


@triton.jit
def load_rows(
    source, row, head, stride_t, stride_h, end, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    TMA: tl.constexpr
):  # fmt: skip
    """[COUNT, WIDTH] of one head from `row` on: by a descriptor over [T, H * WIDTH], or a pointer
    and masked loads.
    """
    if TMA:
        tile = source.load([row, head * WIDTH])
    else:
        rows = row + tl.arange(0, COUNT)
        place = (
            source
            + rows.to(tl.int64)[:, None] * stride_t
            + head * stride_h
            + tl.arange(0, WIDTH)[None, :]
        )
        tile = tl.load(place, mask=rows[:, None] < end, other=0.0)
    return tile


@triton.jit
def load_own_rows(
    source, row, head, stride_t, stride_h, end, sequence_end, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, TMA: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    """As `load_rows`, with CROSSES zeros from `sequence_end` on, whatever lies there."""
    tile = load_rows(source, row, head, stride_t, stride_h, end, COUNT, WIDTH, TMA)
    if CROSSES:
        inside = row + tl.arange(0, COUNT) < sequence_end
        tile = tl.where(inside[:, None], tile, 0.0).to(tile.dtype)
    return tile


@triton.jit
def held_rows(tile, row, end, COUNT: tl.constexpr, HELD: tl.constexpr):
    """[COUNT, WIDTH] from `row` on; with HELD, zeros from `end` on.

    A left operand that comes from a load as it is, Triton has the tensor cores read from shared
    memory in every step. Of one that something was done to, here the masking, it makes registers
    once, before the loop. The shared memory that this frees holds another stage.
    """
    if HELD:
        inside = row + tl.arange(0, COUNT) < end
        tile = tl.where(inside[:, None], tile, 0.0).to(tile.dtype)
    return tile


@triton.jit
def part_of(blocks, inside, part, parts):
    """A part's blocks: the first, the first that may cross the end of the sequence, and the end.

    `inside` blocks lie inside the sequence.
    """
    begin, end = blocks * part // parts, blocks * (part + 1) // parts
    return begin, tl.maximum(tl.minimum(inside, end), begin), end


@triton.jit
def exact_tanh(x, ON_GPU: tl.constexpr):
    """tanh with float32's own error, where `tanh.approx` has one of 2**-11.

    A division would first bring its operands into range; a reciprocal alone is one instruction.
    """
    grown = 1 + tl.exp2(x * (2 * LOG2_E))
    if ON_GPU:
        inverse = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [grown], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        inverse = 1 / grown
    return 1 - 2 * inverse


@triton.jit
def tanh_of(x, FAST: tl.constexpr):
    if FAST:
        y = approximate_tanh(x)
    else:
        y = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E)))
    return y


@triton.jit
def half_scores(query, keys, alpha, PRECISION: tl.constexpr):
    """Half of alpha q·k, [M, N]."""
    return tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (0.5 * alpha)


@triton.jit
def silu_of(half, FAST: tl.constexpr):
    """SiLU of twice `half`."""
    return half + half * tanh_of(half, FAST)


@triton.jit
def twice_slope(half, tanh):
    """Twice SiLU's derivative at 2 half, in three instructions; the sums of what it makes are
    halved at the end.
    """
    rise = 1 + tanh
    return rise + rise * (half - half * tanh)


@triton.jit
def store_rows(
    out, value, row, end, head, HEADS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Rows row..end of a contiguous [T, HEADS, WIDTH]."""
    rows = row + tl.arange(0, COUNT)
    place = out + (rows.to(tl.int64)[:, None] * HEADS + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=rows[:, None] < end)


@triton.jit
def store_grads(
    out, slope, sums, value, row, end, entry, head, stride_out, stride_slope, stride_sums,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, TRUE: tl.constexpr, SLOPE: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Rows row..end of a gradient, heads TRUE wide, rows `stride_out` apart; with SLOPE times
    `slope`, that of what made the operand. With SUMS the sum of the rows goes to row `entry` of
    `sums`: these add to the gradient of a bias. Both spare a pass over the whole gradient."""
    rows, columns = row + tl.arange(0, COUNT), tl.arange(0, WIDTH)
    inside = (rows < end)[:, None]
    if WIDTH != TRUE:
        inside = inside & (columns < TRUE)[None, :]
    long_rows, place = rows.to(tl.int64)[:, None], head * TRUE + columns[None, :]

    if SLOPE:
        value *= tl.load(slope + long_rows * stride_slope + place, mask=inside, other=0.0).to(
            tl.float32
        )
    tl.store(out + long_rows * stride_out + place, value.to(out.dtype.element_ty), mask=inside)

    if SUMS:
        total = tl.sum(tl.where(inside, value, 0.0), 0)
        tl.store(sums + entry * stride_sums + head * TRUE + columns, total, mask=columns < TRUE)


@triton.jit
def slot_place(partial, slot, head, HEADS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to a [COUNT, BLOCK] partial sum."""
    base = partial + (slot * HEADS + head).to(tl.int64) * (COUNT * BLOCK)
    return base + tl.arange(0, COUNT)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def sum_slots(
    partial, slot, parts, head, HEADS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    total = tl.zeros((COUNT, BLOCK), tl.float32)
    for part in range(parts):  # past L1, where another program's sum would not show
        total += tl.load(
            slot_place(partial, slot + part, head, HEADS, COUNT, BLOCK), cache_modifier=".cg"
        )
    return total


@triton.jit
def is_last(arrived, parts):
    """Whether this program is the last of a tile's parts; what it stored before is seen by the one
    that is.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(arrived, 0)  # for the next launch
    return last
