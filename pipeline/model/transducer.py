"""A stack of STU layers with attention truncation: later layers keep only the newest history (arXiv:2602.16986)."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.config import ModelConfig
from pipeline.model.embeddings import Tokens, sequence_index, target_mask
from pipeline.model.stu import STU


def select(tokens: Tokens, kept: Tensor) -> Tokens:
    """The tokens where `kept`, bool [T], is true, context and candidates among them.

    What a candidate sees is counted anew among the kept tokens; the mask follows from the new lengths.
    """
    offsets, visible = tokens.seq_offsets, tokens.target_visible
    kept_before = nn.functional.pad(kept.cumsum(0), (1, 0))
    if visible is not None:
        first = torch.repeat_interleave(offsets[:-1], tokens.num_targets, output_size=visible.numel())
        visible = (kept_before[first + visible] - kept_before[first]).to(visible.dtype)
    new_offsets = kept_before[offsets]
    return Tokens(
        x_TE=tokens.x_TE.index_select(0, kept.nonzero().squeeze(1)),
        seq_offsets=new_offsets,
        num_targets=tokens.num_targets,
        target_visible=visible,
        max_seq_len=int(new_offsets.diff().max()),
    )


def truncate(tokens: Tokens, num_context: int, keep_events: int) -> Tokens:
    """Context, the newest `keep_events` events and all candidates; a history no longer than that is untouched."""
    offsets, num_tokens = tokens.seq_offsets, tokens.x_TE.shape[0]
    lengths = offsets.diff()
    dropped = (lengths - tokens.num_targets - num_context - keep_events).clamp(min=0)
    sequence = sequence_index(offsets, num_tokens)
    position = torch.arange(num_tokens, device=offsets.device) - offsets[sequence]
    return select(tokens, (position < num_context) | (position >= num_context + dropped[sequence]))


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
    return tokens.x_TE[target_mask(tokens.seq_offsets, tokens.num_targets, tokens.x_TE.shape[0])]
