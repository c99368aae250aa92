"""What every sequence encoder is: tokens of a batch → a row per candidate.

A new encoder subclasses `Encoder` in a file of its own: docs/extend/encoder.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kernels.jagged.op import truncate_tail
from kernels.semi_local_attention.types import QueryRows
from pipeline.batches.collate import SequenceBatch
from pipeline.config import AttentionConfig, ModelConfig
from pipeline.config.errors import require
from pipeline.model.flops import Flops, kept_pairs, row_pairs
from pipeline.model.tokens import Tokens, target_index, target_mask


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """What an encoder is told about the tokens that it will read."""

    num_context: int  # prefix tokens of a sequence, before its history
    actions: tuple[str, ...] = ()  # by the number of their bit in `action_mask`
    # False where rows are also read to find what comes next, whenever that may be
    knows_request_time: bool = True
    # True where candidates of several requests in one sequence see what each would alone
    exact_view: bool = False
    # True where the rows before the next items are read after each step of a loop
    every_step: bool = False
    # For counting: True where the last layer makes rows that nobody reads, as some on a GPU; and
    # where the layer before truncation makes none but those that are kept, as others there.
    every_row: bool = False
    cuts_early: bool = False


@dataclass(frozen=True, slots=True)
class Encoded:
    """What an encoder makes of a batch of B sequences and C candidates."""

    candidate_rows: Tensor  # [C, width], in the order of the batch
    # [B, width], zeros for a user without history; None where not asked for, or where the encoder
    # has no such row
    last_history_row: Tensor | None = None
    # [P, width]: the row that lies before each next item (`Tokens.num_next`), zeros where the
    # layers no longer have one; None where the batch has none
    next_rows: Tensor | None = None
    # [P, width]: the same after an earlier step, of an encoder that goes in steps; in training
    step_rows: Tensor | None = None
    # the same after each step, the last included; where `TokenLayout.every_step` asks for them
    every_step: tuple[Tensor, ...] | None = None


class Encoder(nn.Module):
    """Base class of the sequence encoders.

    A subclass makes its weights in `__init__` and gives `forward` and `work`. It names in
    `settings` those optional settings that it obeys: `check` refuses all others, since a baseline
    that ignored one would be compared under a wrong name.
    """

    settings: frozenset[str] = frozenset()
    # True where `Encoded.last_history_row` and `next_rows` are given: retrieval needs them
    has_history_rows = False

    def __init__(self, cfg: ModelConfig, layout: TokenLayout) -> None:
        super().__init__()
        self.num_context = layout.num_context
        self.width = self.output_width(cfg)

    def forward(
        self, tokens: Tokens, batch: SequenceBatch, *, last_history: bool = False
    ) -> Encoded:
        """Rows of the candidates, with `last_history` each user's newest history row, and those
        before the next items where `tokens` have such.

        `tokens` are those of `batch`, each sequence behind its context tokens. No candidate may see
        another, and no history row a candidate.
        """
        raise NotImplementedError

    @classmethod
    def work(
        cls, tokens: Tokens, batch: SequenceBatch, cfg: ModelConfig, layout: TokenLayout
    ) -> Flops:
        """Work of one forward pass. `tokens` have offsets and lengths but no width, on the CPU."""
        raise NotImplementedError

    @classmethod
    def output_width(cls, cfg: ModelConfig) -> int:
        """Width of a candidate's row."""
        return cfg.d_model

    @classmethod
    def two_tokens_per_event(cls, cfg: ModelConfig) -> bool:
        """True where item and action of an event are two tokens, one behind the other."""
        return not cfg.merge

    @classmethod
    def has_fixed_sizes(cls, cfg: ModelConfig) -> bool:
        """True where the sizes of all tensors follow from those of a filled batch
        (`pipeline/batches/filling.py`), so that a CUDA graph can hold a step.
        """
        return False

    @classmethod
    def check(cls, cfg: ModelConfig) -> None:
        """Raises ConfigError for a setting that this encoder does not know."""
        where = f"where model.encoder is {cfg.encoder}"
        channels = list(cfg.channels)
        optional = [
            ("window", "model.attention.window", cfg.attention.window, None, "null"),
            ("truncation", "model.truncate_after_layer", cfg.truncate_after_layer, None, "null"),
            ("channels", "model.channels", channels, [], "empty"),
            ("fp8", "model.fp8", cfg.fp8, False, "false"),
            ("norm_a_fp32", "model.norm_a_fp32", cfg.norm_a_fp32, False, "false"),
        ]
        for setting, key, value, neutral, rule in optional:
            require(setting in cls.settings or value == neutral, key, value, f"{rule} {where}")

        known = "merge" in cls.settings
        rule = f"true {where}: the encoder says it"
        require(known or cfg.merge, "model.merge", cfg.merge, rule)

        if cls.two_tokens_per_event(cfg):
            where = "where item and action are two tokens (model.merge: false, encoder hstu)"
            action = cfg.candidate_action
            require(action == "none", "model.candidate_action", action, f"none {where}")
            require(not channels, "model.channels", channels, f"empty {where}")

        # its times are sums of the gaps between events
        biased = "relative_bias" in cls.settings and cfg.time_anchor == "event"
        rule = "false unless model.encoder is hstu or hstu_merged, and model.time_anchor event"
        require(biased or not cfg.relative_bias, "model.relative_bias", cfg.relative_bias, rule)


