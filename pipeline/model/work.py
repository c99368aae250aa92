"""Floating-point work of whole forward passes: token encoder, sequence encoder and heads.

Of each linear map of T rows from n to m numbers 2·T·n·m operations are counted. `cached_work` is
the same for M-FALCON's two passes.
"""

import torch

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.rates import dense_width
from pipeline.config import (
    FeatureConfig,
    InputConfig,
    ModelConfig,
    RetrievalConfig,
    RunConfig,
    TrainConfig,
)
from pipeline.model.encoders import ENCODERS
from pipeline.model.encoders.encoder import TokenLayout
from pipeline.model.encoders.hstu import interleave_actions
from pipeline.model.encoders.mixture import filter_rows, newest_rows
from pipeline.model.encoders.stu import layer_flops, projection_flops
from pipeline.model.encoders.transducer import truncate_history
from pipeline.model.encoders.ultra_hstu import channel_parts
from pipeline.model.flops import Flops, mask_pairs
from pipeline.model.tokens import Tokens, prepend_context


def count_work(batch: SequenceBatch, cfg: RunConfig, num_items: int = 0) -> Flops:
    """The work of one forward pass over `batch`, which is on the CPU.

    `num_items`: those that each next item is told apart from, where the batch has such.
    """
    num_context = len(cfg.features.user_tokens)
    fused = _has_fused_layers(cfg.model, cfg.train)
    layout = TokenLayout(
        num_context,
        cfg.source.actions,
        exact_view=cfg.train.target_view == "exact",
        every_row=cfg.train.use_gpu and not (fused and not cfg.retrieval.enabled),
        cuts_early=fused,
    )
    encoder = ENCODERS[cfg.model.encoder]
    if encoder.two_tokens_per_event(cfg.model):
        tokens = _interleaved_tokens(batch, layout.num_context)
    else:
        tokens = _bare_tokens(batch, layout.num_context)

    work = Flops(candidates=int(batch.num_targets.sum()))
    work.flops = input_flops(cfg.features, cfg.model, batch.num_tokens, batch.num_sequences)
    work.flops += action_flops(cfg.model, cfg.num_action_bits, batch.num_tokens)
    work.flops += head_flops(cfg.features, cfg.model, len(cfg.tasks), work.candidates)
    work.add(encoder.work(tokens, batch, cfg.model, layout))

    if batch.next_code is not None:
        num_next = len(batch.next_code)
        work.flops += retrieval_flops(cfg.features, cfg.model, cfg.retrieval, num_next, num_items)
        if not cfg.tasks:  # its examples are the next items
            work.candidates = len(batch.next_code)
    return work


def _has_fused_layers(model: ModelConfig, train: TrainConfig) -> bool:
    """True of runs whose layers are the fused kernels (`kernels/stu/op.py`)."""
    layers = model.encoder in ("ultra_hstu", "hstu", "hstu_merged") and not model.relative_bias
    backend = model.attention_backend in ("auto", "triton")
    return train.use_gpu and train.precision == "bf16" and layers and backend


def cached_work(
    history: SequenceBatch, candidates: SequenceBatch, inputs: InputConfig
) -> tuple[int, int]:
    """Floating-point operations of `encode_history` and of `score_candidates`, both batches on the
    CPU.

    Of the last layer, candidates need the keys and values alone: the history's attention there is
    not computed. Nor are the actions that candidates do not have.
    """
    features, whole = inputs.features, inputs.model
    num_context, num_candidates = len(features.user_tokens), candidates.num_tokens
    encode = input_flops(features, whole, history.num_tokens, history.num_sequences)
    encode += action_flops(whole, inputs.num_action_bits, history.num_tokens)
    score = input_flops(features, whole, num_candidates, 0)
    score += head_flops(features, whole, len(inputs.task_bits), num_candidates)

    tokens = _bare_tokens(history, num_context)
    for channel, model in channel_parts(whole):
        passed = filter_rows(tokens, history, channel, inputs.source.actions)
        rows = newest_rows(passed, channel, num_context)

        for depth in range(model.num_layers):
            if depth == model.truncate_after_layer:
                rows = truncate_history(rows, num_context, model.truncate_to)
            encode += _encoding_flops(rows, depth, model, num_context)

            # each candidate sees the rows of its user that this layer has, and itself
            pairs = (candidates.num_targets * (rows.seq_offsets.diff() + 1)).sum()
            score += layer_flops(model, num_candidates, int(pairs))
    return encode, score


