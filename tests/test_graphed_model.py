"""Passes of a model that are replayed for batches of one size: the model's own results."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from pipeline.batches.filling import BatchFiller
from pipeline.batches.graphs import BatchGraphs, record_graph
from pipeline.config import DenseFeature
from pipeline.model.inference.cached_scoring import HistoryCache, encode_history
from pipeline.model.inference.cuda_graph import FEWEST_ROWS, bucket_size, bucket_sizes
from pipeline.model.inference.graphed_model import GraphedModel
from serve_app.ranking.history_cache import CacheBudget, HeldHistory, HistoryCaches
from tests.support.graphs import capture_none
from tests.worlds.mixture import ENGAGED, EVERY_ROW, make_mixture
from tests.worlds.model import make_batch, make_config, make_model

TRUNCATED = make_config(num_layers=3, truncate_after_layer=1, truncate_to=4)
DENSE = replace(
    TRUNCATED,
    features=replace(TRUNCATED.features, dense={"popularity": DenseFeature(by=("item_id",))}),
)
CONFIGS = {
    "plain": make_config(),
    "truncation": TRUNCATED,
    "dense features": DENSE,
    "merged HSTU": make_config(encoder="hstu_merged", attention={"window": None}),
}
# of one size, when filled up; the last two of others, which come once
LENGTHS = [9, 0, 14, 7], [9, 0, 14, 6], [10, 0, 13, 7], [3], [40]


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BatchGraphs, "_capture", capture_none)


def with_rates(batch, cfg):
    """The batch with a rate for each candidate, where the model reads one."""
    if not cfg.features.dense:
        return batch
    num_candidates = int(batch.num_targets.sum())
    generator = torch.Generator().manual_seed(num_candidates)
    dense = torch.rand(num_candidates, 2 * len(cfg.tasks), generator=generator)
    return replace(batch, dense=dense.double())


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_replayed_scores_are_those_of_the_model(name: str) -> None:
    cfg = CONFIGS[name]
    model = make_model(cfg)
    graphed = GraphedModel(model, cfg)
    for seed, lengths in enumerate(LENGTHS):
        candidates = [3] * len(lengths)
        batch = make_batch(lengths, candidates, seed)
        scores = graphed.score(batch)
        torch.testing.assert_close(scores, model(batch), rtol=1e-9, atol=1e-9)
    assert (graphed._scoring.captured, graphed._scoring.replayed) == (1, 2)


@pytest.mark.parametrize("name", ["plain", "truncation", "dense features"])
@torch.no_grad()
def test_replayed_histories_are_those_that_the_model_encodes(name: str) -> None:
    cfg = CONFIGS[name]
    model = make_model(cfg)
    graphed = GraphedModel(model, cfg)
    for seed, lengths in enumerate([*LENGTHS, [0]]):
        batch = make_batch(lengths, [0] * len(lengths), seed)
        cache, expected = graphed.encode_history(batch), encode_history(model, batch)
        for found, layer in zip(cache.layers, expected.layers, strict=True):
            assert torch.equal(found.offsets, layer.offsets)
            torch.testing.assert_close(found.k_THD, layer.k_THD, rtol=1e-9, atol=1e-9)
            torch.testing.assert_close(found.v_THV, layer.v_THV, rtol=1e-9, atol=1e-9)
    assert (graphed._encoding.captured, graphed._encoding.replayed) == (1, 2)

    # layers share their offsets as those of a launched pass do: a plan serves all of them
    first, *_, last = cache.layers
    assert (first.offsets is last.offsets) == (cfg.model.truncate_after_layer is None)


@pytest.mark.parametrize("name", ["plain", "truncation"])
@torch.no_grad()
def test_a_history_goes_from_a_graph_into_pages(name: str) -> None:
    """Over what another has left in the graph's results, and in pages of any places."""
    cfg = CONFIGS[name]
    graphed = GraphedModel(make_model(cfg), cfg)
    caches = HistoryCaches(CacheBudget(2**22, for_rooms=True))
    lengths = [9, 40, 3, 41, 9, 300, 8, 280, 1]
    held = []
    for seed, length in enumerate(lengths):
        batch = make_batch([length], [0], seed)
        found = graphed.encode_kept(batch, partial(caches.keep_entry, bytes([seed])))
        assert isinstance(found, HeldHistory)
        held.append(found)
        if seed == 3:  # the pages of these come to others
            caches.release_entries(held[1:3])
            for entry in held[1:3]:
                caches.budget.pages.release(entry.entry)

    assert graphed._encoding.replayed > 2
    for seed, found in enumerate(held):
        if seed not in (1, 2):
            batch = make_batch([lengths[seed]], [0], seed)
            assert_same(found.read(), graphed.encode_history(batch))


