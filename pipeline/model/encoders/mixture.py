"""Mixture of transducers (ULTRA-HSTU, arXiv:2602.16986): one per kind of row, so that the many do
not drown the few.

The tokens are encoded once, with positions and gaps of the whole sequence. A channel is the
context, the history rows that its filter lets through and every candidate, read by a transducer of
its own; the candidates' outputs of all channels lie side by side before the heads.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.config import ChannelConfig, ModelConfig
from pipeline.model.encoders.transducer import select_tokens, truncate_history
from pipeline.model.tokens import Tokens, sequence_index, target_mask


def channel_model(model: ModelConfig, channel: ChannelConfig) -> ModelConfig:
    """The settings of a channel's transducer."""
    return replace(
        model,
        num_layers=channel.num_layers,
        attention=channel.attention,
        truncate_after_layer=channel.truncate_after_layer,
        truncate_to=channel.truncate_to,
    )


def filter_rows(
    tokens: Tokens, batch: SequenceBatch, channel: ChannelConfig, actions: Sequence[str]
) -> Tokens:
    """Context, candidates and the history rows on which one of the channel's actions is known and
    set.

    `tokens` are the batch's, each sequence after its context.

        tokens                       c  h0 h1 h2 x     c context, h history, x a candidate
        is_click known and set          1  0  1
        kept by actions: [is_click]  c  h0    h2 x
    """
    if not channel.actions:
        return tokens
    bits = sum(1 << actions.index(action) for action in set(channel.actions))

    # where the batch's rows lie among the tokens
    num_context_before = (tokens.seq_offsets - batch.seq_offsets)[1:]
    row = torch.arange(batch.num_tokens, device=tokens.seq_offsets.device)
    row = row + num_context_before[sequence_index(batch.seq_offsets, batch.num_tokens)]

    # context tokens stay
    is_kept = torch.ones(len(tokens.x_TE), dtype=torch.bool, device=row.device)
    is_kept = is_kept.index_copy(0, row, _passing_rows(batch, bits))

    # their number, by the same rule on the host
    host = batch.on_host
    passed_before = torch.nn.functional.pad(_passing_rows(host, bits).cumsum(0), (1, 0))
    num_context = tokens.lengths_on_host()[0] - host.seq_offsets.diff()
    kept_lengths = passed_before[host.seq_offsets].diff() + num_context
    return select_tokens(tokens, is_kept, kept_lengths)


def _passing_rows(batch: SequenceBatch, bits: int) -> Tensor:
    """bool [T]: candidates, and rows on which one of the actions `bits` is known and set."""
    is_target = target_mask(batch.seq_offsets, batch.num_targets, batch.num_tokens)
    return is_target | ((batch.action_mask & batch.known_mask & bits) != 0)


def newest_rows(tokens: Tokens, channel: ChannelConfig, num_context: int) -> Tokens:
    """The newest `max_len` history rows of a channel, with context and candidates."""
    if channel.max_len is None:
        return tokens
    return truncate_history(tokens, num_context, channel.max_len)
