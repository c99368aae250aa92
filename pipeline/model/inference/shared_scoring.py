"""All requests of a user at once: each history row is encoded once, not once for every request.

    user's rows + the candidates of many requests → `score_shared` → logits

The scores are those that `RankingModel.forward` gives to each request alone in its sequence. What
makes a request's encoding its own is the place where its history ends, n: the newest `full_rows`
rows before n see everything, and truncation keeps the newest `truncate_to`. Of two layers the last
one's history rows are nobody's input, so the whole dependence is which rows of layer 1 a candidate
of n sees, and each of them has two forms, that neither needs n:

    history row        0 1 2 3 4 5 6 7 8 9        full_rows 2, truncate_to 5
    by the window      w w w w w w w w w w        sees its window: `full_rows: 0`
    in full            f f f f f f f f f f        sees everything before it, as candidates do
    a candidate, n = 7     w w w f f              reads rows 2 to 6
    a candidate, n = 10          w w w f f        reads rows 5 to 9

A deeper stack with such a mask has other rows for every n, and is scored request by request. One
without full rows and truncation (`window: null` of the baselines) is exact as it stands.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.jagged.op import sequence_index
from kernels.stu import op as stu
from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.encoders.stu import STU, sequences
from pipeline.model.encoders.transducer import Transducer
from pipeline.model.encoders.ultra_hstu import UltraHSTU, channel_parts
from pipeline.model.ranker import RankingModel
from pipeline.model.tokens import Tokens

SCORES_AT_ONCE = 2**18  # pairs of candidate and key in the last layer whose keys are gathered

# forward: the model as it stands; layers: `score_shared`; none: each request has its own encoding
Sharing = Literal["forward", "layers", "none"]


def shared_form(cfg: ModelConfig) -> Sharing:
    """How requests of one user may share an encoded history without another score.

    Told from the mask: forward where no row depends on where the history ends, layers where two
    layers make the two forms of a row enough, else none.
    """
    if cfg.time_anchor == "query":
        return "none"

    forms: set[Sharing] = set()
    for channel, model in channel_parts(cfg):
        masked = model.attention.window is not None and model.attention.full_rows > 0
        if not masked and model.truncate_after_layer is None and channel.max_len is None:
            forms.add("forward")
        elif model.num_layers <= 2 and channel.max_len is None and cfg.cacheable:
            forms.add("layers")
        else:
            forms.add("none")

    if "none" in forms:
        return "none"
    return "layers" if "layers" in forms else "forward"


def score_shared(model: RankingModel, batch: SequenceBatch, cfg: ModelConfig) -> Tensor:
    """Logits, float32 [C, tasks], of candidates that see `batch.target_visible` of their user's
    rows. Call it without gradients, in evaluation mode, where `shared_form(cfg)` is not none.
    """
    form = shared_form(cfg)
    assert form != "none" and batch.target_visible is not None
    if form == "forward":
        return model(batch)

    assert isinstance(model.transducer, UltraHSTU)  # `ModelConfig.cacheable`
    tokens = model.encoder(batch)
    outputs = []
    for stack, rows in model.transducer.channel_rows(tokens, batch):
        outputs.append(_stack_rows(stack, rows))
    return model.score_rows(torch.cat(outputs, dim=1), batch)


@dataclass(frozen=True, slots=True)
class _Forms:
    """Packed sequences [history | history in full, its newest rows | candidates], context before
    the history, and where each part lies. B sequences, C candidates.
    """

    tokens: Tokens
    num_history: Tensor  # int64 [B], context included
    first_full: Tensor  # int64 [B], the oldest history row that is there in full too
    num_full: Tensor  # int64 [B]
    sequence: Tensor  # int64 [C], which sequence a candidate is of
    visible: Tensor  # int64 [C], history rows that a candidate sees, context included
    own: Tensor  # int64 [C], where the candidate itself lies among the tokens


def _stack_rows(stack: Transducer, tokens: Tokens) -> Tensor:
    """[C, d]: the transducer's outputs of the candidates, of one layer or of two."""
    layers = [layer for layer in stack.layers if isinstance(layer, STU)]
    *earlier, last = layers
    assert len(earlier) <= 1

    mask = last.shape
    full_rows = 0 if mask.window is None else mask.full_rows
    forms = _both_forms(tokens, stack.num_context, full_rows if earlier else 0)
    x_TE = forms.tokens.x_TE
    for layer in earlier:
        x_TE = stu.stu_layer(
            x_TE,
            layer.weights(),
            replace(layer.shape, full_rows=0),
            sequences(forms.tokens),
            backend=layer.cfg.attention_backend,
        )

    keep = stack.truncate_to if stack.truncate_after_layer is not None else None
    oldest = _oldest_keys(forms, stack.num_context, keep)
    outputs = _last_layer(last, x_TE, forms, oldest, stack.num_context, full_rows if earlier else 0)
    return stack.norm_out(outputs)


