"""Semi-local attention in plain PyTorch, for CPUs: a list of (row tile, key tile) pairs instead of
an L×L score.

Rows are laid out in tiles, each sequence padded to whole tiles; the pairs of tiles with at least
one kept score are listed for the whole batch at once and go through batched products, some `CHUNK`
scores at a time. A candidate's own key is a term by itself, so the tiles right of the history are
never visited. The backward computes the scores again where they are too many to keep. Sums run in a
fixed order: two runs agree bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.semi_local_attention.types import (
    QueryRows,
    RelativeBias,
    time_bucket,
    whole_seconds,
)

# Rows and keys of a tile. Of rows shorter than four tiles much of the last one is padding: smaller
# ones waste less of it, and of the mask's edge.
TILE, SHORT_TILE = 64, 32
CHUNK = 2**18  # scores held at a time: 1 MiB in float32, which stays in a core's cache
# Scores of a layer up to which they are kept for backward, with their weights: 32 MiB in float32.
KEPT_SCORES = 2**22


@dataclass(frozen=True)
class Chunk:
    """Pairs of tiles that are computed together."""

    row: Tensor  # int64 [P]
    key: Tensor  # int64 [P]
    masked: bool  # whether some pair keeps only part of its scores


@dataclass(frozen=True)
class TileLayout:
    """Where packed rows lie in N tiles of S, each sequence padded to whole tiles.

    rows of two sequences    a b c | d      S = 2
    tiles                    a b  c a  d d      past a sequence's end its first row stands in
    """

    index: Tensor  # int64 [N, S]: the row that lies there
    place: Tensor  # int64 [R]: where in [N * S] a row lies
    sequence: Tensor  # int64 [N]
    first_tile: Tensor  # int64 [B]: of each sequence
    valid: Tensor  # bool [N, S]: false past a sequence's end
    number: Tensor  # int64 [N, S]: of the row among its sequence's rows

    @staticmethod
    def of(offsets: Tensor, size: int) -> "TileLayout":
        length, device = offsets.diff(), offsets.device
        tiles = (length + size - 1) // size
        first_tile = tiles.cumsum(0) - tiles
        sequence = torch.arange(len(length), device=device).repeat_interleave(tiles)

        tile = torch.arange(len(sequence), device=device) - first_tile[sequence]
        number = tile[:, None] * size + torch.arange(size, device=device)
        valid = number < length[sequence, None]
        index = offsets[sequence, None] + torch.where(valid, number, 0)
        place = valid.flatten().nonzero()[:, 0]
        return TileLayout(index, place, sequence, first_tile, valid, number)


class HeadTiles:
    """Rows of H heads to tiles and back: one gather of head rows, no transposed copy."""

    def __init__(self, layout: TileLayout, heads: int) -> None:
        self.shape = len(layout.index), heads, layout.index.shape[1]
        self.num_rows = len(layout.place)
        head = torch.arange(heads, device=layout.index.device)
        self.rows = (layout.index[:, None, :] * heads + head[:, None]).flatten()

        # [R, H]: where in [N, H, S] a row's heads lie
        size = layout.index.shape[1]
        tile, column = layout.place // size, layout.place % size
        self.places = ((tile[:, None] * heads + head) * size + column[:, None]).flatten()

    def to_tiles(self, x_RHD: Tensor) -> Tensor:
        """[N, H, S, D]"""
        heads_of_rows = x_RHD.contiguous().flatten(0, 1)
        return heads_of_rows.index_select(0, self.rows).view(*self.shape, x_RHD.shape[2])

    def to_rows(self, x_NHSD: Tensor) -> Tensor:
        """[R, H, D]"""
        heads_of_rows = x_NHSD.flatten(0, 2).index_select(0, self.places)
        return heads_of_rows.unflatten(0, (self.num_rows, self.shape[1]))


@dataclass(frozen=True)
class TilePlan:
    """What the mask of a batch means for its tiles; the same for every layer and for backward.

    N tiles of S rows, and M of S keys: the same ones unless only some tokens ask.
    """

    rows: TileLayout
    keys: TileLayout
    row_token: Tensor  # int64 [N, S]: the row's token
    row_position: Tensor  # int64 [N, S]: its place in the sequence
    low: Tensor  # int64 [N, S]: the oldest key of the row's window
    high: Tensor  # int64 [N, S]: the newest key; -1 where there is no row
    own_row: Tensor  # int64 [C]: the rows that are candidates, which see themselves
    own: Tensor  # int64 [C]: their tokens
    prefix: int
    pairs: tuple[Tensor, Tensor, Tensor, Tensor]  # inner row, inner key, edge row, edge key

    @property
    def num_pairs(self) -> int:
        return len(self.pairs[0]) + len(self.pairs[2])

    @property
    def pair_scores(self) -> int:
        """Scores of a pair of tiles in one head."""
        return self.low.shape[1] ** 2

    @property
    def position(self) -> Tensor:
        """int64 [M, S]: a key's place in its sequence."""
        return self.keys.number

    def cut_chunks(self, heads: int) -> list[Chunk]:
        """The pairs in groups of at most CHUNK scores, those without a mask first."""
        size = max(1, CHUNK // (self.pair_scores * heads))
        inner_row, inner_key, edge_row, edge_key = self.pairs

        chunks = []
        for rows, keys, masked in ((inner_row, inner_key, False), (edge_row, edge_key, True)):
            for row, key in zip(rows.split(size), keys.split(size), strict=True):
                if len(row):
                    chunks.append(Chunk(row, key, masked))
        return chunks


def plan_tiles(
    seq_offsets: Tensor,
    num_targets: Tensor | None,
    target_visible: Tensor | None,
    target_from: Tensor | None,
    extra_full_rows: Tensor | None,
    window: int | None,
    full_rows: int,
    prefix: int,
    query_rows: QueryRows | None = None,
) -> TilePlan:
    """The tiles of a batch and the pairs of them with a kept score, without a loop over sequences.

    One sequence of 5 tiles, a window of less than one tile, the prefix in tile 0:

        row tile     0    1     2       3         4
        key tiles    0    0 1   0 1 2   0 . 2 3   0 . . 3 4
                     the prefix's tiles, then those from the window's first key to the newest key
    """
    length = seq_offsets.diff()
    longest = int(length.max()) if len(length) else 0
    size = SHORT_TILE if longest <= 4 * TILE else TILE
    keys = rows = TileLayout.of(seq_offsets, size)
    token, position = keys.index, keys.number
    if query_rows is not None:
        rows = TileLayout.of(query_rows.offsets, size)
        token = query_rows.index[rows.index]
        position = token - seq_offsets[rows.sequence, None]
    valid, seq = rows.valid, rows.sequence

    # the keys of each row
    u = (length if num_targets is None else length - num_targets)[seq, None]
    is_candidate = valid & (position >= u)
    number = None
    if num_targets is not None:  # candidates are numbered through the batch
        first = (num_targets.cumsum(0) - num_targets)[seq, None]
        number = (first + position - u)[is_candidate]

    visible = u.expand(-1, size).clone()
    if target_visible is not None:
        seen = target_visible.to(torch.int64).clamp(min=0)[number]
        visible[is_candidate] = torch.minimum(seen, visible[is_candidate])
    high = torch.where(valid, torch.where(is_candidate, visible - 1, position), -1)
    low = torch.zeros_like(position)
    if window is not None:
        full = full_rows if extra_full_rows is None else full_rows + extra_full_rows[seq, None]
        low = torch.where(position < u - full, position - window, 0)
    if target_from is not None:  # above `high` where a candidate sees the prefix alone
        low[is_candidate] = target_from.to(torch.int64).clamp(min=0)[number]

    pairs = _tile_pairs(low, high, seq, keys, prefix)
    own_row, own = rows.index[is_candidate], token[is_candidate]
    return TilePlan(rows, keys, token, position, low, high, own_row, own, prefix, pairs)


def _tile_pairs(
    low: Tensor, high: Tensor, seq: Tensor, keys: TileLayout, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and key tiles of the pairs that keep all scores, and of those that keep some."""
    size = low.shape[1]

    # key tiles of each row tile: of the prefix, and of the range behind it
    newest = high.max(1, keepdim=True).values
    oldest = torch.where(high >= 0, torch.minimum(low, high), newest).amin(1)
    first = oldest.clamp(min=0) // size
    count = (high.amax(1) // size - first + 1).clamp(min=0)
    prefix_tiles = (prefix + size - 1) // size
    before = torch.where(count > 0, torch.clamp(first, max=prefix_tiles), 0)
    total = before + count

    # one entry a pair
    row = torch.arange(len(seq), device=seq.device).repeat_interleave(total)
    step = torch.arange(len(row), device=seq.device) - (total.cumsum(0) - total)[row]
    key_index = torch.where(step < before[row], step, first[row] + step - before[row])
    key = keys.first_tile[seq[row]] + key_index

    begin, end = key_index * size, key_index * size + size
    seen_by_all = end <= high.amin(1)[row] + 1
    inner = seen_by_all & ((begin >= low.amax(1)[row]) | (end <= prefix))
    return row[inner], key[inner], row[~inner], key[~inner]


def _seen(plan: TilePlan, chunk: Chunk) -> Tensor:
    """[P, 1, S, S] bool, where a row sees a key."""
    key = plan.position[chunk.key][:, None, None, :]
    low, high = plan.low[chunk.row][:, None, :, None], plan.high[chunk.row][:, None, :, None]
    within = key >= low
    if plan.prefix:
        within |= key < plan.prefix
    return within & (key <= high)


@dataclass(frozen=True)
class TileBias:
    """A `RelativeBias` in tile layout."""

    position_table: Tensor
    time_table: Tensor
    # int64 [N, S]: the row's position, a candidate's being right behind what it sees
    rank: Tensor
    position: Tensor  # int64 [N, S]: the key's position
    query_time: Tensor  # int32 s [N, S]
    key_time: Tensor  # int32 s [N, S]
    own_bucket: Tensor  # int64 [C]: of the candidates' own keys in the table of times

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.position_table, self.time_table

    def buckets(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Entries of both tables, [P, S, S] each."""
        distance = self.rank[chunk.row][:, :, None] - self.position[chunk.key][:, None, :]
        gap = self.query_time[chunk.row][:, :, None] - self.key_time[chunk.key][:, None, :]
        return distance.clamp_(0, len(self.position_table) - 1), time_bucket(
            gap, len(self.time_table)
        )

    def own_rows(self) -> tuple[Tensor, Tensor]:
        """The same of the candidates' own keys, [C] each: the key is at no distance."""
        return torch.zeros_like(self.own_bucket), self.own_bucket


def _tile_bias(bias: RelativeBias, plan: TilePlan) -> TileBias:
    asked = bias.event_time_T if bias.query_time_T is None else bias.query_time_T
    query_time, key_time = whole_seconds(asked), whole_seconds(bias.event_time_T)
    rank = torch.where(plan.high < plan.row_position, plan.high + 1, plan.row_position)

    own_gap = query_time[plan.own] - key_time[plan.own]
    own_bucket = time_bucket(own_gap, len(bias.time_table))
    tables = bias.position_table, bias.time_table
    times = query_time[plan.row_token], key_time[plan.keys.index]
    return TileBias(*tables, rank, plan.position, *times, own_bucket)


def _bias_scores(bias: TileBias, entries: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    distance, bucket = entries
    return (bias.position_table[distance] + bias.time_table[bucket]).to(dtype)


def _score(q: Tensor, k: Tensor, chunk: Chunk, bias: TileBias | None) -> Tensor:
    """[P, H, S, S]"""
    score = torch.matmul(q, k.transpose(-1, -2))
    if bias is not None:
        score += _bias_scores(bias, bias.buckets(chunk), score.dtype)[:, None]
    return score


def _weights(score: Tensor, seen: Tensor | None) -> Tensor:
    """SiLU of the scores, 0 where the row does not see the key."""
    weight = F.silu(score)
    # a product, which costs a tenth of filling by a mask; tiles never hold two sequences, so what
    # is not finite stays in its own
    return weight if seen is None else weight.mul_(seen)


def _own_scores(q_CHD: Tensor, k_CHD: Tensor, bias: TileBias | None) -> Tensor:
    """[C, H]: of the candidates with themselves."""
    score = (q_CHD * k_CHD).sum(-1)
    if bias is not None:
        score += _bias_scores(bias, bias.own_rows(), score.dtype)[:, None]
    return score


class _BlockedAttention(torch.autograd.Function):
    """The sum over the keys that each row sees, its own included."""

    @staticmethod
    def forward(ctx, q, k, v, position_table, time_table, plan: TilePlan, bias: TileBias | None):
        heads = q.shape[1]
        keys_at = rows_at = HeadTiles(plan.keys, heads)
        if plan.rows is not plan.keys:
            rows_at = HeadTiles(plan.rows, heads)
        tile_q, tile_k, tile_v = rows_at.to_tiles(q), keys_at.to_tiles(k), keys_at.to_tiles(v)
        out = v.new_zeros(*tile_q.shape[:3], v.shape[2])
        num_scores = plan.num_pairs * plan.pair_scores * heads
        keep = any(ctx.needs_input_grad) and num_scores <= KEPT_SCORES

        kept = []
        chunks = plan.cut_chunks(heads)
        for chunk in chunks:
            keys, values = (x.index_select(0, chunk.key) for x in (tile_k, tile_v))
            seen = _seen(plan, chunk) if chunk.masked else None
            score = _score(tile_q.index_select(0, chunk.row), keys, chunk, bias)
            weight = _weights(score, seen)
            out.index_add_(0, chunk.row, torch.matmul(weight, values))
            if keep:
                kept.append((score, weight, seen))

        out_RHV = rows_at.to_rows(out)
        if len(plan.own):
            own_q = q.index_select(0, plan.own_row)
            own_k, own_v = (x.index_select(0, plan.own) for x in (k, v))
            weight = F.silu(_own_scores(own_q, own_k, bias))
            out_RHV.index_add_(0, plan.own_row, weight[..., None] * own_v)

        ctx.save_for_backward(q, k, v)
        ctx.plan, ctx.bias, ctx.tiles, ctx.chunks = plan, bias, (rows_at, keys_at), chunks
        # made here, neither inputs nor outputs: they may be kept as they are
        ctx.kept = kept if keep else None
        return out_RHV

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_RHV):
        plan, bias, (rows_at, keys_at) = ctx.plan, ctx.bias, ctx.tiles
        layouts = rows_at, keys_at, keys_at, rows_at
        tensors = *ctx.saved_tensors, grad_RHV
        all_tiles = [at.to_tiles(x) for at, x in zip(layouts, tensors, strict=True)]
        d_tiles = [torch.zeros_like(x) for x in all_tiles[:3]]
        d_tables = [] if bias is None else [torch.zeros_like(table) for table in bias.tables]

        for i, chunk in enumerate(ctx.chunks):
            row, key = chunk.row, chunk.key
            q, k, v, grad = (
                x.index_select(0, at) for x, at in zip(all_tiles, (row, key, key, row), strict=True)
            )
            if ctx.kept is not None:
                score, weight, seen = ctx.kept[i]
            else:
                seen = _seen(plan, chunk) if chunk.masked else None
                score = _score(q, k, chunk, bias)
                weight = _weights(score, seen)

            d_weight = torch.matmul(grad, v.transpose(-1, -2))
            if seen is not None:
                d_weight *= seen
            d_score = torch.ops.aten.silu_backward(d_weight, score)

            d_tiles[0].index_add_(0, row, torch.matmul(d_score, k))
            d_tiles[1].index_add_(0, key, torch.matmul(d_score.transpose(-1, -2), q))
            d_tiles[2].index_add_(0, key, torch.matmul(weight.transpose(-1, -2), grad))
            if bias is not None:
                _add_to_tables(d_tables, bias.buckets(chunk), d_score.sum(1))

        ctx.kept = None
        grads = [at.to_rows(x) for at, x in zip(layouts[:3], d_tiles, strict=True)]
        if len(plan.own):
            _add_own_gradients(grads, d_tables, ctx.saved_tensors, grad_RHV, plan, bias)
        return *grads, *(d_tables or (None, None)), None, None


def _add_to_tables(d_tables: list[Tensor], entries: tuple[Tensor, Tensor], d_score: Tensor) -> None:
    """Add the scores' gradients, summed over heads, to the entries of the bias's two tables."""
    flat = d_score.flatten()
    for table, entry in zip(d_tables, entries, strict=True):
        table += torch.bincount(entry.flatten(), flat, len(table)).to(table.dtype)


def _add_own_gradients(
    grads: list[Tensor],
    d_tables: list[Tensor],
    qkv: tuple[Tensor, Tensor, Tensor],
    grad_RHV: Tensor,
    plan: TilePlan,
    bias: TileBias | None,
) -> None:
    """Add, in place, what the candidates' own keys give to the gradients of Q [R, H, D], K and V
    [T, H, ·] and of the tables.
    """
    rows, own = plan.own_row, plan.own
    q, grad = (x.index_select(0, rows) for x in (qkv[0], grad_RHV))
    k, v = (x.index_select(0, own) for x in qkv[1:])
    score = _own_scores(q, k, bias)
    d_score = torch.ops.aten.silu_backward((grad * v).sum(-1), score)

    d_q, d_k, d_v = grads
    d_q.index_add_(0, rows, d_score[..., None] * k)
    d_k.index_add_(0, own, d_score[..., None] * q)
    d_v.index_add_(0, own, F.silu(score)[..., None] * grad)
    if bias is not None:
        _add_to_tables(d_tables, bias.own_rows(), d_score.sum(1))


def semi_local_attention_blocked(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    plan: TilePlan,
    *,
    bias: RelativeBias | None,
    attn_alpha: float,
    scaling_seq_len: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `reference.semi_local_attention_reference`; half precision is computed in float32."""
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    q, k, v = q_THD.to(wide) * attn_alpha, k_THD.to(wide), v_THV.to(wide)
    tables = (None, None) if bias is None else (bias.position_table, bias.time_table)
    # it would take the products back to half precision
    with torch.autocast(q.device.type, enabled=False):
        out = _BlockedAttention.apply(
            q, k, v, *tables, plan, None if bias is None else _tile_bias(bias, plan)
        )
    return (out / scaling_seq_len).to(out_dtype or q_THD.dtype)


def cached_attention_blocked(
    q_CHD: Tensor,
    own_k_CHD: Tensor,
    own_v_CHV: Tensor,
    row_offsets: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    cache_offsets: Tensor,
    *,
    visible: Tensor | None,
    attn_alpha: float,
    scaling_seq_len: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `reference.cached_attention_reference`, a block of cached keys at a time; users one after
    another, as a request has one or a few of them and the products of each are large."""
    wide = torch.promote_types(q_CHD.dtype, torch.float32)
    rows_of, cache_of = row_offsets.tolist(), cache_offsets.tolist()
    out = torch.zeros(own_v_CHV.shape, dtype=wide, device=q_CHD.device)

    for i in range(len(rows_of) - 1):
        rows = slice(rows_of[i], rows_of[i + 1])
        q, own_k, own_v = (
            x[rows].transpose(0, 1).to(wide) for x in (q_CHD * attn_alpha, own_k_CHD, own_v_CHV)
        )

        # the cache, block by block
        block = max(TILE, CHUNK // max(1, q.shape[0] * q.shape[1]))
        for begin in range(cache_of[i], cache_of[i + 1], block):
            keys = slice(begin, min(begin + block, cache_of[i + 1]))
            k, v = (x[keys].transpose(0, 1).to(wide) for x in (k_THD, v_THV))
            weight = F.silu(q @ k.transpose(1, 2), inplace=True)
            if visible is not None:
                position = torch.arange(
                    keys.start - cache_of[i], keys.stop - cache_of[i], device=q.device
                )
                weight *= position[None, :] < visible[rows, None]
            out[rows] += (weight @ v).transpose(0, 1)

        # and the new rows themselves
        out[rows] += (F.silu((q * own_k).sum(-1, keepdim=True)) * own_v).transpose(0, 1)
    return (out / scaling_seq_len).to(out_dtype or q_CHD.dtype)
