"""ULTRA-HSTU (arXiv:2602.16986): one transducer over every row, or a mixture of them
(`model.channels`).

    tokens of a batch ──┬─ rows of channel "clicks" ── transducer ──┐
                        └─ rows of channel "likes" ─── transducer ──┴─ side by side → [C, 2 d]
"""

from torch import nn

from pipeline.batches.collate import SequenceBatch
from pipeline.config import ChannelConfig, ModelConfig
from pipeline.model.encoders.encoder import Encoded, Encoder, TokenLayout, side_by_side
from pipeline.model.encoders.mixture import channel_model, filter_rows, newest_rows
from pipeline.model.encoders.own_view import Sharing, stack_sharing
from pipeline.model.encoders.transducer import Transducer, stack_work
from pipeline.model.flops import Flops
from pipeline.model.tokens import Tokens

EVERY_ROW = ChannelConfig()


class UltraHSTU(Encoder):
    """Transducers side by side, each with the rows of its channel."""

    settings = frozenset({"window", "truncation", "channels", "fp8", "norm_a_fp32", "merge"})
    has_history_rows = True

    def __init__(self, cfg: ModelConfig, layout: TokenLayout) -> None:
        super().__init__(cfg, layout)
        self.actions = layout.actions

        # A plain list: what is registered below decides the names of the weights.
        self.channels: list[ChannelConfig] = []
        self.stacks: list[Transducer] = []
        for channel, model in channel_parts(cfg):
            self.channels.append(channel)
            self.stacks.append(Transducer(model, layout))

        if cfg.channels:
            self.transducers = nn.ModuleList(self.stacks)
        else:
            (only,) = self.stacks
            self.layers, self.norm_out = only.layers, only.norm_out

    def forward(
        self, tokens: Tokens, batch: SequenceBatch, *, last_history: bool = False
    ) -> Encoded:
        """Candidates' rows, [C, channels * d]; the history row is each channel's own newest one."""
        parts = []
        for stack, rows in self.channel_rows(tokens, batch):
            parts.append(stack(rows, last_history=last_history))
        return side_by_side(parts)

    def channel_rows(self, tokens: Tokens, batch: SequenceBatch) -> list[tuple[Transducer, Tokens]]:
        """Each transducer with the tokens that it reads: those that pass its channel's filter, and
        of them the newest `max_len`.
        """
        found = []
        for channel, stack in zip(self.channels, self.stacks, strict=True):
            passed = filter_rows(tokens, batch, channel, self.actions)
            newest = newest_rows(passed, channel, self.num_context)
            found.append((stack, newest))
        return found

    @classmethod
    def has_fixed_sizes(cls, cfg: ModelConfig) -> bool:
        # how many rows pass a channel's filter depends on the batch's actions
        sizes_follow = not cfg.channels
        # truncation keeps more tokens of an event's two than filling counts
        return sizes_follow and cfg.merge

    @classmethod
    def output_width(cls, cfg: ModelConfig) -> int:
        return cfg.d_model * len(channel_parts(cfg))

    @classmethod
    def work(
        cls, tokens: Tokens, batch: SequenceBatch, cfg: ModelConfig, layout: TokenLayout
    ) -> Flops:
        total = Flops()
        for channel, model in channel_parts(cfg):
            passed = filter_rows(tokens, batch, channel, layout.actions)
            newest = newest_rows(passed, channel, layout.num_context)

            total.add(stack_work(passed, newest, model, layout))
            total.filtered_tokens += len(tokens.x_TE) - len(passed.x_TE)
        return total


def model_sharing(cfg: ModelConfig) -> Sharing:
    """How requests of one user may share an encoded history: the least that a transducer allows.

    none < layers < forward
    """
    forms = {stack_sharing(channel, model) for channel, model in channel_parts(cfg)}
    if "none" in forms:
        return "none"
    if "layers" in forms:
        return "layers"
    return "forward"


def channel_parts(cfg: ModelConfig) -> list[tuple[ChannelConfig, ModelConfig]]:
    """Each channel with its transducer's settings; without channels one that reads every row."""
    if not cfg.channels:
        return [(EVERY_ROW, cfg)]
    return [(channel, channel_model(cfg, channel)) for channel in cfg.channels.values()]
