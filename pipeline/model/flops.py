"""What the mask keeps, counted from lengths: the terms of a forward pass that depend on it.

Products of matrices are counted; norms, look-ups, gates, biases and other pointwise work are not,
and padding isn't work. Each encoder counts its own layers (`Encoder.work`); `work.py` adds the
token encoder and the heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.semi_local_attention.types import QueryRows
from pipeline.config import AttentionConfig
from pipeline.model.tokens import Tokens


@dataclass
class Flops:
    """Sums over batches; `add` merges the counts of two."""

    candidates: int = 0
    # Tokens that an encoder reads; of a mixture those that pass the filters, summed over channels.
    tokens: int = 0
    # Of these, what the later layers no longer see, or what max_len keeps out.
    truncated_tokens: int = 0
    # Tokens that a filter keeps out of its channel, summed over channels.
    filtered_tokens: int = 0
    # Of the untruncated sequence (of a mixture: the filtered one), once per layer.
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
        """Truncated ÷ all tokens."""
        return self.truncated_tokens / max(self.tokens, 1)

    @property
    def filtered_token_share(self) -> float:
        """Filtered ÷ all tokens of all channels, those filtered included."""
        return self.filtered_tokens / max(self.filtered_tokens + self.tokens, 1)


def kept_pairs(
    seq_offsets: Tensor,
    num_targets: Tensor,
    target_visible: Tensor | None,
    window: int | None,
    full_rows: int,
    prefix: int,
    *,
    target_from: Tensor | None = None,
    extra_full_rows: Tensor | None = None,
) -> int:
    """Pairs that the semi-local mask keeps, by arithmetic on lengths: no mask is built.

    row        0 1 2 3 4 x      x a candidate that sees the 5 rows before it and itself
    keys seen  1 2 2 2 5 6      window 1, full_rows 1, prefix 0
    """
    targets = num_targets.long()
    history = seq_offsets.diff() - targets

    keys = _sum_to(history)  # causal: row r sees r + 1 keys
    if window is not None:
        # all but the newest rows see as many as lie in the prefix and the window, once there are
        full = full_rows if extra_full_rows is None else full_rows + extra_full_rows
        banded = (history - full).clamp(min=0)
        most = window + 1 + prefix
        short = banded.clamp(max=most)
        keys = keys - _sum_to(banded) + _sum_to(short) + (banded - short) * most

    visible = history.repeat_interleave(targets) if target_visible is None else target_visible
    return int(keys.sum() + candidate_pairs(visible, target_from, prefix))


def candidate_pairs(visible: Tensor, oldest: Tensor | None, prefix: int) -> int:
    """Pairs of the candidates, with themselves too: of the `visible` positions, [C], the prefix and
    those from `oldest`, [C], on.
    """
    seen = visible.long()
    if oldest is not None:
        begin = oldest.long().clamp(min=prefix)
        seen = seen.clamp(max=prefix) + (seen - begin).clamp(min=0)
    return int((seen + 1).sum())


def row_pairs(
    tokens: Tokens, rows: QueryRows, window: int | None, full_rows: int, prefix: int
) -> int:
    """As `kept_pairs`, of some rows alone."""
    offsets, targets = tokens.seq_offsets, tokens.num_targets.long()
    count = rows.offsets.diff()
    position = rows.index - offsets[:-1].repeat_interleave(count)
    history = (offsets.diff() - targets).repeat_interleave(count)

    keys = position + 1
    if window is not None:
        full = full_rows
        if tokens.span is not None:
            full = full + tokens.span.repeat_interleave(count)
        banded = position < history - full
        keys = torch.where(banded, keys.clamp(max=window + 1 + prefix), keys)
    of_history = keys[position < history].sum()

    # all candidates are among the rows
    visible = tokens.target_visible
    if visible is None:
        visible = (offsets.diff() - targets).repeat_interleave(targets)
    return int(of_history) + candidate_pairs(visible, tokens.target_from, prefix)


def _sum_to(count: Tensor) -> Tensor:
    """1 + 2 + … + count, each."""
    return count * (count + 1) // 2


def mask_pairs(tokens: Tokens, attention: AttentionConfig, num_context: int) -> int:
    """Pairs that `attention` keeps of the tokens' sequences, context included."""
    return kept_pairs(
        tokens.seq_offsets,
        tokens.num_targets,
        tokens.target_visible,
        attention.window,
        attention.full_rows,
        num_context + attention.extra_prefix,
        target_from=tokens.target_from,
        extra_full_rows=tokens.span,
    )
