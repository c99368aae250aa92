"""A stack of STU layers with attention truncation: later layers keep only the newest history
(arXiv:2602.16986).
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.jagged.op import truncate_tail
from pipeline.config import ModelConfig
from pipeline.model.encoders.stu import STU
from pipeline.model.tokens import Tokens


def select(tokens: Tokens, kept: Tensor, kept_lengths: Tensor) -> Tokens:
    """The tokens where `kept`, bool [T], is true, context and candidates among them.

    `kept_lengths`, int64 [B] on the CPU, says how many those are in each sequence. What a candidate
    sees is counted anew among the kept tokens; the mask follows from the new lengths.
    """
    offsets, visible = tokens.seq_offsets, tokens.target_visible
    kept_before = nn.functional.pad(kept.cumsum(0), (1, 0))
    if visible is not None:
        first = torch.repeat_interleave(
            offsets[:-1], tokens.num_targets, output_size=visible.numel()
        )
        visible = (kept_before[first + visible] - kept_before[first]).to(visible.dtype)
    index = torch.nonzero_static(kept, size=int(kept_lengths.sum())).squeeze(1)
    return Tokens(
        x_TE=tokens.x_TE.index_select(0, index),
        seq_offsets=kept_before[offsets],
        num_targets=tokens.num_targets,
        target_visible=visible,
        max_seq_len=int(kept_lengths.max()),
        host_lengths=torch.stack([kept_lengths, tokens.lengths_on_host()[1]]),
    )


def truncate(tokens: Tokens, num_context: int, keep_events: int) -> Tokens:
    """Context, the newest `keep_events` events and all candidates; a history no longer than that is
    untouched.
    """
    lengths, num_targets = tokens.lengths_on_host()
    kept = torch.minimum(lengths, num_context + keep_events + num_targets)
    x_TE, offsets = truncate_tail(
        tokens.x_TE,
        tokens.seq_offsets,
        tokens.num_targets + keep_events,
        num_context=num_context,
        num_rows=int(kept.sum()),
    )
    visible = tokens.target_visible
    if visible is not None:
        dropped = torch.repeat_interleave(
            tokens.seq_offsets.diff() - offsets.diff(),
            tokens.num_targets,
            output_size=visible.numel(),
        )
        newest = (visible - dropped).clamp(min=num_context)  # what is left of it, the context whole
        visible = torch.where(visible > num_context, newest, visible).to(visible.dtype)
    return Tokens(
        x_TE,
        offsets,
        tokens.num_targets,
        visible,
        int(kept.max()),
        torch.stack([kept, num_targets]),
    )


class Transducer(nn.Module):
    def __init__(self, cfg: ModelConfig, num_context: int) -> None:
        super().__init__()
        self.num_context = num_context
        self.truncate_after_layer = cfg.truncate_after_layer
        self.truncate_to = cfg.truncate_to
        self.layers = nn.ModuleList(STU(cfg, num_context) for _ in range(cfg.num_layers))
        self.norm_out = nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps)

    def forward(self, tokens: Tokens) -> Tensor:
        """[C, d]: the candidates' outputs, in the order of the batch."""
        for depth, layer in enumerate(self.layers):
            if depth == self.truncate_after_layer:
                tokens = truncate(tokens, self.num_context, self.truncate_to)
            tokens = replace(tokens, x_TE=layer(tokens))
        return self.norm_out(candidates(tokens))


def candidates(tokens: Tokens) -> Tensor:
    """[C, d]"""
    num_targets = int(tokens.lengths_on_host()[1].sum())
    return truncate_tail(tokens.x_TE, tokens.seq_offsets, tokens.num_targets, num_rows=num_targets)[
        0
    ]
