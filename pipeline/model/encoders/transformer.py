"""Softmax attention: a pre-norm Transformer, and the parts that SASRec has in common with it.

Both see what plain causal HSTU sees, candidates blind to each other. PyTorch's
`scaled_dot_product_attention` has no jagged form of that mask, so attention alone pads to the
longest sequence, with one [B, L, L] mask for all layers; everything else works on packed tokens.
"""

from dataclasses import dataclass, replace

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
from pipeline.model.flops import Flops, kept_pairs
from pipeline.model.tokens import Tokens, sequence_index, target_index


@dataclass(frozen=True, slots=True)
class Padding:
    """Where packed tokens lie in [B, L], and what they see there."""

    sequence: Tensor  # int64 [T]
    position: Tensor  # int64 [T]
    mask: Tensor  # bool [B, 1, L, L]

    @staticmethod
    def of(tokens: Tokens, num_context: int) -> "Padding":
        """Padding of the sequences, with the mask that all layers share.

        c h0 h1 x y    c context, h history, x and y candidates; y sees c and h0 alone
        sees 1 2 3 3 2 keys from the oldest on; the diagonal is always seen
        """
        offsets, num_tokens, length = tokens.seq_offsets, len(tokens.x_TE), tokens.max_seq_len
        sequence = sequence_index(offsets, num_tokens)
        position = torch.arange(num_tokens, device=offsets.device) - offsets[sequence]

        # so many keys from the oldest on; a candidate itself too
        num_history = (offsets.diff() - tokens.num_targets)[sequence]
        sees = torch.minimum(position + 1, num_history)
        if tokens.target_visible is not None:
            at = target_index(offsets, tokens.num_targets, len(tokens.target_visible))
            sees = sees.index_copy(0, at, tokens.target_visible.long())

        nothing = sees.new_zeros(len(tokens.num_targets), length)
        padded = nothing.index_put((sequence, position), sees)
        key = torch.arange(length, device=offsets.device)
        seen = key < padded[:, :, None]
        if tokens.target_from is not None:
            at = target_index(offsets, tokens.num_targets, len(tokens.target_from))
            oldest = tokens.target_from.to(nothing.dtype)
            oldest = nothing.index_put((sequence[at], position[at]), oldest)
            seen &= (key >= oldest[:, :, None]) | (key < num_context)

        # Padding too sees itself: a softmax over nothing would be NaN.
        mask = seen | (key == key[:, None])
        return Padding(sequence, position, mask[:, None])

    def of_rows(self, rows: QueryRows) -> "Padding":
        """Where some of the tokens lie in [B, R], and what these see, [B, 1, R, L]."""
        token = rows.index
        sequence = self.sequence[token]
        number = torch.arange(len(token), device=token.device) - rows.offsets[sequence]
        longest = int(rows.offsets.diff().max()) if len(token) else 0

        num_sequences, length = self.mask.shape[0], self.mask.shape[-1]
        # where no row is, everything is seen, as a softmax over nothing would be NaN
        mask = self.mask.new_ones(num_sequences, longest, length)
        sees = self.mask[sequence, 0, self.position[token]]
        return Padding(sequence, number, mask.index_put((sequence, number), sees)[:, None])

    def attend(
        self, q_RHD: Tensor, k_THD: Tensor, v_THV: Tensor, dropout: float, keys: "Padding"
    ) -> Tensor:
        """[R, H * V]; `keys` says where keys and values lie."""
        q, k, v = self.pad_heads(q_RHD), keys.pad_heads(k_THD), keys.pad_heads(v_THV)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=self.mask, dropout_p=dropout
        )
        return self.pack_heads(out)

    def pack_heads(self, x_BHLD: Tensor) -> Tensor:
        """[T, H * D]"""
        return x_BHLD.transpose(1, 2)[self.sequence, self.position].flatten(1)

    def pad_heads(self, x_THD: Tensor) -> Tensor:
        """[B, H, L, D]"""
        batch, _, length, _ = self.mask.shape
        padded = x_THD.new_zeros(batch, length, *x_THD.shape[1:])
        return padded.index_put((self.sequence, self.position), x_THD).transpose(1, 2)


