"""Encoded histories in pages: what is read is what was written, and all of it lies in one block."""

import numpy as np
import pytest
import torch

from kernels.pages.op import copy_pieces, even_words, fill_pages, find_addresses
from pipeline.model.inference.cached_scoring import HistoryCache, LayerCache
from pipeline.model.inference.rooms import Room, fill_room, make_room
from serve_app.ranking.history_cache import CacheBudget, HistoryCaches, resident_bytes
from serve_app.ranking.history_pages import (
    PAGE_BYTES,
    PART_PAGES,
    HistoryPages,
    PagedHistory,
)


def random_history(lengths: list[int], dtype: torch.dtype = torch.float32) -> HistoryCache:
    """One with a layer of each length, 3 heads of 5; layers of one length share their offsets."""
    offsets = {length: torch.tensor([0, length]) for length in lengths}
    layers = []
    for length in lengths:
        k, v = torch.randn(2, length, 3, 5).to(dtype)
        layers.append(LayerCache(k, v, offsets[length]))
    return HistoryCache(tuple(layers))


def written(pages: HistoryPages, history: HistoryCache) -> PagedHistory:
    kept = pages.take(pages.lay_out(history))
    pages.write(kept, history)
    return kept


def assert_equal(found: HistoryCache, whole: HistoryCache) -> None:
    for mine, other in zip(found.layers, whole.layers, strict=True):
        assert torch.equal(mine.offsets, other.offsets)
        assert torch.equal(mine.k_THD, other.k_THD) and mine.k_THD.dtype == other.k_THD.dtype
        assert torch.equal(mine.v_THV, other.v_THV) and mine.v_THV.dtype == other.v_THV.dtype


@pytest.mark.parametrize("for_rooms", [False, True])
def test_what_comes_and_goes_is_read_as_it_was_written(for_rooms: bool) -> None:
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    pages = HistoryPages(64 * PAGE_BYTES + 17, for_rooms=for_rooms)
    held: list[tuple[HistoryCache, PagedHistory]] = []
    for _ in range(300):
        rows = int(rng.integers(1, 90))
        dtype = (torch.float32, torch.bfloat16)[rng.integers(2)]
        history = random_history([rows, rows, min(rows, 7)], dtype)
        while pages.lay_out(history).num_pages > pages.num_free:
            _, oldest = held.pop(0)
            pages.release(oldest)
        held.append((history, written(pages, history)))
        assert pages.num_free == 64 - sum(len(kept.pages) for _, kept in held)
        for whole, kept in held:
            assert_equal(pages.read(kept), whole)


def test_layers_of_one_length_share_their_offsets() -> None:
    pages = HistoryPages(4 * PAGE_BYTES)
    first, second, other = pages.read(written(pages, random_history([9, 9, 4]))).layers
    assert first.offsets is second.offsets
    assert other.offsets.tolist() == [0, 4]


def test_what_was_read_outlives_its_pages() -> None:
    pages = HistoryPages(4 * PAGE_BYTES)
    first, second = random_history([40]), random_history([40])
    kept = written(pages, first)
    found = pages.read(kept)
    pages.release(kept)
    assert written(pages, second).pages.tolist() == kept.pages.tolist()
    assert_equal(found, first)


