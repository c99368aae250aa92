"""Batches filled up to one of few sizes, so that what was recorded for one serves many: a CUDA
graph (`pipeline/train/graphs.py`) has fixed sizes.

    sequences    a a a a x | b b x        8 tokens, 2 candidates
    filled       a a a a x | b b x | x x x x x y | |        tokens 14, candidates 4, sequences 5

One sequence more takes all tokens and candidates that are missing, if any are, and empty ones the
rest. They repeat the last row of each column, so that they touch no row of an embedding table that
the batch does not, and their labels weigh nothing: losses and gradients are those of the batch
itself, but for the order in which sums are added.

Few sizes come of few numbers that differ. What costs time in proportion, tokens and those that
truncation keeps, goes up to a size near by; candidates and sequences, which cost little, to a
multiple that most batches of a run share; and a longest sequence only says how kernels are tiled,
so its bounds lie far apart.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pipeline.batches.collate import Filling, SequenceBatch
from pipeline.config import RunConfig

# For so many sizes of all tokens one of those that truncation keeps, a small part of the work.
KEPT_SIZES = 4
# For each candidate, and for each sequence, that may be added: so many tokens of a batch. Of few as
# many again at most: they pass the layers behind truncation too, which may have little else.
TARGET_SHARE, SEQUENCE_SHARE = 256, 1024
# Bounds of the longest sequence: where the attention kernels' tiles change, and far above.
SHORT_SEQUENCE, BOUNDS_APART = 1024, 8


@dataclass(frozen=True, slots=True)
class BatchFiller:
    """Fills the batches of a run.

    `keep_events` None: the model truncates nothing. `sizes`: numbers of tokens from a power of two
    to the next; fewer of those that truncation keeps.
    """

    num_context: int
    keep_events: int | None
    sizes: int

    @staticmethod
    def of_run(cfg: RunConfig, sizes: int | None = None) -> "BatchFiller":
        """`sizes` None: `train.graph_sizes`."""
        truncates = cfg.model.truncate_after_layer is not None
        keep_events = cfg.model.truncate_to if truncates else None
        if sizes is None:
            sizes = cfg.train.graph_sizes
        return BatchFiller(len(cfg.features.user_tokens), keep_events, sizes)

    def fill(self, batch: SequenceBatch) -> SequenceBatch:
        """The batch, which is on the CPU, filled up to the next sizes.

        It must have no next items: their rows are not those of tokens.
        """
        assert batch.num_next is None, "a batch for retrieval is not filled"
        lengths, targets = batch.seq_offsets.diff(), batch.num_targets.long()
        filling, span = self.next_sizes(lengths, targets, batch.target_span)
        return _filled(batch, filling, span, spans=self.keep_events is not None)

    def next_sizes(
        self, lengths: Tensor, targets: Tensor, span: Tensor | None = None
    ) -> tuple[Filling, int]:
        """The sizes that sequences are filled up to, and the `target_span` of the one that fills.

        `lengths`, `targets` and `span`, int [B]: the tokens of each sequence, its candidates among
        them, and the history tokens that its first request does not see.
        """
        own_tokens, own_targets = int(lengths.sum()), int(targets.sum())
        own_sequences, num_context = len(targets), self.num_context
        scale = power_of_two(own_tokens)
        num_sequences = next_multiple(own_sequences + 1, scale // SEQUENCE_SHARE)
        num_targets = next_multiple(own_targets, scale // TARGET_SHARE)
        more_targets = num_targets - own_targets

        # rows of the filling sequence: none, or one event at least before its candidates
        fewest = more_targets + 1 if more_targets else 0
        its_span, kept_tokens, longest_kept = 0, 0, 0
        if self.keep_events is not None:
            kept = self.kept_lengths(lengths, targets, span)
            own_kept = int(kept.sum()) - num_context * own_sequences
            num_kept = next_size(own_kept + fewest, max(self.sizes // KEPT_SIZES, 1))
            kept_tokens = num_kept + num_context * num_sequences

            # It keeps what is missing: its span makes up for it, below 0 where that is little.
            fewest = num_kept - own_kept
            its_span = fewest - more_targets - self.keep_events
            longest_kept = max(int(kept.max()), num_context + fewest)

        num_tokens = next_size(own_tokens + fewest, self.sizes)
        longest = num_context + max(int(lengths.max()), num_tokens - own_tokens)
        filling = Filling(
            own_tokens=own_tokens,
            num_tokens=num_tokens,
            num_targets=num_targets,
            num_sequences=num_sequences,
            max_seq_len=length_bound(longest) - num_context,
            kept_tokens=kept_tokens,
            kept_seq_len=length_bound(longest_kept),
        )
        return filling, its_span

    def kept_lengths(self, lengths: Tensor, targets: Tensor, span: Tensor | None) -> Tensor:
        """int64 [B], what truncation leaves of each sequence, its context counted."""
        assert self.keep_events is not None
        tail = targets + self.keep_events
        if span is not None:
            tail = tail + span
        return torch.minimum(lengths, tail) + self.num_context


def next_size(count: int, sizes: int) -> int:
    """The smallest number from `count` on of which there are `sizes` in an octave, evenly spaced.

    With 4 in an octave: 8 10 12 14 16 20 24 28 32 40 …
    """
    step = max(power_of_two(count) // 2 // sizes, 1)
    return -(-count // step) * step


def next_multiple(count: int, step: int) -> int:
    """The smallest multiple of `step` from `count` on, or power of two where that is less; of a
    step of 0 `count` itself.

    With a step of 64: 1 2 4 8 16 32 64 128 192 …
    """
    step = min(step, power_of_two(count))
    return -(-count // step) * step if step > 0 else count


def length_bound(longest: int) -> int:
    """The smallest of few bounds that a sequence of `longest` tokens does not pass: 1,024, 8,192,
    65,536, …
    """
    bound = SHORT_SEQUENCE
    while bound < longest:
        bound *= BOUNDS_APART
    return bound


def power_of_two(count: int) -> int:
    """The smallest that is not below `count`; 0 for 0."""
    return 1 << (count - 1).bit_length() if count > 0 else 0


def _filled(batch: SequenceBatch, filling: Filling, span: int, *, spans: bool) -> SequenceBatch:
    """The columns of `batch`, each as long as `filling` says."""
    more_targets = filling.num_targets - int(batch.num_targets.sum())
    more_tokens = filling.num_tokens - batch.num_tokens
    more_sequences = filling.num_sequences - batch.num_sequences

    def of_tokens(column: Tensor) -> Tensor:
        return torch.cat([column, column[-1:].expand(more_tokens, *column.shape[1:])])

    def of_targets(column: Tensor | None, value: float = 0) -> Tensor | None:
        if column is None:
            return None
        more = column.new_full((more_targets, *column.shape[1:]), value)
        return torch.cat([column, more])

    def of_sequences(column: Tensor, first: int) -> Tensor:
        """`first` is the filling sequence's, 0 the empty ones'."""
        more = column.new_zeros(more_sequences)
        more[0] = first
        return torch.cat([column, more])

    target_span = batch.target_span
    if target_span is None and spans:
        target_span = torch.zeros_like(batch.num_targets)
    if target_span is not None:
        target_span = of_sequences(target_span, span)

    user_codes = batch.user_codes
    users = user_codes[-1:].expand(more_sequences, user_codes.shape[1])
    ends = batch.seq_offsets.new_full((more_sequences,), filling.num_tokens)
    history_codes = batch.history_codes
    return replace(
        batch,
        seq_offsets=torch.cat([batch.seq_offsets, ends]),
        num_targets=of_sequences(batch.num_targets, more_targets),
        item_codes=of_tokens(batch.item_codes),
        request_codes=of_tokens(batch.request_codes),
        action_mask=of_tokens(batch.action_mask),
        known_mask=of_tokens(batch.known_mask),
        position=of_tokens(batch.position),
        gap_ms=of_tokens(batch.gap_ms),
        history_codes=None if history_codes is None else of_tokens(history_codes),
        user_codes=torch.cat([user_codes, users]),
        max_seq_len=filling.max_seq_len,
        target_visible=of_targets(batch.target_visible, more_tokens - more_targets),
        target_from=of_targets(batch.target_from),
        target_span=target_span,
        dense=of_targets(batch.dense),
        labels=of_targets(batch.labels),
        label_weight=of_targets(batch.label_weight),
        filling=filling,
        packed=None,
    )
