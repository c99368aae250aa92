"""The forward kernels of semi-local attention: over a batch, and of new rows over cached keys."""

import triton
import triton.language as tl

from kernels.semi_local_attention.triton_common import (
    FAR,
    half_scores,
    held_rows,
    is_last,
    load_own_rows,
    load_rows,
    part_of,
    silu_of,
    slot_place,
    store_rows,
    sum_slots,
)
from kernels.semi_local_attention.triton_row_tile import (
    asked_times,
    block_bias,
    inside_blocks,
    key_block,
    mask_block,
    row_tile,
)
from kernels.semi_local_attention.triton_tiles import (
    ENTRY,
    ROW_SEQUENCE_END,
    ROW_TARGET,
    row_entry,
)


@triton.jit
def _add_values(
    acc, weight, v, first, head, stride_t, stride_h, end, sequence_end, BLOCK_N: tl.constexpr,
    V: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    """acc + weights [M, N] times the values from row `first` on."""
    values = load_own_rows(
        v, first, head, stride_t, stride_h, end, sequence_end, BLOCK_N, V, TMA, CROSSES
    )  # fmt: skip
    return tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)


@triton.jit
def _store_sum(
    out, acc, partial, arrived, slot, part, parts, row, row_end, head, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Stores a whole tile's sum; of a cut tile a part's, and the last part the sum of all."""
    if parts == 1:
        store_rows(out, acc, row, row_end, head, HEADS, BLOCK_M, V)
    else:
        tl.store(slot_place(partial, slot + part, head, HEADS, BLOCK_M, V), acc)
        if is_last(arrived + slot * HEADS + head, parts):
            total = sum_slots(partial, slot, parts, head, HEADS, BLOCK_M, V)
            store_rows(out, total, row, row_end, head, HEADS, BLOCK_M, V)


@triton.jit
def _attend_block(
    acc, i, query, k, v, positions, cells, event_time, asked, rank, rows, low, high, low_all,
    high_all, row, start, sequence_end, key, prefix, prefix_blocks, range_blocks, head, num_tokens,
    stride_kt, stride_kh, stride_vt, stride_vh, reach, alpha, D: tl.constexpr, V: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, ON_GPU: tl.constexpr,
    CROSSES: tl.constexpr,
):  # fmt: skip
    """acc [M, V] with block i of a row tile's keys."""
    first, is_own = key_block(i, row, start, key, prefix_blocks, range_blocks, BLOCK_N)
    keys = load_rows(k, first, head, stride_kt, stride_kh, num_tokens, BLOCK_N, D, TMA)
    half = half_scores(query, keys, alpha, PRECISION)

    if BIAS:
        added, _, _ = block_bias(
            positions, cells, event_time, rank, asked, first, start, reach, num_tokens, BLOCK_N,
            ON_GPU
        )  # fmt: skip
        half += added
    weight = mask_block(
        silu_of(half, FAST), rows, low, high, low_all, high_all, first, start, prefix,
        i < prefix_blocks, is_own, BLOCK_N, HAS_PREFIX, CANDIDATES
    )  # fmt: skip

    return _add_values(
        acc, weight, v, first, head, stride_vt, stride_vh, num_tokens, sequence_end, BLOCK_N, V,
        TMA, PRECISION, CROSSES
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "num_times", "reach"])
def forward(
    q, k, v,  # descriptors over [T, H * width], or pointers
    positions, cells, event_time, query_time,  # of the bias: `spread_tables`, and int32 s [T], [T]
    out,  # [T, H, V]
    partial,  # float32 [slots, H, BLOCK_M, V]
    arrived,  # int32 [slots, H], zeros
    tiles, header, visible, oldest, num_tokens, stride_qt, stride_qh, stride_kt, stride_kh,
    stride_vt, stride_vh, num_positions, num_times, reach, window, prefix, alpha, scale,
    HEADS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr, VISIBLE: tl.constexpr, FROM: tl.constexpr,
    BIAS: tl.constexpr, TMA: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
    ON_GPU: tl.constexpr, HELD: tl.constexpr,
):  # fmt: skip
    # the heads of a tile share DRAM pages
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    tiles += tile * ENTRY
    row, row_end, start, history_end, kind, part, parts, slot = row_entry(tiles)
    target, sequence_end = tl.load(tiles + ROW_TARGET), tl.load(tiles + ROW_SEQUENCE_END)
    if tile >= tl.load(header):  # after the loads above, so that none waits for another
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

    asked, rank = rows, rows  # of a bias alone
    if BIAS:
        asked, rank = asked_times(query_time, rows, high, start, reach, num_tokens)
    acc = tl.zeros((BLOCK_M, V), tl.float32)

    for i in range(begin, crossing):
        acc = _attend_block(
            acc, i, query, k, v, positions, cells, event_time, asked, rank, rows, low, high,
            low_all, high_all, row, start, sequence_end, key, prefix, prefix_blocks, range_blocks,
            head, num_tokens, stride_kt, stride_kh, stride_vt, stride_vh, reach, alpha, D, V,
            BLOCK_N, HAS_PREFIX, CANDIDATES, BIAS, TMA, FAST, PRECISION, ON_GPU, False
        )  # fmt: skip
    for i in tl.range(crossing, end, num_stages=1, disable_licm=True):
        acc = _attend_block(
            acc, i, query, k, v, positions, cells, event_time, asked, rank, rows, low, high,
            low_all, high_all, row, start, sequence_end, key, prefix, prefix_blocks, range_blocks,
            head, num_tokens, stride_kt, stride_kh, stride_vt, stride_vh, reach, alpha, D, V,
            BLOCK_N, HAS_PREFIX, CANDIDATES, BIAS, TMA, FAST, PRECISION, ON_GPU, True
        )  # fmt: skip
    _store_sum(
        out, acc * scale, partial, arrived, slot, part, parts, row, row_end, head, HEADS, BLOCK_M, V
    )  # fmt: skip


