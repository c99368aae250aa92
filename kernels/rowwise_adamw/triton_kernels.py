"""Fused row-wise AdamW: gradients of the same row are added and the row updated, in one pass over
sorted ids.

`ids` are sorted and `order` says where each one's gradient lies. A program takes BLOCK_N places of
that order, a
chunk. A run of equal ids inside one chunk is added and its row updated at once. A run that goes on
in other chunks leaves one partial sum in each, and a second kernel adds those. All sums have an
order given by the places alone.
"""

import triton
import triton.language as tl


@triton.jit
def _round_by_chance(x, at, step):
    """As `reference.round_by_chance`."""
    bits = at.to(tl.uint32) ^ (step.to(tl.uint32) * 0x9E3779B9)
    bits = (bits ^ (bits >> 16)) * 0x85EBCA6B
    bits = (bits ^ (bits >> 13)) * 0xC2B2AE35
    bits = (bits ^ (bits >> 16)) & 0xFFFF
    return ((x.to(tl.uint32, bitcast=True) + bits) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _update(
    weight, m, v, row, grad, active, grad_scale, first_row, step, lr, share1, share2, correct1,
    correct2, eps, weight_decay, dim, MOMENTUM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows `row` [N] of the table where `active`, with the gradients [N, BLOCK_D]."""
    col = tl.arange(0, BLOCK_D)
    at = row[:, None] * dim + col
    mask = active[:, None] & (col < dim)
    grad = grad / tl.load(grad_scale)
    old = tl.load(weight + at, mask=mask, other=0.0).to(tl.float32)
    old_v = tl.load(v + row, mask=active, other=0.0)
    mean = tl.sum(tl.where(col < dim, grad * grad, 0.0), 1) / dim

    new_v = old_v + share2 * (mean - old_v)
    new_m = grad
    if MOMENTUM:
        old_m = tl.load(m + at, mask=mask, other=0.0)
        new_m = old_m + share1 * (grad - old_m)
    # Several threads, of several warps, read the same number and one writes it: none may write
    # before all have read.
    tl.debug_barrier()
    tl.store(v + row, new_v, mask=active)
    if MOMENTUM:
        tl.store(m + at, new_m, mask=mask)

    update = (new_m / correct1) / (tl.sqrt(new_v / correct2) + eps)[:, None]
    new = old - lr * (update + weight_decay * old)
    if weight.dtype.element_ty == tl.bfloat16:
        new = _round_by_chance(new, at + first_row.to(tl.int64) * dim, step)
    tl.store(weight + at, new.to(weight.dtype.element_ty), mask=mask)


@triton.jit
def _add_within_runs(sum_a, starts_a, sum_b, starts_b):
    """Of neighbouring pieces: the sum since the last start of a run, and whether there was one."""
    return tl.where(starts_b != 0, sum_b, sum_a + sum_b), starts_a | starts_b


@triton.jit
def _row_at(ids, place, inside):
    """The row that place of the sorted ids names, -1 outside."""
    return tl.load(ids + place, mask=inside, other=-1).to(tl.int64)


@triton.jit(do_not_specialize=["num_ids", "first_row", "step"])
def update_rows(
    ids,  # int [n], sorted
    order,  # int64 [n]: where the gradient of ids[i] lies
    grads,  # [n, dim]
    partial,  # float32 [chunks, 2, dim] out: sums of runs that come from before, and that go on
    weight,  # [R, dim], float32 or bfloat16
    m,  # float32 [R, dim], with MOMENTUM
    v,  # float32 [R]
    grad_scale,  # float32 []: gradients are divided by it; infinity: nothing is changed
    num_ids,
    first_row,  # of the block that the table is, in a larger one
    step,
    lr,
    share1,  # 1 - β1, and 1 - β2: in float32 the subtraction would lose digits
    share2,
    correct1,
    correct2,
    eps,
    weight_decay,
    dim,
    MOMENTUM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    if tl.load(grad_scale) == float("inf"):
        return
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    lane = tl.arange(0, BLOCK_N)
    col = tl.arange(0, BLOCK_D)
    place = first + lane

    valid = place < num_ids
    row = _row_at(ids, place, valid)
    source = tl.load(order + place, mask=valid, other=0)

    before = _row_at(ids, place - 1, valid & (place > 0))
    after = _row_at(ids, place + 1, place + 1 < num_ids)
    before_chunk = _row_at(ids, first - 1, first > 0)
    after_chunk = _row_at(ids, first + BLOCK_N, first + BLOCK_N < num_ids)
    mask = valid[:, None] & (col < dim)
    grad = tl.load(grads + source[:, None] * dim + col, mask=mask, other=0.0).to(tl.float32)

    starts = ((row != before) | (lane == 0)).to(tl.int32)
    if tl.sum(starts, 0) < BLOCK_N:
        starts_too = starts[:, None] + tl.zeros((BLOCK_N, BLOCK_D), tl.int32)
        grad, _ = tl.associative_scan((grad, starts_too), 0, _add_within_runs)
    ends = valid & ((row != after) | (lane == BLOCK_N - 1))  # here lies the sum of a run

    came, goes_on = ends & (row == before_chunk), ends & (row == after_chunk)
    _update(
        weight, m, v, row, grad, ends & ~goes_on & ~came, grad_scale, first_row, step, lr, share1,
        share2, correct1, correct2, eps, weight_decay, dim, MOMENTUM, BLOCK_D,
    )  # fmt: skip
    # A run that came from before lies in half 0, whether or not it goes on; one that begins here
    # and goes on in half 1.
    to = (tl.program_id(0).to(tl.int64) * 2 + tl.where(came, 0, 1))[:, None] * dim + col
    tl.store(partial + to, grad, mask=(came | goes_on)[:, None] & (col < dim))


@triton.jit(do_not_specialize=["num_ids", "first_row", "step"])
def finish_rows(
    ids, partial, weight, m, v, grad_scale, num_ids, first_row, step, lr, share1, share2, correct1,
    correct2, eps, weight_decay, dim, MOMENTUM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program a chunk: the row whose run begins there and goes on, if there is one."""
    if tl.load(grad_scale) == float("inf"):
        return
    chunk = tl.program_id(0).to(tl.int64)

    last = (chunk + 1) * BLOCK_N - 1
    if last + 1 >= num_ids:
        return
    row = tl.load(ids + last).to(tl.int64)
    if tl.load(ids + last + 1).to(tl.int64) != row:
        return

    begin = chunk * BLOCK_N
    if tl.load(ids + begin - 1, mask=begin > 0, other=-1).to(tl.int64) == row:
        return  # it began earlier
    col = tl.arange(0, BLOCK_D)

    total = tl.load(partial + (chunk * 2 + 1) * dim + col, mask=col < dim, other=0.0)
    sums = tl.zeros((BLOCK_C, BLOCK_D), tl.float32)
    next_chunk = chunk + 1

    more = True
    while more:
        each = next_chunk + tl.arange(0, BLOCK_C)
        place = each * BLOCK_N
        same = tl.load(ids + place, mask=place < num_ids, other=-1).to(tl.int64) == row
        mask = same[:, None] & (col < dim)
        sums += tl.load(partial + (each * 2)[:, None] * dim + col, mask=mask, other=0.0)
        next_chunk += BLOCK_C
        more = tl.sum(same.to(tl.int32), 0) == BLOCK_C

    grad = (total + tl.sum(sums, 0))[None, :]
    rows = row + tl.zeros((1,), tl.int64)
    _update(
        weight, m, v, rows, grad, rows >= 0, grad_scale, first_row, step, lr, share1, share2,
        correct1, correct2, eps, weight_decay, dim, MOMENTUM, BLOCK_D,
    )  # fmt: skip
