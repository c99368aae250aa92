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

from dataclasses import dataclass

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
    places: dict[int, _Places] = {}  # layers of one length share them
    for depth, layer in enumerate(layers):
        most = num_rows
        truncated = stack.truncate_after_layer
        if truncated is not None and depth >= truncated:
            most = min(num_rows, stack.truncate_to)
        x_TE = x_TE[-most:]

        before = cache.layers[depth]
        if most not in places:
            first_row = num_cached - (len(before.k_THD) - stack.num_context)  # that it has
            places[most] = _find_places(
                stack.num_context, num_known - first_row, most - len(x_TE), len(x_TE)
            )
        where = places[most]

        u, q, k, v = layer.project(x_TE)
        keys = torch.cat([before.k_THD[where.kept], k])
        values = torch.cat([before.v_THV[where.kept], v])
        kept.append(LayerCache(keys, values, where.sequence.seq_offsets))

        if depth < len(layers) - 1:
            attended = attend_rows(
                *(q, keys, values, layer.shape, where.sequence),
                query_rows=where.rows,
                backend="torch",
            )
            x_TE = layer.output(x_TE, u, attended)
    return HistoryCache(tuple(kept))


@dataclass(frozen=True, slots=True)
class _Places:
    """Where rows of a layer come from and lie."""

    kept: Tensor  # int64, places in the layer's cache
    rows: QueryRows  # those encoded anew, behind the kept ones
    sequence: Sequences


def _find_places(num_context: int, num_known: int, num_kept: int, num_anew: int) -> _Places:
    """A layer's context, the newest `num_kept` of the first `num_known` rows in its cache, and
    `num_anew` rows behind them.

    2 context tokens, 5 known rows of which 3 are kept, 2 rows anew:

        cache    c c 0 1 2 3 4 5      kept   0 1 4 5 6
        result   c c 2 3 4 a a        rows   5 6
    """
    begin = num_context + num_known - num_kept
    kept = torch.cat([torch.arange(num_context), torch.arange(begin, begin + num_kept)])
    length = len(kept) + num_anew

    rows = QueryRows(torch.arange(len(kept), length), torch.tensor([0, num_anew]))
    no_targets = torch.zeros(1, dtype=torch.int32)
    return _Places(kept, rows, Sequences(torch.tensor([0, length]), length, no_targets))
