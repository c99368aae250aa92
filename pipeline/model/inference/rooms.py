"""Memory of fixed addresses for one encoded history at a time, which a CUDA graph reads.

    an encoded history, 70 rows a layer   ──copy──▶   room of 256 rows a layer, of which 70 count

What lies behind a history in the room is of an earlier one, finite or not: attention reads no
number of it.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from pipeline.model.inference.cached_scoring import HistoryCache, LayerCache

# Each layer's keys and values begin at a multiple of that many bytes, so that a history that is
# kept in pages of as many is copied page by page.
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, eq=False)
class Room:
    """Room for one history."""

    buffer: Tensor  # uint8, all of it
    # int64 [2 * layers]: the page where keys, then values of each layer begin
    first_pages: Tensor
    history: HistoryCache  # views of the buffer, and offsets of its own

    def set_lengths(self, lengths: tuple[int, ...]) -> None:
        """Have `lengths[i]` rows of layer i count."""
        of_offsets: dict[int, tuple[Tensor, int]] = {}
        for layer, num_rows in zip(self.history.layers, lengths, strict=True):
            of_offsets[id(layer.offsets)] = layer.offsets, num_rows
        for offsets, num_rows in of_offsets.values():
            offsets[1].fill_(num_rows)


@dataclass(frozen=True, slots=True, eq=False)
class FilledHistory:
    """One encoded history as the pass over a filled batch leaves it: the first rows of longer
    tensors. If a graph was replayed, its next replay writes over them.
    """

    tensors: tuple[Tensor, ...]  # keys, then values, of each layer
    offsets: tuple[Tensor, ...]  # of each layer; only which layers share theirs is of use
    lengths: tuple[int, ...]  # rows of each layer that count
    addresses: Tensor  # int64 [2 * layers], where each tensor begins, on its device


class StoredHistory(Protocol):
    """An encoded history of one user that lies in somebody's memory, to be read or copied."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each layer."""
        ...

    def copy_to(self, room: Room) -> None:
        """Copy it into a room that holds as many rows, lengths included."""
        ...

    def read(self) -> HistoryCache:
        """A copy in memory of its own."""
        ...


def make_room(like: HistoryCache, sizes: tuple[int, ...]) -> Room:
    """Room for one history with `sizes` rows in its layers."""
    ends = [0]
    for layer, size in zip(like.layers, sizes, strict=True):
        for rows in (layer.k_THD, layer.v_THV):
            num_bytes = size * rows.shape[1:].numel() * rows.dtype.itemsize
            ends.append(ends[-1] + -(-num_bytes // PAGE_BYTES) * PAGE_BYTES)

    device = like.layers[0].k_THD.device
    buffer = torch.zeros(ends[-1], dtype=torch.uint8, device=device)
    parts = [buffer[begin:end] for begin, end in pairwise(ends)]
    shared: dict[int, Tensor] = {}  # layers that share their offsets go on sharing them
    layers = []
    for depth, (layer, size) in enumerate(zip(like.layers, sizes, strict=True)):
        keys = _rows_of(parts[2 * depth], layer.k_THD, size)
        values = _rows_of(parts[2 * depth + 1], layer.v_THV, size)
        offsets = shared.setdefault(id(layer.offsets), torch.zeros_like(layer.offsets))
        layers.append(LayerCache(keys, values, offsets))
    first_pages = torch.tensor(ends[:-1], device=device) // PAGE_BYTES
    return Room(buffer, first_pages, HistoryCache(tuple(layers)))


def _rows_of(part: Tensor, like: Tensor, size: int) -> Tensor:
    """The first bytes of `part` as `size` rows like those of `like`."""
    shape = (size, *like.shape[1:])
    num_bytes = torch.Size(shape).numel() * like.dtype.itemsize
    return part[:num_bytes].view(like.dtype).view(shape)


def fill_room(room: Room, cache: HistoryCache) -> None:
    """Copy a history into the room, and its lengths."""
    places, rows = [], []
    for place, kept in zip(room.history.layers, cache.layers, strict=True):
        num_rows = len(kept.k_THD)
        places += [place.k_THD[:num_rows], place.v_THV[:num_rows]]
        rows += [kept.k_THD, kept.v_THV]

    torch._foreach_copy_(places, rows)  # pyright: ignore[reportPrivateImportUsage]
    room.set_lengths(cache.lengths)
