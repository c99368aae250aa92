"""Passes over whole batches as CUDA graphs: encoding one long history, or scoring in FP8, launching
the layers' kernels takes the host longer than the device needs to run them.

    batch ──fill up, copy──▶ the graph's buffer ──replay──▶ padded results ──▶ those of its own rows

For candidates of an encoded history see `cuda_graph.py`.
"""

import threading
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kernels.pages.op import find_addresses
from pipeline.batches.collate import Filling, SequenceBatch
from pipeline.batches.filling import BatchFiller
from pipeline.batches.graphs import BatchGraph, BatchGraphs, Results
from pipeline.config import ModelConfig, RunConfig
from pipeline.model.encoders import ENCODERS
from pipeline.model.inference.cached_scoring import HistoryCache, LayerCache, encode_history
from pipeline.model.inference.rooms import FilledHistory
from pipeline.model.ranker import RankingModel

Kept = TypeVar("Kept")

# Numbers of tokens from a power of two to the next: requests are of all lengths, and each size is
# recorded while somebody waits and keeps its results' memory.
SIZES = 2
MOST_GRAPHS = 64


class GraphedModel:
    """A model on a GPU whose passes are recorded for sizes of batches that come again, and launched
    for others. Call it without gradients, always in one number format. Threads take turns.

    Its encoder must have fixed sizes (`Encoder.has_fixed_sizes`).
    """

    def __init__(self, model: RankingModel, cfg: RunConfig, sizes: int = SIZES) -> None:
        self.model, self.model_cfg = model, cfg.model
        self.filler = BatchFiller.of_run(cfg, sizes)
        self.device = next(model.parameters()).device
        self._lock = threading.Lock()
        # not methods of its own: it would lie in memory, with the weights, until a collection
        self._encoding = BatchGraphs(partial(_encode, model), MOST_GRAPHS)
        self._scoring = BatchGraphs(partial(_score, model), MOST_GRAPHS)
        # of graphs that encode: `FilledHistory.addresses` of their results
        self._addresses: WeakKeyDictionary[BatchGraph, Tensor] = WeakKeyDictionary()

    @staticmethod
    def fits(cfg: ModelConfig) -> bool:
        """Tell whether the sizes of all tensors follow from those of a filled batch."""
        return ENCODERS[cfg.encoder].has_fixed_sizes(cfg)

    def score(self, batch: SequenceBatch) -> Tensor:
        """`model(batch)`: logits, float32 [C, tasks]."""
        num_targets = int(batch.num_targets.sum())
        if batch.num_tokens == 0:
            return self.model(batch.to(self.device))
        return self.score_filled(self.fill(batch), num_targets)

    def score_filled(self, filled: SequenceBatch, num_targets: int) -> Tensor:
        """The same of a batch from `fill`, of whose candidates the first `num_targets` count."""
        with self._lock:
            graph = self._scoring.find(filled)
            if graph is None:
                (logits,) = _score(self.model, filled)
                return logits[:num_targets]
            (logits,) = graph.replay(filled)
            return logits[:num_targets].clone()

    def encode_history(self, batch: SequenceBatch) -> HistoryCache:
        """`encode_history` of B histories without candidates, from the CPU."""
        if batch.num_tokens == 0:
            return encode_history(self.model, batch.to(self.device))

        own_rows = self._own_rows(batch)
        filled = self._fill_on_host(batch)
        with self._lock:
            results, _ = self._encode_filled(filled)
            return self._own_cache(results, own_rows, batch.num_sequences)

    def encode_kept(
        self, batch: SequenceBatch, keep: Callable[[FilledHistory], Kept | None]
    ) -> Kept | HistoryCache:
        """One history without candidates, from the CPU, as `keep` keeps it; in memory of its own
        where that is None. `keep` begins its copy before it returns.
        """
        assert batch.num_sequences == 1
        if batch.num_tokens == 0:
            return encode_history(self.model, batch.to(self.device))

        own_rows = self._own_rows(batch)
        filled = self._fill_on_host(batch)
        with self._lock:
            results, graph = self._encode_filled(filled)
            kept = keep(self._filled_history(results, own_rows, graph))
            return self._own_cache(results, own_rows, 1) if kept is None else kept

    def _encode_filled(self, filled: SequenceBatch) -> tuple[Results, BatchGraph | None]:
        """Results of a filled batch on the CPU, and the graph that was replayed for them."""
        graph = self._encoding.find(filled)
        if graph is None:
            return _encode(self.model, filled.to(self.device)), None
        return graph.replay(filled), graph

    def _filled_history(
        self, results: Results, own_rows: tuple[int, int], graph: BatchGraph | None
    ) -> FilledHistory:
        tensors: list[Tensor] = []
        for keys, values in zip(results[0::3], results[1::3], strict=True):
            tensors += [keys, values]

        addresses = None if graph is None else self._addresses.get(graph)
        if addresses is None:
            addresses = find_addresses(tensors).to(self.device)
            if graph is not None:
                self._addresses[graph] = addresses
        num_layers = len(tensors) // 2
        lengths = tuple([own_rows[self._is_cut(depth)] for depth in range(num_layers)])
        return FilledHistory(tuple(tensors), results[2::3], lengths, addresses)

    def _is_cut(self, depth: int) -> bool:
        """True of a layer that has only what truncation leaves."""
        truncates = self.model_cfg.truncate_after_layer
        return truncates is not None and depth >= truncates

    def lengths_of_sizes(self, longest: int) -> list[int]:
        """The shortest history of each size that one of up to `longest` events is filled up to, and
        the longest.
        """
        none = torch.zeros(1, dtype=torch.int64)

        def sizes_of(length: int) -> Filling:
            filling, _ = self.filler.next_sizes(torch.tensor([length]), none)
            return filling.sizes

        found: list[int] = []
        length = 1
        while length <= longest:
            found.append(length)
            sizes = sizes_of(length)  # no number in it falls as histories grow
            longer = range(length, longest + 1)
            length += bisect_left(longer, True, key=lambda one: sizes_of(one) != sizes)
        # what each layer keeps of it may need another room than what shorter ones do
        return found if found[-1] == longest else [*found, longest]

    def fill(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch, from the CPU, filled up to one of few sizes and on the device."""
        return self._fill_on_host(batch).to(self.device)

    def _fill_on_host(self, batch: SequenceBatch) -> SequenceBatch:
        """The same before its copy; a graph copies it to where it reads by itself."""
        return self.filler.fill(batch).pack(pin_memory=self.device.type == "cuda")

    def _own_rows(self, batch: SequenceBatch) -> tuple[int, int]:
        """Tokens of the batch's own sequences, before truncation and after."""
        context = self.filler.num_context * batch.num_sequences
        kept = context + batch.num_tokens
        if self.filler.keep_events is not None:
            lengths, targets = batch.seq_offsets.diff(), batch.num_targets.long()
            kept = int(self.filler.kept_lengths(lengths, targets, batch.target_span).sum())
        return context + batch.num_tokens, kept

    def _own_cache(
        self, results: Results, own_rows: tuple[int, int], num_sequences: int
    ) -> HistoryCache:
        """The caches of the first `num_sequences` sequences, in memory of their own."""
        layers: list[LayerCache] = []
        shared: dict[int, Tensor] = {}  # layers that share their offsets go on sharing them
        found, own = [], []
        of_layers = zip(results[0::3], results[1::3], results[2::3], strict=True)
        for depth, (keys, values, offsets) in enumerate(of_layers):
            num_rows = own_rows[self._is_cut(depth)]
            if id(offsets) not in shared:
                shared[id(offsets)] = offsets[: num_sequences + 1].clone()
            keys, values = keys[:num_rows], values[:num_rows]
            layer = LayerCache(
                torch.empty_like(keys), torch.empty_like(values), shared[id(offsets)]
            )
            found += [keys, values]
            own += [layer.k_THD, layer.v_THV]
            layers.append(layer)

        # a few launches for all of them
        torch._foreach_copy_(own, found)  # pyright: ignore[reportPrivateImportUsage]
        return HistoryCache(tuple(layers))


def _score(model: RankingModel, batch: SequenceBatch) -> Results:
    with _own_casts(batch):
        return (model(batch),)


def _encode(model: RankingModel, batch: SequenceBatch) -> Results:
    """Keys, values and offsets of each layer's cache, one after another."""
    with _own_casts(batch):
        cache = encode_history(model, batch)
    results = []
    for layer in cache.layers:
        results += [layer.k_THD, layer.v_THV, layer.offsets]
    return tuple(results)


def _own_casts(batch: SequenceBatch) -> torch.autocast:
    """Autocast as it is, without its own copies of weights: they would be freed with its block, and
    a graph would go on reading them.
    """
    kind = batch.position.device.type
    half, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    return torch.autocast(kind, dtype, half, cache_enabled=False)
