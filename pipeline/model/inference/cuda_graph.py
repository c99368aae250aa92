"""The candidates' pass as CUDA graphs: for a few users' candidates, launching the kernels takes
longer than running them.

    candidates ──filled up, one copy──▶ the graph's buffer ─┐
    keys and values ──copy──▶ room of a bucket's size ──────┴─replay─▶ logits of its own rows

A graph holds fixed addresses and sizes, from the candidates' codes to their logits. The offsets,
which the kernels read on the device, say how much of the room and of the rows counts.
"""

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.graphs import record_graph
from pipeline.batches.packing import Packed, pack_tensors
from pipeline.model.inference.cached_scoring import HistoryCache, layer_outputs, score_candidates
from pipeline.model.inference.rooms import Room, StoredHistory, fill_room, make_room
from pipeline.model.ranker import RankingModel

FEWEST_ROWS, FEWEST_KEYS = 64, 256  # of a bucket; larger ones are powers of two
# Users together go one after another up to so many, and one more for each ROWS_A_REPLAY of their
# rows. On an H200 a replay of 512 candidates over 4,096 rows takes 1.1 ms; launching a pass over
# all takes 7 ms, and .55 µs a row.
MOST_REPLAYS, ROWS_A_REPLAY = 8, 2048
WARM_UPS = 2  # passes before a capture: they compile kernels and make what is kept between passes
# what candidates without history rows are made of, a row each; `row_offsets` lies beside them
COLUMNS = ("item_codes", "request_codes", "position", "gap_ms", "dense")
ROW_OFFSETS = "row_offsets"  # int64 [2]: 0, and how many of the rows count

Encoded = HistoryCache | StoredHistory


@dataclass(frozen=True, slots=True)
class _Graph:
    graph: torch.cuda.CUDAGraph
    packed: Packed  # the candidates that it reads
    logits: Tensor  # float32 [size, tasks]


class GraphedScorer:
    """`score_candidates` on a GPU, a few users one after another; more of them are launched
    together.

    Besides the graphs it holds room for a history in each bucket of lengths that has come, all
    together at most twice what the longest takes. Threads take turns: the room is shared.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._rooms: dict[tuple[int, ...], Room] = {}
        self._graphs: dict[tuple[int, ...], _Graph] = {}

    def __call__(
        self,
        model: RankingModel,
        caches: Sequence[Encoded],
        batch: SequenceBatch,
        micro_batch: int,
    ) -> Tensor:
        """Logits, float32 [C, tasks], of the candidates of the users whose histories are `caches`,
        in the order of `batch`, which comes from the CPU.
        """
        host = batch.on_host
        num_rows = host.num_tokens + sum([max(cache.lengths) for cache in caches])
        if host.num_tokens == 0 or not replays_pay(len(caches), num_rows):
            return score_together(model, caches, batch, micro_batch)

        logits: list[Tensor] = []
        with self._lock:
            for cache, (begin, end) in zip(
                caches, pairwise(host.seq_offsets.tolist()), strict=True
            ):
                logits += self._score_user(model, cache, host, range(begin, end), micro_batch)
        return torch.cat(logits)

    def _score_user(
        self,
        model: RankingModel,
        cache: Encoded,
        batch: SequenceBatch,
        rows: range,
        micro_batch: int,
    ) -> list[Tensor]:
        """Logits of one user's candidates, `rows` of the batch, in parts."""
        sizes = tuple([bucket_size(length, FEWEST_KEYS) for length in cache.lengths])
        if sizes not in self._rooms:
            like = cache if isinstance(cache, HistoryCache) else cache.read()
            self._rooms[sizes] = make_room(like, sizes)
        room = self._rooms[sizes]
        if isinstance(cache, HistoryCache):
            fill_room(room, cache)
        else:
            cache.copy_to(room)

        logits = []
        for first in range(rows.start, rows.stop, micro_batch):
            part = range(first, min(first + micro_batch, rows.stop))
            logits.append(self._replay(model, room, sizes, batch, part))
        return logits

    def _replay(
        self,
        model: RankingModel,
        room: Room,
        sizes: tuple[int, ...],
        batch: SequenceBatch,
        rows: range,
    ) -> Tensor:
        size = bucket_size(len(rows), FEWEST_ROWS)
        packed = pack_candidates(batch, rows, size, pin_memory=room.buffer.is_cuda)
        key = size, *sizes
        if key not in self._graphs:
            # one at a time runs, so they share their memory
            like = next(iter(self._graphs.values()), None)
            self._graphs[key] = _capture(model, room, packed, like)
        captured = self._graphs[key]
        captured.packed.buffer.copy_(packed.buffer, non_blocking=True)
        captured.graph.replay()
        return captured.logits[: len(rows)].clone()