def read_rows(
    tokens: Tokens, norm: nn.Module, num_context: int, *, last_history: bool = False
) -> Encoded:
    """Normalised rows of the last layer's tokens, as `Encoder.forward` returns them."""
    candidates = norm(candidate_rows(tokens))
    last = last_history_rows(tokens, norm, num_context) if last_history else None
    return Encoded(candidates, last, next_rows(tokens, norm, num_context))


def read_last_layer(
    x_RE: Tensor,
    rows: QueryRows | None,
    tokens: Tokens,
    norm: nn.Module,
    num_context: int,
    *,
    last_history: bool,
) -> Encoded:
    """`read_rows` of what the last layer made of `tokens`: the rows of `last_rows`, all where that
    is None.
    """
    only_candidates = not last_history and tokens.next_visible is None
    if rows is not None and only_candidates:
        return Encoded(norm(x_RE))
    whole = replace(tokens, x_TE=spread_rows(x_RE, rows, len(tokens.x_TE)))
    return read_rows(whole, norm, num_context, last_history=last_history)


def last_rows(
    tokens: Tokens, num_context: int, *, last_history: bool, on_gpu: bool = False
) -> QueryRows | None:
    """The rows of the last layer that `read_rows` reads: of all others that layer needs the keys
    and values alone.

    None on a GPU where its kernels make every row; `on_gpu`: they do not, and None is only where
    the host would have to ask the device how many rows are read.
    """
    offsets, num_targets = tokens.seq_offsets, tokens.num_targets
    if tokens.x_TE.is_cuda:
        of_candidates = not last_history and tokens.next_visible is None
        return candidate_places(tokens) if on_gpu and of_candidates else None

    num_tokens = len(tokens.x_TE)
    read = target_mask(offsets, num_targets, num_tokens)
    if last_history:
        newest = offsets[1:] - num_targets - 1
        read[newest[newest >= offsets[:-1] + num_context]] = True
    if tokens.next_visible is not None and tokens.num_next is not None:
        before = torch.repeat_interleave(offsets[:-1], tokens.num_next) + tokens.next_visible - 1
        read[before[tokens.next_visible > num_context]] = True

    index = read.nonzero()[:, 0]
    return QueryRows(index, torch.searchsorted(index, offsets))


