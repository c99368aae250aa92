"""Triton kernels that build the tile lists of a batch, on the device: the host reads nothing back.

A list has an entry for every program and head of an attention kernel. A row tile never mixes kinds
of rows, because tiles are anchored at the borders between the kinds:

    rows of a sequence   0  1  2  3  4  5  6  7  8  9 | 10 11 12 13 | 14 15 16
    kind                 ------------ BAND ---------- | --- FULL -- | CANDIDATE
    tiles of 4 rows      [0  1][2  3  4  5][6 7 8  9] | [10 .. 13]  | [14 15 16]

    BAND       history rows that see `window` back, and the prefix
    FULL       history rows that see everything before them
    CANDIDATE  rows that see the history (or its first `visible` positions) and themselves

FULL and CANDIDATE tiles have many keys. Long ones are cut into parts, each an entry of its own:

    entry   rows        kind       part of parts   slot
    0       14 .. 17    CANDIDATE  0 of 2          0 + 0
    1       14 .. 17    CANDIDATE  1 of 2          0 + 1
    2       10 .. 14    FULL       0 of 2          2 + 0
    3       10 .. 14    FULL       1 of 2          2 + 1
    4        6 .. 10    BAND       0 of 1          -
    5        2 ..  6    BAND       0 of 1          -
    6        0 ..  2    BAND       0 of 1          -

Every part writes its sum to its slot; the part that arrives last adds the slots. Sequences follow
each other, so that K and V of one of them stay in L2; inside a sequence the longest tiles go first.

An entry is a row of `ENTRY` int32, whose places are named below.
"""

import triton
import triton.language as tl

ENTRY = tl.constexpr(16)  # int32 of an entry: 64 bytes, two sectors
BAND, FULL, CANDIDATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)

# Places in an entry of row tiles.
ROW = tl.constexpr(0)  # first row
ROW_END = tl.constexpr(1)
ROW_START = tl.constexpr(2)  # first row of the sequence
ROW_HISTORY_END = tl.constexpr(3)
ROW_KIND = tl.constexpr(4)
ROW_PART = tl.constexpr(5)
ROW_PARTS = tl.constexpr(6)
ROW_SLOT = tl.constexpr(7)  # of part 0
ROW_TARGET = tl.constexpr(8)  # the first row's number among the candidates of the batch
ROW_SEQUENCE_END = tl.constexpr(9)

# Places in an entry of key tiles.
KEY = tl.constexpr(0)  # first key
KEY_END = tl.constexpr(1)
KEY_START = tl.constexpr(2)  # first row of the sequence
KEY_HISTORY_END = tl.constexpr(3)
KEY_SEQUENCE_END = tl.constexpr(4)
KEY_KIND = tl.constexpr(5)  # CANDIDATE, or FULL for any key of the history
KEY_PART = tl.constexpr(6)
KEY_PARTS = tl.constexpr(7)
KEY_SLOT = tl.constexpr(8)  # of part 0
KEY_FIRST_FULL = tl.constexpr(9)  # first FULL row of the sequence
KEY_TARGET = tl.constexpr(10)  # number of the sequence's first candidate in the batch
KEY_SEEN_BY = tl.constexpr(11)  # row of the first candidate that sees the tile


@triton.jit
def row_entry(tiles):
    """An entry of row tiles: row, row end, start, history end, kind, part, parts, slot."""
    row, row_end = tl.load(tiles + ROW), tl.load(tiles + ROW_END)
    start, history_end = tl.load(tiles + ROW_START), tl.load(tiles + ROW_HISTORY_END)
    kind, part = tl.load(tiles + ROW_KIND), tl.load(tiles + ROW_PART)
    parts, slot = tl.load(tiles + ROW_PARTS), tl.load(tiles + ROW_SLOT)
    return row, row_end, start, history_end, kind, part, parts, slot


