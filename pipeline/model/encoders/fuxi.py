"""FuXi-α (arXiv:2502.03036) and FuXi-β (arXiv:2508.10615): position and time as channels of their
own beside attention.

One layer, x [T, d], h heads:

    u, v, q, k = SiLU(RMSNorm(x) W)
    A_lat[i, j] = SiLU(q_i · k_j) / N                        each head its own
    A_pos[i, j] = w_pos[i − j]                               shared by the heads
    A_ts[i, j]  = w_ts[bucket(t_i − t_j)]                    shared by the heads
    y = u ⊙ RMSNorm([A_lat v | A_pos v | A_ts v])
    z = y W0 + b0 + x
    out = (SiLU(n W1) ⊙ n W3) W2 + z,  n = RMSNorm(z)

FuXi-β has no q, k and latent channel, and A_ts = a · (t_i − t_j + 1)^(−b).

Two things differ from the authors' code. N is `model.attention.scaling_seq_len`, where they have
the padded length. And they take the time from t_j to the row after i, the one that is asked for;
here an encoded history depends on nothing that comes after it.

Both see what plain causal attention sees. The maps are whole matrices, [B, h, L, L] of the padded
batch: the memory of a batch grows with the square of its longest sequence.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from kernels.semi_local_attention.types import QueryRows
from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.encoders.encoder import (
    Encoded,
    Encoder,
    TokenLayout,
    last_layer_size,
    last_rows,
    read_rows,
    spread_rows,
)
from pipeline.model.encoders.hstu import token_times
from pipeline.model.encoders.transformer import Padding, chosen_rows
from pipeline.model.flops import Flops, kept_pairs
from pipeline.model.tokens import Tokens, target_index

TIME_BUCKETS = 129
BUCKET_WIDTH = 0.301  # of ln(ms), about a doubling every 2.3 buckets


class FuXiAlpha(Encoder):
    """Layers of three channels: latent attention, position, time."""

    has_history_rows = True
    has_latent: ClassVar[bool] = True

    def __init__(self, cfg: ModelConfig, layout: TokenLayout) -> None:
        super().__init__(cfg, layout)
        self.layers = nn.ModuleList(
            FuXiLayer(cfg, has_latent=self.has_latent) for _ in range(cfg.num_layers)
        )
        self.norm_out = nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps)

    def forward(
        self, tokens: Tokens, batch: SequenceBatch, *, last_history: bool = False
    ) -> Encoded:
        time_T = token_times(batch, self.num_context, interleaved=False)
        maps = ChannelMaps.of(tokens, time_T, self.num_context)
        rows = last_rows(tokens, self.num_context, last_history=last_history)
        x_TE = tokens.x_TE
        for layer in self.layers[:-1]:
            x_TE = layer(x_TE, maps)
        x_TE = spread_rows(self.layers[-1](x_TE, maps, rows), rows, len(x_TE))

        tokens = replace(tokens, x_TE=x_TE)
        return read_rows(tokens, self.norm_out, self.num_context, last_history=last_history)

    @classmethod
    def work(
        cls, tokens: Tokens, batch: SequenceBatch, cfg: ModelConfig, layout: TokenLayout
    ) -> Flops:
        """Projections, a product of every channel's map with v, and the gated feed-forward part."""
        num_tokens, h, d = len(tokens.x_TE), cfg.num_heads, cfg.d_model
        causal = kept_pairs(
            tokens.seq_offsets, tokens.num_targets, tokens.target_visible, None, 0, 0
        )
        latent, channels = int(cls.has_latent), 2 + int(cls.has_latent)
        of_pair = 2 * h * (channels * cfg.d_v + latent * cfg.d_qk)
        # of each token v and k; of each row that is made u and the output map, which are of all
        # channels' width, q and the feed-forward part
        of_token = 2 * d * (h * cfg.d_v + latent * h * cfg.d_qk)
        of_row = 2 * d * (2 * channels * h * cfg.d_v + latent * h * cfg.d_qk + 3 * cfg.ffn_dim)

        num_rows, last_pairs = last_layer_size(tokens, layout)
        flops = (cfg.num_layers - 1) * (causal * of_pair + num_tokens * (of_token + of_row))
        flops += last_pairs * of_pair + num_tokens * of_token + num_rows * of_row
        pairs = cfg.num_layers * causal
        return Flops(tokens=num_tokens, causal_pairs=pairs, kept_pairs=pairs, flops=flops)