@triton.jit
def _attend_cached_block(
    acc, first, query, k, v, high, high_all, history_end, head, num_keys, stride_kt, stride_kh,
    stride_vt, stride_vh, alpha, D: tl.constexpr, V: tl.constexpr, BLOCK_N: tl.constexpr,
    TMA: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    """acc [M, V] with the cached keys from `first` on."""
    keys = load_rows(k, first, head, stride_kt, stride_kh, num_keys, BLOCK_N, D, TMA)
    weight = silu_of(half_scores(query, keys, alpha, PRECISION), FAST)
    if first + BLOCK_N - 1 > high_all:
        index = first + tl.arange(0, BLOCK_N)
        weight = tl.where(index[None, :] <= high[:, None], weight, 0.0)

    return _add_values(
        acc, weight, v, first, head, stride_vt, stride_vh, num_keys, history_end, BLOCK_N, V, TMA,
        PRECISION, CROSSES
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows", "num_keys"])
def forward_cached(
    q,  # [C, H, D] the new rows
    k, v,  # [T, H, ·] the cache
    own_k, own_v,  # [C, H, ·] of the new rows
    out,  # [C, H, V]
    partial, arrived, tiles, header, visible, num_rows, num_keys, stride_qt, stride_qh, stride_kt,
    stride_kh, stride_vt, stride_vh, stride_ot, stride_oh, stride_pt, stride_ph, alpha, scale,
    HEADS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, VISIBLE: tl.constexpr, TMA: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """New rows over a user's cached keys, and each over its own key.

    A list's CANDIDATE tiles, with `row` counted in the new rows and `start`, `history_end` in the
    cache.
    """
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    tiles += tile * ENTRY
    row, row_end, start, history_end, _kind, part, parts, slot = row_entry(tiles)
    if tile >= tl.load(header):
        return
    rows = row + tl.arange(0, BLOCK_M)
    high = rows * 0 + history_end - 1  # the newest key that a row sees

    if VISIBLE:
        seen = tl.load(visible + rows, mask=rows < row_end, other=0)
        high = tl.minimum(high, start + tl.maximum(seen, 0) - 1)
    high_all = tl.min(tl.where(rows < row_end, high, FAR), 0)
    blocks = tl.cdiv(tl.max(tl.where(rows < row_end, high, 0), 0) + 1 - start, BLOCK_N)
    begin, crossing, end = part_of(
        blocks, tl.minimum(blocks, (history_end - start) // BLOCK_N), part, parts
    )
    query = load_rows(q, row, head, stride_qt, stride_qh, num_rows, BLOCK_M, D, TMA)
    acc = tl.zeros((BLOCK_M, V), tl.float32)

    for i in range(begin, crossing):
        acc = _attend_cached_block(
            acc, start + i * BLOCK_N, query, k, v, high, high_all, history_end, head, num_keys,
            stride_kt, stride_kh, stride_vt, stride_vh, alpha, D, V, BLOCK_N, TMA, FAST, PRECISION,
            False
        )  # fmt: skip
    for i in tl.range(crossing, end, num_stages=1, disable_licm=True):
        acc = _attend_cached_block(
            acc, start + i * BLOCK_N, query, k, v, high, high_all, history_end, head, num_keys,
            stride_kt, stride_kh, stride_vt, stride_vh, alpha, D, V, BLOCK_N, TMA, FAST, PRECISION,
            True
        )  # fmt: skip

    if part == parts - 1:  # which also takes the new rows' own keys
        for first in tl.range(row, row_end, BLOCK_N, num_stages=1, disable_licm=True):
            keys = load_rows(own_k, first, head, stride_ot, stride_oh, num_rows, BLOCK_N, D, TMA)
            half = half_scores(query, keys, alpha, PRECISION)

            index = first + tl.arange(0, BLOCK_N)
            weight = tl.where(index[None, :] == rows[:, None], silu_of(half, FAST), 0.0)

            acc = _add_values(
                acc, weight, own_v, first, head, stride_pt, stride_ph, num_rows, row_end, BLOCK_N,
                V, TMA, PRECISION, True
            )  # fmt: skip
    _store_sum(
        out, acc * scale, partial, arrived, slot, part, parts, row, row_end, head, HEADS, BLOCK_M, V
    )  # fmt: skip
