"""Semi-local attention in plain PyTorch, for CPUs: a list of (row tile, key tile) pairs instead of
an L×L score.

Rows are laid out in tiles of `TILE`, each sequence padded to whole tiles; the pairs of tiles with
at least one kept score are listed for the whole batch at once and go through batched products, some
`CHUNK` scores at a time. A candidate's own key is an elementwise term, so the tiles right of the
history are never visited. The backward computes the scores again. Sums run in a fixed order: two
runs agree bit for bit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.semi_local_attention.types import RelativeBias, time_bucket, whole_seconds

TILE = 64  # rows and keys of a tile
CHUNK = 2**18  # scores held at a time: 1 MiB in float32, which stays in a core's cache


@dataclass(frozen=True)
class Chunk:
    """Pairs of tiles that are computed together."""

    row: Tensor  # int64 [P]
    key: Tensor  # int64 [P]
    masked: bool  # whether some pair keeps only part of its scores


@dataclass(frozen=True)
class TilePlan:
    """What the mask of a batch means for its tiles; the same for every layer and for backward.

    N tiles.
    """

    token: Tensor  # int64 [N, TILE]: the tile's tokens, some valid one past a sequence's end
    place: Tensor  # int64 [T]: where in [N * TILE] a token is
    position: Tensor  # int64 [N, TILE]: place in the sequence
    low: Tensor  # int64 [N, TILE]: the oldest key of the row's window
    high: Tensor  # int64 [N, TILE]: the newest key; -1 where there is no row
    # bool [T]: the tokens that are candidates, which see themselves; None: there are none
    own_T: Tensor | None
    prefix: int
    pairs: tuple[Tensor, Tensor, Tensor, Tensor]  # inner row, inner key, edge row, edge key

    def cut_chunks(self, heads: int) -> list[Chunk]:
        """The pairs in groups of at most CHUNK scores, those without a mask first."""
        size = max(1, CHUNK // (TILE * TILE * heads))
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
    window: int | None,
    full_rows: int,
    prefix: int,
) -> TilePlan:
    """The tiles of a batch and the pairs of them with a kept score, without a loop over sequences.

    One sequence of 5 tiles, a window of less than one tile, the prefix in tile 0:

        row tile     0    1     2       3         4
        key tiles    0    0 1   0 1 2   0 . 2 3   0 . . 3 4
                     the prefix's tiles, then those from the window's first key to the newest key
    """
    length = seq_offsets.diff()
    u = length if num_targets is None else length - num_targets
    device = seq_offsets.device

    # the tokens of each tile
    tiles = (length + TILE - 1) // TILE
    first_tile = tiles.cumsum(0) - tiles
    seq = torch.arange(len(length), device=device).repeat_interleave(tiles)
    index = torch.arange(len(seq), device=device) - first_tile[seq]  # of the tile in its sequence
    position = index[:, None] * TILE + torch.arange(TILE, device=device)
    valid = position < length[seq, None]
    token = torch.where(valid, seq_offsets[seq, None] + position, seq_offsets[seq, None])

    # the keys of each row
    is_candidate = valid & (position >= u[seq, None])
    visible = u[seq, None].expand(-1, TILE).clone()
    if target_visible is not None:
        seen = target_visible.to(torch.int64).clamp(min=0)
        visible[is_candidate] = torch.minimum(seen, visible[is_candidate])
    high = torch.where(valid, torch.where(is_candidate, visible - 1, position), -1)
    low = torch.zeros_like(position)
    if window is not None:
        banded = position < u[seq, None] - full_rows
        low = torch.where(banded, position - window, 0)

    pairs = _tile_pairs(low, high, seq, first_tile, prefix)
    own = is_candidate[valid] if num_targets is not None else None
    place = valid.flatten().nonzero()[:, 0]
    return TilePlan(token, place, position, low, high, own, prefix, pairs)


def _tile_pairs(
    low: Tensor, high: Tensor, seq: Tensor, first_tile: Tensor, prefix: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Row and key tiles of the pairs that keep all scores, and of those that keep some."""
    # key tiles of each row tile: of the prefix, and of the range behind it
    oldest = torch.where(high >= 0, low, high.max(1, keepdim=True).values).amin(1)
    first = oldest.clamp(min=0) // TILE
    count = (high.amax(1) // TILE - first + 1).clamp(min=0)
    prefix_tiles = (prefix + TILE - 1) // TILE
    before = torch.where(count > 0, torch.clamp(first, max=prefix_tiles), 0)
    total = before + count

    # one entry a pair
    row = torch.arange(len(seq), device=seq.device).repeat_interleave(total)
    step = torch.arange(len(row), device=seq.device) - (total.cumsum(0) - total)[row]
    key_index = torch.where(step < before[row], step, first[row] + step - before[row])
    key = first_tile[seq[row]] + key_index

    begin, end = key_index * TILE, key_index * TILE + TILE
    seen_by_all = end <= high.amin(1)[row] + 1
    inner = seen_by_all & ((begin >= low.amax(1)[row]) | (end <= prefix))
    return row[inner], key[inner], row[~inner], key[~inner]


def _hidden(plan: TilePlan, chunk: Chunk) -> Tensor:
    """[P, 1, TILE, TILE] bool, where a row does not see a key."""
    key = plan.position[chunk.key][:, None, None, :]
    low, high = plan.low[chunk.row][:, None, :, None], plan.high[chunk.row][:, None, :, None]
    before = key < low
    if plan.prefix:
        before &= key >= plan.prefix
    return before | (key > high)


def _to_tiles(x_THD: Tensor, plan: TilePlan) -> Tensor:
    """[N, H, TILE, D]"""
    return x_THD[plan.token].transpose(1, 2).contiguous()


def _to_tokens(x_NHMD: Tensor, plan: TilePlan) -> Tensor:
    return x_NHMD.transpose(1, 2).flatten(0, 1)[plan.place]


@dataclass(frozen=True)
class TileBias:
    """A `RelativeBias` in tile layout."""

    position_table: Tensor
    time_table: Tensor
    # int64 [N, TILE]: the row's position, a candidate's being right behind what it sees
    rank: Tensor
    position: Tensor  # int64 [N, TILE]: the key's position
    query_time: Tensor  # int32 s [N, TILE]
    key_time: Tensor  # int32 s [N, TILE]

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        return self.position_table, self.time_table

    def buckets(self, chunk: Chunk) -> tuple[Tensor, Tensor]:
        """Entries of both tables, [P, TILE, TILE] each."""
        distance = self.rank[chunk.row][:, :, None] - self.position[chunk.key][:, None, :]
        gap = self.query_time[chunk.row][:, :, None] - self.key_time[chunk.key][:, None, :]
        return distance.clamp_(0, len(self.position_table) - 1), time_bucket(
            gap, len(self.time_table)
        )


def _tile_bias(bias: RelativeBias, plan: TilePlan) -> TileBias:
    query_time = bias.event_time_T if bias.query_time_T is None else bias.query_time_T
    rank = torch.where(plan.high < plan.position, plan.high + 1, plan.position)
    times = whole_seconds(query_time)[plan.token], whole_seconds(bias.event_time_T)[plan.token]
    return TileBias(bias.position_table, bias.time_table, rank, plan.position, *times)


def _score(q: Tensor, k: Tensor, chunk: Chunk, bias: TileBias | None) -> Tensor:
    """[P, H, TILE, TILE]"""
    score = torch.matmul(q, k.transpose(-1, -2))
    if bias is not None:
        distance, bucket = bias.buckets(chunk)
        score += (bias.position_table[distance] + bias.time_table[bucket])[:, None].to(score.dtype)
    return score


class _BlockedAttention(torch.autograd.Function):
    """Everything but the candidates' own keys."""

    @staticmethod
    def forward(ctx, q, k, v, position_table, time_table, plan: TilePlan, bias: TileBias | None):
        tile_q, tile_k, tile_v = (_to_tiles(x, plan) for x in (q, k, v))
        out = torch.zeros_like(tile_v)

        for chunk in plan.cut_chunks(q.shape[1]):
            keys, values = (x.index_select(0, chunk.key) for x in (tile_k, tile_v))
            weight = F.silu(
                _score(tile_q.index_select(0, chunk.row), keys, chunk, bias), inplace=True
            )
            if chunk.masked:
                weight.masked_fill_(_hidden(plan, chunk), 0.0)
            out.index_add_(0, chunk.row, torch.matmul(weight, values))

        ctx.save_for_backward(q, k, v)
        ctx.plan, ctx.bias = plan, bias
        return _to_tokens(out, plan)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_THV):
        plan, bias = ctx.plan, ctx.bias
        all_tiles = [_to_tiles(x, plan) for x in (*ctx.saved_tensors, grad_THV)]
        dq, dk, dv = (torch.zeros_like(x) for x in all_tiles[:3])
        d_tables = [] if bias is None else [torch.zeros_like(table) for table in bias.tables]

        for chunk in plan.cut_chunks(dq.shape[1]):
            row, key = chunk.row, chunk.key
            q, k, v, grad = (
                x.index_select(0, i) for x, i in zip(all_tiles, (row, key, key, row), strict=True)
            )

            score = _score(q, k, chunk, bias)
            weight, d_weight = F.silu(score), torch.matmul(grad, v.transpose(-1, -2))
            if chunk.masked:
                hidden = _hidden(plan, chunk)
                weight.masked_fill_(hidden, 0.0)
                d_weight.masked_fill_(hidden, 0.0)

            d_score = torch.ops.aten.silu_backward(d_weight, score)
            dv.index_add_(0, key, torch.matmul(weight.transpose(-1, -2), grad))
            dq.index_add_(0, row, torch.matmul(d_score, k))
            dk.index_add_(0, key, torch.matmul(d_score.transpose(-1, -2), q))

            if bias is not None:
                shared = d_score.sum(1).flatten()  # the heads share the tables
                for table, bucket in zip(d_tables, bias.buckets(chunk), strict=True):
                    table += torch.bincount(bucket.flatten(), shared, len(table)).to(table.dtype)

        pairs = zip((dq, dk, dv), ctx.saved_tensors, strict=True)
        grads = [_to_tokens(x, plan).to(y.dtype) for x, y in pairs]
        return *grads, *(d_tables or (None, None)), None, None


def _own_key(
    q_THD: Tensor, k_THD: Tensor, v_THV: Tensor, own_T: Tensor, bias: RelativeBias | None
) -> Tensor:
    """What the candidates take from themselves, [T, H, V]."""
    score = (q_THD * k_THD).sum(-1)
    if bias is not None:
        query_time = bias.event_time_T if bias.query_time_T is None else bias.query_time_T
        bucket = time_bucket(
            whole_seconds(query_time) - whole_seconds(bias.event_time_T), len(bias.time_table)
        )
        score = score + (bias.position_table[0] + bias.time_table[bucket])[:, None].to(score.dtype)
    return (F.silu(score) * own_T[:, None])[..., None] * v_THV


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
    if plan.own_T is not None:
        out = out + _own_key(q, k, v, plan.own_T, bias)
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
    causal: bool,
    attn_alpha: float,
    scaling_seq_len: int,
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
        if causal:
            out[rows] += (F.silu(q @ own_k.transpose(1, 2)).tril() @ own_v).transpose(0, 1)
        else:
            out[rows] += (F.silu((q * own_k).sum(-1, keepdim=True)) * own_v).transpose(0, 1)
    return (out / scaling_seq_len).to(q_CHD.dtype)
