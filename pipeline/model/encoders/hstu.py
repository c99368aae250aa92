"""HSTU (arXiv:2402.17152) as ULTRA-HSTU's baseline: plain causal attention over the whole history
in every layer.

`hstu` reads two tokens an event, item and then action, as that paper does; `hstu_merged` one. With
`model.relative_bias` each layer adds a learned bias of relative position and time to its scores.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.jagged.op import concatenate
from kernels.semi_local_attention.types import RelativeBias
from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.encoders.stu import STU
from pipeline.model.encoders.transducer import candidates, select
from pipeline.model.tokens import TokenEncoder, Tokens, sequence_index, target_index, target_mask

TIME_BUCKETS = 129  # of the bias: HSTU's research code has 128 and one for all that is longer


class InterleavedEncoder(TokenEncoder):
    """SequenceBatch → Tokens, `[context | item, action, item, action, … | candidates]`."""

    def sequence(self, batch: SequenceBatch) -> Tokens:
        items = self.as_tokens(self.placed(self.items(batch), batch), batch)
        return interleave(items, self.placed(self.actions(batch), batch))


def interleave(items: Tokens, action_TE: Tensor) -> Tokens:
    """Each history row's action behind its item; a candidate has no action.

    `items` have no context yet.
    """
    lengths, num_targets = items.lengths_on_host()
    is_target = target_mask(items.seq_offsets, items.num_targets, len(action_TE))
    pairs = torch.stack([items.x_TE, action_TE.to(items.x_TE.dtype)], dim=1).flatten(0, 1)
    twice = Tokens(
        x_TE=pairs,
        seq_offsets=2 * items.seq_offsets,
        num_targets=items.num_targets,
        target_visible=None if items.target_visible is None else 2 * items.target_visible,
        max_seq_len=2 * items.max_seq_len,
        host_lengths=torch.stack([2 * lengths, num_targets]),
    )
    kept = torch.stack([torch.ones_like(is_target), ~is_target], dim=1).flatten()
    return select(twice, kept, 2 * lengths - num_targets)


class HSTU(nn.Module):
    """STU layers without window or truncation, over whatever tokens the encoder makes."""

    def __init__(self, cfg: ModelConfig, num_context: int) -> None:
        super().__init__()
        self.num_context = num_context
        self.interleaved = cfg.interleaved
        self.layers = nn.ModuleList(STU(cfg, num_context) for _ in range(cfg.num_layers))
        shapes = {"position": cfg.position_buckets, "time": TIME_BUCKETS}
        self.bias = nn.ModuleList(
            nn.ParameterDict(
                {name: nn.Parameter(0.02 * torch.randn(size)) for name, size in shapes.items()}
            )
            for _ in range(cfg.num_layers if cfg.relative_bias else 0)
        )
        self.norm_out = nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps)

    def forward(self, tokens: Tokens, batch: SequenceBatch) -> Tensor:
        """[C, d]: the candidates' outputs, in the order of the batch."""
        time_T = token_times(batch, self.num_context, self.interleaved) if len(self.bias) else None
        for depth, layer in enumerate(self.layers):
            assert isinstance(layer, STU)
            if time_T is None:
                x_TE = layer(tokens)
            else:
                tables = self.bias[depth]
                assert isinstance(tables, nn.ParameterDict)
                bias = RelativeBias(tables["position"], tables["time"], time_T)
                u, q, k, v = layer.project(tokens.x_TE)
                x_TE = layer.output(tokens.x_TE, u, layer.attend(q, k, v, tokens, bias))
            tokens = replace(tokens, x_TE=x_TE)
        return self.norm_out(candidates(tokens))


def token_times(batch: SequenceBatch, num_context: int, interleaved: bool) -> Tensor:
    """int64 [T], ms since the sequence's first row, of the tokens that the encoder made of `batch`.

    Summed up from the gaps, so that time which is only an order does not pass. Context tokens are
    at 0, a candidate at its request.
    """
    offsets, num_tokens = batch.seq_offsets, batch.num_tokens
    host_targets = batch.on_host.num_targets.long()
    num_candidates = int(host_targets.sum())
    sequence = sequence_index(offsets, num_tokens)
    is_target = target_mask(offsets, batch.num_targets, num_tokens)
    gap = batch.gap_ms.clamp(min=0)
    passed = gap.masked_fill(is_target, 0).cumsum(0)
    # the first row is at 0
    time = passed - passed[offsets[:-1].clamp(max=num_tokens - 1)][sequence]
    at = target_index(offsets, batch.num_targets, num_candidates)
    num_history = (offsets.diff() - batch.num_targets)[sequence[at]]
    visible = num_history if batch.target_visible is None else batch.target_visible.long()
    last = time[offsets[sequence[at]] + (visible - 1).clamp(min=0)]
    time = time.index_copy(0, at, torch.where(visible > 0, last + gap[at], 0))[:, None]
    lengths = torch.stack([batch.on_host.seq_offsets.diff(), host_targets])
    tokens = Tokens(time, offsets, batch.num_targets, None, batch.max_seq_len, lengths)
    if interleaved:
        tokens = interleave(tokens, time)
    shift = torch.arange(batch.num_sequences + 1, device=offsets.device) * num_context
    context = time.new_zeros(batch.num_sequences * num_context, 1)
    return concatenate(context, shift, tokens.x_TE, tokens.seq_offsets, backend="torch").squeeze(1)
