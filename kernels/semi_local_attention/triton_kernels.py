# ruff: noqa: SIM102  (an `if` of a constexpr stands alone: joined by `and`, both would be evaluated
# on the device)
"""Triton kernels of semi-local attention: forward, against cached keys, and backward: of queries,
of keys and values, and of the tables of a bias.

A program is one entry of a tile list (`triton_tiles.py` draws one) and one head; it knows nothing
of the batch or its longest sequence. A row tile visits its keys block by block, in three ranges
that are numbered through:

    keys of a sequence   [prefix]  . . . . . .  [own range]  . . .  [own rows]
    BAND                  0 1                    2 3 4
    FULL                                         0 1 2 3 4 ..
    CANDIDATE                                    0 1 2 3 4 ..        n

A BAND tile's range begins `window` before its first row, the others' at the start of the sequence;
that of candidates which see no further back than `oldest` (FROM) there, behind the prefix.
Only blocks that touch an edge of the mask are masked.

SiLU attention has no row statistics: sums over any parts of the keys simply add. Tiles with many
keys are cut into parts; each part writes its sum to a slot, and the last to arrive adds the slots
in their order, so results do not depend on which part that is.

A block may reach past the end of its sequence, into the next one. Masks make those weights 0, but 0
times NaN is NaN: one user's broken numbers would reach another. So loops end before the first such
block, and a second loop, of one or two blocks as a rule, zeroes the foreign rows (CROSSES). The
first, which does nearly all the work, reads its operands as they lie.

Suffixes: M rows (queries) of a tile, N keys of a tile, D query-key width, V value width.
"""

import triton
import triton.language as tl

from kernels.semi_local_attention.triton_bias import (
    LATEST,
    add_fixed,
    add_position_grads,
    bias_of,
    time_buckets,
)
from kernels.semi_local_attention.triton_tiles import (
    BAND,
    CANDIDATE,
    ENTRY,
    KEY_FIRST_FULL,
    KEY_SEEN_BY,
    KEY_TARGET,
    ROW_SEQUENCE_END,
    ROW_TARGET,
    key_entry,
    row_entry,
)
from kernels.triton_math import LOG2_E, approximate_tanh

FAR = tl.constexpr(2**30)


