"""What the mask keeps, counted from lengths, and the floating-point work that follows from it.

Per STU layer, forward, T tokens and `pairs` kept pairs of query and key:
`2·T·d·(2h·d_qk + 2h·d_v) + 2·T·h·d_v·d + 2·pairs·h·(d_qk + d_v)`. With `concat_ua` the output
layer's term is three times as large. A mixture is the sum of its channels. A Transformer layer has
`2·2·T·d·ffn_dim` more and no gate; of DIN every pair of candidate and row is `2·(4d + 1)·ffn_dim`.
The products of the token encoder and of the heads are counted; norms, look-ups, gates, biases and
other pointwise work are not, and padding isn't work.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.rates import dense_width
from pipeline.config import ModelConfig, RunConfig
from pipeline.model.encoders.hstu import interleave
from pipeline.model.encoders.mixture import channel_model, filter_rows, newest_rows
from pipeline.model.encoders.transducer import truncate
from pipeline.model.tokens import Tokens, prepend, sequence_index


@dataclass
class Flops:
    """Sums over batches; `add` merges the counts of two."""

    candidates: int = 0
    tokens: int = 0  # of a mixture: those that pass the filters, summed over channels
    # of these, tokens that the later layers no longer see, or that max_len keeps out
    truncated_tokens: int = 0
    filtered_tokens: int = 0  # tokens that a filter keeps out of its channel, summed over channels
    # of the untruncated sequence (of a mixture: the filtered one), once per layer
    causal_pairs: int = 0
    kept_pairs: int = 0  # summed over layers
    flops: int = 0  # one forward pass

    def add(self, other: "Flops") -> None:
        self.candidates += other.candidates
        self.tokens += other.tokens
        self.truncated_tokens += other.truncated_tokens
        self.filtered_tokens += other.filtered_tokens
        self.causal_pairs += other.causal_pairs
        self.kept_pairs += other.kept_pairs
        self.flops += other.flops

    @property
    def masked_pair_share(self) -> float:
        """Masked ÷ causal pairs of the untruncated sequence, mean over layers."""
        return 1 - self.kept_pairs / max(self.causal_pairs, 1)

    @property
    def truncated_token_share(self) -> float:
        return self.truncated_tokens / max(self.tokens, 1)

    @property
    def filtered_token_share(self) -> float:
        return self.filtered_tokens / max(self.filtered_tokens + self.tokens, 1)


def kept_pairs(
    seq_offsets: Tensor,
    num_targets: Tensor,
    target_visible: Tensor | None,
    window: int | None,
    full_rows: int,
    prefix: int,
) -> int:
    """Pairs that the semi-local mask keeps, by arithmetic on row numbers rather than by building a
    mask.
    """
    num_tokens = int(seq_offsets[-1])
    sequence = sequence_index(seq_offsets, num_tokens)
    row = torch.arange(num_tokens, device=seq_offsets.device) - seq_offsets[sequence]
    history = (seq_offsets.diff() - num_targets)[sequence]
    is_target = row >= history
    causal = row + 1
    if window is None:
        keys = causal
    else:
        before_window = (row - window).clamp(min=0)
        semi_local = causal - before_window + before_window.clamp(max=prefix)
        keys = torch.where(row >= history - full_rows, causal, semi_local)
    visible = history[is_target] if target_visible is None else target_visible.long()
    return int(keys[~is_target].sum() + (visible + 1).sum())


def layer_flops(cfg: ModelConfig, num_tokens: int, pairs: int) -> int:
    """One layer of STU, or of softmax attention with its feed-forward part."""
    h, d = cfg.num_heads, cfg.d_model
    attention = 2 * pairs * h * (cfg.d_qk + cfg.d_v)
    if cfg.encoder in ("transformer", "sasrec"):
        return attention + 2 * num_tokens * d * (h * (2 * cfg.d_qk + 2 * cfg.d_v) + 2 * cfg.ffn_dim)
    out_width = h * cfg.d_v * (3 if cfg.concat_ua else 1)
    return attention + projection_flops(cfg, num_tokens) + 2 * num_tokens * out_width * d


def projection_flops(cfg: ModelConfig, num_tokens: int) -> int:
    """U, Q, K and V of one STU layer."""
    return 2 * num_tokens * cfg.d_model * 2 * cfg.num_heads * (cfg.d_qk + cfg.d_v)


def count_work(batch: SequenceBatch, cfg: RunConfig) -> Flops:
    """The work of one forward pass over `batch`, which is on the CPU."""
    num_context = len(cfg.features.user_tokens)
    tokens = _bare_tokens(batch, num_context)
    work = Flops(candidates=int(batch.num_targets.sum()))
    work.flops = input_flops(cfg, batch.num_tokens, batch.num_sequences) + head_flops(
        cfg, work.candidates
    )
    if cfg.model.encoder == "din":
        work.add(_din_work(tokens, cfg.model))
    elif not cfg.model.channels:
        if cfg.model.interleaved:
            tokens = _interleaved(batch, num_context)
        work.add(_transducer_work(tokens, tokens, cfg.model, num_context))
    for channel in cfg.model.channels.values():
        passed = filter_rows(tokens, batch, channel, cfg.source.actions)
        newest = newest_rows(passed, channel, num_context)
        work.add(_transducer_work(passed, newest, channel_model(cfg.model, channel), num_context))
        work.filtered_tokens += tokens.x_TE.shape[0] - passed.x_TE.shape[0]
    return work


def cached_work(
    history: SequenceBatch, candidates: SequenceBatch, cfg: RunConfig
) -> tuple[int, int]:
    """Floating-point operations of `encode_history` and of `score_candidates`, both batches on the
    CPU.

    Of the last layer, candidates need the keys and values alone: the history's attention there is
    not computed. Nor
    are the actions that candidates do not have.
    """
    num_context = len(cfg.features.user_tokens)
    num_candidates = candidates.num_tokens
    encode = input_flops(cfg, history.num_tokens, history.num_sequences)
    score = (
        input_flops(cfg, num_candidates, 0)
        - action_flops(cfg, num_candidates)
        + head_flops(cfg, num_candidates)
    )
    tokens = _bare_tokens(history, num_context)
    stacks = [(tokens, cfg.model)]
    if cfg.model.channels:
        stacks = [
            (
                newest_rows(
                    filter_rows(tokens, history, channel, cfg.source.actions), channel, num_context
                ),
                channel_model(cfg.model, channel),
            )
            for channel in cfg.model.channels.values()
        ]
    for rows, model in stacks:
        for depth in range(model.num_layers):
            if depth == model.truncate_after_layer:
                rows = truncate(rows, num_context, model.truncate_to)
            num_rows = int(rows.seq_offsets[-1])
            if depth < model.num_layers - 1:
                encode += layer_flops(model, num_rows, _kept(rows, model, num_context))
            else:
                encode += projection_flops(model, num_rows)
            pairs = (candidates.num_targets * (rows.seq_offsets.diff() + 1)).sum()
            score += layer_flops(model, num_candidates, int(pairs))
    return encode, score


def input_flops(cfg: RunConfig, num_rows: int, num_sequences: int) -> int:
    """The token encoder's products: content and actions of every row, the context tokens of every
    sequence.
    """
    features, model = cfg.features, cfg.model
    d = model.d_model
    content = features.item_id_dim + sum(
        f.dim for f in (*features.item.values(), *features.request.values())
    )
    context = sum(
        features.user[name].dim for group in features.user_tokens.values() for name in group
    )
    per_row = content * 2 * d + 2 * d * d
    return 2 * (num_rows * per_row + num_sequences * context * d) + action_flops(cfg, num_rows)


def action_flops(cfg: RunConfig, num_rows: int) -> int:
    """The action encoder's products."""
    model = cfg.model
    actions = (cfg.num_action_bits if model.heterogeneous_actions else 1) * model.action_dim
    return 2 * num_rows * (actions + model.d_model) * model.d_model


