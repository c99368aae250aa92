"""Triton kernels that build the tile lists of a batch, on the device and without a word to the
host.

Entries are rows of `ENTRY` int32, sequence by sequence (so that K and V of one sequence stay in
L2), longest first inside.

A row tile never mixes kinds, because tiles are anchored at the borders of the kinds:
  BAND       history rows that see `window` back, and the prefix
  FULL       history rows that see everything before them
  CANDIDATE  rows that see the history (or its first `visible` positions) and themselves
"""

import triton
import triton.language as tl

ENTRY = tl.constexpr(16)  # int32 of an entry: 64 bytes, two sectors
BAND, FULL, CANDIDATE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def _sequence(
    offsets, num_targets, seq, valid, full_rows, BANDED: tl.constexpr, CANDIDATES: tl.constexpr, CACHED: tl.constexpr
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
        full = tl.minimum(history, full_rows)
    else:
        full = history
    return start, history, full, targets


@triton.jit
def _row_counts(
    history, full, targets, per_part, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, CACHED: tl.constexpr
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
    history, full, targets, prefix, per_part, KEYS: tl.constexpr, CACHED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
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


@triton.jit
def count_tiles(
    offsets,  # int64 [B + 1]
    num_targets,  # int [B]
    header,  # int32 [2] out: entries, blocks of a part
    first,  # int32 [3, B] out: first entry, first slot, first candidate of each sequence
    num_sequences,
    full_rows,
    prefix,
    KEYS: tl.constexpr,  # a list of key tiles (dk, dv) instead of row tiles
    BANDED: tl.constexpr,
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
            offsets, num_targets, seq, seq < num_sequences, full_rows, BANDED, CANDIDATES, CACHED
        )
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
            offsets, num_targets, seq, seq < num_sequences, full_rows, BANDED, CANDIDATES, CACHED
        )
        entries, slots = _entries(
            history, full, targets, prefix, per_part, KEYS, CACHED, BLOCK_M, BLOCK_N
        )
        short_before += tl.sum(tl.where(slots > 0, entries, 0), 0)
    for begin in range(0, num_sequences, BLOCK_B):
        seq = begin + tl.arange(0, BLOCK_B)
        valid = seq < num_sequences
        _, history, full, targets = _sequence(
            offsets, num_targets, seq, valid, full_rows, BANDED, CANDIDATES, CACHED
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


@triton.jit
def write_row_tiles(
    offsets,
    num_targets,
    header,
    first,
    # int32 [capacity, ENTRY] out: row, row end, sequence start, history end, kind, part, parts,
    # slot,
    tiles,
    # number of the row as a candidate of the batch, first candidate's row
    num_sequences,
    full_rows,
    BANDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    CACHED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program a sequence."""
    seq = tl.program_id(0)
    start, history, full, targets = _sequence(
        offsets, num_targets, seq, True, full_rows, BANDED, CANDIDATES, CACHED
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
        row_end = tl.where(
            is_target, tl.minimum(row + BLOCK_M, first_row + targets), start + row_end
        )
        place = tiles + (first_entry + entry) * ENTRY
        mask = entry < cut + band_tiles
        tl.store(place, row, mask=mask)
        tl.store(place + 1, row_end, mask=mask)
        tl.store(place + 2, start + tl.zeros_like(row), mask=mask)
        tl.store(place + 3, start + history + tl.zeros_like(row), mask=mask)
        tl.store(place + 4, tl.where(is_target, CANDIDATE, tl.where(is_cut, FULL, BAND)), mask=mask)
        tl.store(place + 5, tl.where(is_cut, entry % parts, 0), mask=mask)
        tl.store(place + 6, tl.where(is_cut, parts, 1), mask=mask)
        tl.store(place + 7, first_slot + tile * parts, mask=mask)
        tl.store(place + 8, first_target + row - first_row, mask=mask)
        tl.store(place + 9, first_row + tl.zeros_like(row), mask=mask)


@triton.jit
def write_key_tiles(
    offsets,
    num_targets,
    visible,  # int32 [C]
    header,
    first,
    # int32 [capacity, ENTRY] out: key, key end, sequence start, history end, sequence end, kind,
    # part, parts,
    tiles,
    # slot, first FULL row, first candidate of the sequence, first row of a candidate that sees the
    # tile
    num_sequences,
    full_rows,
    prefix,
    BANDED: tl.constexpr,
    CANDIDATES: tl.constexpr,
    VISIBLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One program a sequence."""
    seq = tl.program_id(0)
    start, history, full, targets = _sequence(
        offsets, num_targets, seq, True, full_rows, BANDED, CANDIDATES, False
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
            seen_by += targets
            for i in range(0, targets, BLOCK_M):
                target = i + tl.arange(0, BLOCK_M)
                seen = tl.load(visible + first_target + target, mask=target < targets, other=0)
                sees = tl.where(seen[None, :] > key[:, None], target[None, :], targets)
                seen_by = tl.minimum(seen_by, tl.min(sees, 1))
        place = tiles + (first_entry + entry) * ENTRY
        mask = entry < total
        tl.store(place, start + key, mask=mask)
        tl.store(place + 1, start + key_end, mask=mask)
        tl.store(place + 2, start + tl.zeros_like(key), mask=mask)
        tl.store(place + 3, start + history + tl.zeros_like(key), mask=mask)
        tl.store(place + 4, start + history + targets + tl.zeros_like(key), mask=mask)
        tl.store(place + 5, tl.where(is_target, CANDIDATE, FULL), mask=mask)
        tl.store(place + 6, tl.where(is_cut, entry % parts, 0), mask=mask)
        tl.store(place + 7, tl.where(is_cut, parts, 1), mask=mask)
        tl.store(place + 8, first_slot + tile * parts, mask=mask)
        tl.store(place + 9, start + history - full + tl.zeros_like(key), mask=mask)
        tl.store(place + 10, first_target + tl.zeros_like(key), mask=mask)
        tl.store(place + 11, start + history + seen_by, mask=mask)
