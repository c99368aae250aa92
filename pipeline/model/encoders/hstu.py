"""HSTU (arXiv:2402.17152) as ULTRA-HSTU's baseline: plain causal attention over the whole history
in every layer.

`hstu` reads two tokens an event, item and then action, as that paper does; `hstu_merged` one. With
`model.relative_bias` each layer adds a learned bias of relative position and time to its scores; a
row asks about the time of the next event (`asked_times`). With `retrieval.enabled` about its own: a
user's vector is made before anybody knows when it will be asked for.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.jagged.op import concatenate_sequences
from kernels.semi_local_attention.types import RelativeBias
from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.encoders.encoder import (
    Encoded,
    Encoder,
    TokenLayout,
    last_rows,
    read_last_layer,
)
from pipeline.model.encoders.stu import STU
from pipeline.model.encoders.transducer import select_tokens, stack_work
from pipeline.model.flops import Flops
from pipeline.model.tokens import TokenEncoder, Tokens, sequence_index, target_index, target_mask

TIME_BUCKETS = 129  # of the bias: HSTU's research code has 128 and one for all that is longer


class InterleavedEncoder(TokenEncoder):
    """SequenceBatch → Tokens, `[context | item, action, item, action, … | candidates]`."""

    one_token_per_event = False

    def sequence_tokens(self, batch: SequenceBatch) -> Tokens:
        items = self.add_position_and_time(self.item_rows(batch), batch)
        actions = self.add_position_and_time(self.action_rows(batch), batch)
        return interleave_actions(self.as_tokens(items, batch), actions)


def interleave_actions(items: Tokens, action_TE: Tensor) -> Tokens:
    """Each history row's action behind its item; a candidate has no action.

    `items` have no context yet.

        items      i0    i1    x      x a candidate that sees 2 tokens
        result     i0 a0 i1 a1 x      it sees 4
    """
    lengths, num_targets = items.lengths_on_host()
    is_target = target_mask(items.seq_offsets, items.num_targets, len(action_TE))

    pairs = torch.stack([items.x_TE, action_TE.to(items.x_TE.dtype)], dim=1).flatten(0, 1)
    twice = Tokens(
        x_TE=pairs,
        seq_offsets=2 * items.seq_offsets,
        num_targets=items.num_targets,
        target_visible=_twice(items.target_visible),
        max_seq_len=2 * items.max_seq_len,
        host_lengths=torch.stack([2 * lengths, num_targets]),
        num_next=items.num_next,
        next_visible=_twice(items.next_visible),
        target_from=_twice(items.target_from),
        span=_twice(items.span),
        tail_span=_twice(items.tail_span),
        host_tail_span=_twice(items.host_tail_span),
    )

    # every item stays, and the actions of history rows
    kept = torch.stack([torch.ones_like(is_target), ~is_target], dim=1).flatten()
    return select_tokens(twice, kept, 2 * lengths - num_targets)


def _twice(counts: Tensor | None) -> Tensor | None:
    return None if counts is None else 2 * counts


class HSTU(Encoder):
    """STU layers without window or truncation, over whatever tokens the token encoder makes."""

    settings = frozenset({"fp8", "norm_a_fp32", "relative_bias"})
    has_history_rows = True

    def __init__(self, cfg: ModelConfig, layout: TokenLayout) -> None:
        super().__init__(cfg, layout)
        self.interleaved = self.two_tokens_per_event(cfg)
        self.knows_request_time = layout.knows_request_time
        self.layers = nn.ModuleList(STU(cfg, self.num_context) for _ in range(cfg.num_layers))
        num_tables = cfg.num_layers if cfg.relative_bias else 0
        self.bias = nn.ModuleList(_bias_tables(cfg) for _ in range(num_tables))
        self.norm_out = nn.LayerNorm(cfg.d_model, eps=cfg.norm_eps)

    def forward(
        self, tokens: Tokens, batch: SequenceBatch, *, last_history: bool = False
    ) -> Encoded:
        """Candidates' rows, [C, d]; of interleaved tokens the last history row is an action's."""
        time_T = asked_T = None
        if len(self.bias):
            time_T = token_times(batch, self.num_context, self.interleaved)
            asked_T = asked_times(tokens, time_T) if self.knows_request_time else time_T

        made, rows = tokens.x_TE, None
        for depth, layer in enumerate(self.layers):
            assert isinstance(layer, STU)
            if depth == len(self.layers) - 1:
                on_gpu = layer.makes_rows(tokens, biased=time_T is not None)
                rows = last_rows(tokens, self.num_context, last_history=last_history, on_gpu=on_gpu)
            bias = None
            if time_T is not None and asked_T is not None:
                bias = self._layer_bias(depth, time_T, asked_T)
            made = layer(tokens, rows=rows, bias=bias)
            if rows is None:
                tokens = replace(tokens, x_TE=made)
        return read_last_layer(
            made, rows, tokens, self.norm_out, self.num_context, last_history=last_history
        )

    def _layer_bias(self, depth: int, time_T: Tensor, asked_T: Tensor) -> RelativeBias:
        tables = self.bias[depth]
        assert isinstance(tables, nn.ParameterDict)
        return RelativeBias(tables["position"], tables["time"], time_T, asked_T)

    @classmethod
    def two_tokens_per_event(cls, cfg: ModelConfig) -> bool:
        return True

    @classmethod
    def work(
        cls, tokens: Tokens, batch: SequenceBatch, cfg: ModelConfig, layout: TokenLayout
    ) -> Flops:
        return stack_work(tokens, tokens, cfg, layout)


class MergedHSTU(HSTU):
    """HSTU with item and action of an event in one token."""

    @classmethod
    def two_tokens_per_event(cls, cfg: ModelConfig) -> bool:
        return False

    @classmethod
    def has_fixed_sizes(cls, cfg: ModelConfig) -> bool:
        return True


def _bias_tables(cfg: ModelConfig) -> nn.ParameterDict:
    position = nn.Parameter(0.02 * torch.randn(cfg.position_buckets))
    time = nn.Parameter(0.02 * torch.randn(TIME_BUCKETS))
    return nn.ParameterDict({"position": position, "time": time})


def asked_times(tokens: Tokens, time_T: Tensor) -> Tensor:
    """int64 [T], the times that rows ask about: a row that of the next event, a candidate its own.

    So has HSTU's research code: `ext_timestamps[:, 1:]` less `ext_timestamps[:, :-1]` in
    generative_recommenders/research/modeling/sequential/hstu.py, where the last row repeats its own
    time. Here the newest history row asks about the newest request, if there is one, so that it
    asks the same with later rows behind it.

        tokens    h0 h1 h2  x   y       x sees h0 and h1, y all
        time       0  5 12 12  30
        asked      5 12 30 12  30
    """
    offsets, num_targets, num_tokens = tokens.seq_offsets, tokens.num_targets, len(time_T)
    sequence = sequence_index(offsets, num_tokens)
    following = torch.cat([time_T[1:], time_T[-1:]])

    newest = (offsets[1:] - num_targets - 1)[sequence]
    is_newest = torch.arange(num_tokens, device=offsets.device) == newest
    last = time_T[(offsets[1:] - 1)[sequence]]
    is_target = target_mask(offsets, num_targets, num_tokens)
    return torch.where(is_target, time_T, torch.where(is_newest, last, following))


def token_times(batch: SequenceBatch, num_context: int, interleaved: bool) -> Tensor:
    """int64 [T], ms since the sequence's first row, of the tokens that the encoder made of `batch`.

    Summed up from the gaps, so that time which is only an order does not pass. Context tokens are
    at 0, a candidate at its request.

        rows       h0 h1 h2  x      x a candidate that sees h0 and h1
        gap_ms      9  5  7 100     the first row's gap does not count
        time        0  5 12 105
    """
    offsets, num_tokens = batch.seq_offsets, batch.num_tokens
    host_targets = batch.on_host.num_targets.long()
    num_candidates = int(host_targets.sum())
    sequence = sequence_index(offsets, num_tokens)

    # history: the gaps up to a row, less those up to its sequence's first
    is_target = target_mask(offsets, batch.num_targets, num_tokens)
    gap = batch.gap_ms.clamp(min=0)
    passed = gap.masked_fill(is_target, 0).cumsum(0)
    time = passed - passed[offsets[sequence]]

    # candidates: the time of the last row seen, and the gap from there
    at = target_index(offsets, batch.num_targets, num_candidates)
    num_history = (offsets.diff() - batch.num_targets)[sequence[at]]
    visible = num_history if batch.target_visible is None else batch.target_visible.long()
    last = time[offsets[sequence[at]] + (visible - 1).clamp(min=0)]
    time = time.index_copy(0, at, torch.where(visible > 0, last + gap[at], 0))[:, None]

    # as tokens: one or two an event, behind the context
    lengths = torch.stack([batch.on_host.seq_offsets.diff(), host_targets])
    tokens = Tokens(time, offsets, batch.num_targets, None, batch.max_seq_len, lengths)
    if interleaved:
        tokens = interleave_actions(tokens, time)
    shift = torch.arange(batch.num_sequences + 1, device=offsets.device) * num_context
    context = time.new_zeros(batch.num_sequences * num_context, 1)
    return concatenate_sequences(
        context, shift, tokens.x_TE, tokens.seq_offsets, backend="torch"
    ).squeeze(1)
