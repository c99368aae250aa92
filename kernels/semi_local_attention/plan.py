"""The mask of a batch as the Triton kernels read it: lists of tiles, built on the device.

    offsets, candidates, mask → TritonPlan → TileList of rows (forward, dq), of keys (dk and dv)

Nothing here reads a value from the device: a list's capacity is bounded by what the host knows, and
a program past the end of its list returns at once.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels.launch import cdiv, constants_of, launch
from kernels.semi_local_attention import tile_table, triton_tiles
from kernels.semi_local_attention.tile_table import AttentionTile

ENTRY: int = triton_tiles.ENTRY.value
FARTHEST = 2**30  # of a window, full rows and a prefix: with a place it must not pass 2**31
# What the kernels that build lists do at a time: one size for all batches, compiled once.
COUNTED, WRITTEN = 1024, 64  # sequences, entries
LIST_STAGES = 3  # Triton's own number of stages


@dataclass
class Workspace:
    """Device memory that launches over one tile list share, one after another on one stream."""

    capacity: int  # entries of the list
    slots: int  # partial sums of cut tiles
    device: torch.device
    arrived: Tensor  # int32 [slots, H]: how many parts of a cut tile are done, 0 between launches
    partials: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    sums: dict[int, Tensor] = field(default_factory=dict)

    def partial_sums(self, *shape: int) -> Tensor:
        """Room for the sums of cut tiles, float32 [slots, *shape]."""
        if shape not in self.partials:
            self.partials[shape] = torch.empty(
                self.slots, *shape, dtype=torch.float32, device=self.device
            )
        return self.partials[shape]

    def row_sums(self, width: int) -> Tensor:
        """Room for the sum of each tile's rows, float32 [capacity, width].

        A tile's sum lies at its first entry's number. The same rows are written by every launch and
        the others stay zero, so nothing is cleared in between.
        """
        if width not in self.sums:
            self.sums[width] = torch.zeros(
                self.capacity, width, dtype=torch.float32, device=self.device
            )
        return self.sums[width]


@dataclass(frozen=True, slots=True)
class TileList:
    """Tiles in the order in which programs take them; `triton_tiles` draws one."""

    tiles: Tensor  # int32 [capacity, ENTRY], flat
    header: Tensor  # int32 [2]: entries in use, blocks of a part
    capacity: int
    workspace: Workspace


@dataclass
class TritonPlan:
    """The mask of a batch, and what was derived from it for all layers and for backward.

    It holds no tensor of a layer and nothing that holds the plan: when the batch goes, its memory
    goes with it. Launches that share a plan must follow each other on one stream.
    """

    seq_offsets: Tensor  # with `cached`, of the cache
    num_targets: Tensor | None  # with `cached`, the offsets of the new rows, int64 [B + 1]
    target_visible: Tensor | None
    num_tokens: int
    max_seq_len: int
    window: int | None
    full_rows: int
    prefix: int
    cached: bool = False
    target_from: Tensor | None = None
    extra_full_rows: Tensor | None = None
    # int32 [T + 1]: how many rows before each ask; None where all do
    asked_before: Tensor | None = None
    lists: dict[tuple[bool, int, int, int], TileList] = field(default_factory=dict)
    problems: dict[tuple, Any] = field(default_factory=dict)  # of `triton_launch.find_problem`

    def __post_init__(self) -> None:
        if self.window is not None:
            self.window = min(self.window, FARTHEST)
        self.full_rows = min(self.full_rows, FARTHEST)
        self.prefix = min(self.prefix, FARTHEST)

    def tile_list(self, keys: bool, tile: AttentionTile, heads: int) -> TileList:
        """Tiles of keys for dk and dv, or of rows; built at first use."""
        place = keys, tile.rows, tile.keys, heads
        if place not in self.lists:
            self.lists[place] = _build_list(self, keys, tile, heads)
        return self.lists[place]


def _build_list(plan: TritonPlan, keys: bool, tile: AttentionTile, heads: int) -> TileList:
    """Two launches: one program counts tiles and gives every sequence its place, then one program
    a sequence writes them.
    """
    offsets, device = plan.seq_offsets, plan.seq_offsets.device
    num_sequences = len(offsets) - 1
    num_parts = cdiv(tile_table.split_programs(plan.max_seq_len), heads)
    capacity = _list_capacity(plan, keys, tile, num_parts)

    # the tiles first, so that their entries are aligned whatever the number of sequences
    sizes = [capacity * ENTRY, 2, 3 * num_sequences]
    flat = torch.empty(sum(sizes), dtype=torch.int32, device=device)
    tiles, header, first = flat.split(sizes)
    arrived = torch.zeros(2 * num_parts * heads, dtype=torch.int32, device=device)

    targets = offsets if plan.num_targets is None else plan.num_targets
    extra = offsets if plan.extra_full_rows is None else plan.extra_full_rows
    constants = {
        "BANDED": plan.window is not None,
        "EXTRA": plan.window is not None and plan.extra_full_rows is not None,
        "CANDIDATES": plan.num_targets is not None,
        "BLOCK_M": tile.rows,
        "BLOCK_N": tile.keys,
    }
    _count_tiles(plan, keys, tile, heads, (offsets, targets, extra, header, first), constants)
    _write_tiles(plan, keys, (offsets, targets, extra, header, first, tiles), constants)

    if plan.asked_before is not None and not keys:
        tiles, header = _keep_asked(plan.asked_before, tiles, header)
    workspace = Workspace(capacity, 2 * num_parts, device, arrived)
    return TileList(tiles, header, capacity, workspace)


def _keep_asked(asked_before: Tensor, tiles: Tensor, header: Tensor) -> tuple[Tensor, Tensor]:
    """The list of those row tiles in which a row asks."""
    kept, kept_header = torch.empty_like(tiles), torch.empty_like(header)
    launch(
        triton_tiles.keep_asked_tiles,
        1,
        (tiles, header, asked_before, kept, kept_header),
        (),
        (),
        (COUNTED,),
        device=tiles.device,
        num_warps=COUNTED // 128,
        num_stages=LIST_STAGES,
    )
    return kept, kept_header


def _list_capacity(plan: TritonPlan, keys: bool, tile: AttentionTile, num_parts: int) -> int:
    """Entries that any lengths with the plan's number of tokens and sequences fit into.

    These are whole tiles, a broken tile for each kind and sequence, and the parts of cut tiles, of
    which `count_tiles` allows `num_parts` beyond one per tile.
    """
    whole = plan.num_tokens // (tile.keys if keys else tile.rows)
    kinds = 1
    if not plan.cached:
        has_band = plan.window is not None and not keys
        kinds += (plan.num_targets is not None) + has_band
    return whole + kinds * (len(plan.seq_offsets) - 1) + num_parts


def _count_tiles(
    plan: TritonPlan,
    keys: bool,
    tile: AttentionTile,
    heads: int,
    tensors: tuple[Tensor, ...],
    constants: dict,
) -> None:
    num_sequences = len(plan.seq_offsets) - 1
    shortest = tile_table.shortest_part(
        tile, of_keys=keys, banded=plan.window is not None, num_sequences=num_sequences
    )
    kernel = triton_tiles.count_tiles
    of_count = {
        **constants,
        "KEYS": keys,
        "CACHED": plan.cached,
        "HEADS": heads,
        "SPLIT_PROGRAMS": tile_table.split_programs(plan.max_seq_len),
        "SHORTEST_PART": shortest,
        "BLOCK_B": COUNTED,
    }
    launch(
        kernel,
        1,
        tensors,
        (num_sequences,),
        (plan.full_rows, plan.prefix),
        constants_of(kernel, of_count),
        device=plan.seq_offsets.device,
        num_warps=COUNTED // 128,
        num_stages=LIST_STAGES,
    )


def _write_tiles(
    plan: TritonPlan, keys: bool, tensors: tuple[Tensor, ...], constants: dict
) -> None:
    num_sequences = len(plan.seq_offsets) - 1
    offsets, targets, extra, header, first, tiles = tensors
    if keys:
        kernel, warps = triton_tiles.write_key_tiles, 2
        visible = offsets if plan.target_visible is None else plan.target_visible
        tensors = offsets, targets, extra, visible, header, first, tiles
        fixed = plan.full_rows, plan.prefix
        of_kernel = {"VISIBLE": plan.target_visible is not None, "BLOCK_E": WRITTEN}
    else:
        kernel, warps = triton_tiles.write_row_tiles, 1
        fixed = (plan.full_rows,)
        of_kernel = {"CACHED": plan.cached, "BLOCK_E": WRITTEN}

    launch(
        kernel,
        num_sequences,
        tensors,
        (num_sequences,),
        fixed,
        constants_of(kernel, {**constants, **of_kernel}),
        device=plan.seq_offsets.device,
        num_warps=warps,
        num_stages=LIST_STAGES,
    )
