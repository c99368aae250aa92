"""Each candidate's own view of a history that many requests share: what it would see alone.

What makes a request's encoding its own is the place where its history ends, n: the newest
`full_rows` rows before n see everything, and truncation keeps the newest `truncate_to`. Of two
layers the last one's history rows are nobody's input, so the whole dependence is which rows of
layer 1 a candidate of n sees, and each of them has two forms, that neither needs n:

    history row        0 1 2 3 4 5 6 7 8 9        full_rows 2, truncate_to 5
    by the window      w w w w w w w w w w        sees its window: `full_rows: 0`
    in full            f f f f f f f f f f        sees everything before it, as candidates do
    a candidate, n = 7     w w w f f              reads rows 2 to 6
    a candidate, n = 10          w w w f f        reads rows 5 to 9

A deeper stack with such a mask has other rows for every n: no shared form is exact. A stack without
full rows and truncation is exact as it stands, whatever its depth.

The row at which a history ends, from which retrieval finds the next item, is read in the same way:
it stands among the candidates once more, as one that sees what lies before it.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor, nn

from kernels.jagged.op import sequence_index
from kernels.semi_local_attention.op import semi_local_attention
from kernels.semi_local_attention.types import QueryRows
from kernels.stu import op as stu
from pipeline.config import ChannelConfig, ModelConfig
from pipeline.model.encoders.encoder import Encoded
from pipeline.model.encoders.stu import STU, layer_flops, sequences
from pipeline.model.flops import candidate_pairs, kept_pairs
from pipeline.model.tokens import Tokens

# forward: the model as it stands; layers: `own_view_rows`; none: each request has its own encoding
Sharing = Literal["forward", "layers", "none"]


class Stack(Protocol):
    """What `own_view_rows` reads of a transducer."""

    layers: nn.ModuleList
    num_context: int
    truncate_after_layer: int | None
    truncate_to: int


def stack_sharing(channel: ChannelConfig, model: ModelConfig) -> Sharing:
    """How requests of one user may share the history of a transducer without another score.

    Told from the mask: forward where no row depends on where the history ends, layers where two
    layers make the two forms of a row enough, else none.
    """
    masked = model.attention.window is not None and model.attention.full_rows > 0
    if not masked and model.truncate_after_layer is None and channel.max_len is None:
        return "forward"
    if model.num_layers <= 2 and channel.max_len is None and model.cacheable:
        return "layers"
    return "none"


@dataclass(frozen=True, slots=True)
class BothForms:
    """Packed sequences [history | history in full, its newest rows | candidates], context before
    the history, and where each part lies. B sequences, C candidates.
    """

    tokens: Tokens  # the rows in full are candidates here, which see what lies before them
    num_history: Tensor  # int64 [B], context included
    first_full: Tensor  # int64 [B], the oldest history row that is there in full too
    num_targets: Tensor  # int32 [B], without the rows in full
    sequence: Tensor  # int64 [C], which sequence a candidate is of
    visible: Tensor  # int64 [C], history rows that a candidate sees, context included
    # int64 [C], where its history ends: there, or behind itself if it is of the history
    end: Tensor
    oldest: Tensor  # int64 [C], the first of them behind the context in the last layer
    own: Tensor  # int64 [C], where the candidate itself lies among the tokens


def both_forms(
    tokens: Tokens,
    num_context: int,
    full_rows: int,
    keep: int | None,
    is_history: Tensor | None = None,
) -> BothForms:
    """The rows that some candidate sees in full put behind each history, as candidates that see
    what lies before them; none where `full_rows` is 0.

    Args:
        keep: the history rows that the last layer reads, None for all.
        is_history: bool [C], the candidates that are the newest row of a history; None for none.

        tokens      c h0 h1 h2 x y        x sees 3: c h0 h1, y sees all; full_rows 1
        result      c h0 h1 h2 h1 h2 x y  the second h1 sees c h0, the second h2 c h0 h1
    """
    assert tokens.target_visible is not None
    device, offsets = tokens.seq_offsets.device, tokens.seq_offsets
    num_targets = tokens.num_targets.long()
    num_history = offsets.diff() - num_targets
    visible = tokens.target_visible.long()
    end = visible if is_history is None else visible + is_history.long()
    sequence = torch.repeat_interleave(
        torch.arange(len(num_targets), device=device), num_targets, output_size=len(visible)
    )

    # the history rows that are there twice
    first_full = num_history
    if full_rows > 0:
        fewest = num_history.scatter_reduce(0, sequence, end, "amin")
        first_full = (fewest - full_rows).clamp(min=num_context)
    num_full = num_history - first_full

    extended, is_candidate = _repeat_rows(tokens, num_history, num_full)
    return BothForms(
        tokens=extended,
        num_history=num_history,
        first_full=first_full,
        num_targets=tokens.num_targets,
        sequence=sequence,
        visible=visible,
        end=end,
        oldest=_oldest_keys(tokens, end, num_context, keep),
        own=is_candidate.nonzero().squeeze(1),
    )


def _repeat_rows(tokens: Tokens, num_history: Tensor, num_full: Tensor) -> tuple[Tokens, Tensor]:
    """The newest `num_full` rows of each history once more behind it, int64 [B], as candidates that
    see what lies before them; and which of the tokens are the candidates that there were, bool [T].
    """
    assert tokens.target_visible is not None
    device, offsets = tokens.seq_offsets.device, tokens.seq_offsets

    # each token of the new sequences, by its place in the old ones
    lengths = offsets.diff() + num_full
    new_offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    of = sequence_index(new_offsets, int(new_offsets[-1]))
    at = torch.arange(len(of), device=device) - new_offsets[of]
    source = at - torch.where(at < num_history[of], 0, num_full[of])

    # what the added rows and the candidates see
    is_target = at >= num_history[of]
    is_candidate = at >= (num_history + num_full)[of]
    sees = source.clone()
    sees[is_candidate] = tokens.target_visible.long()
    begin = None
    if tokens.target_from is not None:
        begin = torch.zeros_like(source)
        begin[is_candidate] = tokens.target_from.long()
        begin = begin[is_target].int()

    extended = Tokens(
        x_TE=tokens.x_TE.index_select(0, offsets[of] + source),
        seq_offsets=new_offsets,
        num_targets=(num_full + tokens.num_targets.long()).int(),
        target_visible=sees[is_target].int(),
        max_seq_len=int(lengths.max()) if len(lengths) else 0,
        target_from=begin,
    )
    return extended, is_candidate


def _oldest_keys(tokens: Tokens, end: Tensor, num_context: int, keep: int | None) -> Tensor:
    """int64 [C]: the oldest history row that each candidate reads in the last layer."""
    oldest = torch.full_like(end, num_context)
    if keep is not None:
        oldest = (end - keep).clamp(min=num_context)
    if tokens.target_from is not None:
        oldest = torch.maximum(oldest, tokens.target_from.long())
    return oldest


def with_next_rows(tokens: Tokens) -> tuple[Tokens, Tensor]:
    """The row before each next item put behind the candidates, as one that sees what lies before
    it; and which of the candidates are such rows, bool [C + P].

        tokens        c h0 h1 h2 x      next items behind h0 and h2: next_visible 2, 4
        result        c h0 h1 h2 x h0 h2      the second h0 sees c, the second h2 c h0 h1
        of history               0  1  1
    """
    assert tokens.target_visible is not None and tokens.num_next is not None
    assert tokens.next_visible is not None
    offsets, num_targets = tokens.seq_offsets, tokens.num_targets.long()
    before = (tokens.next_visible.long() - 1).clamp(min=0)
    begin = torch.repeat_interleave(offsets[:-1], tokens.num_next, output_size=before.numel())

    # each token of the new sequences, by its place in the old ones
    lengths = offsets.diff() + tokens.num_next
    new_offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    of = sequence_index(new_offsets, int(new_offsets[-1]))
    at = torch.arange(len(of), device=offsets.device) - new_offsets[of]
    is_next = at >= offsets.diff()[of]
    source = offsets[of] + at
    source[is_next] = begin + before

    # what the candidates and these rows see
    is_target = at >= (offsets.diff() - num_targets)[of]
    is_history = is_next[is_target]
    visible = torch.empty_like(source)[is_target]
    visible[~is_history], visible[is_history] = tokens.target_visible.long(), before
    oldest = None
    if tokens.target_from is not None:
        oldest = torch.zeros_like(visible)
        oldest[~is_history] = tokens.target_from.long()
        oldest = oldest.int()

    extended = Tokens(
        x_TE=tokens.x_TE.index_select(0, source),
        seq_offsets=new_offsets,
        num_targets=(num_targets + tokens.num_next).int(),
        target_visible=visible.int(),
        max_seq_len=int(lengths.max()) if len(lengths) else 0,
        target_from=oldest,
    )
    return extended, is_history


def own_view_encoded(stack: Stack, tokens: Tokens, norm: nn.Module) -> Encoded:
    """Normalised rows of the candidates, and of the row before each next item where `tokens` have
    such, each as if it were alone in its sequence with the rows that it sees.
    """
    if tokens.num_next is None or tokens.next_visible is None:
        return Encoded(norm(own_view_rows(stack, tokens)))

    extended, is_history = with_next_rows(tokens)
    rows = norm(own_view_rows(stack, extended, is_history=is_history))
    no_row = (tokens.next_visible <= stack.num_context)[:, None]
    return Encoded(rows[~is_history], next_rows=rows[is_history].masked_fill(no_row, 0))


def own_view_rows(
    stack: Stack, tokens: Tokens, dropout: float = 0.0, is_history: Tensor | None = None
) -> Tensor:
    """[C, d]: the last layer's rows of the candidates of a transducer of one layer or of two, each
    as if it were alone in its sequence with the rows that it sees.

    `is_history`: those of `with_next_rows`, None for none.
    """
    layers = [layer for layer in stack.layers if isinstance(layer, STU)]
    *earlier, last = layers
    assert len(earlier) <= 1

    full_rows, keep = _mask_of(last.cfg, stack.truncate_after_layer, stack.truncate_to)
    forms = both_forms(tokens, stack.num_context, full_rows, keep, is_history)
    x_TE = forms.tokens.x_TE
    for layer in earlier:
        x_TE = stu.stu_layer(
            x_TE,
            layer.weights(),
            replace(layer.shape, full_rows=0),
            sequences(forms.tokens),
            p=dropout,
            backend=layer.cfg.attention_backend,
        )

    rows = None
    if last.cfg.attention_backend in ("auto", "torch") and not x_TE.is_cuda:
        # the other forms make every row
        rows = QueryRows(forms.own, torch.searchsorted(forms.own, forms.tokens.seq_offsets))
        u, q, k, v = last.project_rows(x_TE, rows)
    else:
        u, q, k, v = last.project(x_TE)
        u = u[forms.own]
    attended = _own_attention(last, forms, rows, q, k, v, stack.num_context, full_rows)
    attended = attended.to(last.shape.attended_dtype(v.dtype))
    return last.output(x_TE[forms.own], u, attended)


def _mask_of(
    model: ModelConfig, truncate_after_layer: int | None, truncate_to: int
) -> tuple[int, int | None]:
    """The rows of layer 1 that are read in full, 0 where there is no such layer or no difference;
    and those that the last layer keeps, None for all.
    """
    mask = model.attention
    full_rows = 0 if mask.window is None or model.num_layers == 1 else mask.full_rows
    return full_rows, truncate_to if truncate_after_layer is not None else None


def _own_attention(
    layer: STU,
    forms: BothForms,
    rows: QueryRows | None,
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    num_context: int,
    full_rows: int,
) -> Tensor:
    """[C, H, V] in float32 at least: of the candidates, over their rows by the window and in full.

    There is no softmax, so the sums over both parts of the keys add. The second part leaves the
    candidate itself out: its value is 0 there. `rows`: those of the candidates, where `q_THD` has
    no others.
    """

    def attend(values: Tensor, end: Tensor, begin: Tensor, prefix: int) -> Tensor:
        out = semi_local_attention(
            q_THD,
            k_THD,
            values,
            forms.tokens.seq_offsets,
            max_seq_len=forms.tokens.max_seq_len,
            num_targets=forms.num_targets,
            target_visible=end.int(),
            target_from=begin.int(),
            window=0,  # the history's own rows are not read
            prefix=prefix,
            query_rows=rows,
            attn_alpha=layer.shape.attn_alpha,
            scaling_seq_len=layer.shape.scaling_seq_len,
            out_dtype=torch.promote_types(q_THD.dtype, torch.float32),
            backend=layer.cfg.attention_backend,
        )
        return out if rows is not None else out[forms.own]

    visible, oldest = forms.visible, forms.oldest
    # a candidate of the history is not its own key a second time
    first_read = torch.minimum(forms.end - full_rows, visible).clamp(min=num_context)
    total = attend(v_THV, first_read, oldest, num_context)
    if full_rows == 0:
        return total

    shift = (forms.num_history - forms.first_full)[forms.sequence]
    others = v_THV.index_fill(0, forms.own, 0)
    return total + attend(others, visible + shift, torch.maximum(first_read, oldest) + shift, 0)


def own_view_flops(tokens: Tokens, model: ModelConfig, num_context: int) -> tuple[int, int]:
    """Products of `own_view_rows`, forward, and the pairs of query and key, over the layers."""
    full_rows, keep = _mask_of(model, model.truncate_after_layer, model.truncate_to)
    forms = both_forms(tokens, num_context, full_rows, keep)
    mask, extended = model.attention, forms.tokens
    num_tokens = len(extended.x_TE)

    flops = pairs = 0
    if model.num_layers > 1:
        pairs = kept_pairs(
            extended.seq_offsets,
            extended.num_targets,
            extended.target_visible,
            mask.window,
            0,
            num_context + mask.extra_prefix,
            target_from=extended.target_from,
        )
        flops = layer_flops(model, num_tokens, pairs)
    last_pairs = candidate_pairs(forms.visible, forms.oldest, num_context)
    flops += layer_flops(model, num_tokens, last_pairs, len(forms.own))
    return flops, pairs + last_pairs
