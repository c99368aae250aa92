# ruff: noqa: SIM102  (an `if` of a constexpr stands alone: joined by `and`, both would be
# evaluated on the device)
"""The gradients of keys and values: a key tile visits the rows that see it."""

import triton
import triton.language as tl

from kernels.semi_local_attention.triton_bias import bias_of
from kernels.semi_local_attention.triton_common import (
    FAR,
    half_scores,
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
from kernels.semi_local_attention.triton_tiles import (
    CANDIDATE,
    ENTRY,
    KEY_FIRST_FULL,
    KEY_SEEN_BY,
    KEY_TARGET,
    key_entry,
)


@triton.jit
def _store_both(
    dk, dv, slope_k, slope_v, sums, value_k, value_v, key, key_end, entry, head, stride_dk,
    stride_dv, stride_slope, stride_sums, HEADS: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr,
    V: tl.constexpr, OUT_D: tl.constexpr, OUT_V: tl.constexpr, SLOPE: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Rows key..key_end of dk and dv; the sums of dv's rows lie behind those of dk's."""
    store_grads(
        dk, slope_k, sums, value_k, key, key_end, entry, head, stride_dk, stride_slope, stride_sums,
        COUNT, D, OUT_D, SLOPE, SUMS
    )  # fmt: skip
    store_grads(
        dv, slope_v, sums + HEADS * OUT_D, value_v, key, key_end, entry, head, stride_dv,
        stride_slope, stride_sums, COUNT, V, OUT_V, SLOPE, SUMS
    )  # fmt: skip


@triton.jit
def _key_tile(
    key, key_end, start, history_end, sequence_end, kind, first_full, seen_by, window, prefix,
    BLOCK_M: tl.constexpr, HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr,
    VISIBLE: tl.constexpr,
):  # fmt: skip
    """What a key tile visits: blocks of band rows, of full rows and candidates, and of the late
    candidates that see it, numbered through.
    """
    band_end = tl.minimum(key_end + window, first_full)
    if HAS_PREFIX:
        band_end = tl.where(key < start + prefix, first_full, band_end)
    # candidates follow the full rows at once
    full, full_end = tl.maximum(key, first_full), sequence_end

    late_blocks = 0
    if CANDIDATES:
        if kind == CANDIDATE:
            band_end = key  # its own rows are its only ones
            full_end = key_end
        elif VISIBLE:
            if seen_by > history_end:  # the first candidates see nothing of the tile
                full_end = history_end
                late_blocks = tl.cdiv(tl.maximum(sequence_end - seen_by, 0), BLOCK_M)

    band_blocks = tl.cdiv(tl.maximum(band_end - key, 0), BLOCK_M)
    full_blocks = tl.cdiv(tl.maximum(full_end - full, 0), BLOCK_M)
    return full, band_end, full_end, band_blocks, full_blocks, late_blocks


@triton.jit
def _row_block(
    i, key, full, seen_by, band_end, full_end, sequence_end, band_blocks, full_blocks,
    BLOCK_M: tl.constexpr, VISIBLE: tl.constexpr,
):  # fmt: skip
    """First row and row end of block i, and whether it is one of the band."""
    in_band = i < band_blocks
    row = tl.where(in_band, key + i * BLOCK_M, full + (i - band_blocks) * BLOCK_M)
    row_end = tl.where(in_band, band_end, full_end)

    if VISIBLE:
        is_late = i >= band_blocks + full_blocks
        row = tl.where(is_late, seen_by + (i - band_blocks - full_blocks) * BLOCK_M, row)
        row_end = tl.where(is_late, sequence_end, row_end)
    return row, row_end, in_band


@triton.jit
def _keep_rows(
    index, rows, row_end, start, history_end, sequence_end, first_full, kind, visible, oldest,
    target, window, prefix, HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr,
    VISIBLE: tl.constexpr, FROM: tl.constexpr,
):  # fmt: skip
    """[N, M]: the row sees the key."""
    low = tl.where(rows < first_full, rows - window, start)
    high = rows
    if CANDIDATES:
        if kind == CANDIDATE:
            low = rows
        elif VISIBLE:
            is_target = (rows >= history_end) & (rows < sequence_end)
            seen = tl.load(visible + target + rows - history_end, mask=is_target, other=0)
            high = tl.where(is_target, start + seen - 1, rows)
            if FROM:
                first = tl.load(oldest + target + rows - history_end, mask=is_target, other=0)
                low = tl.where(is_target, start + first, low)
    keep = index[:, None] >= low[None, :]
    if HAS_PREFIX:
        keep = keep | ((index < start + prefix)[:, None] & (kind != CANDIDATE))

    return keep & (index[:, None] <= high[None, :]) & (rows < row_end)[None, :]


@triton.jit
def _rows_bias(
    positions, cells, query_time, happened, place, rows, start, history_end, sequence_end, visible,
    target, reach, num_tokens, VISIBLE: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """Half of the bias of a key tile and a block of rows, [N, M]."""
    rank = tl.minimum(rows, history_end) - start
    if VISIBLE:
        is_target = (rows >= history_end) & (rows < sequence_end)
        seen = tl.load(visible + target + rows - history_end, mask=is_target, other=FAR)
        rank = tl.minimum(rank, tl.maximum(seen, 0))
    asked = tl.load(query_time + rows, mask=rows < num_tokens, other=0)
    rank = tl.minimum(tl.maximum(rank, 0), reach) + reach
    distance, seconds = rank[None, :] - place[:, None], asked[None, :] - happened[:, None]
    added, _ = bias_of(positions, cells, distance, seconds, ON_GPU)
    return added


@triton.jit
def _rows_inside(
    key, full, sequence_end, band_blocks, full_blocks, late_blocks, BLOCK_M: tl.constexpr
):
    """How many of a key tile's blocks of rows come before the first that crosses the sequence's
    end; of each kind only the last can, and the last late one does or ends there.
    """
    band_crosses = key + band_blocks * BLOCK_M > sequence_end
    full_crosses = full + full_blocks * BLOCK_M > sequence_end
    inside = band_blocks + full_blocks + tl.maximum(late_blocks - 1, 0)
    inside = tl.where(full_crosses, band_blocks + full_blocks - 1, inside)
    return tl.where(band_crosses, band_blocks - 1, inside)


@triton.jit
def _key_grads_block(
    acc_k, acc_v, i, keys, values, q, grad, positions, cells, query_time, happened, place, visible,
    oldest, index, key, full, seen_by, band_end, full_end, start, history_end, sequence_end,
    first_full, kind, target, window, prefix, band_blocks, full_blocks, head, num_tokens, stride_qt,
    stride_qh, stride_gt, stride_gh, reach, alpha, D: tl.constexpr, V: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_PREFIX: tl.constexpr,
    CANDIDATES: tl.constexpr, VISIBLE: tl.constexpr, FROM: tl.constexpr, BIAS: tl.constexpr,
    TMA: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr, ON_GPU: tl.constexpr,
    CROSSES: tl.constexpr,
):  # fmt: skip
    """acc_k [N, D] and acc_v [N, V] with block i of the rows that see a key tile."""
    row, row_end, in_band = _row_block(
        i, key, full, seen_by, band_end, full_end, sequence_end, band_blocks, full_blocks,
        BLOCK_M, VISIBLE
    )  # fmt: skip
    rows = row + tl.arange(0, BLOCK_M)
    query = load_own_rows(
        q, row, head, stride_qt, stride_qh, num_tokens, sequence_end, BLOCK_M, D, TMA, CROSSES
    )  # fmt: skip
    half = half_scores(keys, query, alpha, PRECISION)

    if BIAS:
        half += _rows_bias(
            positions, cells, query_time, happened, place, rows, start, history_end,
            sequence_end, visible, target, reach, num_tokens, VISIBLE, ON_GPU
        )  # fmt: skip
    grads = load_own_rows(
        grad, row, head, stride_gt, stride_gh, num_tokens, sequence_end, BLOCK_M, V, TMA, CROSSES
    )  # fmt: skip

    d_weight = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    tanh = tanh_of(half, FAST)
    weight = half + half * tanh
    d_score = d_weight * twice_slope(half, tanh)
    masked = (row + BLOCK_M > row_end) | (row < key + BLOCK_N - 1)
    masked = masked | (in_band & (row + BLOCK_M - 1 - window > key)) | CROSSES

    if VISIBLE:
        masked = masked | (row + BLOCK_M > history_end)
    if masked:
        keep = _keep_rows(
            index, rows, row_end, start, history_end, sequence_end, first_full, kind, visible,
            oldest, target, window, prefix, HAS_PREFIX, CANDIDATES, VISIBLE, FROM
        )  # fmt: skip
        weight = tl.where(keep, weight, 0.0)
        d_score = tl.where(keep, d_score, 0.0)
    acc_v = tl.dot(weight.to(grads.dtype), grads, acc_v, input_precision=PRECISION)
    acc_k = tl.dot(d_score.to(query.dtype), query, acc_k, input_precision=PRECISION)
    return acc_k, acc_v


@triton.jit(do_not_specialize=["num_tokens", "num_positions", "num_times", "reach"])
def backward_keys(
    q, k, v, grad,
    positions, cells, event_time, query_time,
    dk,  # [T, H, OUT_D]
    dv,  # [T, H, OUT_V]
    slope_k, slope_v,  # [T, H, OUT_D], [T, H, OUT_V] with SLOPE, likewise
    sums,  # float32 [entries, H * OUT_D + H * OUT_V] with SUMS: of the rows of dk and dv
    partial_k, partial_v, arrived, tiles, header, visible, oldest, num_tokens, stride_qt, stride_qh,
    stride_kt, stride_kh, stride_vt, stride_vh, stride_gt, stride_gh, num_positions, num_times,
    reach, window, prefix, alpha, scale, stride_dk, stride_dv, stride_slope, stride_sums,
    HEADS: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr,
    VISIBLE: tl.constexpr, FROM: tl.constexpr, BIAS: tl.constexpr, TMA: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr, ON_GPU: tl.constexpr, OUT_D: tl.constexpr,
    OUT_V: tl.constexpr, SLOPE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """dk, dv of a key tile: its band rows, then the full rows, then the candidates, in one loop of
    [N, M] products.

    Every tile but those of the prefix (which are cut into parts) has about the same work.
    """
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    tiles += tile * ENTRY
    key, key_end, start, history_end, sequence_end, kind, part, parts, slot = key_entry(tiles)
    first_full, target = tl.load(tiles + KEY_FIRST_FULL), tl.load(tiles + KEY_TARGET)
    seen_by = tl.load(tiles + KEY_SEEN_BY)
    if tile >= tl.load(header):
        return

    full, band_end, full_end, band_blocks, full_blocks, late_blocks = _key_tile(
        key, key_end, start, history_end, sequence_end, kind, first_full, seen_by, window, prefix,
        BLOCK_M, HAS_PREFIX, CANDIDATES, VISIBLE
    )  # fmt: skip

    begin, crossing, end = part_of(
        band_blocks + full_blocks + late_blocks,
        _rows_inside(key, full, sequence_end, band_blocks, full_blocks, late_blocks, BLOCK_M),
        part, parts,
    )  # fmt: skip
    index = key + tl.arange(0, BLOCK_N)
    keys = load_rows(k, key, head, stride_kt, stride_kh, num_tokens, BLOCK_N, D, TMA)
    values = load_rows(v, key, head, stride_vt, stride_vh, num_tokens, BLOCK_N, V, TMA)

    happened, place = index, index  # of a bias alone
    if BIAS:
        happened = tl.load(event_time + index, mask=index < num_tokens, other=0)
        place = tl.minimum(tl.maximum(index - start, 0), reach)
    acc_k = tl.zeros((BLOCK_N, D), tl.float32)
    acc_v = tl.zeros((BLOCK_N, V), tl.float32)

    for i in range(begin, crossing):
        acc_k, acc_v = _key_grads_block(
            acc_k, acc_v, i, keys, values, q, grad, positions, cells, query_time, happened, place,
            visible, oldest, index, key, full, seen_by, band_end, full_end, start, history_end,
            sequence_end, first_full, kind, target, window, prefix, band_blocks, full_blocks, head,
            num_tokens, stride_qt, stride_qh, stride_gt, stride_gh, reach, alpha, D, V, BLOCK_M,
            BLOCK_N, HAS_PREFIX, CANDIDATES, VISIBLE, FROM, BIAS, TMA, FAST, PRECISION, ON_GPU,
            False
        )  # fmt: skip
    for i in tl.range(crossing, end, num_stages=1, disable_licm=True):
        acc_k, acc_v = _key_grads_block(
            acc_k, acc_v, i, keys, values, q, grad, positions, cells, query_time, happened, place,
            visible, oldest, index, key, full, seen_by, band_end, full_end, start, history_end,
            sequence_end, first_full, kind, target, window, prefix, band_blocks, full_blocks, head,
            num_tokens, stride_qt, stride_qh, stride_gt, stride_gh, reach, alpha, D, V, BLOCK_M,
            BLOCK_N, HAS_PREFIX, CANDIDATES, VISIBLE, FROM, BIAS, TMA, FAST, PRECISION, ON_GPU,
            True
        )  # fmt: skip

    acc_k *= 0.5 * alpha * scale
    acc_v *= scale
    if parts == 1:
        _store_both(
            dk, dv, slope_k, slope_v, sums, acc_k, acc_v, key, key_end, tile - part, head,
            stride_dk, stride_dv, stride_slope, stride_sums, HEADS, BLOCK_N, D, V, OUT_D, OUT_V,
            SLOPE, SUMS
        )  # fmt: skip
    else:
        tl.store(slot_place(partial_k, slot + part, head, HEADS, BLOCK_N, D), acc_k)
        tl.store(slot_place(partial_v, slot + part, head, HEADS, BLOCK_N, V), acc_v)
        if is_last(arrived + slot * HEADS + head, parts):
            total_k = sum_slots(partial_k, slot, parts, head, HEADS, BLOCK_N, D)
            store_grads(
                dk, slope_k, sums, total_k, key, key_end, tile - part, head, stride_dk,
                stride_slope, stride_sums, BLOCK_N, D, OUT_D, SLOPE, SUMS
            )  # fmt: skip
            total_v = sum_slots(partial_v, slot, parts, head, HEADS, BLOCK_N, V)
            store_grads(
                dv, slope_v, sums + HEADS * OUT_D, total_v, key, key_end, tile - part, head,
                stride_dv, stride_slope, stride_sums, BLOCK_N, V, OUT_V, SLOPE, SUMS
            )  # fmt: skip
