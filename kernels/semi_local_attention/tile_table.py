"""Sizes of the attention kernels' tiles, and into how many parts long tiles are cut.

Nothing here needs Triton or a GPU.
"""

from dataclasses import dataclass

# Tiles are cut so that the cut ones give about two waves of two programs on 132 multiprocessors.
# Those of long sequences have so many blocks that fewer parts, each a sum to write and to add, pay.
SPLIT_PROGRAMS = 576
SPLIT_PROGRAMS_LONG = 384
LONG_SEQUENCE = 8192
# Blocks of a part: below, writing and adding a partial sum costs more than it hides.
SHORTEST_PART = 8
SHORTEST_KEY_PART = 16  # a part of a key tile writes two sums
# Tiles of full rows with no more keys stay whole beside the BAND tiles of so many sequences, which
# fill the multiprocessors meanwhile.
WHOLE_KEYS = 1152
MANY_SEQUENCES = 8


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """Tile of a kernel: `rows` queries and `keys` keys, and how Triton runs it."""

    rows: int
    keys: int
    warps: int
    stages: int
    held: bool = False  # products take the program's own rows (Q, dO) from registers
    max_registers: int | None = None  # of a thread; None leaves it to ptxas


def split_programs(max_seq_len: int) -> int:
    """Programs that the cut tiles of a batch should give, over all heads."""
    return SPLIT_PROGRAMS_LONG if max_seq_len > LONG_SEQUENCE else SPLIT_PROGRAMS


def shortest_part(tile: AttentionTile, *, of_keys: bool, banded: bool, num_sequences: int) -> int:
    """Blocks that a part of a cut tile has at least; with `of_keys`, of a tile of keys."""
    if of_keys:
        return SHORTEST_KEY_PART
    if banded and num_sequences >= MANY_SEQUENCES:
        return max(SHORTEST_PART, WHOLE_KEYS // tile.keys)
    return SHORTEST_PART


def tile_sizes(
    kernel: str,
    width: int,
    *,
    half: bool,
    banded: bool,
    biased: bool,
    max_seq_len: int,
    hopper: bool,
) -> AttentionTile:
    """The tile that was fastest on an H100 (benchmarks/NOTES.md).

    Two programs of four warps on a multiprocessor beat one of eight: stock Triton waits for both
    products in every step, so only another program can overlap with the activation.

    Args:
        kernel: "forward", "backward_queries", "backward_keys" or "backward_bias".
        width: of the wider head, a power of two.
        half: two bytes a number.
        banded: the mask has a window.
        biased: a relative bias is added to the scores.
    """
    if not half:
        return AttentionTile(32, 32 if width <= 64 else 16, 4, 2)
    if not hopper:
        return AttentionTile(32 if width > 128 else 64, 32, 4, 2)
    if biased and width <= 128:
        return _biased_tile(kernel)
    if width > 128 and biased:
        return AttentionTile(32, 32, 4, 2)
    if width > 128:
        return _wide_tile(kernel, banded)
    if width <= 64:
        return _narrow_tile(kernel, width)
    return _common_tile(kernel, banded, max_seq_len)


def _biased_tile(kernel: str) -> AttentionTile:
    if kernel == "backward_bias":
        return AttentionTile(64, 32, 4, 2)
    if kernel == "backward_keys":
        return AttentionTile(32, 64, 4, 3)
    return AttentionTile(64, 64, 4, 3 if kernel == "forward" else 2)


def _wide_tile(kernel: str, banded: bool) -> AttentionTile:
    """Heads of 256."""
    if kernel == "backward_queries" and not banded:
        return AttentionTile(128, 32, 8, 2)
    if kernel != "forward":
        return AttentionTile(64, 64, 8, 2)
    if banded:
        return AttentionTile(64, 32, 4, 2)
    return AttentionTile(128, 64, 8, 2)


def _narrow_tile(kernel: str, width: int) -> AttentionTile:
    """Heads of 64 and narrower."""
    stages = 3
    if width <= 32 and kernel == "backward_queries":
        stages = 4
    elif width <= 32 and kernel == "backward_keys":
        stages = 2
    return AttentionTile(64, 64, 4, stages)


def _common_tile(kernel: str, banded: bool, max_seq_len: int) -> AttentionTile:
    """Heads of 128."""
    if kernel == "backward_queries":
        return AttentionTile(64, 64, 4, 3, held=True)
    if kernel == "backward_keys":
        return AttentionTile(64, 64, 4, 2)
    if banded:  # 168 registers let three programs run on a multiprocessor
        return AttentionTile(64, 32, 4, 4, held=True, max_registers=168)
    if max_seq_len <= 1024:
        return AttentionTile(64, 32, 4, 3)
    return AttentionTile(128, 64, 4, 2)