def candidate_places(tokens: Tokens) -> QueryRows | None:
    """The candidates' rows, found without waiting for a GPU; None where there are none."""
    num_candidates = int(tokens.lengths_on_host()[1].sum())
    if num_candidates == 0:
        return None
    index = target_index(tokens.seq_offsets, tokens.num_targets, num_candidates)
    return QueryRows(index, nn.functional.pad(tokens.num_targets.long().cumsum(0), (1, 0)))


def last_layer_size(
    tokens: Tokens, layout: TokenLayout, attention: AttentionConfig | None = None
) -> tuple[int, int]:
    """Rows that pass the last layer, and the pairs that its mask keeps of them; `attention` None is
    plain causal.
    """
    mask = (None, 0, 0)
    if attention is not None:
        mask = attention.window, attention.full_rows, layout.num_context + attention.extra_prefix
    if layout.every_row:
        pairs = kept_pairs(tokens.seq_offsets, tokens.num_targets, tokens.target_visible, *mask)
        return len(tokens.x_TE), pairs

    rows = last_rows(tokens, layout.num_context, last_history=False)
    assert rows is not None, "counted on the CPU"
    return len(rows.index), row_pairs(tokens, rows, *mask)


def spread_rows(x_RE: Tensor, rows: QueryRows | None, num_tokens: int) -> Tensor:
    """[T, d]: the last layer's rows in their places, zeros in those that nobody reads."""
    if rows is None:
        return x_RE
    x_TE = x_RE.new_zeros(num_tokens, x_RE.shape[1])
    return x_TE.index_copy(0, rows.index, x_RE)


def candidate_rows(tokens: Tokens) -> Tensor:
    """[C, d]: the last `num_targets` tokens of each sequence."""
    num_candidates = int(tokens.lengths_on_host()[1].sum())
    rows, _ = truncate_tail(
        tokens.x_TE, tokens.seq_offsets, tokens.num_targets, num_rows=num_candidates
    )
    return rows


def last_history_rows(tokens: Tokens, norm: nn.Module, num_context: int) -> Tensor:
    """[B, d]: each sequence's normalised row before its candidates, zeros where it has no history.

    tokens of a batch   c h h h x y | c x | c h     c context, h history, x and y candidates
    rows read                 ^       0       ^
    """
    history_end = tokens.seq_offsets[1:] - tokens.num_targets
    has_history = history_end - tokens.seq_offsets[:-1] > num_context

    x_TE = tokens.x_TE
    if len(x_TE) == 0:  # users without history, of a model without context tokens
        x_TE = x_TE.new_zeros(1, x_TE.shape[1])
    rows = norm(x_TE[(history_end - 1).clamp(min=0)])
    return rows.masked_fill(~has_history[:, None], 0)


def next_rows(tokens: Tokens, norm: nn.Module, num_context: int) -> Tensor | None:
    """[P, d]: the normalised row before each next item, zeros where no event is left before it.

    tokens of a batch   c h h h | c h h        c context, h history
    next items           1 of the first sequence, 2 of the second
    next_visible            3       2 3        tokens that lie before them
    rows read             ^         ^ ^
    """
    visible, num = tokens.next_visible, tokens.num_next
    if visible is None or num is None:
        return None

    first = torch.repeat_interleave(tokens.seq_offsets[:-1], num, output_size=visible.numel())
    rows = norm(tokens.x_TE[(first + visible - 1).clamp(min=0)])
    return rows.masked_fill((visible <= num_context)[:, None], 0)


def side_by_side(parts: Sequence[Encoded]) -> Encoded:
    """One row from several encodings of the same batch: [C, d] each → [C, parts * d]."""
    if len(parts) == 1:
        return parts[0]

    candidates = torch.cat([part.candidate_rows for part in parts], dim=1)
    last = [part.last_history_row for part in parts if part.last_history_row is not None]
    following = [part.next_rows for part in parts if part.next_rows is not None]
    return Encoded(
        candidates,
        torch.cat(last, dim=1) if last else None,
        torch.cat(following, dim=1) if following else None,
    )