def head_flops(cfg: RunConfig, candidates: int) -> int:
    """The products of the task heads, and of the rates that candidates carry into them or into
    their tokens.
    """
    d, dense = cfg.model.d_model, dense_width(cfg.features, len(cfg.tasks))
    into_head = dense > 0 and cfg.model.dense_to != "token"
    into_token = dense > 0 and cfg.model.dense_to != "head"
    width = d * (max(len(cfg.model.channels), 1) + into_head)
    towers = len(cfg.tasks) if cfg.model.task_towers else 1
    heads = cfg.model.head_hidden * (width * towers + len(cfg.tasks))
    return 2 * candidates * (heads + (into_head + into_token) * (dense * d + d * d))


def _din_work(tokens: Tokens, model: ModelConfig) -> Flops:
    """Every candidate weighs every row before it: pairs without the candidate itself, once."""
    num_candidates = int(tokens.num_targets.sum())
    history = tokens.seq_offsets.diff() - tokens.num_targets
    visible = tokens.target_visible
    pairs = int((history * tokens.num_targets).sum() if visible is None else visible.long().sum())
    d = model.d_model
    flops = 2 * pairs * (4 * d * model.ffn_dim + model.ffn_dim) + 2 * num_candidates * 2 * d * d
    return Flops(tokens=len(tokens.x_TE), causal_pairs=pairs, kept_pairs=pairs, flops=flops)


def _transducer_work(whole: Tokens, tokens: Tokens, model: ModelConfig, num_context: int) -> Flops:
    """The layers' work on `tokens`, which are `whole` or its newest rows."""
    work = Flops(tokens=whole.x_TE.shape[0])
    causal = kept_pairs(whole.seq_offsets, whole.num_targets, whole.target_visible, None, 0, 0)
    pairs = _kept(tokens, model, num_context)
    for depth in range(model.num_layers):
        if depth == model.truncate_after_layer:
            tokens = truncate(tokens, num_context, model.truncate_to)
            pairs = _kept(tokens, model, num_context)
        work.causal_pairs += causal
        work.kept_pairs += pairs
        work.flops += layer_flops(model, int(tokens.seq_offsets[-1]), pairs)
    work.truncated_tokens = work.tokens - tokens.x_TE.shape[0]
    return work


def _kept(tokens: Tokens, model: ModelConfig, num_context: int) -> int:
    attention = model.attention
    return kept_pairs(
        tokens.seq_offsets,
        tokens.num_targets,
        tokens.target_visible,
        attention.window,
        attention.full_rows,
        num_context + attention.extra_prefix,
    )


def _interleaved(batch: SequenceBatch, num_context: int) -> Tokens:
    """The sequences of conventional HSTU: two tokens an event, one a candidate."""
    bare = _bare_tokens(batch, 0)
    twice = interleave(bare, bare.x_TE)
    return (
        prepend(bare.x_TE.new_empty(batch.num_sequences, num_context, 0), twice)
        if num_context
        else twice
    )


def _bare_tokens(batch: SequenceBatch, num_context: int) -> Tokens:
    """The batch's sequences with their context, without a width."""
    offsets = (
        batch.seq_offsets
        + torch.arange(batch.num_sequences + 1, device=batch.seq_offsets.device) * num_context
    )
    visible = None if batch.target_visible is None else batch.target_visible + num_context
    empty = torch.empty(
        batch.num_tokens + batch.num_sequences * num_context, 0, device=batch.seq_offsets.device
    )
    return Tokens(empty, offsets, batch.num_targets, visible, batch.max_seq_len + num_context)
