"""New events onto an encoded history: what they cannot have changed is kept.

    rows of the history      o o o o o o o o | n n       o encoded already, n new
    sees the same as before  x x x x x
    encoded anew                       o o o   n n

A row's keys and values in a layer depend on the rows that it saw in the layers before. A row of the
band sees the same whatever follows it. A full row does not: the newest `full_rows` are full, so
each new event makes the oldest of them a row of the band. From the first whose sight that changes,
all rows are encoded anew, against the kept keys and values of the rows before. The result is that
of encoding everything.

Truncation moves with every new event too: later layers forget the oldest row. Where more than one
layer follows, rows far back see less than they saw, and the history is encoded anew
(`first_changed_row`). A mixture of channels and the GPU's kernels, which make every row of a layer,
are too.
"""

import torch
from torch import Tensor

from kernels.semi_local_attention.types import QueryRows
from kernels.stu.op import attend_rows
from kernels.stu.types import Sequences
from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.encoders.stu import STU
from pipeline.model.encoders.ultra_hstu import UltraHSTU
from pipeline.model.inference.cached_scoring import HistoryCache, LayerCache
from pipeline.model.ranker import RankingModel


def first_changed_row(
    model: ModelConfig, num_context: int, num_cached: int, num_rows: int
) -> int | None:
    """The first history row to encode when a history of `num_cached` rows becomes `num_rows` long;
    None where all of it must be.

    window 2, full_rows 3, no context, 8 rows become 10:

        row                  0 1 2 3 4 5 6 7 8 9
        full among 8                   x x x
        full among 10                      x x x
        encoded anew                   x x x x x      from row 5, which saw all and now sees 3 4 5
    """
    truncated = model.truncate_after_layer
    moves = truncated is not None and num_rows > model.truncate_to
    if model.channels or (moves and truncated != model.num_layers - 1):
        return None

    mask = model.attention
    cached, total = num_context + num_cached, num_context + num_rows
    first = cached
    if mask.window is not None:
        # the first that was full and saw more than its window and the prefix
        prefix = num_context + mask.extra_prefix
        beyond = max(cached - mask.full_rows, mask.window + prefix + 1)
        # it must also have stopped being full
        if beyond < min(cached, total - mask.full_rows):
            first = beyond
    return first - num_context if first > num_context else None


def append_history(
    model: RankingModel, cache: HistoryCache, batch: SequenceBatch, num_cached: int, num_rows: int
) -> HistoryCache:
    """The cache of one history of `num_rows` rows, whose first `num_cached` are in `cache`.

    `batch` holds its rows from `first_changed_row` on, without candidates. On a CPU, without
    gradients.
    """
    assert isinstance(model.transducer, UltraHSTU)
    (stack,) = model.transducer.stacks
    layers = [layer for layer in stack.layers if isinstance(layer, STU)]
    x_TE = model.encoder.event_rows(batch)
    num_known = num_rows - len(x_TE)  # rows whose keys and values are kept

    kept: list[LayerCache] = []
    shared: dict[int, Tensor] = {}  # layers of one length share their offsets
    for depth, layer in enumerate(layers):
        most = num_rows
        truncated = stack.truncate_after_layer
        if truncated is not None and depth >= truncated:
            most = min(num_rows, stack.truncate_to)
        x_TE = x_TE[-most:]

        u, q, k, v = layer.project(x_TE)
        chosen = _kept_places(
            cache.layers[depth], stack.num_context, num_cached, num_known, most - len(x_TE)
        )
        keys = torch.cat([cache.layers[depth].k_THD[chosen], k])
        values = torch.cat([cache.layers[depth].v_THV[chosen], v])
        offsets = shared.setdefault(len(keys), torch.tensor([0, len(keys)]))
        kept.append(LayerCache(keys, values, offsets))

        if depth < len(layers) - 1:
            rows = QueryRows(torch.arange(len(chosen), len(keys)), torch.tensor([0, len(x_TE)]))
            where = Sequences(offsets, len(keys), torch.zeros(1, dtype=torch.int32))
            attended = attend_rows(
                q, keys, values, layer.shape, where, query_rows=rows, backend="torch"
            )
            x_TE = layer.output(x_TE, u, attended)
    return HistoryCache(tuple(kept))


def _kept_places(
    layer: LayerCache, num_context: int, num_cached: int, num_known: int, num_kept: int
) -> Tensor:
    """Places in a layer's cache of the context and of the newest `num_kept` of the first
    `num_known` rows.

    2 context tokens, 6 rows of which a layer has the newest 4 and 5 are known; 3 are kept:

        cache    c c 2 3 4 5
        places   0 1 2 3 4
    """
    first_row = num_cached - (len(layer.k_THD) - num_context)  # that the layer has
    begin = num_context + num_known - num_kept - first_row
    return torch.cat([torch.arange(num_context), torch.arange(begin, begin + num_kept)])