@triton.jit
def _rows(
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
def _own_rows(
    source, row, head, stride_t, stride_h, end, sequence_end, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, TMA: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    """As `_rows`, with CROSSES zeros from `sequence_end` on, whatever lies there."""
    tile = _rows(source, row, head, stride_t, stride_h, end, COUNT, WIDTH, TMA)
    if CROSSES:
        inside = row + tl.arange(0, COUNT) < sequence_end
        tile = tl.where(inside[:, None], tile, 0.0).to(tile.dtype)
    return tile


@triton.jit
def _part_of(blocks, inside, part, parts):
    """A part's blocks: the first, the first that may cross the end of the sequence, and the end.

    `inside` blocks lie inside the sequence.
    """
    begin, end = blocks * part // parts, blocks * (part + 1) // parts
    return begin, tl.maximum(tl.minimum(inside, end), begin), end


@triton.jit
def _tanh(x, FAST: tl.constexpr):
    if FAST:
        y = approximate_tanh(x)
    else:
        y = 1 - 2 / (1 + tl.exp2(x * (2 * LOG2_E)))
    return y


@triton.jit
def _half_scores(query, keys, alpha, PRECISION: tl.constexpr):
    """Half of alpha q·k, [M, N]."""
    return tl.dot(query, tl.trans(keys), input_precision=PRECISION) * (0.5 * alpha)


@triton.jit
def _silu(half, FAST: tl.constexpr):
    """SiLU of twice `half`."""
    return half + half * _tanh(half, FAST)


@triton.jit
def _add_values(
    acc, weight, v, first, head, stride_t, stride_h, end, sequence_end, BLOCK_N: tl.constexpr,
    V: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr, CROSSES: tl.constexpr,
):  # fmt: skip
    """acc + weights [M, N] times the values from row `first` on."""
    values = _own_rows(
        v, first, head, stride_t, stride_h, end, sequence_end, BLOCK_N, V, TMA, CROSSES
    )  # fmt: skip
    return tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)


@triton.jit
def _twice_slope(half, tanh):
    """Twice SiLU's derivative at 2 half, in three instructions; the sums of what it makes are
    halved at the end.
    """
    rise = 1 + tanh
    return rise + rise * (half - half * tanh)


@triton.jit
def _store_rows(
    out, value, row, end, head, HEADS: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr
):  # fmt: skip
    """Rows row..end of a contiguous [T, HEADS, WIDTH]."""
    rows = row + tl.arange(0, COUNT)
    place = out + (rows.to(tl.int64)[:, None] * HEADS + head) * WIDTH + tl.arange(0, WIDTH)[None, :]
    tl.store(place, value.to(out.dtype.element_ty), mask=rows[:, None] < end)


@triton.jit
def _store_grads(
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
def _slot(partial, slot, head, HEADS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """Pointers to a [COUNT, BLOCK] partial sum."""
    base = partial + (slot * HEADS + head).to(tl.int64) * (COUNT * BLOCK)
    return base + tl.arange(0, COUNT)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]


@triton.jit
def _sum_slots(
    partial, slot, parts, head, HEADS: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    total = tl.zeros((COUNT, BLOCK), tl.float32)
    for part in range(parts):  # past L1, where another program's sum would not show
        total += tl.load(
            _slot(partial, slot + part, head, HEADS, COUNT, BLOCK), cache_modifier=".cg"
        )
    return total


@triton.jit
def _is_last(arrived, parts):
    """Whether this program is the last of a tile's parts; what it stored before is seen by the one
    that is.
    """
    tl.debug_barrier()
    last = tl.atomic_add(arrived, 1, sem="acq_rel") == parts - 1
    if last:
        tl.store(arrived, 0)  # for the next launch
    return last


@triton.jit
def _row_tile(
    row, row_end, start, history_end, kind, target, visible, oldest, window, prefix,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, HAS_PREFIX: tl.constexpr,
    CANDIDATES: tl.constexpr, VISIBLE: tl.constexpr, FROM: tl.constexpr,
):  # fmt: skip
    """What a row tile visits: blocks of the prefix, of its own range, and of its own rows, numbered
    through.
    """
    rows = row + tl.arange(0, BLOCK_M)
    low = tl.where(kind == BAND, rows - window, start)  # the oldest key of a row's window
    high = rows  # and the newest
    # from here on, every row sees a key
    low_all = tl.where(kind == BAND, row_end - 1 - window, start)
    high_all = row  # up to here
    key = tl.where(kind == BAND, tl.maximum(row - window, start), start)
    key_end = row_end

    own_blocks = 0
    if CANDIDATES:
        if kind == CANDIDATE:
            high = rows * 0 + history_end - 1
            high_all = history_end - 1
            key_end = history_end
            own_blocks = tl.cdiv(row_end - row, BLOCK_N)

            if VISIBLE:
                seen = tl.load(
                    visible + target + tl.arange(0, BLOCK_M), mask=rows < row_end, other=0
                )
                high = tl.minimum(high, start + tl.maximum(seen, 0) - 1)
                high = tl.where(rows < row_end, high, tl.max(tl.where(rows < row_end, high, 0), 0))
                key_end = tl.max(high, 0) + 1
                high_all = tl.min(high, 0)

            if FROM:  # an oldest key of its own, beside the prefix
                first = tl.load(
                    oldest + target + tl.arange(0, BLOCK_M), mask=rows < row_end, other=FAR
                )
                low = start + tl.minimum(tl.maximum(first, 0), FAR)
                low_all = tl.max(tl.where(rows < row_end, low, start), 0)
                key = tl.minimum(tl.min(low, 0), key_end)
    prefix_blocks = 0

    if HAS_PREFIX:
        skips = kind == BAND  # keys between the prefix and its range
        if FROM:
            skips = skips | (kind == CANDIDATE)
        if skips:
            if key <= start + prefix:
                key = start
            else:
                prefix_blocks = tl.cdiv(prefix, BLOCK_N)
    range_blocks = tl.cdiv(tl.maximum(key_end - key, 0), BLOCK_N)

    return rows, low, high, low_all, high_all, key, prefix_blocks, range_blocks, own_blocks


@triton.jit
def _inside_blocks(
    row, start, sequence_end, key, prefix_blocks, range_blocks, own_blocks, BLOCK_N: tl.constexpr,
    HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """How many of a row tile's blocks come before the first that crosses the sequence's end.

    Of each kind only the last can.
    """
    range_crosses = key + range_blocks * BLOCK_N > sequence_end
    inside = prefix_blocks + range_blocks - tl.where(range_crosses, 1, 0)
    if CANDIDATES:
        own_crosses = row + own_blocks * BLOCK_N > sequence_end
        inside += tl.where(range_crosses, 0, own_blocks - tl.where(own_crosses, 1, 0))
    if HAS_PREFIX:  # one that crosses is of a sequence as short as it
        inside = tl.where(start + prefix_blocks * BLOCK_N > sequence_end, 0, inside)
    return inside


@triton.jit
def _key_block(i, row, start, key, prefix_blocks, range_blocks, BLOCK_N: tl.constexpr):
    """First key of block i, and whether it is one of the rows' own."""
    is_own = i >= prefix_blocks + range_blocks
    first = tl.where(i < prefix_blocks, start + i * BLOCK_N, key + (i - prefix_blocks) * BLOCK_N)
    return tl.where(is_own, row + (i - prefix_blocks - range_blocks) * BLOCK_N, first), is_own


@triton.jit
def _keep(
    rows,
    low,
    high,
    keys,
    prefix_end,
    in_prefix,
    is_own,
    HAS_PREFIX: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """[M, N]: high >= key >= low, or a key of the prefix; of its own rows, a row's own key."""
    if CANDIDATES:
        high = tl.where(is_own, rows, high)
        low = tl.where(is_own, rows, low)
    keep = keys[None, :] >= low[:, None]

    if HAS_PREFIX:
        low = tl.where(in_prefix, FAR, low)  # the range has its own blocks
        keep = (keys[None, :] >= low[:, None]) | ((keys < prefix_end)[None, :] & (is_own == 0))

    return keep & (keys[None, :] <= high[:, None])


@triton.jit
def _mask_block(
    x, rows, low, high, low_all, high_all, first, start, prefix, in_prefix, is_own,
    BLOCK_N: tl.constexpr, HAS_PREFIX: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """x [M, N], 0 where the row does not see the key. Inner blocks pass as they are."""
    if (first + BLOCK_N - 1 > high_all) | (first < low_all) | in_prefix | is_own:
        index = first + tl.arange(0, BLOCK_N)
        keep = _keep(
            rows, low, high, index, start + prefix, in_prefix, is_own, HAS_PREFIX, CANDIDATES
        )
        x = tl.where(keep, x, 0.0)
    return x


@triton.jit
def _asked(query_time, rows, high, start, reach, num_tokens):
    """The times that rows ask about, and their places in the sequence, from `reach` on.

    A candidate stands right behind what it sees.
    """
    asked = tl.load(query_time + rows, mask=rows < num_tokens, other=0)
    rank = tl.minimum(high + 1, rows) - start
    return asked, tl.minimum(tl.maximum(rank, 0), reach) + reach


@triton.jit
def _block_bias(
    positions, cells, event_time, rank, asked, first, start, reach, num_tokens,
    BLOCK_N: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    """Half of the bias of a block and its time buckets, [M, N]; the times of its keys [N]."""
    index = first + tl.arange(0, BLOCK_N)
    happened = tl.load(event_time + index, mask=index < num_tokens, other=0)
    place = tl.minimum(tl.maximum(index - start, 0), reach)
    distance, seconds = rank[:, None] - place[None, :], asked[:, None] - happened[None, :]
    added, bucket = bias_of(positions, cells, distance, seconds, ON_GPU)
    return added, bucket, happened


@triton.jit
def _store_sum(
    out, acc, partial, arrived, slot, part, parts, row, row_end, head, HEADS: tl.constexpr,
    BLOCK_M: tl.constexpr, V: tl.constexpr,
):  # fmt: skip
    """Stores a whole tile's sum; of a cut tile a part's, and the last part the sum of all."""
    if parts == 1:
        _store_rows(out, acc, row, row_end, head, HEADS, BLOCK_M, V)
    else:
        tl.store(_slot(partial, slot + part, head, HEADS, BLOCK_M, V), acc)
        if _is_last(arrived + slot * HEADS + head, parts):
            total = _sum_slots(partial, slot, parts, head, HEADS, BLOCK_M, V)
            _store_rows(out, total, row, row_end, head, HEADS, BLOCK_M, V)


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
    first, is_own = _key_block(i, row, start, key, prefix_blocks, range_blocks, BLOCK_N)
    keys = _rows(k, first, head, stride_kt, stride_kh, num_tokens, BLOCK_N, D, TMA)
    half = _half_scores(query, keys, alpha, PRECISION)

    if BIAS:
        added, _, _ = _block_bias(
            positions, cells, event_time, rank, asked, first, start, reach, num_tokens, BLOCK_N,
            ON_GPU
        )  # fmt: skip
        half += added
    weight = _mask_block(
        _silu(half, FAST), rows, low, high, low_all, high_all, first, start, prefix,
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
    ON_GPU: tl.constexpr,
):  # fmt: skip
    # the heads of a tile share DRAM pages
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    tiles += tile * ENTRY
    row, row_end, start, history_end, kind, part, parts, slot = row_entry(tiles)
    target, sequence_end = tl.load(tiles + ROW_TARGET), tl.load(tiles + ROW_SEQUENCE_END)
    if tile >= tl.load(header):  # after the loads above, so that none waits for another
        return

    rows, low, high, low_all, high_all, key, prefix_blocks, range_blocks, own_blocks = _row_tile(
        row, row_end, start, history_end, kind, target, visible, oldest, window, prefix, BLOCK_M,
        BLOCK_N, HAS_PREFIX, CANDIDATES, VISIBLE, FROM
    )  # fmt: skip
    begin, crossing, end = _part_of(
        prefix_blocks + range_blocks + own_blocks,
        _inside_blocks(
            row, start, sequence_end, key, prefix_blocks, range_blocks, own_blocks, BLOCK_N,
            HAS_PREFIX, CANDIDATES
        ),
        part, parts,
    )  # fmt: skip
    query = _rows(q, row, head, stride_qt, stride_qh, num_tokens, BLOCK_M, D, TMA)

    asked, rank = rows, rows  # of a bias alone
    if BIAS:
        asked, rank = _asked(query_time, rows, high, start, reach, num_tokens)
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
    keys = _rows(k, first, head, stride_kt, stride_kh, num_keys, BLOCK_N, D, TMA)
    weight = _silu(_half_scores(query, keys, alpha, PRECISION), FAST)
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
    begin, crossing, end = _part_of(
        blocks, tl.minimum(blocks, (history_end - start) // BLOCK_N), part, parts
    )
    query = _rows(q, row, head, stride_qt, stride_qh, num_rows, BLOCK_M, D, TMA)
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
            keys = _rows(own_k, first, head, stride_ot, stride_oh, num_rows, BLOCK_N, D, TMA)
            half = _half_scores(query, keys, alpha, PRECISION)

            index = first + tl.arange(0, BLOCK_N)
            weight = tl.where(index[None, :] == rows[:, None], _silu(half, FAST), 0.0)

            acc = _add_values(
                acc, weight, own_v, first, head, stride_pt, stride_ph, num_rows, row_end, BLOCK_N,
                V, TMA, PRECISION, True
            )  # fmt: skip
    _store_sum(
        out, acc * scale, partial, arrived, slot, part, parts, row, row_end, head, HEADS, BLOCK_M, V
    )  # fmt: skip


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


@triton.jit
def _store_grad_sum(
    out, slope, sums, acc, partial, arrived, slot, part, parts, row, row_end, tile, head,
    stride_out, stride_slope, stride_sums, HEADS: tl.constexpr, COUNT: tl.constexpr,
    WIDTH: tl.constexpr, TRUE: tl.constexpr, SLOPE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """As `_store_sum`, of a gradient; the sum of its rows lies at the tile's first part."""
    if parts == 1:
        _store_grads(
            out, slope, sums, acc, row, row_end, tile - part, head, stride_out, stride_slope,
            stride_sums, COUNT, WIDTH, TRUE, SLOPE, SUMS
        )  # fmt: skip
    else:
        tl.store(_slot(partial, slot + part, head, HEADS, COUNT, WIDTH), acc)
        if _is_last(arrived + slot * HEADS + head, parts):
            total = _sum_slots(partial, slot, parts, head, HEADS, COUNT, WIDTH)
            _store_grads(
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
    first, is_own = _key_block(i, row, start, key, prefix_blocks, range_blocks, BLOCK_N)
    keys = _own_rows(
        k, first, head, stride_kt, stride_kh, num_tokens, sequence_end, BLOCK_N, D, TMA, CROSSES
    )  # fmt: skip
    values = _rows(v, first, head, stride_vt, stride_vh, num_tokens, BLOCK_N, V, TMA)
    half = _half_scores(query, keys, alpha, PRECISION)

    if BIAS:
        added, _, _ = _block_bias(
            positions, cells, event_time, rank, asked, first, start, reach, num_tokens, BLOCK_N,
            ON_GPU
        )  # fmt: skip
        half += added

    d_weight = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
    d_score = _mask_block(
        d_weight * _twice_slope(half, _tanh(half, FAST)), rows, low, high, low_all, high_all,
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
    ON_GPU: tl.constexpr,
    OUT_D: tl.constexpr, OUT_V: tl.constexpr, SLOPE: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """dq of a row tile."""
    tile, head = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS
    tiles += tile * ENTRY
    row, row_end, start, history_end, kind, part, parts, slot = row_entry(tiles)
    target, sequence_end = tl.load(tiles + ROW_TARGET), tl.load(tiles + ROW_SEQUENCE_END)
    if tile >= tl.load(header):
        return

    rows, low, high, low_all, high_all, key, prefix_blocks, range_blocks, own_blocks = _row_tile(
        row, row_end, start, history_end, kind, target, visible, oldest, window, prefix, BLOCK_M,
        BLOCK_N, HAS_PREFIX, CANDIDATES, VISIBLE, FROM
    )  # fmt: skip
    begin, crossing, end = _part_of(
        prefix_blocks + range_blocks + own_blocks,
        _inside_blocks(
            row, start, sequence_end, key, prefix_blocks, range_blocks, own_blocks, BLOCK_N,
            HAS_PREFIX, CANDIDATES
        ),
        part, parts,
    )  # fmt: skip
    query = _rows(q, row, head, stride_qt, stride_qh, num_tokens, BLOCK_M, D, TMA)
    grads = _rows(grad, row, head, stride_gt, stride_gh, num_tokens, BLOCK_M, V, TMA)

    asked, rank = rows, rows  # of a bias alone
    if BIAS:
        asked, rank = _asked(query_time, rows, high, start, reach, num_tokens)
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

    rows, low, high, low_all, high_all, key, prefix_blocks, range_blocks, own_blocks = _row_tile(
        row, row_end, start, history_end, kind, target, visible, oldest, window, prefix, BLOCK_M,
        BLOCK_N, HAS_PREFIX, CANDIDATES, VISIBLE, FROM
    )  # fmt: skip
    blocks = prefix_blocks + range_blocks + own_blocks
    begin, _, end = _part_of(blocks, blocks, part, parts)

    asked, rank = _asked(query_time, rows, high, start, reach, num_tokens)
    unit = tl.load(per_unit)
    first_rank, last_rank = tl.min(rank, 0), tl.max(rank, 0)
    asked_first = tl.min(tl.where(rows < row_end, asked, LATEST), 0)
    asked_last = tl.max(tl.where(rows < row_end, asked, -LATEST), 0)
    range_end = tl.max(tl.where(rows < row_end, high, 0), 0) + 1
    far = tl.zeros((BLOCK_M,), tl.float32)

    for i in range(begin, end):
        first, is_own = _key_block(i, row, start, key, prefix_blocks, range_blocks, BLOCK_N)
        added, bucket, happened = _block_bias(
            positions, cells, event_time, rank, asked, first, start, reach, num_tokens, BLOCK_N,
            ON_GPU
        )  # fmt: skip

        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for head in range(HEADS):
            query = _rows(q, row, head, stride_qt, stride_qh, num_tokens, BLOCK_M, D, TMA)
            keys = _rows(k, first, head, stride_kt, stride_kh, num_tokens, BLOCK_N, D, TMA)
            grads = _rows(grad, row, head, stride_gt, stride_gh, num_tokens, BLOCK_M, V, TMA)
            values = _rows(v, first, head, stride_vt, stride_vh, num_tokens, BLOCK_N, V, TMA)

            # exact: tanh.approx has an error with a sign, which a million pairs of an entry add up
            half = _half_scores(query, keys, alpha, PRECISION) + added
            d_weight = tl.dot(grads, tl.trans(values), input_precision=PRECISION)
            total += d_weight * _twice_slope(half, _tanh(half, False))

        total = _mask_block(
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


@triton.jit
def _store_both(
    dk, dv, slope_k, slope_v, sums, value_k, value_v, key, key_end, entry, head, stride_dk,
    stride_dv, stride_slope, stride_sums, HEADS: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr,
    V: tl.constexpr, OUT_D: tl.constexpr, OUT_V: tl.constexpr, SLOPE: tl.constexpr,
    SUMS: tl.constexpr,
):  # fmt: skip
    """Rows key..key_end of dk and dv; the sums of dv's rows lie behind those of dk's."""
    _store_grads(
        dk, slope_k, sums, value_k, key, key_end, entry, head, stride_dk, stride_slope, stride_sums,
        COUNT, D, OUT_D, SLOPE, SUMS
    )  # fmt: skip
    _store_grads(
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
    query = _own_rows(
        q, row, head, stride_qt, stride_qh, num_tokens, sequence_end, BLOCK_M, D, TMA, CROSSES
    )  # fmt: skip
    half = _half_scores(keys, query, alpha, PRECISION)

    if BIAS:
        half += _rows_bias(
            positions, cells, query_time, happened, place, rows, start, history_end,
            sequence_end, visible, target, reach, num_tokens, VISIBLE, ON_GPU
        )  # fmt: skip
    grads = _own_rows(
        grad, row, head, stride_gt, stride_gh, num_tokens, sequence_end, BLOCK_M, V, TMA, CROSSES
    )  # fmt: skip

    d_weight = tl.dot(values, tl.trans(grads), input_precision=PRECISION)
    tanh = _tanh(half, FAST)
    weight = half + half * tanh
    d_score = d_weight * _twice_slope(half, tanh)
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

    begin, crossing, end = _part_of(
        band_blocks + full_blocks + late_blocks,
        _rows_inside(key, full, sequence_end, band_blocks, full_blocks, late_blocks, BLOCK_M),
        part, parts,
    )  # fmt: skip
    index = key + tl.arange(0, BLOCK_N)
    keys = _rows(k, key, head, stride_kt, stride_kh, num_tokens, BLOCK_N, D, TMA)
    values = _rows(v, key, head, stride_vt, stride_vh, num_tokens, BLOCK_N, V, TMA)

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
        tl.store(_slot(partial_k, slot + part, head, HEADS, BLOCK_N, D), acc_k)
        tl.store(_slot(partial_v, slot + part, head, HEADS, BLOCK_N, V), acc_v)
        if _is_last(arrived + slot * HEADS + head, parts):
            total_k = _sum_slots(partial_k, slot, parts, head, HEADS, BLOCK_N, D)
            _store_grads(
                dk, slope_k, sums, total_k, key, key_end, tile - part, head, stride_dk,
                stride_slope, stride_sums, BLOCK_N, D, OUT_D, SLOPE, SUMS
            )  # fmt: skip
            total_v = _sum_slots(partial_v, slot, parts, head, HEADS, BLOCK_N, V)
            _store_grads(
                dv, slope_v, sums + HEADS * OUT_D, total_v, key, key_end, tile - part, head,
                stride_dv, stride_slope, stride_sums, BLOCK_N, V, OUT_V, SLOPE, SUMS
            )  # fmt: skip