@triton.jit
def key_entry(tiles):
    """An entry of key tiles: key, key end, start, history end, sequence end, kind, part, parts,
    slot.
    """
    key, key_end = tl.load(tiles + KEY), tl.load(tiles + KEY_END)
    start, history_end = tl.load(tiles + KEY_START), tl.load(tiles + KEY_HISTORY_END)
    sequence_end, kind = tl.load(tiles + KEY_SEQUENCE_END), tl.load(tiles + KEY_KIND)
    part, parts, slot = (
        tl.load(tiles + KEY_PART),
        tl.load(tiles + KEY_PARTS),
        tl.load(tiles + KEY_SLOT),
    )
    return key, key_end, start, history_end, sequence_end, kind, part, parts, slot


@triton.jit
def _sequence(
    offsets, num_targets, extra, seq, valid, full_rows, BANDED: tl.constexpr,
    EXTRA: tl.constexpr, CANDIDATES: tl.constexpr, CACHED: tl.constexpr
):  # fmt: skip
    """Start, history length, full rows and candidates of sequences."""
    start = tl.load(offsets + seq, mask=valid, other=0).to(tl.int32)
    length = tl.load(offsets + seq + 1, mask=valid, other=0).to(tl.int32) - start

    if CACHED:  # the history is elsewhere, `num_targets` are the offsets of the new rows
        first_target = tl.load(num_targets + seq, mask=valid, other=0)
        targets = (tl.load(num_targets + seq + 1, mask=valid, other=0) - first_target).to(tl.int32)
        length += targets
    elif CANDIDATES:
        targets = tl.load(num_targets + seq, mask=valid, other=0).to(tl.int32)
    else:
        targets = length * 0
    history = length - targets

    if BANDED:
        if EXTRA:
            full_rows += tl.load(extra + seq, mask=valid, other=0).to(tl.int32)
        full = tl.minimum(history, full_rows)
    else:
        full = history
    return start, history, full, targets


@triton.jit
def _row_counts(
    history, full, targets, per_part, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    CACHED: tl.constexpr
):  # fmt: skip
    """Row tiles of each kind, and into how many parts a FULL or CANDIDATE tile is cut."""
    parts = tl.maximum(tl.cdiv(tl.cdiv(history, BLOCK_N), per_part), 1)
    if CACHED:  # no rows of the history
        full = full * 0
        history = full
    return (
        tl.cdiv(history - full, BLOCK_M),
        tl.cdiv(full, BLOCK_M),
        tl.cdiv(targets, BLOCK_M),
        parts,
    )


