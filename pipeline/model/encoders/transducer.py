"""A stack of STU layers with attention truncation: later layers keep only the newest history
(arXiv:2602.16986).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.jagged.op import truncate_tail
from kernels.semi_local_attention.types import QueryRows
from pipeline.batches.filling import length_bound
from pipeline.config import ChannelConfig, ModelConfig
from pipeline.model.encoders.encoder import (
    Encoded,
    TokenLayout,
    last_layer_size,
    last_rows,
    read_last_layer,
)
from pipeline.model.encoders.own_view import own_view_flops, own_view_rows, stack_sharing
from pipeline.model.encoders.stu import STU, layer_flops
from pipeline.model.flops import Flops, kept_pairs, mask_pairs, row_pairs
from pipeline.model.tokens import Tokens


def select_tokens(tokens: Tokens, kept: Tensor, kept_lengths: Tensor) -> Tokens:
    """The tokens where `kept`, bool [T], is true, context and candidates among them.

    `kept_lengths`, int64 [B] on the CPU, says how many those are in each sequence. What a candidate
    sees is counted anew among the kept tokens; the mask follows from the new lengths.

        tokens    c h0 h1 h2 x      x sees 3: c h0 h1
        kept      1  1  0  1 1
        result    c h0    h2 x      x sees 2: c h0
    """
    offsets = tokens.seq_offsets
    kept_before = nn.functional.pad(kept.cumsum(0), (1, 0))

    def count_kept(visible: Tensor | None, num: Tensor | None) -> Tensor | None:
        if visible is None or num is None:
            return None
        first = torch.repeat_interleave(offsets[:-1], num, output_size=visible.numel())
        return (kept_before[first + visible] - kept_before[first]).to(visible.dtype)

    index = torch.nonzero_static(kept, size=int(kept_lengths.sum())).squeeze(1)
    return Tokens(
        x_TE=tokens.x_TE.index_select(0, index),
        seq_offsets=kept_before[offsets],
        num_targets=tokens.num_targets,
        target_visible=count_kept(tokens.target_visible, tokens.num_targets),
        max_seq_len=_length_bound(tokens, kept_lengths),
        host_lengths=torch.stack([kept_lengths, tokens.lengths_on_host()[1]]),
        num_next=tokens.num_next,
        next_visible=count_kept(tokens.next_visible, tokens.num_next),
        target_from=count_kept(tokens.target_from, tokens.num_targets),
        # at most so many of these are left
        span=tokens.span,
        tail_span=tokens.tail_span,
        host_tail_span=tokens.host_tail_span,
    )


def truncate_history(tokens: Tokens, num_context: int, keep_events: int) -> Tokens:
    """Context, the newest `keep_events` events that the first request sees, all later ones and all
    candidates; a history no longer than that is untouched.

        tokens           c h0 h1 h2 h3 x y      x sees 4: c h0 h1 h2, y sees all; span 1
        keep_events 2    c    h1 h2 h3 x y      x sees 3: c h1 h2,    y sees 4
    """
    lengths, num_targets = tokens.lengths_on_host()
    tail, host_tail = tokens.num_targets + keep_events, num_targets + keep_events
    if tokens.tail_span is not None and tokens.host_tail_span is not None:
        tail, host_tail = tail + tokens.tail_span, host_tail + tokens.host_tail_span
    kept = torch.minimum(lengths, num_context + host_tail)
    x_TE, offsets = truncate_tail(
        tokens.x_TE,
        tokens.seq_offsets,
        tail,
        num_context=num_context,
        num_rows=int(kept.sum()),
    )

    num_dropped = tokens.seq_offsets.diff() - offsets.diff()

    def count_left(visible: Tensor | None, num: Tensor | None) -> Tensor | None:
        if visible is None or num is None:
            return None
        dropped = torch.repeat_interleave(num_dropped, num, output_size=visible.numel())
        newest = (visible - dropped).clamp(min=num_context)  # what is left of it, the context whole
        return torch.where(visible > num_context, newest, visible).to(visible.dtype)

    return Tokens(
        x_TE=x_TE,
        seq_offsets=offsets,
        num_targets=tokens.num_targets,
        target_visible=count_left(tokens.target_visible, tokens.num_targets),
        max_seq_len=_length_bound(tokens, kept),
        host_lengths=torch.stack([kept, num_targets]),
        num_next=tokens.num_next,
        next_visible=count_left(tokens.next_visible, tokens.num_next),
        target_from=count_left(tokens.target_from, tokens.num_targets),
        span=tokens.span,
        tail_span=tokens.tail_span,
        host_tail_span=tokens.host_tail_span,
    )


def kept_rows(tokens: Tokens, num_context: int, keep_events: int) -> tuple[Tokens, QueryRows]:
    """What truncation leaves of the tokens, which have yet to be made, and where they are now."""
    places = torch.arange(len(tokens.x_TE), device=tokens.x_TE.device)[:, None]
    kept = truncate_history(replace(tokens, x_TE=places), num_context, keep_events)
    return kept, QueryRows(kept.x_TE[:, 0], kept.seq_offsets)


def _length_bound(tokens: Tokens, kept_lengths: Tensor) -> int:
    """No sequence is longer. One of few bounds, since a CUDA graph holds it for many batches."""
    return min(tokens.max_seq_len, length_bound(int(kept_lengths.max())))


class Transducer(nn.Module):
    """STU layers over one channel's tokens, and a last norm."""

    def __init__(self, cfg: ModelConfig, layout: TokenLayout) -> None:
        super().__init__()
        num_context = layout.num_context
        self.num_context = num_context
        self.dropout = cfg.dropout
        self.has_own_views = _has_own_views(cfg, layout)
        self.truncate_after_layer = cfg.truncate_after_layer
        self.truncate_to = cfg.truncate_to
        self.layers = nn.ModuleList(STU(cfg, num_context) for _ in range(cfg.num_layers))
        self.norm_out = nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps)

    def forward(self, tokens: Tokens, *, last_history: bool = False) -> Encoded:
        """Rows of the last layer, as `Encoder.forward`."""
        if self.has_own_views and tokens.target_visible is not None:
            dropout = self.dropout if self.training else 0.0
            return Encoded(self.norm_out(own_view_rows(self, tokens, dropout)))

        is_cut, made, rows = False, tokens.x_TE, None
        for depth, layer in enumerate(self.layers):
            assert isinstance(layer, STU)
            if not is_cut:
                tokens = self.tokens_at(depth, tokens)
            if self.cuts_early(depth, layer, tokens):
                kept, kept_places = kept_rows(tokens, self.num_context, self.truncate_to)
                made = layer(tokens, rows=kept_places)
                tokens, is_cut = replace(kept, x_TE=made), True
                continue

            if depth == len(self.layers) - 1:
                on_gpu = layer.makes_rows(tokens)
                rows = last_rows(tokens, self.num_context, last_history=last_history, on_gpu=on_gpu)
            made = layer(tokens, rows=rows)
            if rows is None:
                tokens = replace(tokens, x_TE=made)
        return read_last_layer(
            made, rows, tokens, self.norm_out, self.num_context, last_history=last_history
        )

    def cuts_early(self, depth: int, layer: STU, tokens: Tokens) -> bool:
        """True of the layer before truncation where it makes those rows alone that are kept: in the
        fused kernels. On a CPU it would change the draws of dropout.
        """
        if self.truncate_after_layer is None or depth + 1 != self.truncate_after_layer:
            return False
        return layer.is_fused(tokens) and layer.makes_rows(tokens)

    def tokens_at(self, depth: int, tokens: Tokens) -> Tokens:
        """What is left of the previous layer's tokens for the layer at `depth`."""
        if depth == self.truncate_after_layer:
            return truncate_history(tokens, self.num_context, self.truncate_to)
        return tokens