def test_a_history_of_several_parts_is_read_as_it_was_written() -> None:
    torch.manual_seed(1)
    history = random_history([3 * PART_PAGES * PAGE_BYTES // 60 + 1, 5, 5000])
    pages = HistoryPages(2**23)
    assert pages.lay_out(history).num_pages > 5 * PART_PAGES
    assert_equal(pages.read(written(pages, history)), history)


@pytest.mark.parametrize("lengths", [[400, 400, 130], [256, 256, 1], [1, 1, 1]])
def test_a_history_is_copied_into_a_room_of_a_buckets_size(lengths: list[int]) -> None:
    """From pages that lie anywhere, over what a longer history has left there."""
    torch.manual_seed(2)
    pages = HistoryPages(2**20, for_rooms=True)
    gone, whole = written(pages, random_history([77])), random_history(lengths)
    longer = random_history([512, 512, 256])
    room = make_room(longer, (512, 512, 256))
    fill_room(room, longer)

    pages.release(gone)
    pages.copy_to(room, written(pages, whole))
    assert_equal(_counted_rows(room), whole)
    for place, former, num_rows in zip(room.history.layers, longer.layers, lengths, strict=True):
        behind = -(-num_rows * 60 // PAGE_BYTES) * PAGE_BYTES // 60 + 1
        assert torch.equal(place.k_THD[behind:], former.k_THD[behind:])

    fill_room(room, longer)
    assert_equal(_counted_rows(room), longer)


@pytest.mark.parametrize("words", [512, 6])
@pytest.mark.parametrize("lengths", [[3, 2], [1, 0, 9, 4], [0, 0]])
def test_the_kernel_copies_the_pages_that_the_reference_does(
    lengths: list[int], words: int
) -> None:
    rng = np.random.default_rng(len(lengths))
    block = torch.from_numpy(rng.integers(-(2**62), 2**62, (40, words)))
    pages = torch.from_numpy(rng.permutation(40)[: sum(lengths)])
    begins = torch.tensor([0, *np.cumsum(lengths).tolist()])
    places = begins[:-1] + 3 * torch.arange(1, len(lengths) + 1)
    copied = []
    for backend in ("triton", "reference"):
        target = torch.zeros(40, words, dtype=torch.int64)
        longest = max(lengths)
        copy_pieces(block, pages, begins, target, places, longest=longest, backend=backend)
        copied.append(target)
    assert torch.equal(*copied)
    assert int((copied[0] != 0).any(1).sum()) == sum(lengths)


@pytest.mark.parametrize("words", [512, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_kernel_fills_the_pages_that_the_reference_does(words: int, dtype: torch.dtype) -> None:
    """Of some sources most words count, of others some or none."""
    torch.manual_seed(words)
    sources = [torch.randn(num, 5, 4).to(dtype) for num in (78, 300, 8, 11)]
    counts = [77, 130, 0, 1]  # rows of them
    bytes_of = [num * 20 * dtype.itemsize for num in counts]
    num_words = torch.tensor([even_words(num) for num in bytes_of])
    num_pages = -(-num_words // words)
    begins = torch.nn.functional.pad(num_pages.cumsum(0), (1, 0))
    pages = torch.randperm(700)[: int(begins[-1])]
    filled = []
    for backend in ("triton", "reference"):
        block = torch.full((700, words), -1)
        fill_pages(
            *(sources, find_addresses(sources), num_words, block, pages, begins),
            longest=int(num_pages.max()),
            backend=backend,
        )
        filled.append(block)
    assert torch.equal(*filled)

    for piece, source in enumerate(sources):
        own = filled[0][pages[begins[piece] : begins[piece + 1]]].view(-1).view(torch.uint8)
        rows = own[: bytes_of[piece]].view(dtype).view(-1, 5, 4)
        assert torch.equal(rows, source[: counts[piece]])
        assert (own[8 * int(num_words[piece]) :] == 255).all(), "what is behind them stays"


def test_sources_without_an_address_of_whole_words_are_refused() -> None:
    with pytest.raises(ValueError, match="16-byte aligned"):
        find_addresses([torch.zeros(9, dtype=torch.int32)[1:]])
    with pytest.raises(ValueError, match="contiguous"):
        find_addresses([torch.zeros(4, 4)[:, :2]])


def _counted_rows(room: Room) -> HistoryCache:
    layers = []
    for layer in room.history.layers:
        num_rows = int(layer.offsets[1])
        layers.append(LayerCache(layer.k_THD[:num_rows], layer.v_THV[:num_rows], layer.offsets))
    return HistoryCache(tuple(layers))


def test_a_held_entry_keeps_its_pages_until_it_is_released() -> None:
    caches = HistoryCaches(CacheBudget(3 * PAGE_BYTES + 2**12, for_rooms=True))
    first, second = random_history([9]), random_history([12])
    caches.keep_entry(b"first", first)
    held = caches.hold_entry(b"first")
    assert held is not None and held.lengths == (9,)

    caches.keep_entry(b"second", second)  # there is no room for both, and this one is read
    assert_equal(held.read(), first)
    assert caches.find_entry(b"second") is None
    caches.release_entries([held])
    caches.keep_entry(b"second", second)
    kept = caches.find_entry(b"second")
    assert kept is not None
    assert_equal(kept, second)
    assert (caches.hits, caches.misses) == (2, 1)


def test_an_empty_history_takes_no_page() -> None:
    pages = HistoryPages(PAGE_BYTES)
    history = random_history([0])
    assert_equal(pages.read(written(pages, history)), history)
    assert pages.num_free == 1


@pytest.mark.parametrize("max_bytes", [0, 5000, 300_000])
def test_a_full_cache_keeps_everything_in_its_block(max_bytes: int) -> None:
    """Whatever came and went: no tensor of a kept history lies in the heap, between others."""
    rng = np.random.default_rng(1)
    caches = HistoryCaches(CacheBudget(max_bytes))
    budget = caches.budget
    for number in range(400):
        caches.keep_entry(str(number).encode(), random_history([int(rng.integers(1, 120))]))
        taken = sum(len(entry.pages) for entry in budget.entries.values())
        assert taken * PAGE_BYTES + budget.pages.num_free * PAGE_BYTES <= max_bytes
        sizes = [resident_bytes(len(entry.pages), 1) for entry in budget.entries.values()]
        assert budget.num_bytes == sum(sizes) <= max_bytes

    assert (caches.num_entries > 1) == (max_bytes == 300_000)
    # those of one length share all that is not in the block
    by_length: dict[int, set[int]] = {}
    for entry in budget.entries.values():
        (layer,) = entry.layers
        assert layer.offsets.untyped_storage().nbytes() == 16
        by_length.setdefault(layer.keys.shape[0], set()).add(id(entry.layout))
    assert all(len(layouts) == 1 for layouts in by_length.values())
    assert max_bytes < 300_000 or len(by_length) < caches.num_entries
    caches.close()
    assert budget.pages.num_free == max_bytes // PAGE_BYTES


def test_an_entry_that_is_read_keeps_its_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evicted in the middle of a copy, it is counted, and nobody writes over it, until the end."""
    caches = HistoryCaches(CacheBudget(resident_bytes(1, 1)))
    first, second = random_history([30]), random_history([30])
    caches.keep_entry(b"first", first)
    read = caches.budget.pages.read

    def read_slowly(history: PagedHistory) -> HistoryCache:
        caches.keep_entry(b"second", second)  # as another thread does
        assert caches.num_entries == 0 and caches.num_bytes > 0
        return read(history)

    monkeypatch.setattr(caches.budget.pages, "read", read_slowly)
    found = caches.find_entry(b"first")
    monkeypatch.undo()
    assert found is not None
    assert_equal(found, first)
    assert caches.num_bytes == caches.budget.num_bytes == 0

    caches.keep_entry(b"second", second)
    kept = caches.find_entry(b"second")
    assert kept is not None
    assert_equal(kept, second)
    caches.close()
    assert caches.budget.pages.num_free == 1


def test_a_copy_that_fails_gives_its_pages_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU without room for the copy: the cache keeps its size."""
    caches = HistoryCaches(CacheBudget(resident_bytes(2, 1)))
    pages = caches.budget.pages

    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pages, "write", fail)
    with pytest.raises(torch.OutOfMemoryError):
        caches.keep_entry(b"first", random_history([30]))
    monkeypatch.undo()
    assert caches.num_bytes == caches.budget.num_bytes == 0
    assert pages.num_free == 2

    caches.keep_entry(b"first", random_history([30]))
    assert caches.num_entries == 1


def test_what_is_kept_while_its_model_goes_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update takes a version away in the middle of a pass: nobody would find the entry again."""
    caches = HistoryCaches(CacheBudget(resident_bytes(2, 1)))
    pages = caches.budget.pages
    write = pages.write

    def write_late(history: PagedHistory, entry: HistoryCache) -> None:
        caches.close()
        write(history, entry)

    monkeypatch.setattr(pages, "write", write_late)
    caches.keep_entry(b"first", random_history([30]))
    assert not caches.budget.entries
    assert caches.num_bytes == caches.budget.num_bytes == 0
    assert pages.num_free == 2
