"""A history encoded once, candidates scored against it: M-FALCON (HSTU, arXiv:2402.17152, algorithm
1).

    history batch → `encode_history` → HistoryCache ─┐
    candidate batch ─────────────────────────────────┴→ `score_candidates` → logits

History rows never see candidates, so what a candidate takes from them, their keys and values in
each layer, is the same for every candidate and every request until the history changes. Semi-local
attention and truncation work on the history alone: a layer's cache holds the rows that the layer
still has. Position and time are those of the events themselves, so nothing in a cache depends on
the request. The scores are those of `RankingModel.forward` on both together.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kernels.semi_local_attention.op import cached_attention
from pipeline.batches.collate import SequenceBatch
from pipeline.model.encoders.encoder import last_history_rows
from pipeline.model.encoders.stu import STU
from pipeline.model.encoders.transducer import Transducer, kept_rows
from pipeline.model.encoders.ultra_hstu import UltraHSTU
from pipeline.model.ranker import RankingModel
from pipeline.model.tokens import Tokens


@dataclass(frozen=True, slots=True)
class LayerCache:
    """What one layer's candidates see of B histories."""

    k_THD: Tensor
    v_THV: Tensor
    # int64 [B + 1]; layers with the same rows share the tensor, so that a plan serves them all
    offsets: Tensor


@dataclass(frozen=True, slots=True)
class HistoryCache:
    """B encoded histories: a `LayerCache` per layer, of a mixture channel after channel."""

    layers: tuple[LayerCache, ...]

    @property
    def num_bytes(self) -> int:
        return sum(layer.k_THD.nbytes + layer.v_THV.nbytes for layer in self.layers)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Rows of each layer."""
        return tuple([len(layer.k_THD) for layer in self.layers])

    def split_histories(self) -> list["HistoryCache"]:
        """One cache per history.

        Each has memory of its own: keeping one does not keep the others.

            offsets of a layer     0 3 5        two histories of 3 and 2 rows
            of its parts           0 3 | 0 2
        """
        num_histories = len(self.layers[0].offsets) - 1
        if num_histories == 1:
            return [self]

        # layers that share their offsets go on sharing them
        lengths: dict[int, list[int]] = {}
        own_offsets: dict[int, list[Tensor]] = {}
        parts: list[list[LayerCache]] = [[] for _ in range(num_histories)]
        for layer in self.layers:
            key = id(layer.offsets)
            if key not in lengths:
                lengths[key] = layer.offsets.diff().tolist()
                own_offsets[key] = _single_offsets(layer.offsets)

            keys, values = layer.k_THD.split(lengths[key]), layer.v_THV.split(lengths[key])
            for i, part in enumerate(parts):
                part.append(LayerCache(keys[i].clone(), values[i].clone(), own_offsets[key][i]))
        return [HistoryCache(tuple(part)) for part in parts]

    @staticmethod
    def join_histories(caches: Sequence["HistoryCache"]) -> "HistoryCache":
        """The histories of several caches one after another."""
        if len(caches) == 1:
            return caches[0]

        joined: list[LayerCache] = []
        shared: dict[tuple[int, ...], Tensor] = {}  # ids of the parts' offsets -> the joint ones
        for depth in range(len(caches[0].layers)):
            keys, values, offsets = [], [], []
            for cache in caches:
                layer = cache.layers[depth]
                keys.append(layer.k_THD)
                values.append(layer.v_THV)
                offsets.append(layer.offsets)

            key = tuple(map(id, offsets))
            if key not in shared:
                lengths = torch.cat([one.diff() for one in offsets])
                shared[key] = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
            joined.append(LayerCache(torch.cat(keys), torch.cat(values), shared[key]))
        return HistoryCache(tuple(joined))


def _single_offsets(offsets: Tensor) -> list[Tensor]:
    """Offsets [0, length] of each history by itself."""
    lengths = offsets.diff()
    pairs = torch.stack([torch.zeros_like(lengths), lengths], dim=1)
    return [pair.clone() for pair in pairs]


def encode_history(model: RankingModel, batch: SequenceBatch) -> HistoryCache:
    """The caches of B histories; `batch` holds them without candidates. Call it without gradients.

    The last layer's own output is nobody's input: only its keys and values are computed.
    """
    tokens = model.encoder(batch)
    layers: list[LayerCache] = []
    for stack, rows in _ultra_hstu(model).channel_rows(tokens, batch):
        kept, _ = _encode_stack(stack, rows, to_the_end=False)
        layers += kept
    return HistoryCache(tuple(layers))


def encode_history_rows(model: RankingModel, batch: SequenceBatch) -> tuple[HistoryCache, Tensor]:
    """The same, and `Encoded.last_history_row` of the batch, [B, width], from one pass."""
    tokens = model.encoder(batch)
    layers: list[LayerCache] = []
    rows: list[Tensor] = []
    for stack, read in _ultra_hstu(model).channel_rows(tokens, batch):
        kept, encoded = _encode_stack(stack, read, to_the_end=True)
        layers += kept
        rows.append(last_history_rows(encoded, stack.norm_out, stack.num_context))
    return HistoryCache(tuple(layers)), torch.cat(rows, dim=1)


def _ultra_hstu(model: RankingModel) -> UltraHSTU:
    assert isinstance(model.transducer, UltraHSTU)  # `ModelConfig.cacheable`
    return model.transducer


def _stu_layers(stack: Transducer) -> list[STU]:
    return [layer for layer in stack.layers if isinstance(layer, STU)]


def _encode_stack(
    stack: Transducer, tokens: Tokens, *, to_the_end: bool
) -> tuple[list[LayerCache], Tokens]:
    """The cache of each layer; `to_the_end` the last layer's tokens, else those before it."""
    layers = _stu_layers(stack)
    kept: list[LayerCache] = []
    is_cut = False
    for depth, layer in enumerate(layers):
        if not is_cut:
            tokens = stack.tokens_at(depth, tokens)
        if stack.cuts_early(depth, layer, tokens):
            short, rows = kept_rows(tokens, stack.num_context, stack.truncate_to)
            x_TE, k, v = layer.rows_and_keys(tokens, rows)
            kept.append(LayerCache(k.contiguous(), v.contiguous(), tokens.seq_offsets))
            tokens, is_cut = replace(short, x_TE=x_TE), True
            continue

        u, q, k, v = layer.project(tokens.x_TE)
        # not a view: it would keep u and q
        kept.append(LayerCache(k.contiguous(), v.contiguous(), tokens.seq_offsets))

        if to_the_end or depth < len(layers) - 1:
            attended = layer.attend(q, k, v, tokens)
            tokens = replace(tokens, x_TE=layer.output(tokens.x_TE, u, attended))
    return kept, tokens


