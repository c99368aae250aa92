"""Encoded histories in pages of one block of memory.

    HistoryCache, 5 KB    → `write` → pages 7 and 2 of the block
    FilledHistory         → `write` → the same, out of a graph's results
    pages 7 and 2         → `read`  → the HistoryCache again, in memory of its own
                          → `copy_to` → the room that a CUDA graph reads
    pages 7 and 2         → `release`, for the next history

Kept one by one in the heap, histories of all lengths leave holes between the tensors of passing
requests, and a full cache of 96 MiB was seen to take 170. A page fits every history.
"""

from dataclasses import dataclass
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from kernels.pages.op import copy_pieces, even_words, fill_pages
from pipeline.batches.events import Events
from pipeline.model.inference.cached_scoring import HistoryCache, LayerCache
from pipeline.model.inference.rooms import PAGE_BYTES, FilledHistory, Room

WORD = torch.int64  # what is copied at a time: byte by byte it takes four times as long
PAGE_WORDS = PAGE_BYTES // WORD.itemsize
ALIGNED_BYTES = 64  # where each tensor begins within its history
PART_PAGES = 128  # half a MiB, within a processor's own cache

# shapes of each layer's keys and values, their type, and the first layer that it shares its offsets
# with
LayoutKey = tuple[tuple[torch.Size, torch.Size, torch.dtype, int], ...]


@dataclass(frozen=True, slots=True)
class PagedTensor:
    """What a tensor is, without its numbers."""

    shape: torch.Size
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class PagedLayer:
    """A layer of a history whose keys and values lie in pages."""

    keys: PagedTensor
    values: PagedTensor
    offsets: Tensor


