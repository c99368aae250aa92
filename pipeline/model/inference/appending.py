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

A history that is as long as it may be loses its oldest row with each new one. Then rows of the band
near its beginning see less than they saw, and so do those that saw these, layer by layer:

    rows of the history      - o o o o o o o o | n       - has left
    encoded anew               o o o       o o   n

The rest is kept (`changed_rows`). A prefix of the oldest rows that all rows see would change all.
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


@dataclass(frozen=True, slots=True)
class ChangedRows:
    """The rows of a grown history that are encoded anew: its first `front`, and all from `first`
    on.
    """

    front: int
    first: int


def changed_rows(
    model: ModelConfig, num_context: int, num_cached: int, num_rows: int, num_dropped: int = 0
) -> ChangedRows | None:
    """The rows to encode when a history of `num_cached` rows loses its oldest `num_dropped`, and
    becomes `num_rows` long with new ones; None where all of it must be.

    window 2, full_rows 3, 3 layers, 12 rows of which one leaves, and two come:

        before             0 1 2 3 4 5 6 7 8 9 a b
        after                0 1 2 3 4 5 6 7 8 9 a b c
        encoded anew         x x x x x       x x x x x      front 5, first 8

    Layer by layer `window` more rows of the band learn that rows have left. The first row does by
    itself: no row is before it any more. Rows that were full saw what has left.
    """
    if num_dropped == 0:
        first = first_changed_row(model, num_context, num_cached, num_rows)
        return None if first is None else ChangedRows(0, first)

    mask = model.attention
    truncated = model.truncate_after_layer
    moves = truncated is not None and max(num_cached, num_rows) > model.truncate_to
    moves_many = moves and truncated != model.num_layers - 1
    if model.channels or moves_many or mask.window is None or mask.extra_prefix:
        return None

    front = (model.num_layers - 1) * mask.window + 1
    first = num_cached - num_dropped - mask.full_rows
    return ChangedRows(front, first) if front < first else None


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
    model: RankingModel,
    cache: HistoryCache,
    batch: SequenceBatch,
    num_cached: int,
    num_rows: int,
    *,
    front: int = 0,
    num_dropped: int = 0,
) -> HistoryCache:
    """The cache of one history of `num_rows` rows, of whose `num_cached` in `cache` the oldest
    `num_dropped` have left.

    `batch` holds the rows of `changed_rows`, `front` of them the oldest, without candidates. On a
    CPU, without gradients.
    """
    assert isinstance(model.transducer, UltraHSTU)
    (stack,) = model.transducer.stacks
    layers = [layer for layer in stack.layers if isinstance(layer, STU)]
    x_TE = model.encoder.event_rows(batch)
    num_known = num_rows - (len(x_TE) - front)  # rows before those that are new at the end

    kept: list[LayerCache] = []
    places: dict[int, _Places] = {}  # layers of one length share them
    for depth, layer in enumerate(layers):
        most = num_rows
        truncated = stack.truncate_after_layer
        if truncated is not None and depth >= truncated:
            most = min(num_rows, stack.truncate_to)

        # of the oldest rows those that the layer still has
        front_here = max(0, front - (num_rows - most))
        x_TE = x_TE[front - front_here :][-most:]
        front = front_here

        before = cache.layers[depth]
        if most not in places:
            first_row = num_cached - (len(before.k_THD) - stack.num_context)  # that it has
            end = num_known + num_dropped - first_row
            places[most] = _find_places(
                stack.num_context, end, most - len(x_TE), front, len(x_TE) - front
            )
        where = places[most]

        u, q, k, v = layer.project(x_TE)
        keys = where.put_together(before.k_THD, k)
        values = where.put_together(before.v_THV, v)
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

    num_context: int
    front: int
    begin: int  # of the kept rows in the layer's cache
    end: int
    rows: QueryRows  # those encoded anew
    sequence: Sequences

    def put_together(self, before: Tensor, anew: Tensor) -> Tensor:
        """The layer's rows in their order, from those before and those encoded anew."""
        context, middle = before[: self.num_context], before[self.begin : self.end]
        return torch.cat([context, anew[: self.front], middle, anew[self.front :]])


def _find_places(
    num_context: int, num_known: int, num_kept: int, front: int, num_behind: int
) -> _Places:
    """A layer's context, `front` rows anew, the newest `num_kept` of the first `num_known` rows in
    its cache, and `num_behind` rows anew.

    2 context tokens, 5 known rows of which 3 are kept, 1 row anew before them and 2 behind:

        cache    c c 0 1 2 3 4 5      begin, end   4 7
        result   c c a 2 3 4 a a      rows         2 6 7
    """
    end = num_context + num_known
    begin = end - num_kept

    num_before = num_context + front
    length = num_before + num_kept + num_behind
    at_front = torch.arange(num_context, num_before)
    behind = torch.arange(num_before + num_kept, length)
    rows = QueryRows(torch.cat([at_front, behind]), torch.tensor([0, front + num_behind]))

    no_targets = torch.zeros(1, dtype=torch.int32)
    sequence = Sequences(torch.tensor([0, length]), length, no_targets)
    return _Places(num_context, front, begin, end, rows, sequence)