def _both_forms(tokens: Tokens, num_context: int, full_rows: int) -> _Forms:
    """The rows that some candidate sees in full put behind each history, as candidates that see
    what lies before them; none where `full_rows` is 0.

        tokens      c h0 h1 h2 x y        x sees 3: c h0 h1, y sees all; full_rows 1
        result      c h0 h1 h2 h1 h2 x y  the second h1 sees c h0, the second h2 c h0 h1
    """
    assert tokens.target_visible is not None
    device, offsets = tokens.seq_offsets.device, tokens.seq_offsets
    num_targets = tokens.num_targets.long()
    num_history = offsets.diff() - num_targets
    visible = tokens.target_visible.long()
    sequence = torch.repeat_interleave(
        torch.arange(len(num_targets), device=device), num_targets, output_size=len(visible)
    )

    # the history rows that are there twice
    first_full = num_history
    if full_rows > 0:
        fewest = num_history.scatter_reduce(0, sequence, visible, "amin")
        first_full = (fewest - full_rows).clamp(min=num_context)
    num_full = num_history - first_full

    # each token of the new sequences, by its place in the old ones
    lengths = offsets.diff() + num_full
    new_offsets = nn.functional.pad(lengths.cumsum(0), (1, 0))
    of = sequence_index(new_offsets, int(new_offsets[-1]))
    at = torch.arange(len(of), device=device) - new_offsets[of]
    source = at - torch.where(at < num_history[of], 0, num_full[of])

    # what the added rows and the candidates see
    is_target = at >= num_history[of]
    sees = source.clone()
    is_candidate = at >= (num_history + num_full)[of]
    sees[is_candidate] = visible

    extended = Tokens(
        x_TE=tokens.x_TE.index_select(0, offsets[of] + source),
        seq_offsets=new_offsets,
        num_targets=(num_full + num_targets).int(),
        target_visible=sees[is_target].int(),
        max_seq_len=int(lengths.max()),
    )
    own = is_candidate.nonzero().squeeze(1)
    return _Forms(extended, num_history, first_full, num_full, sequence, visible, own)


def _oldest_keys(forms: _Forms, num_context: int, keep: int | None) -> Tensor:
    """int64 [C]: the oldest history row that each candidate reads in the last layer."""
    if keep is None:
        return torch.full_like(forms.visible, num_context)
    return (forms.visible - keep).clamp(min=num_context)


def _last_layer(
    layer: STU, x_TE: Tensor, forms: _Forms, oldest: Tensor, num_context: int, full_rows: int
) -> Tensor:
    """[C, d]: the last layer of the candidates, each over keys of its own."""
    u, q, k, v = layer.project(x_TE)
    attended = torch.empty(len(forms.own), *v.shape[1:], dtype=v.dtype, device=v.device)

    for part in _parts_of_like_size(forms.visible - oldest + num_context + 1):
        keys, is_seen = _keys_seen(forms, part, oldest[part], num_context, full_rows)
        sums = _gathered_attention(q[forms.own[part]], k, v, keys, is_seen, layer)
        attended[part] = sums.to(v.dtype)
    return layer.output(x_TE[forms.own], u[forms.own], attended)


def _parts_of_like_size(num_keys: Tensor) -> Iterator[Tensor]:
    """Candidates in groups, those with few keys first, of at most SCORES_AT_ONCE keys with padding
    (one candidate at least).
    """
    order = num_keys.argsort(stable=True)
    sizes = num_keys[order].tolist()

    begin = 0
    while begin < len(sizes):
        # as many as would fit if all had as few keys as the first, then as the last of those
        end = min(begin + max(SCORES_AT_ONCE // sizes[begin], 1), len(sizes))
        end = begin + max(min(SCORES_AT_ONCE // sizes[end - 1], end - begin), 1)
        yield order[begin:end]
        begin = end


def _keys_seen(
    forms: _Forms, part: Tensor, oldest: Tensor, num_context: int, full_rows: int
) -> tuple[Tensor, Tensor]:
    """Places among the tokens, int64 [c, K], and bool [c, K], true where there is a key: itself,
    the context, then its rows from the oldest on, the newest `full_rows` of them in full.
    """
    sequence, visible = forms.sequence[part], forms.visible[part]
    begin = forms.tokens.seq_offsets[sequence]
    full_shift = (forms.num_history - forms.first_full)[sequence]

    width = int((visible - oldest).max())
    row = oldest[:, None] + torch.arange(width, device=part.device)
    in_full = row >= (visible - full_rows)[:, None]
    place = begin[:, None] + row + torch.where(in_full, full_shift[:, None], 0)
    is_row = row < visible[:, None]

    context = begin[:, None] + torch.arange(num_context, device=part.device)
    own = forms.own[part][:, None]
    keys = torch.cat([own, context, torch.where(is_row, place, own)], dim=1)
    return keys, nn.functional.pad(is_row, (1 + num_context, 0), value=True)


def _gathered_attention(
    q_CHD: Tensor, k_THD: Tensor, v_THV: Tensor, keys: Tensor, is_seen: Tensor, layer: STU
) -> Tensor:
    """[c, H, V] in float32 at least: SiLU attention of each row over its own keys."""
    shape = layer.shape
    wide = torch.promote_types(q_CHD.dtype, torch.float32)
    with torch.autocast(q_CHD.device.type, enabled=False):
        k_CKHD, v_CKHV = k_THD[keys].to(wide), v_THV[keys].to(wide)
        score = torch.einsum("chd,ckhd->chk", q_CHD.to(wide) * shape.attn_alpha, k_CKHD)
        weight = nn.functional.silu(score) * is_seen[:, None]
        return torch.einsum("chk,ckhv->chv", weight, v_CKHV) / shape.scaling_seq_len
