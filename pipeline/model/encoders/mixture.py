"""Mixture of transducers (ULTRA-HSTU, arXiv:2602.16986): one per kind of row, so that the many do
not drown the few.

The tokens are encoded once, with positions and gaps of the whole sequence. A channel is the
context, the history rows that its filter lets through and every candidate, read by a transducer of
its own; the candidates' outputs of all channels lie side by side before the heads.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.config import ChannelConfig, ModelConfig, RunConfig
from pipeline.model.encoders.transducer import Transducer, select, truncate
from pipeline.model.tokens import Tokens, sequence_index, target_mask


class MixtureOfTransducers(nn.Module):
    def __init__(self, cfg: RunConfig, num_context: int) -> None:
        super().__init__()
        self.actions = cfg.source.actions
        self.num_context = num_context
        self.channels = list(cfg.model.channels.values())
        self.transducers = nn.ModuleList(
            Transducer(channel_model(cfg.model, channel), num_context) for channel in self.channels
        )

    def forward(self, tokens: Tokens, batch: SequenceBatch) -> Tensor:
        """[C, channels * d]: the candidates' outputs, in the order of the batch."""
        outputs = []
        for channel, transducer in zip(self.channels, self.transducers, strict=True):
            rows = filter_rows(tokens, batch, channel, self.actions)
            outputs.append(transducer(newest_rows(rows, channel, self.num_context)))
        return torch.cat(outputs, dim=1)


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
    """
    if not channel.actions:
        return tokens
    bits = sum(1 << actions.index(action) for action in set(channel.actions))
    passes = _passes(batch, bits)
    # context tokens up to and with a sequence's own
    shift = (tokens.seq_offsets - batch.seq_offsets)[1:]
    at = torch.arange(batch.num_tokens, device=passes.device)
    at = at + shift[sequence_index(batch.seq_offsets, batch.num_tokens)]
    # context tokens stay
    is_kept = torch.ones(tokens.x_TE.shape[0], dtype=torch.bool, device=passes.device)
    host = batch.on_host
    before = torch.nn.functional.pad(_passes(host, bits).cumsum(0), (1, 0))
    kept_lengths = (
        before[host.seq_offsets].diff() + tokens.lengths_on_host()[0] - host.seq_offsets.diff()
    )
    return select(tokens, is_kept.index_copy(0, at, passes), kept_lengths)


def _passes(batch: SequenceBatch, bits: int) -> Tensor:
    """bool [T]: candidates, and rows on which one of the actions `bits` is known and set."""
    is_target = target_mask(batch.seq_offsets, batch.num_targets, batch.num_tokens)
    return is_target | ((batch.action_mask & batch.known_mask & bits) != 0)


def newest_rows(tokens: Tokens, channel: ChannelConfig, num_context: int) -> Tokens:
    return tokens if channel.max_len is None else truncate(tokens, num_context, channel.max_len)
