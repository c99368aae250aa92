"""The candidate pass as CUDA graphs: for a few users' candidates, launching the kernels takes
longer than running them.

A graph holds fixed addresses and sizes. So a user's keys and values are copied into room of a
bucket's size first, the candidates too, and the offsets, which the kernels read on the device, say
how much of it counts.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.model.inference.cached_scoring import (
    HistoryCache,
    LayerCache,
    layer_outputs,
    score_candidates,
)
from pipeline.model.ranker import RankingModel

FEWEST_ROWS, FEWEST_KEYS = 64, 256  # of a bucket; larger ones are powers of two
# users together up to which they go one after another: launching a pass over all of them takes the
# host as long as so many replays
MOST_REPLAYS = 8
WARM_UPS = 2  # passes before a capture: they compile kernels and make what is kept between passes


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    x_CE: Tensor
    row_offsets: Tensor  # int64 [2]
    out_CE: Tensor


class GraphedScorer:
    """`score_candidates` on a GPU, a few users one after another; more of them are launched
    together.

    Besides the graphs it holds room for a history in each bucket of lengths that has come, all
    together at most twice what the longest takes. Threads take turns: the room is shared.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rooms: dict[tuple[int, ...], HistoryCache] = {}
        self._graphs: dict[tuple[int, ...], _Graph] = {}

    def __call__(
        self,
        model: RankingModel,
        caches: Sequence[HistoryCache],
        batch: SequenceBatch,
        micro_batch: int,
    ) -> Tensor:
        """Logits, float32 [C, tasks], of the candidates of the users whose histories are `caches`,
        in the order of `batch`.
        """
        if len(caches) > MOST_REPLAYS:
            return score_together(model, caches, batch, micro_batch)

        x_CE = model.encoder.candidate_rows(batch)
        bounds = batch.on_host.seq_offsets.tolist()
        parts: list[Tensor] = []
        with self._lock:
            for cache, (begin, end) in zip(caches, pairwise(bounds), strict=True):
                parts += self._score_user(model, cache, x_CE[begin:end], micro_batch)
        return model.score_rows(torch.cat(parts), batch)

    def _score_user(
        self, model: RankingModel, cache: HistoryCache, x_CE: Tensor, micro_batch: int
    ) -> list[Tensor]:
        """The transducers' outputs of one user's candidates, in parts."""
        sizes = tuple(bucket_size(len(layer.k_THD), FEWEST_KEYS) for layer in cache.layers)
        if sizes not in self._rooms:
            self._rooms[sizes] = make_room(cache, sizes)
        room = self._rooms[sizes]
        fill_room(room, cache)
        return [self._replay(model, room, sizes, rows) for rows in x_CE.split(micro_batch)]

    def _replay(
        self, model: RankingModel, room: HistoryCache, sizes: tuple[int, ...], rows: Tensor
    ) -> Tensor:
        num_rows = len(rows)
        key = bucket_size(num_rows, FEWEST_ROWS), *sizes
        if key not in self._graphs:
            self._graphs[key] = _capture(model, room, rows.new_zeros(key[0], rows.shape[1]))
        captured = self._graphs[key]
        captured.x_CE[:num_rows].copy_(rows)
        captured.row_offsets[1].fill_(num_rows)
        captured.graph.replay()
        return captured.out_CE[:num_rows].clone()


def score_together(
    model: RankingModel, caches: Sequence[HistoryCache], batch: SequenceBatch, micro_batch: int
) -> Tensor:
    """`score_candidates` of the users whose histories are `caches`."""
    return score_candidates(model, HistoryCache.join_histories(caches), batch, micro_batch)


def bucket_size(size: int, fewest: int) -> int:
    """The smallest power of two that holds `size`, `fewest` at least: 70 rows lie in 128."""
    return max(fewest, 1 << (size - 1).bit_length())


def bucket_sizes(most_rows: int) -> list[int]:
    """A number of candidates in each bucket that up to `most_rows` come in: 64, 128, 200 of 200."""
    found = []
    size = FEWEST_ROWS
    while size < most_rows:
        found.append(size)
        size *= 2
    return [*found, most_rows]


def make_room(like: HistoryCache, sizes: tuple[int, ...]) -> HistoryCache:
    """Room for one history with `sizes` rows in its layers."""
    shared: dict[int, Tensor] = {}  # layers that share their offsets go on sharing them
    layers = []
    for layer, size in zip(like.layers, sizes, strict=True):
        keys = layer.k_THD.new_zeros(size, *layer.k_THD.shape[1:])
        values = layer.v_THV.new_zeros(size, *layer.v_THV.shape[1:])
        offsets = shared.setdefault(id(layer.offsets), torch.zeros_like(layer.offsets))
        layers.append(LayerCache(keys, values, offsets))
    return HistoryCache(tuple(layers))


def fill_room(room: HistoryCache, cache: HistoryCache) -> None:
    """Copy a history into the room, and its lengths.

    Behind it lies what an earlier one left, finite or not: attention reads no number of it.
    """
    key_places, keys, value_places, values = [], [], [], []
    lengths: dict[int, tuple[Tensor, int]] = {}
    for place, kept in zip(room.layers, cache.layers, strict=True):
        num_rows = len(kept.k_THD)
        key_places.append(place.k_THD[:num_rows])
        keys.append(kept.k_THD)
        value_places.append(place.v_THV[:num_rows])
        values.append(kept.v_THV)
        lengths[id(place.offsets)] = place.offsets, num_rows

    torch._foreach_copy_(key_places, keys)  # pyright: ignore[reportPrivateImportUsage]
    torch._foreach_copy_(value_places, values)  # pyright: ignore[reportPrivateImportUsage]
    for offsets, num_rows in lengths.values():
        offsets[1].fill_(num_rows)


def _capture(model: RankingModel, room: HistoryCache, x_CE: Tensor) -> _Graph:
    row_offsets = torch.tensor([0, len(x_CE)], device=x_CE.device)
    half = torch.is_autocast_enabled("cuda")
    # Autocast's own copies of weights would be freed with its block, and the graph would go on
    # reading them.
    with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), half, cache_enabled=False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                layer_outputs(model, room, x_CE, row_offsets)
        torch.cuda.current_stream().wait_stream(stream)
        # a change: the list of tiles is made anew, inside the graph
        row_offsets[1].fill_(len(x_CE))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            out_CE = layer_outputs(model, room, x_CE, row_offsets)
    return _Graph(graph, x_CE, row_offsets, out_CE)