class SoftmaxEncoder(Encoder):
    """A stack of blocks, which subclasses make, and a last norm."""

    has_history_rows = True

    def __init__(self, cfg: ModelConfig, layout: TokenLayout) -> None:
        super().__init__(cfg, layout)
        self.layers = nn.ModuleList(self.make_block(cfg) for _ in range(cfg.num_layers))
        self.norm_out = nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps)

    @staticmethod
    def make_block(cfg: ModelConfig) -> nn.Module:
        """One layer: packed rows and their `Padding` → rows, all or those of `QueryRows`."""
        raise NotImplementedError

    def forward(
        self, tokens: Tokens, batch: SequenceBatch, *, last_history: bool = False
    ) -> Encoded:
        padding = Padding.of(tokens, self.num_context)
        rows = last_rows(tokens, self.num_context, last_history=last_history)
        x_TE = tokens.x_TE
        for layer in self.layers[:-1]:
            x_TE = layer(x_TE, padding)
        x_TE = spread_rows(self.layers[-1](x_TE, padding, rows), rows, len(x_TE))

        tokens = replace(tokens, x_TE=x_TE)
        return read_rows(tokens, self.norm_out, self.num_context, last_history=last_history)

    @classmethod
    def work(
        cls, tokens: Tokens, batch: SequenceBatch, cfg: ModelConfig, layout: TokenLayout
    ) -> Flops:
        """Projections, attention and the feed-forward part, which has no gate."""
        offsets, num_targets, num_tokens = tokens.seq_offsets, tokens.num_targets, len(tokens.x_TE)
        causal = kept_pairs(offsets, num_targets, tokens.target_visible, None, 0, 0)

        pairs = cfg.num_layers * causal
        flops = (cfg.num_layers - 1) * block_flops(cfg, num_tokens, causal)
        num_rows, last_pairs = last_layer_size(tokens, layout)
        flops += block_flops(cfg, num_tokens, last_pairs, num_rows)
        return Flops(tokens=num_tokens, causal_pairs=pairs, kept_pairs=pairs, flops=flops)


def block_flops(cfg: ModelConfig, num_tokens: int, pairs: int, num_rows: int | None = None) -> int:
    """Products of one block, forward, with `pairs` kept pairs of query and key; where only
    `num_rows` are made, all but keys and values are of these.
    """
    rows = num_tokens if num_rows is None else num_rows
    heads = cfg.num_heads * (cfg.d_qk + cfg.d_v)
    attention = 2 * pairs * heads
    # keys and values; queries, the output map and the feed-forward part
    return attention + 2 * cfg.d_model * (num_tokens * heads + rows * (heads + 2 * cfg.ffn_dim))


class Transformer(SoftmaxEncoder):
    """Blocks of pre-norm attention and GELU."""

    @staticmethod
    def make_block(cfg: ModelConfig) -> nn.Module:
        return TransformerBlock(cfg)


class SelfAttention(nn.Module):
    """Multi-head softmax attention; queries and keys may come from different rows."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.num_heads, self.dropout = cfg.num_heads, cfg.dropout
        self.query = nn.Linear(cfg.d_model, cfg.num_heads * cfg.d_qk)
        self.key = nn.Linear(cfg.d_model, cfg.num_heads * cfg.d_qk)
        self.value = nn.Linear(cfg.d_model, cfg.num_heads * cfg.d_v)
        self.out = nn.Linear(cfg.num_heads * cfg.d_v, cfg.d_model)

    def forward(
        self, query_RE: Tensor, keys_TE: Tensor, padding: Padding, rows: QueryRows | None = None
    ) -> Tensor:
        """[R, d]; without `rows` every token asks."""
        parts = self.query(query_RE), self.key(keys_TE), self.value(keys_TE)
        q, k, v = (x.unflatten(1, (self.num_heads, -1)) for x in parts)

        dropout = self.dropout if self.training else 0.0
        asking = padding if rows is None else padding.of_rows(rows)
        return self.out(asking.attend(q, k, v, dropout, padding))


def chosen_rows(x_TE: Tensor, rows: QueryRows | None) -> Tensor:
    """[R, d]: of `rows`, else all."""
    return x_TE if rows is None else x_TE.index_select(0, rows.index)


class TransformerBlock(nn.Module):
    """x + MHA(LN(x)); x + FFN(LN(x))."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.norm_attn = nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps)
        self.attention = SelfAttention(cfg)
        self.norm_ffn = nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps)
        self.ffn = nn.Sequential(
            nn.Linear(cfg.d_model, cfg.ffn_dim),
            nn.GELU(),
            nn.Dropout(cfg.dropout),
            nn.Linear(cfg.ffn_dim, cfg.d_model),
        )
        self.dropout = nn.Dropout(cfg.dropout)

    def forward(self, x_TE: Tensor, padding: Padding, rows: QueryRows | None = None) -> Tensor:
        normed = self.norm_attn(x_TE)
        attended = self.attention(chosen_rows(normed, rows), normed, padding, rows)
        x_RE = chosen_rows(x_TE, rows) + self.dropout(attended)
        return x_RE + self.dropout(self.ffn(self.norm_ffn(x_RE)))
