"""The gradients of the tables of a relative bias."""

import triton
import triton.language as tl

from kernels.semi_local_attention.triton_bias import (
    LATEST,
    add_fixed,
    add_position_grads,
    time_buckets,
)
from kernels.semi_local_attention.triton_common import (
    exact_tanh,
    half_scores,
    load_rows,
    part_of,
    twice_slope,
)
from kernels.semi_local_attention.triton_row_tile import (
    asked_times,
    block_bias,
    key_block,
    mask_block,
    row_tile,
)
from kernels.semi_local_attention.triton_tiles import ENTRY, ROW_TARGET, row_entry


@triton.jit
def _add_bias_grads(
    d_score, bucket, happened, far, rows, row_end, rank, first_rank, last_rank, asked_first,
    asked_last, first, start, range_end, is_own, d_position, d_time, unit, num_positions, num_times,
    reach, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Adds a block's [M, N] to the gradients of both bias tables.

    Returns `far` [M], the sums for the last entry of the position table, with the block's own where
    all of it is so far away.
    """
    inside = tl.where(rows[:, None] < row_end, d_score, 0.0)  # others count in the next tile
    near = first_rank - reach - (first - start)
    if near - BLOCK_N >= num_positions - 2:
        far += tl.sum(inside, 1)
    else:
        add_position_grads(
            inside, rank, first_rank, last_rank, near, d_position, unit, num_positions, BLOCK_M,
            BLOCK_N
        )  # fmt: skip

    index = first + tl.arange(0, BLOCK_N)
    valid = index < tl.where(is_own, row_end, range_end)
    low_bucket, high_bucket = time_buckets(asked_first, asked_last, happened, valid, num_times)
    for b in range(low_bucket, high_bucket + 1):
        by_row = tl.sum(tl.where(bucket == b, inside, 0.0), 1)
        add_fixed(d_time + b * BLOCK_M, tl.arange(0, BLOCK_M), by_row, unit, by_row != 0)
    return far


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "num_times", "reach"])
def backward_bias(
    q, k, v, grad,  # as in `backward_queries`
    positions, cells, event_time, query_time,
    d_position, d_time,  # int64 [P], [N, BLOCK_M]: by row, so that few wait for each other
    per_unit,  # float32 [1]: how many units of the two make 1
    tiles, header, visible, oldest, num_tokens, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_vt, stride_vh, stride_gt, stride_gh, num_positions, num_times, reach, window, prefix,
    alpha, HEADS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr,
    VISIBLE: tl.constexpr, FROM: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    ON_GPU: tl.constexpr,
):  # fmt: skip
    """What a row tile adds to the gradients of the bias tables.

    All heads read one bias. So the gradients of their scores are added first, and the sums over
    distances and time buckets, which take longer than the products, are made once a block instead
    of once a block and head. No row of another sequence is in a sum: its column is masked.
    """
    tile = tl.program_id(0)
    tiles += tile * ENTRY
    row, row_end, start, history_end, kind, part, parts, _slot_of = row_entry(tiles)
    target = tl.load(tiles + ROW_TARGET)
    if tile >= tl.load(header):
        return

    rows, low, high, low_all, high_all, key, prefix_blocks, range_blocks, own_blocks = row_tile(
        row, row_end, start, history_end, kind, target, visible, oldest, window, prefix, BLOCK_M,
        BLOCK_N, HAS_PREFIX, CANDIDATES, VISIBLE, FROM
    )  # fmt: skip
    blocks = prefix_blocks + range_blocks + own_blocks
    begin, _, end = part_of(blocks, blocks, part, parts)

    asked, rank = asked_times(query_time, rows, high, start, reach, num_tokens)
    unit = tl.load(per_unit)
    first_rank, last_rank = tl.min(rank, 0), tl.max(rank, 0)
    asked_first = tl.min(tl.where(rows < row_end, asked, LATEST), 0)
    asked_last = tl.max(tl.where(rows < row_end, asked, -LATEST), 0)
    range_end = tl.max(tl.where(rows < row_end, high, 0), 0) + 1
    far = tl.zeros((BLOCK_M,), tl.float32)

    for i in range(begin, end):
        first, is_own = key_block(i, row, start, key, prefix_blocks, range_blocks, BLOCK_N)
        added, bucket, happened = block_bias(
            positions, cells, event_time, rank, asked, first, start, reach, num_tokens, BLOCK_N,
            ON_GPU
        )  # fmt: skip

        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for head in range(HEADS):
            query = load_rows(q, row, head, stride_qt, stride_qh, num_tokens, BLOCK_M, D, TMA)
            keys = load_rows(k, first, head, stride_kt, stride_kh, num_tokens, BLOCK_N, D, TMA)
            grads = load_rows(grad, row, head, stride_gt, stride_gh, num_tokens, BLOCK_M, V, TMA)
            values = load_rows(v, first, head, stride_vt, stride_vh, num_tokens, BLOCK_N, V, TMA)

            # not tanh.approx: its error has a sign, which a million pairs of an entry add up
            half = half_scores(query, keys, alpha, PRECISION) + added
            d_weight = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            total += d_weight * twice_slope(half, exact_tanh(half, ON_GPU))

        total = mask_block(
            total, rows, low, high, low_all, high_all, first, start, prefix, i < prefix_blocks,
            is_own, BLOCK_N, HAS_PREFIX, CANDIDATES
        )  # fmt: skip
        far = _add_bias_grads(
            total, bucket, happened, far, rows, row_end, rank, first_rank, last_rank, asked_first,
            asked_last, first, start, range_end, is_own, d_position, d_time, unit, num_positions,
            num_times, reach, BLOCK_M, BLOCK_N
        )  # fmt: skip

    farther = tl.sum(far, 0)
    add_fixed(d_position, num_positions - 1, farther, unit, farther != 0)