def score_candidates(
    model: RankingModel, cache: HistoryCache, batch: SequenceBatch, micro_batch: int
) -> Tensor:
    """Logits, float32 [C, tasks], of the candidates of B users in the order of `batch`, which holds
    no history rows.

    `cache` holds the same users' histories. At most `micro_batch` candidates pass the layers at a
    time.

        candidates of users   a a a b b      batch.seq_offsets 0 3 5, micro_batch 2
        passes                [a a] [a b] [b]
        their row_offsets     0 2 2 | 0 1 2 | 0 0 1
    """
    x_CE = model.encoder.candidate_rows(batch)
    parts = []
    for begin in range(0, len(x_CE), micro_batch):
        rows = x_CE[begin : begin + micro_batch]
        row_offsets = batch.seq_offsets.clamp(begin, begin + len(rows)) - begin
        parts.append(layer_outputs(model, cache, rows, row_offsets))
    return model.score_rows(torch.cat(parts), batch)


def layer_outputs(
    model: RankingModel, cache: HistoryCache, x_CE: Tensor, row_offsets: Tensor
) -> Tensor:
    """[C, channels * d]: the transducers' outputs of the candidates `x_CE`."""
    outputs, caches = [], iter(cache.layers)
    for stack in _ultra_hstu(model).stacks:
        z_CE = x_CE
        for layer in _stu_layers(stack):
            z_CE = _cached_layer(layer, z_CE, row_offsets, next(caches))
        outputs.append(stack.norm_out(z_CE))
    return torch.cat(outputs, dim=1)


def _cached_layer(layer: STU, z_CE: Tensor, row_offsets: Tensor, cache: LayerCache) -> Tensor:
    u, q, k, v = layer.project(z_CE)
    a_CHV = cached_attention(
        q,
        k,
        v,
        row_offsets,
        cache.k_THD,
        cache.v_THV,
        cache.offsets,
        attn_alpha=layer.shape.attn_alpha,
        scaling_seq_len=layer.cfg.attention.scaling_seq_len,
        out_dtype=layer.shape.attended_dtype(q.dtype),
        backend=layer.cfg.attention_backend,
    )
    return layer.output(z_CE, u, a_CHV)