class FuXiBeta(FuXiAlpha):
    """Layers of two channels: position, and a power of time."""

    has_latent = False


class ChannelMaps:
    """What the layers of a batch share: where its tokens lie, how far apart, and when."""

    def __init__(self, padding: Padding, distance: Tensor, elapsed_ms: Tensor) -> None:
        self.padding = padding
        self.mask = padding.mask  # bool [B, 1, L, L]
        self.distance = distance  # int64 [B or 1, L, L]: rows from a key to a query, 0 or more
        self.elapsed_ms = elapsed_ms  # int64 [B, L, L]: the same in time

    @staticmethod
    def of(tokens: Tokens, time_T: Tensor, num_context: int) -> "ChannelMaps":
        """`time_T`, int64 [T]: ms since the sequence's first row (`token_times`).

        A candidate stands behind the last row that it sees, wherever it lies.

        rows          h0 h1 h2  x  y      x sees two rows, y three
        place          0  1  2  2  3
        """
        padding = Padding.of(tokens, num_context)
        num_sequences, length = padding.mask.shape[0], padding.mask.shape[-1]

        num_candidates = int(tokens.lengths_on_host()[1].sum())
        at = target_index(tokens.seq_offsets, tokens.num_targets, num_candidates)
        visible = tokens.target_visible
        if visible is None:
            num_history = tokens.seq_offsets.diff() - tokens.num_targets
            visible = num_history[padding.sequence[at]]
        place = padding.position.index_copy(0, at, visible.long())

        def gaps(values: Tensor) -> Tensor:
            padded = values.new_zeros(num_sequences, length)
            padded = padded.index_put((padding.sequence, padding.position), values)
            return (padded[:, :, None] - padded[:, None, :]).clamp(min=0)

        # without candidates all sequences are alike
        rows = torch.arange(length, device=time_T.device)
        alike = (rows[:, None] - rows).clamp(min=0)[None]
        distance = gaps(place) if num_candidates else alike
        return ChannelMaps(padding, distance, gaps(time_T))

    def of_rows(self, rows: QueryRows | None) -> "ChannelMaps":
        """The same of some queries, [B, R, L] each."""
        if rows is None:
            return self
        padding = self.padding.of_rows(rows)
        place = padding.sequence, padding.position
        token = self.padding.sequence[rows.index], self.padding.position[rows.index]

        def gather(values: Tensor) -> Tensor:
            of_batch = values.expand(len(self.elapsed_ms), -1, -1)
            padded = values.new_zeros(len(of_batch), padding.mask.shape[2], values.shape[2])
            return padded.index_put(place, of_batch[token])

        return ChannelMaps(padding, gather(self.distance), gather(self.elapsed_ms))