def _encoding_flops(rows: Tokens, depth: int, model: ModelConfig, num_context: int) -> int:
    if depth == model.num_layers - 1:
        return projection_flops(model, len(rows.x_TE))
    pairs = mask_pairs(rows, model.attention, num_context)
    return layer_flops(model, len(rows.x_TE), pairs)


def input_flops(
    features: FeatureConfig, model: ModelConfig, num_rows: int, num_sequences: int
) -> int:
    """The token encoder's products without actions: the content of every row, the context tokens of
    every sequence.
    """
    d = model.d_model
    context = 0
    for group in features.user_tokens.values():
        context += sum(features.user[name].dim for name in group)

    per_row = content_width(features) * 2 * d + 2 * d * d
    return 2 * (num_rows * per_row + num_sequences * context * d)


def content_width(features: FeatureConfig) -> int:
    """Numbers that the columns of one event are looked up as."""
    columns = *features.item.values(), *features.request.values()
    return features.item_id_dim + sum(column.dim for column in columns)


def action_flops(model: ModelConfig, num_bits: int, num_rows: int) -> int:
    """The action encoder's products, for masks of `num_bits` (`RunConfig.num_action_bits`)."""
    num_actions = num_bits if model.heterogeneous_actions else 1
    return 2 * num_rows * (num_actions * model.action_dim + model.d_model) * model.d_model


def head_flops(features: FeatureConfig, model: ModelConfig, num_tasks: int, candidates: int) -> int:
    """The products of the task heads, and of the rates that candidates carry into them or into
    their tokens.
    """
    dense = dense_width(features, num_tasks)
    into_head = dense > 0 and model.dense_to != "token"
    into_token = dense > 0 and model.dense_to != "head"
    d = model.d_model

    width = ENCODERS[model.encoder].output_width(model) + d * into_head
    towers = num_tasks if model.task_towers else 1
    heads = model.head_hidden * (width * towers + num_tasks)
    rates = (into_head + into_token) * (dense * d + d * d)
    return 2 * candidates * (heads + rates)


def retrieval_flops(
    features: FeatureConfig,
    model: ModelConfig,
    retrieval: RetrievalConfig,
    num_next: int,
    num_items: int,
) -> int:
    """The products of the retrieval head: the vectors of the next items' users and of `num_items`
    items, and the score of each pair.
    """
    d, dim = model.d_model, retrieval.dim
    width = ENCODERS[model.encoder].output_width(model)
    if retrieval.item_tower == "linear":
        columns = features.item.values()
        of_item = (features.item_id_dim + sum(column.dim for column in columns)) * dim
    else:
        of_item = content_width(features) * 2 * d + 2 * d * d + d * dim
    return 2 * (num_items * of_item + num_next * (width * dim + num_items * dim))


def _interleaved_tokens(batch: SequenceBatch, num_context: int) -> Tokens:
    """The sequences of conventional HSTU: two tokens an event, one a candidate."""
    bare = _bare_tokens(batch, 0)
    twice = interleave_actions(bare, bare.x_TE)
    if num_context == 0:
        return twice
    return prepend_context(bare.x_TE.new_empty(batch.num_sequences, num_context, 0), twice)


def _bare_tokens(batch: SequenceBatch, num_context: int) -> Tokens:
    """The batch's sequences with their context, without a width."""
    device = batch.seq_offsets.device
    shift = torch.arange(batch.num_sequences + 1, device=device) * num_context
    num_tokens = batch.num_tokens + batch.num_sequences * num_context
    visible, next_visible = batch.target_visible, batch.next_visible
    oldest = batch.target_from
    return Tokens(
        x_TE=torch.empty(num_tokens, 0, device=device),
        seq_offsets=batch.seq_offsets + shift,
        num_targets=batch.num_targets,
        target_visible=None if visible is None else visible + num_context,
        max_seq_len=batch.max_seq_len + num_context,
        num_next=batch.num_next,
        next_visible=None if next_visible is None else next_visible + num_context,
        target_from=None if oldest is None else oldest + num_context,
        span=batch.target_span,
        tail_span=batch.target_span,
        host_tail_span=batch.target_span,
    )