@dataclass(frozen=True, slots=True, weakref_slot=True, eq=False)
class PagedLayout:
    """What histories of one length are without their numbers: one object for all of them.

    Thousands of small objects that stay, between the tensors of passing requests, keep the heap
    from giving memory back: of each history there were some 17 KB, seen from outside.
    """

    layers: tuple[PagedLayer, ...]
    lengths: tuple[int, ...]  # rows of each layer
    # int64: among a history's pages the first one of each tensor, and the number of all; where
    # several may begin in one page it is of no use
    begins: Tensor
    num_words: Tensor  # int64, of each tensor
    longest: int  # pages of one tensor
    num_pages: int  # of all

    @classmethod
    def of(cls, key: LayoutKey, device: torch.device, aligned_bytes: int) -> "PagedLayout":
        """Layers that share their offsets go on sharing them. Others of one length do not: those of
        a history that truncation does not cut are of one length too, and a room made like it takes
        longer ones.
        """
        layers: list[PagedLayer] = []
        lengths, begins, num_words = [], [0], []
        num_bytes = longest = 0
        for depth, (keys, values, dtype, first) in enumerate(key):
            if first < depth:
                offsets = layers[first].offsets
            else:
                offsets = to_device(np.array([0, keys[0]]), device)
            layer = PagedLayer(PagedTensor(keys, dtype), PagedTensor(values, dtype), offsets)
            layers.append(layer)
            lengths.append(keys[0])

            for tensor in (layer.keys, layer.values):
                whole = _aligned(tensor.num_bytes, aligned_bytes)
                num_bytes += whole
                begins.append(begins[-1] + whole // PAGE_BYTES)
                num_words.append(even_words(tensor.num_bytes))
                longest = max(longest, whole // PAGE_BYTES)
        return cls(
            layers=tuple(layers),
            lengths=tuple(lengths),
            begins=to_device(np.array(begins), device),
            num_words=to_device(np.array(num_words), device),
            longest=longest,
            num_pages=-(-num_bytes // PAGE_BYTES),
        )


@dataclass(slots=True, eq=False)
class PagedHistory:
    """A history in pages: keys and values of one layer after the other's."""

    layout: PagedLayout
    pages: np.ndarray  # int32
    index: Tensor | None  # the same as int64 on a GPU, so that no reader has to bring them there
    readers: int = 0  # that copy it at this moment
    is_evicted: bool = False  # its pages are given back after the last of them
    rows: Events | None = None  # that were encoded, of a user with a long history

    @property
    def num_bytes(self) -> int:
        """Of its numbers alone."""
        return sum(layer.keys.num_bytes + layer.values.num_bytes for layer in self.layers)

    @property
    def layers(self) -> tuple[PagedLayer, ...]:
        return self.layout.layers


class HistoryPages:
    """A block of `max_bytes`, as pages that are taken and given back.

    On a CPU the system gives memory to a page when it is first written, and pages given back are
    taken first: the block takes as much as it once held, never more. A GPU gives all of it with the
    first history.

    One thread at a time may take or release pages, as its caller sees to. They may be written and
    read meanwhile: a history of 16,384 rows is 64 MiB, and others would wait for its copy.

    `for_rooms`: each tensor begins with a page, so that `copy_to` copies whole pages.
    """

    def __init__(self, max_bytes: int, *, for_rooms: bool = False) -> None:
        self.for_rooms = for_rooms
        self._aligned_bytes = PAGE_BYTES if for_rooms else ALIGNED_BYTES
        self._num_pages = max_bytes // PAGE_BYTES
        self._block: Tensor | None = None  # [pages, words of a page], where the first history is
        # the next to be taken is the last
        self._free = np.arange(self._num_pages, dtype=np.int32)[::-1].copy()
        self.num_free = self._num_pages
        self._layouts: WeakValueDictionary[LayoutKey, PagedLayout] = WeakValueDictionary()

    def lay_out(self, entry: HistoryCache | FilledHistory) -> PagedLayout:
        """How `entry` lies in its pages; the same object for all of its lengths that are kept."""
        filled = isinstance(entry, FilledHistory)
        key = _filled_key(entry) if filled else _layout_key(entry)
        layout = self._layouts.get(key)
        if layout is None:
            device = entry.addresses.device if filled else entry.layers[0].k_THD.device
            layout = PagedLayout.of(key, device, self._aligned_bytes)
            self._layouts[key] = layout
        return layout

    def take(self, layout: PagedLayout) -> PagedHistory:
        """Pages for a history, to be written; there must be enough that are free."""
        needed = layout.num_pages
        assert needed <= self.num_free
        if self._block is None:
            device = layout.begins.device
            self._block = torch.empty(self._num_pages, PAGE_WORDS, dtype=WORD, device=device)

        taken = self._free[self.num_free - needed : self.num_free][::-1].copy()
        self.num_free -= needed
        index = to_device(taken.astype(np.int64), self._block.device)
        return PagedHistory(layout, taken, index if index.is_cuda else None)

    def write(self, history: PagedHistory, entry: HistoryCache | FilledHistory) -> None:
        """Copy `entry` into the pages that were taken for it.

        All its numbers one after another, then page by page. On a CPU in parts, so that a long
        history needs no memory of its size besides. What a graph has left goes from there.
        """
        block = self._block
        assert block is not None
        if len(history.pages) == 0:
            return
        if isinstance(entry, FilledHistory):
            assert self.for_rooms
            layout = history.layout
            fill_pages(
                *(entry.tensors, entry.addresses, layout.num_words),
                *(block, self._index(history, 0, len(history.pages)), layout.begins),
                longest=layout.longest,
            )
            return

        tensors: list[tuple[int, Tensor]] = []  # where each begins, and its bytes
        begin = 0
        for layer in entry.layers:
            for tensor in (layer.k_THD, layer.v_THV):
                tensors.append((begin, tensor.reshape(-1).view(torch.uint8)))
                begin += _aligned(tensor.nbytes, self._aligned_bytes)

        num_bytes = len(history.pages) * PAGE_BYTES
        if block.is_cuda:  # a few launches for all tensors
            whole = torch.empty(num_bytes, dtype=torch.uint8, device=block.device)
            places = [whole[begin : begin + len(numbers)] for begin, numbers in tensors]
            numbers = [numbers for _, numbers in tensors]
            torch._foreach_copy_(places, numbers)  # pyright: ignore[reportPrivateImportUsage]
            filled = whole.view(WORD).view(-1, PAGE_WORDS)
            block.index_copy_(0, self._index(history, 0, len(history.pages)), filled)
            return

        part_bytes = min(num_bytes, PART_PAGES * PAGE_BYTES)
        part = torch.empty(part_bytes, dtype=torch.uint8, device=block.device)
        for first in range(0, num_bytes, part_bytes):
            last = min(first + part_bytes, num_bytes)
            for begin, numbers in tensors:
                low, high = max(begin, first), min(begin + len(numbers), last)
                if low < high:
                    part[low - first : high - first].copy_(numbers[low - begin : high - begin])

            index = self._index(history, first // PAGE_BYTES, last // PAGE_BYTES)
            filled = part[: last - first].view(WORD).view(-1, PAGE_WORDS)
            block.index_copy_(0, index, filled)

    def read(self, history: PagedHistory) -> HistoryCache:
        """A copy of what was written, which outlives the pages.

        Of a long history each tensor by itself: one piece of memory for all of it comes new from
        the system every time, which takes six times as long as the copy.
        """
        assert self._block is not None
        is_short = self._block.is_cuda or len(history.pages) <= PART_PAGES
        whole = None
        if is_short:
            whole = self._read_bytes(history, 0, len(history.pages) * PAGE_BYTES)

        layers, begin = [], 0
        for layer in history.layers:
            tensors = []
            for kept in (layer.keys, layer.values):
                end = begin + kept.num_bytes
                if whole is None:
                    part = self._read_bytes(history, begin, end)
                else:
                    part = whole[begin:end]
                tensors.append(part.view(kept.dtype).view(kept.shape))
                begin += _aligned(kept.num_bytes, self._aligned_bytes)
            keys, values = tensors
            layers.append(LayerCache(keys, values, layer.offsets))
        return HistoryCache(tuple(layers))

    def _read_bytes(self, history: PagedHistory, begin: int, end: int) -> Tensor:
        """The bytes `begin` to `end` of a history, uint8; `begin` is aligned."""
        assert self._block is not None
        first, last = begin // PAGE_BYTES, -(-end // PAGE_BYTES)
        pages = self._block.index_select(0, self._index(history, first, last))
        skipped = begin - first * PAGE_BYTES
        return pages.view(-1).view(torch.uint8)[skipped : skipped + end - begin]

    def copy_to(self, room: Room, history: PagedHistory) -> None:
        """Copy what was written into a room, page by page, in one go."""
        assert self._block is not None and self.for_rooms
        layout = history.layout
        copy_pieces(
            self._block,
            self._index(history, 0, len(history.pages)),
            layout.begins,
            room.buffer.view(WORD).view(-1, PAGE_WORDS),
            room.first_pages,
            longest=layout.longest,
        )
        room.set_lengths(layout.lengths)

    def release(self, history: PagedHistory) -> None:
        """Its pages are free; it cannot be read any more."""
        end = self.num_free + len(history.pages)
        self._free[self.num_free : end] = history.pages[::-1]
        self.num_free = end

    def _index(self, history: PagedHistory, first: int, last: int) -> Tensor:
        """Some of a history's pages, int64, beside the block."""
        if history.index is not None:
            return history.index[first:last]
        return torch.from_numpy(history.pages[first:last].astype(np.int64))


def _layout_key(entry: HistoryCache) -> LayoutKey:
    sharing: dict[int, int] = {}  # id of offsets -> the first layer that has them
    key = []
    for depth, layer in enumerate(entry.layers):
        first = sharing.setdefault(id(layer.offsets), depth)
        key.append((layer.k_THD.shape, layer.v_THV.shape, layer.k_THD.dtype, first))
    return tuple(key)


def _filled_key(entry: FilledHistory) -> LayoutKey:
    """`_layout_key` of the rows that count."""
    sharing: dict[int, int] = {}
    key = []
    tensors = zip(entry.tensors[0::2], entry.tensors[1::2], strict=True)
    for depth, (keys, values) in enumerate(tensors):
        num_rows = entry.lengths[depth]
        first = sharing.setdefault(id(entry.offsets[depth]), depth)
        of_keys = torch.Size((num_rows, *keys.shape[1:]))
        of_values = torch.Size((num_rows, *values.shape[1:]))
        key.append((of_keys, of_values, keys.dtype, first))
    return tuple(key)


def to_device(numbers: np.ndarray, device: torch.device) -> Tensor:
    """The numbers on a device; the host does not wait for what a GPU is still at."""
    there = torch.from_numpy(numbers)
    if device.type != "cuda":
        return there
    return there.pin_memory().to(device, non_blocking=True)


def _aligned(num_bytes: int, aligned_bytes: int) -> int:
    return -(-num_bytes // aligned_bytes) * aligned_bytes
