"""The gradient of the queries: a row tile visits the keys as in forward."""

import triton
import triton.language as tl

from kernels.semi_local_attention.triton_common import (
    half_scores,
    held_rows,
    is_last,
    load_own_rows,
    load_rows,
    part_of,
    slot_place,
    store_grads,
    sum_slots,
    tanh_of,
    twice_slope,
)
from kernels.semi_local_attention.triton_row_tile import (
    asked_times,
    block_bias,
    inside_blocks,
    key_block,
    mask_block,
    row_tile,
)
from kernels.semi_local_attention.triton_tiles import ENTRY, ROW_SEQUENCE_END, ROW_TARGET, row_entry


@triton.jit
def _store_grad_sum(
    out, slope, sums, acc, partial, arrived, slot, part, parts, row, row_end, tile, head,
    stride_out, stride_slope, stride_sums, HEADS: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, TRUE: tl.constexpr, SLOPE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """As `_store_sum`, of a gradient; the sum of its rows lies at the tile's first part."""
    if parts == 1:
        store_grads(
            out, slope, sums, acc, row, row_end, tile - part, head, stride_out, stride_slope,
            stride_sums, COUNT, WIDTH, TRUE, SLOPE, SUMS
        )  # fmt: skip
    else:
        tl.store(slot_place(partial, slot + part, head, HEADS, COUNT, WIDTH), acc)
        if is_last(arrived + slot * HEADS + head, parts):
            total = sum_slots(partial, slot, parts, head, HEADS, COUNT, WIDTH)
            store_grads(
                out, slope, sums, total, row, row_end, tile - part, head, stride_out, stride_slope,
                stride_sums, COUNT, WIDTH, TRUE, SLOPE, SUMS
            )  # fmt: skip


@triton.jit
def _query_grads_block(
    acc, i, query, grads, k, v, positions, cells, event_time, asked, rank, rows, low, high, low_all,
    high_all, row, start, sequence_end, key, prefix, prefix_blocks, range_blocks, head, num_tokens,
    stride_kt, stride_kh, stride_vt, stride_vh, reach, alpha, D: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, ON_GPU: tl.constexpr,
    CROSSES: tl.constexpr,
):  # fmt: skip
    """acc [M, D] with block i of a row tile's keys."""
    first, is_own = key_block(i, row, start, key, prefix_blocks, range_blocks, BLOCK_N)
    keys = load_own_rows(
        k, first, head, stride_kt, stride_kh, num_tokens, sequence_end, BLOCK_N, D, TMA, CROSSES
    )  # fmt: skip
    values = load_rows(v, first, head, stride_vt, stride_vh, num_tokens, BLOCK_N, V, TMA)
    half = half_scores(query, keys, alpha, PRECISION)

    if BIAS:
        added, _, _ = block_bias(
            positions, cells, event_time, rank, asked, first, start, reach, num_tokens, BLOCK_N,
            ON_GPU
        )  # fmt: skip
        half += added

    d_weight = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
    d_score = mask_block(
        d_weight * twice_slope(half, tanh_of(half, FAST)), rows, low, high, low_all, high_all,
        first, start, prefix, i < prefix_blocks, is_own, BLOCK_N, HAS_PREFIX, CANDIDATES
    )  # fmt: skip
    return tl.dot(d_score.to(keys.dtype), keys, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "num_times", "reach"])
def backward_queries(
    q, k, v, grad,  # descriptors or pointers; grad is that of the output, in the inputs' type
    positions, cells, event_time, query_time,
    dq,  # [T, H, OUT_D]
    slope_q,  # [T, H, OUT_D] with SLOPE: of what made q; dq is then the gradient of its input
    sums,  # float32 [entries, H * OUT_D] with SUMS: of dq's rows
    partial, arrived, tiles, header, visible, oldest, num_tokens, stride_qt, stride_qh, stride_kt,
    stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, num_positions, num_times, reach, window,
    prefix, alpha, scale, stride_dq, stride_slope, stride_sums, HEADS: tl.constexpr,
    D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr, VISIBLE: tl.constexpr, FROM: tl.constexpr,
    BIAS: tl.constexpr, TMA: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    ON_GPU: tl.constexpr, HELD: tl.constexpr, OUT_D: tl.constexpr, OUT_V: tl.constexpr,
    SLOPE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """dq of a row tile."""
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    tiles += tile * ENTRY
    row, row_end, start, history_end, kind, part, parts, slot = row_entry(tiles)
    target, sequence_end = tl.load(tiles + ROW_TARGET), tl.load(tiles + ROW_SEQUENCE_END)
    if tile >= tl.load(header):
        return

    rows, low, high, low_all, high_all, key, prefix_blocks, range_blocks, own_blocks = row_tile(
        row, row_end, start, history_end, kind, target, visible, oldest, window, prefix, BLOCK_M,
        BLOCK_N, HAS_PREFIX, CANDIDATES, VISIBLE, FROM
    )  # fmt: skip
    begin, crossing, end = part_of(
        prefix_blocks + range_blocks + own_blocks,
        inside_blocks(
            row, start, sequence_end, key, prefix_blocks, range_blocks, own_blocks, BLOCK_N,
            HAS_PREFIX, CANDIDATES
        ),
        part, parts,
    )  # fmt: skip
    query = load_rows(q, row, head, stride_qt, stride_qh, num_tokens, BLOCK_M, D, TMA)
    query = held_rows(query, row, row_end, BLOCK_M, HELD)
    grads = load_rows(grad, row, head, stride_gt, stride_gh, num_tokens, BLOCK_M, V, TMA)
    grads = held_rows(grads, row, row_end, BLOCK_M, HELD)

    asked, rank = rows, rows  # of a bias alone
    if BIAS:
        asked, rank = asked_times(query_time, rows, high, start, reach, num_tokens)
    acc = tl.zeros((BLOCK_M, D), tl.float32)

    for i in range(begin, crossing):
        acc = _query_grads_block(
            acc, i, query, grads, k, v, positions, cells, event_time, asked, rank, rows, low, high,
            low_all, high_all, row, start, sequence_end, key, prefix, prefix_blocks, range_blocks,
            head, num_tokens, stride_kt, stride_kh, stride_vt, stride_vh, reach, alpha, D, V,
            BLOCK_N, HAS_PREFIX, CANDIDATES, BIAS, TMA, FAST, PRECISION, ON_GPU, False
        )  # fmt: skip
    for i in tl.range(crossing, end, num_stages=1, disable_licm=True):
        acc = _query_grads_block(
            acc, i, query, grads, k, v, positions, cells, event_time, asked, rank, rows, low, high,
            low_all, high_all, row, start, sequence_end, key, prefix, prefix_blocks, range_blocks,
            head, num_tokens, stride_kt, stride_kh, stride_vt, stride_vh, reach, alpha, D, V,
            BLOCK_N, HAS_PREFIX, CANDIDATES, BIAS, TMA, FAST, PRECISION, ON_GPU, True
        )  # fmt: skip
    _store_grad_sum(
        dq, slope_q, sums, acc * (0.5 * alpha * scale), partial, arrived, slot, part, parts, row,
        row_end, tile, head, stride_dq, stride_slope, stride_sums, HEADS, BLOCK_M, D, OUT_D, SLOPE,
        SUMS
    )  # fmt: skip