def replays_pay(num_users: int, num_rows: int) -> bool:
    """Tell whether replays one after another take less than a launched pass over all users, whose
    histories and candidates have `num_rows` rows.
    """
    return num_users <= MOST_REPLAYS + num_rows // ROWS_A_REPLAY


def score_together(
    model: RankingModel, caches: Sequence[Encoded], batch: SequenceBatch, micro_batch: int
) -> Tensor:
    """`score_candidates` of the users whose histories are `caches`, launched."""
    read = [cache if isinstance(cache, HistoryCache) else cache.read() for cache in caches]
    there = batch.to(read[0].layers[0].k_THD.device)
    return score_candidates(model, HistoryCache.join_histories(read), there, micro_batch)


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


def pack_candidates(
    batch: SequenceBatch, rows: range, size: int, *, pin_memory: bool = False
) -> Packed:
    """The columns of some candidates of a batch on the CPU, filled up to `size` rows, and their
    `row_offsets`.

        rows 2..4 of       a b c d e      size = 4
        packed             c d e e        row_offsets 0 3
    """
    columns = {}
    for name in COLUMNS:
        column = getattr(batch, name)
        if column is not None:
            own = column[rows.start : rows.stop]
            # a row that there is: padding looks up no row of a table that its user does not
            more = own[-1:].expand(size - len(rows), *own.shape[1:])
            columns[name] = torch.cat([own, more]) if len(more) else own
    offsets = torch.tensor([0, len(rows)])
    return pack_tensors(columns | {ROW_OFFSETS: offsets}, pin_memory=pin_memory)


def candidate_logits(model: RankingModel, room: Room, packed: Packed) -> Tensor:
    """Logits, float32 [size, tasks], of what `pack_candidates` made, on the room's device; those
    behind `row_offsets` are of no use.
    """
    columns = packed.views()
    row_offsets = columns.pop(ROW_OFFSETS)
    batch = _candidate_batch(columns)
    x_CE = layer_outputs(model, room.history, model.encoder.candidate_rows(batch), row_offsets)
    return model.score_rows(x_CE, batch)


def _candidate_batch(columns: dict[str, Tensor]) -> SequenceBatch:
    """One sequence of candidates alone, without what candidates have none of."""
    position = columns["position"]
    size = len(position)
    # made on the device: while a graph is recorded nothing may come from the host
    zeros = torch.zeros(size, dtype=torch.int32, device=position.device)
    return SequenceBatch(
        seq_offsets=torch.arange(0, size + 1, size, device=position.device),
        num_targets=zeros.new_full((1,), size),
        action_mask=zeros,
        known_mask=zeros,
        user_codes=zeros.new_zeros(1, 0),
        max_seq_len=size,
        item_codes=columns["item_codes"],
        request_codes=columns["request_codes"],
        position=position,
        gap_ms=columns["gap_ms"],
        dense=columns.get("dense"),
    )


def _capture(model: RankingModel, room: Room, packed: Packed, like: _Graph | None) -> _Graph:
    """The graph of candidates of one size; its memory is that of `like`, another graph."""
    own = Packed(packed.columns, packed.buffer.to(room.buffer.device))
    half = torch.is_autocast_enabled("cuda")
    # Autocast's own copies of weights would be freed with its block, and the graph would go on
    # reading them.
    with torch.autocast("cuda", torch.get_autocast_dtype("cuda"), half, cache_enabled=False):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                candidate_logits(model, room, own)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # views of its own: the list of tiles is made anew, inside the graph
        pool = None if like is None else like.graph.pool()
        with record_graph(graph, pool):
            logits = candidate_logits(model, room, own)
    return _Graph(graph, own, logits)