class FuXiLayer(nn.Module):
    """One layer; its rows are packed, its maps padded."""

    def __init__(self, cfg: ModelConfig, *, has_latent: bool) -> None:
        super().__init__()
        self.cfg, self.has_latent = cfg, has_latent
        channels = 3 if has_latent else 2
        heads_v, heads_qk = cfg.num_heads * cfg.d_v, cfg.num_heads * cfg.d_qk
        latent = [heads_qk, heads_qk] if has_latent else []
        self.widths = [channels * heads_v, heads_v, *latent]

        self.norm_in = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps, elementwise_affine=False)
        self.uvqk = nn.Linear(cfg.d_model, sum(self.widths), bias=False)
        nn.init.normal_(self.uvqk.weight, std=0.02)
        self.position = nn.Parameter(0.02 * torch.randn(cfg.position_buckets))
        self.time = nn.Parameter(0.02 * torch.randn(TIME_BUCKETS) if has_latent else _power_law())

        self.norm_channels = nn.RMSNorm(
            channels * heads_v, eps=cfg.norm_eps, elementwise_affine=False
        )
        self.out = nn.Linear(channels * heads_v, cfg.d_model)
        self.norm_ffn = nn.RMSNorm(cfg.d_model, eps=cfg.norm_eps, elementwise_affine=False)
        self.ffn_in = nn.Linear(cfg.d_model, cfg.ffn_dim, bias=False)
        self.ffn_gate = nn.Linear(cfg.d_model, cfg.ffn_dim, bias=False)
        self.ffn_out = nn.Linear(cfg.ffn_dim, cfg.d_model, bias=False)
        for linear in (self.out, self.ffn_in, self.ffn_gate, self.ffn_out):
            nn.init.xavier_uniform_(linear.weight)
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x_TE: Tensor, maps: ChannelMaps, rows: QueryRows | None = None) -> Tensor:
        """[T, d], or [R, d] of `rows`, for which U, Q and what follows are made alone."""
        silu, heads = nn.functional.silu, self.cfg.num_heads
        asking = maps.of_rows(rows)
        normed = self.norm_in(x_TE)
        of_rows = chosen_rows(normed, rows)
        maps_of = self.uvqk.weight.split(self.widths)
        u = silu(nn.functional.linear(of_rows, maps_of[0]))
        v = silu(nn.functional.linear(normed, maps_of[1]))
        v = maps.padding.pad_heads(v.unflatten(1, (heads, -1)))  # [B, H, L, V]

        channels = [
            self._shared(map_of(asking), v) for map_of in (self.position_map, self.time_map)
        ]
        if self.has_latent:
            q = silu(nn.functional.linear(of_rows, maps_of[2])).unflatten(1, (heads, -1))
            k = silu(nn.functional.linear(normed, maps_of[3])).unflatten(1, (heads, -1))
            q, k = asking.padding.pad_heads(q), maps.padding.pad_heads(k)
            scores = silu(q @ k.transpose(2, 3)) / self.cfg.attention.scaling_seq_len
            channels.insert(0, (scores * asking.mask) @ v)

        packed = [asking.padding.pack_heads(channel) for channel in channels]
        y = u * self.norm_channels(torch.cat(packed, dim=1))
        z = self.out(self.dropout(y)) + chosen_rows(x_TE, rows)

        normed = self.dropout(self.norm_ffn(z))
        return self.ffn_out(silu(self.ffn_in(normed)) * self.ffn_gate(normed)) + z

    def position_map(self, maps: ChannelMaps) -> Tensor:
        """[B, 1, L, L]"""
        bucket = maps.distance.clamp(max=len(self.position) - 1)
        return look_up(self.position, bucket)[:, None] * maps.mask

    def time_map(self, maps: ChannelMaps) -> Tensor:
        """[B, 1, L, L]"""
        if self.has_latent:
            values = look_up(self.time, time_bucket(maps.elapsed_ms))
        else:
            factor, exponent = self.time
            values = factor * (maps.elapsed_ms + 1.0).pow(-exponent)
        return values[:, None] * maps.mask

    @staticmethod
    def _shared(map_B1LL: Tensor, v_BHLV: Tensor) -> Tensor:
        """[B, H, L, V]: the same map for every head."""
        return map_B1LL.to(v_BHLV.dtype) @ v_BHLV


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, whose gradient adds millions of values to few numbers: the embedding's sums
    them in parallel, plain indexing one after another.
    """
    return nn.functional.embedding(index, table[:, None])[..., 0]


def time_bucket(elapsed_ms: Tensor) -> Tensor:
    """int64: logarithmic, up to 128."""
    bucket = torch.log(elapsed_ms.clamp(min=1).float()) / BUCKET_WIDTH
    return bucket.long().clamp(max=TIME_BUCKETS - 1)


def _power_law() -> Tensor:
    """[2]: factor and exponent of FuXi-β's time, as its authors draw them."""
    factor = torch.empty(1).uniform_(-0.2, 0.2)
    exponent = torch.empty(1).uniform_(0.4, 0.8)
    return torch.cat([factor, exponent])
