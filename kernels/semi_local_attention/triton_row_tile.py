# ruff: noqa: SIM102  (an `if` of a constexpr stands alone: joined by `and`, both would be
# evaluated on the device)
"""A row tile of attention: the blocks of keys that it visits, and the mask of each."""

import triton
import triton.language as tl

from kernels.semi_local_attention.triton_bias import bias_of
from kernels.semi_local_attention.triton_common import FAR
from kernels.semi_local_attention.triton_tiles import BAND, CANDIDATE


@triton.jit
def row_tile(
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
def inside_blocks(
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
def key_block(i, row, start, key, prefix_blocks, range_blocks, BLOCK_N: tl.constexpr):
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
def mask_block(
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
def asked_times(query_time, rows, high, start, reach, num_tokens):
    """The times that rows ask about, and their places in the sequence, from `reach` on.

    A candidate stands right behind what it sees.
    """
    asked = tl.load(query_time + rows, mask=rows < num_tokens, other=0)
    rank = tl.minimum(high + 1, rows) - start
    return asked, tl.minimum(tl.maximum(rank, 0), reach) + reach


@triton.jit
def block_bias(
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