@torch.no_grad()
def test_a_history_that_is_not_kept_has_memory_of_its_own() -> None:
    cfg = CONFIGS["truncation"]
    graphed = GraphedModel(make_model(cfg), cfg)
    caches = HistoryCaches(CacheBudget(2**12, for_rooms=True))  # a page, and a history has six
    found = []
    for seed in range(4):
        batch = make_batch([20], [0], seed)
        found.append(graphed.encode_kept(batch, partial(caches.keep_entry, bytes([seed]))))
    for seed, cache in enumerate(found):
        assert isinstance(cache, HistoryCache)
        assert_same(cache, graphed.encode_history(make_batch([20], [0], seed)))
    assert caches.num_entries == 0


def assert_same(one: HistoryCache, other: HistoryCache) -> None:
    for mine, theirs in zip(one.layers, other.layers, strict=True):
        assert torch.equal(mine.offsets, theirs.offsets)
        assert torch.equal(mine.k_THD, theirs.k_THD)
        assert torch.equal(mine.v_THV, theirs.v_THV)


def test_a_graphed_model_goes_when_nobody_holds_it() -> None:
    """With its weights, without waiting for a collection: a server swaps versions."""
    cfg = CONFIGS["plain"]
    graphed = GraphedModel(make_model(cfg), cfg)
    with torch.no_grad():
        for seed in range(3):
            graphed.encode_history(make_batch([9, 14], [0, 0], seed))
    assert graphed._encoding.captured == 1
    gone = weakref.ref(graphed)
    gc.disable()
    try:
        del graphed
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("num_context", [0, 2])
@pytest.mark.parametrize("keep_events", [None, 12, 64])
def test_every_length_has_the_size_of_one_that_a_server_records(
    num_context: int, keep_events: int | None
) -> None:
    """The longest too, which all users have that have as many events as are read."""
    graphed = GraphedModel(make_model(CONFIGS["plain"]), CONFIGS["plain"])
    graphed.filler = BatchFiller(num_context, keep_events, sizes=2)
    none = torch.zeros(1, dtype=torch.int64)

    def sizes_of(length: int) -> object:
        return graphed.filler.next_sizes(torch.tensor([length]), none)[0].sizes

    for longest in (1, 7, 64, 100, 128):
        lengths = graphed.lengths_of_sizes(longest)
        recorded = {sizes_of(length) for length in lengths}
        assert recorded == {sizes_of(length) for length in range(1, longest + 1)}
        assert lengths[-1] == longest and len(recorded) >= len(lengths) - 1


def test_a_model_whose_sizes_are_the_batchs_own_is_not_recorded() -> None:
    mixture = make_mixture("request", engaged=ENGAGED, all=EVERY_ROW)
    fitting = [GraphedModel.fits(cfg.model) for cfg in CONFIGS.values()]
    assert fitting == [True] * len(CONFIGS)
    assert not GraphedModel.fits(mixture.model)
    assert not GraphedModel.fits(make_config(merge=False).model)
    assert not GraphedModel.fits(make_config(encoder="sasrec", attention={"window": None}).model)


def test_every_bucket_of_candidates_has_a_number_of_them() -> None:
    for most in (1, 64, 65, 200, 1024):
        asked = {bucket_size(count, FEWEST_ROWS) for count in range(1, most + 1)}
        made = [bucket_size(count, FEWEST_ROWS) for count in bucket_sizes(most)]
        assert (set(made), len(made)) == (asked, len(asked))


def test_nothing_is_collected_while_a_graph_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "graph", lambda *_, **__: nullcontext())
    no_graph: Any = None
    with record_graph(no_graph):
        assert not gc.isenabled()
    assert gc.isenabled()

    with pytest.raises(ValueError, match="inside"), record_graph(no_graph):
        raise ValueError("inside")
    assert gc.isenabled()

    # who has turned collections off finds them off
    gc.disable()
    try:
        with record_graph(no_graph):
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_threads_record_one_after_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch gives all recordings one stream, and each of two models has its own lock."""
    inside, most = 0, 0

    @contextmanager
    def count(*_: object, **__: object) -> Iterator[None]:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        with suppress(threading.BrokenBarrierError):
            together.wait()  # a moment, for the other to come in
        yield
        inside -= 1

    together = threading.Barrier(2, timeout=0.3)
    monkeypatch.setattr(torch.cuda, "graph", count)
    no_graph: Any = None

    def record() -> None:
        with record_graph(no_graph):
            pass

    threads = [threading.Thread(target=record) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (most, inside) == (1, 0)
    assert gc.isenabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_former_graph_that_is_garbage_does_not_spoil_a_recording() -> None:
    counted = torch.zeros(1, device="cuda")
    rounds = 3

    def record() -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with record_graph(graph):
            counted.add_(1)
            held = [[number] for number in range(1000)]  # new objects bring a collection about
            counted.add_(len(held) / 1000)
        return graph

    thresholds = gc.get_threshold()
    gc.set_threshold(1, 1, 1)
    try:
        for _ in range(rounds):
            cycle: list[object] = [record()]
            cycle.append(cycle)
            del cycle
            record().replay()
    finally:
        gc.set_threshold(*thresholds)
    assert counted.item() == 2 * rounds