@triton.jit
def _key_counts(
    history, full, targets, prefix, per_part, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """Key tiles: those of the prefix that band rows see, other history, candidates; and the parts
    of the first.
    """
    all_history = tl.cdiv(history, BLOCK_N)
    of_prefix = tl.where(history > full, tl.minimum(tl.cdiv(prefix, BLOCK_N), all_history), 0)
    parts = tl.maximum(tl.cdiv(tl.cdiv(history + targets, BLOCK_M), per_part), 1)
    return of_prefix, all_history - of_prefix, tl.cdiv(targets, BLOCK_N), parts


@triton.jit
def _entries(
    history, full, targets, prefix, per_part, KEYS: tl.constexpr, CACHED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Entries and slots of sequences."""
    if KEYS:
        cut, one, other, parts = _key_counts(
            history, full, targets, prefix, per_part, BLOCK_M, BLOCK_N
        )
        once = one + other
    else:
        once, full_tiles, target_tiles, parts = _row_counts(
            history, full, targets, per_part, BLOCK_M, BLOCK_N, CACHED
        )
        cut = full_tiles + target_tiles
    return once + cut * parts, tl.where(parts > 1, cut * parts, 0)


@triton.jit(do_not_specialize=["num_sequences"])
def count_tiles(
    offsets,  # int64 [B + 1]
    num_targets,  # int [B]
    extra,  # int [B] with EXTRA: full rows of each sequence beside `full_rows`
    header,  # int32 [2] out: entries, blocks of a part
    first,  # int32 [3, B] out: first entry, first slot, first candidate of each sequence
    num_sequences,
    full_rows,
    prefix,
    KEYS: tl.constexpr,  # a list of key tiles (dk, dv) instead of row tiles
    BANDED: tl.constexpr,
    EXTRA: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CACHED: tl.constexpr,
    HEADS: tl.constexpr,
    SPLIT_PROGRAMS: tl.constexpr,
    SHORTEST_PART: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """One program: how many entries each sequence needs, and where they go.

    Sequences with cut tiles, the long ones, go first: what is left at the end should be short.
    """
    work = tl.zeros((BLOCK_B,), tl.int64)  # blocks in the tiles that may be cut
    for begin in range(0, num_sequences, BLOCK_B):
        seq = begin + tl.arange(0, BLOCK_B)
        _, history, full, targets = _sequence(
            offsets, num_targets, extra, seq, seq < num_sequences, full_rows, BANDED, EXTRA,
            CANDIDATES, CACHED
        )  # fmt: skip
        if KEYS:
            of_prefix, _, _, blocks = _key_counts(
                history, full, targets, prefix, 1, BLOCK_M, BLOCK_N
            )
            work += of_prefix.to(tl.int64) * blocks
        else:
            _, full_tiles, target_tiles, blocks = _row_counts(
                history, full, targets, 1, BLOCK_M, BLOCK_N, CACHED
            )
            work += (full_tiles + target_tiles).to(tl.int64) * blocks

    per_part = tl.maximum(tl.cdiv(tl.sum(work, 0) * HEADS, SPLIT_PROGRAMS), SHORTEST_PART).to(
        tl.int32
    )

    long_before = tl.sum(tl.zeros((BLOCK_B,), tl.int32), 0)
    slots_before = long_before
    targets_before = long_before
    short_before = long_before
    for begin in range(0, num_sequences, BLOCK_B):
        seq = begin + tl.arange(0, BLOCK_B)
        _, history, full, targets = _sequence(
            offsets, num_targets, extra, seq, seq < num_sequences, full_rows, BANDED, EXTRA,
            CANDIDATES, CACHED
        )  # fmt: skip
        entries, slots = _entries(
            history, full, targets, prefix, per_part, KEYS, CACHED, BLOCK_M, BLOCK_N
        )
        short_before += tl.sum(tl.where(slots > 0, entries, 0), 0)
    for begin in range(0, num_sequences, BLOCK_B):
        seq = begin + tl.arange(0, BLOCK_B)
        valid = seq < num_sequences
        _, history, full, targets = _sequence(
            offsets, num_targets, extra, seq, valid, full_rows, BANDED, EXTRA, CANDIDATES, CACHED
        )
        entries, slots = _entries(
            history, full, targets, prefix, per_part, KEYS, CACHED, BLOCK_M, BLOCK_N
        )

        long, short = tl.where(slots > 0, entries, 0), tl.where(slots > 0, 0, entries)
        first_long = long_before + tl.cumsum(long, 0) - long
        first_short = short_before + tl.cumsum(short, 0) - short

        tl.store(first + seq, tl.where(slots > 0, first_long, first_short), mask=valid)
        tl.store(
            first + num_sequences + seq, slots_before + tl.cumsum(slots, 0) - slots, mask=valid
        )
        tl.store(
            first + 2 * num_sequences + seq,
            targets_before + tl.cumsum(targets, 0) - targets,
            mask=valid,
        )

        long_before += tl.sum(long, 0)
        short_before += tl.sum(short, 0)
        slots_before += tl.sum(slots, 0)
        targets_before += tl.sum(targets, 0)
    tl.store(header, short_before)
    tl.store(header + 1, per_part)


@triton.jit(do_not_specialize=["num_sequences"])
def write_row_tiles(
    offsets,
    num_targets,
    extra,
    header,
    first,
    tiles,  # int32 [capacity, ENTRY] out
    num_sequences,
    full_rows,
    BANDED: tl.constexpr,
    EXTRA: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program a sequence."""
    seq = tl.program_id(0)
    start, history, full, targets = _sequence(
        offsets, num_targets, extra, seq, True, full_rows, BANDED, EXTRA, CANDIDATES, CACHED
    )

    if CACHED:
        first_row = tl.load(num_targets + seq).to(tl.int32)
    else:
        first_row = start + history

    band_tiles, full_tiles, target_tiles, parts = _row_counts(
        history, full, targets, tl.load(header + 1), BLOCK_M, BLOCK_N, CACHED
    )
    first_entry, first_slot = tl.load(first + seq), tl.load(first + num_sequences + seq)
    first_target = tl.load(first + 2 * num_sequences + seq)

    cut = (target_tiles + full_tiles) * parts
    for begin in range(0, cut + band_tiles, BLOCK_E):
        entry = begin + tl.arange(0, BLOCK_E)
        tile = entry // parts
        is_cut = entry < cut
        is_target = is_cut & (tile < target_tiles)
        full_row = history - full + (target_tiles + full_tiles - 1 - tile) * BLOCK_M
        band_end = history - full - (entry - cut) * BLOCK_M

        row = tl.where(is_cut, full_row, tl.maximum(band_end - BLOCK_M, 0))
        row_end = tl.where(is_cut, tl.minimum(full_row + BLOCK_M, history), band_end)
        row = tl.where(is_target, first_row + tile * BLOCK_M, start + row)
        target_end = tl.minimum(row + BLOCK_M, first_row + targets)
        row_end = tl.where(is_target, target_end, start + row_end)
        place = tiles + (first_entry + entry) * ENTRY
        mask = entry < cut + band_tiles
        kind = tl.where(is_target, CANDIDATE, tl.where(is_cut, FULL, BAND))

        same = tl.zeros_like(row)  # spreads what all entries share
        tl.store(place + ROW, row, mask=mask)
        tl.store(place + ROW_END, row_end, mask=mask)
        tl.store(place + ROW_START, start + same, mask=mask)
        tl.store(place + ROW_HISTORY_END, start + history + same, mask=mask)
        tl.store(place + ROW_KIND, kind, mask=mask)
        tl.store(place + ROW_PART, tl.where(is_cut, entry % parts, 0), mask=mask)
        tl.store(place + ROW_PARTS, tl.where(is_cut, parts, 1), mask=mask)
        tl.store(place + ROW_SLOT, first_slot + tile * parts, mask=mask)
        tl.store(place + ROW_TARGET, first_target + row - first_row, mask=mask)
        tl.store(place + ROW_SEQUENCE_END, start + history + targets + same, mask=mask)


@triton.jit
def keep_asked_tiles(
    tiles,  # int32 [capacity, ENTRY] of row tiles
    header,
    before,  # int32 [T + 1]: how many of the rows before each ask
    kept,  # int32 [capacity, ENTRY] out: the tiles in which a row asks
    kept_header,  # int32 [2] out
    BLOCK_E: tl.constexpr,
):
    """One program. All parts of a tile stay, or none does, so that slots are those of the list."""
    num_kept = tl.sum(tl.zeros((BLOCK_E,), tl.int32), 0)
    num_entries = tl.load(header)
    for begin in range(0, num_entries, BLOCK_E):
        entry = begin + tl.arange(0, BLOCK_E)
        valid = entry < num_entries
        place = tiles + entry * ENTRY
        row = tl.load(place + ROW, mask=valid, other=0)
        row_end = tl.load(place + ROW_END, mask=valid, other=0)
        asked_before = tl.load(before + row, mask=valid, other=0)
        asks = valid & (tl.load(before + row_end, mask=valid, other=0) > asked_before)

        count = asks.to(tl.int32)
        new_place = kept + (num_kept + tl.cumsum(count, 0) - count) * ENTRY
        for i in tl.static_range(ENTRY):
            tl.store(new_place + i, tl.load(place + i, mask=asks, other=0), mask=asks)
        num_kept += tl.sum(count, 0)

    tl.store(kept_header, num_kept)
    tl.store(kept_header + 1, tl.load(header + 1))


@triton.jit
def _first_seeing(visible, key, targets, BLOCK_M: tl.constexpr):
    """The first of a sequence's candidates that sees more than `key` positions, or their number."""
    found = tl.zeros_like(key) + targets
    for i in range(0, targets, BLOCK_M):
        target = i + tl.arange(0, BLOCK_M)
        seen = tl.load(visible + target, mask=target < targets, other=0)
        sees = tl.where(seen[None, :] > key[:, None], target[None, :], targets)
        found = tl.minimum(found, tl.min(sees, 1))
    return found


@triton.jit(do_not_specialize=["num_sequences"])
def write_key_tiles(
    offsets,
    num_targets,
    extra,
    visible,  # int32 [C]
    header,
    first,
    tiles,  # int32 [capacity, ENTRY] out
    num_sequences,
    full_rows,
    prefix,
    BANDED: tl.constexpr,
    EXTRA: tl.constexpr,
    CANDIDATES: tl.constexpr,
    VISIBLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program a sequence."""
    seq = tl.program_id(0)
    start, history, full, targets = _sequence(
        offsets, num_targets, extra, seq, True, full_rows, BANDED, EXTRA, CANDIDATES, False
    )

    of_prefix, others, target_tiles, parts = _key_counts(
        history, full, targets, prefix, tl.load(header + 1), BLOCK_M, BLOCK_N
    )
    first_entry, first_slot = tl.load(first + seq), tl.load(first + num_sequences + seq)
    first_target = tl.load(first + 2 * num_sequences + seq)
    cut = of_prefix * parts
    total = cut + others + target_tiles
    for begin in range(0, total, BLOCK_E):
        entry = begin + tl.arange(0, BLOCK_E)
        is_cut = entry < cut
        is_target = entry >= cut + others

        tile = tl.where(is_cut, entry // parts, entry - cut + of_prefix)
        key = tl.where(is_target, history + (entry - cut - others) * BLOCK_N, tile * BLOCK_N)
        key_end = tl.minimum(key + BLOCK_N, tl.where(is_target, history + targets, history))

        seen_by = tl.zeros_like(key)
        if VISIBLE:
            seen_by = _first_seeing(visible + first_target, key, targets, BLOCK_M)
        place = tiles + (first_entry + entry) * ENTRY
        mask = entry < total

        same = tl.zeros_like(key)  # spreads what all entries share
        tl.store(place + KEY, start + key, mask=mask)
        tl.store(place + KEY_END, start + key_end, mask=mask)
        tl.store(place + KEY_START, start + same, mask=mask)
        tl.store(place + KEY_HISTORY_END, start + history + same, mask=mask)
        tl.store(place + KEY_SEQUENCE_END, start + history + targets + same, mask=mask)
        tl.store(place + KEY_KIND, tl.where(is_target, CANDIDATE, FULL), mask=mask)
        tl.store(place + KEY_PART, tl.where(is_cut, entry % parts, 0), mask=mask)
        tl.store(place + KEY_PARTS, tl.where(is_cut, parts, 1), mask=mask)
        tl.store(place + KEY_SLOT, first_slot + tile * parts, mask=mask)
        tl.store(place + KEY_FIRST_FULL, start + history - full + same, mask=mask)
        tl.store(place + KEY_TARGET, first_target + same, mask=mask)
        tl.store(place + KEY_SEEN_BY, start + history + seen_by, mask=mask)