def _has_own_views(cfg: ModelConfig, layout: TokenLayout) -> bool:
    """True where candidates of several requests have to be kept apart, and are."""
    return layout.exact_view and stack_sharing(ChannelConfig(), cfg) == "layers"


def stack_work(whole: Tokens, tokens: Tokens, model: ModelConfig, layout: TokenLayout) -> Flops:
    """The layers' work on `tokens`, which are `whole` or its newest rows."""
    num_context = layout.num_context
    work = Flops(tokens=len(whole.x_TE))
    causal = kept_pairs(whole.seq_offsets, whole.num_targets, whole.target_visible, None, 0, 0)
    if _has_own_views(model, layout) and tokens.target_visible is not None:
        work.flops, work.kept_pairs = own_view_flops(tokens, model, num_context)
        work.causal_pairs = model.num_layers * causal
        return work

    pairs = mask_pairs(tokens, model.attention, num_context)
    for depth in range(model.num_layers):
        if depth == model.truncate_after_layer:
            tokens = truncate_history(tokens, num_context, model.truncate_to)
            pairs = mask_pairs(tokens, model.attention, num_context)
        work.causal_pairs += causal
        work.kept_pairs += pairs
        if layout.cuts_early and depth + 1 == model.truncate_after_layer:
            work.flops += _early_cut_flops(tokens, model, num_context)
        elif depth < model.num_layers - 1:
            work.flops += layer_flops(model, len(tokens.x_TE), pairs)

    num_rows, pairs = last_layer_size(tokens, layout, model.attention)
    work.flops += layer_flops(model, len(tokens.x_TE), pairs, num_rows)

    work.truncated_tokens = work.tokens - len(tokens.x_TE)
    return work


def _early_cut_flops(tokens: Tokens, model: ModelConfig, num_context: int) -> int:
    """Products of the layer before truncation where it makes those rows alone that are kept."""
    mask = model.attention
    _, rows = kept_rows(tokens, num_context, model.truncate_to)
    sizes = mask.window, mask.full_rows, num_context + mask.extra_prefix
    return layer_flops(model, len(tokens.x_TE), row_pairs(tokens, rows, *sizes), len(rows.index))
