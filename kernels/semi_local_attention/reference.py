"""The truth for semi-local SiLU attention: dense, one sequence after another, differentiable by
autograd.

Shapes: B sequences, T packed tokens, H heads, D query-key width, V value width, C candidates of the
whole batch, and
L, the length of one sequence. A sequence is `[context | history, oldest first | candidates]`.
"""

import torch
from torch import Tensor

from kernels.semi_local_attention.types import RelativeBias, time_bucket, whole_seconds


def semi_local_mask(
    length: int,
    num_targets: int,
    window: int | None,
    full_rows: int,
    prefix: int = 0,
    target_visible: Tensor | None = None,
    target_from: Tensor | None = None,
) -> Tensor:
    """[length, length] bool, where a row may see a column: ULTRA-HSTU, arXiv:2602.16986, eq. 6-7,
    plus a prefix.

    History rows see at most `window` positions back, the newest `full_rows` of them everything
    before, and all of them the oldest `prefix` positions. Candidates, the last `num_targets` rows,
    see themselves and the history, or of it the first `target_visible` [num_targets] positions, and
    of these the prefix and those from `target_from` [num_targets] on.

        length 6, 2 candidates, window 1, full_rows 1, prefix 1, visible 3 and 4, from 2 and 0

        k      0 1 2 3 4 5
        q=0    1 . . . . .    the prefix
        q=1    1 1 . . . .
        q=2    1 1 1 . . .    the prefix and the window
        q=3    1 1 1 1 . .    the full row
        q=4    1 . 1 . 1 .    the prefix, 2 to 2, itself
        q=5    1 1 1 1 . 1    everything, itself
    """
    u = length - num_targets
    device = None if target_visible is None else target_visible.device
    q, k = (
        torch.arange(length, device=device)[:, None],
        torch.arange(length, device=device)[None, :],
    )
    window = length if window is None else window
    history = (k <= q) & ((q - k <= window) | (q >= u - full_rows) | (k < prefix))
    visible = torch.full((length, 1), u, device=device)
    if target_visible is not None:
        visible[u:, 0] = target_visible.clamp(0, u)
    seen = k < visible
    if target_from is not None:
        oldest = torch.zeros((length, 1), dtype=torch.int64, device=device)
        oldest[u:, 0] = target_from.to(torch.int64)
        seen = seen & ((k >= oldest) | (k < prefix))
    return torch.where(q >= u, seen | (k == q), history)


def relative_bias(
    bias: RelativeBias, rows: slice, num_targets: int, target_visible: Tensor | None
) -> Tensor:
    """[L, L] bias of the sequence that holds the tokens `rows`."""
    key_time = whole_seconds(bias.event_time_T[rows])
    query_time = key_time if bias.query_time_T is None else whole_seconds(bias.query_time_T[rows])
    length = len(key_time)
    u = length - num_targets
    position = torch.arange(length, device=key_time.device)
    position[u:] = u if target_visible is None else target_visible.clamp(0, u)
    distance = (position[:, None] - position[None, :]).clamp(0, len(bias.position_table) - 1)
    bucket = time_bucket(query_time[:, None] - key_time[None, :], len(bias.time_table))
    return bias.position_table[distance] + bias.time_table[bucket]


def semi_local_attention_reference(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    seq_offsets: Tensor,
    *,
    num_targets: Tensor | None,
    target_visible: Tensor | None,
    target_from: Tensor | None,
    extra_full_rows: Tensor | None,
    window: int | None,
    full_rows: int,
    prefix: int,
    bias: RelativeBias | None,
    attn_alpha: float,
    scaling_seq_len: int,
) -> Tensor:
    """O = M ⊙ SiLU(alpha Q Kᵀ + bias) V / scaling_seq_len, no softmax; [T, H, V] in the dtype of
    `q_THD`.
    """
    offsets = seq_offsets.tolist()
    counts = [0] * (len(offsets) - 1) if num_targets is None else num_targets.tolist()
    extra = [0] * len(counts) if extra_full_rows is None else extra_full_rows.tolist()
    outputs, first_candidate = [], 0
    for i, (begin, end, count) in enumerate(zip(offsets[:-1], offsets[1:], counts, strict=True)):
        rows = slice(begin, end)
        candidates = slice(first_candidate, first_candidate + count)
        first_candidate += count
        visible = None if target_visible is None else target_visible[candidates]
        oldest = None if target_from is None else target_from[candidates]
        full = full_rows + extra[i]
        mask = semi_local_mask(end - begin, count, window, full, prefix, visible, oldest)
        mask = mask.to(q_THD.device)
        score = torch.einsum("qhd,khd->hqk", q_THD[rows], k_THD[rows]) * attn_alpha
        if bias is not None:
            score = score + relative_bias(bias, rows, count, visible).to(score.dtype)
        weight = torch.nn.functional.silu(score).masked_fill(~mask, 0.0) / scaling_seq_len
        outputs.append(torch.einsum("hqk,khv->qhv", weight, v_THV[rows]))
    return torch.cat(outputs) if outputs else v_THV.new_zeros(v_THV.shape)


def cached_attention_reference(
    q_CHD: Tensor,
    own_k_CHD: Tensor,
    own_v_CHV: Tensor,
    row_offsets: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    cache_offsets: Tensor,
    *,
    visible: Tensor | None,
    attn_alpha: float,
    scaling_seq_len: int,
) -> Tensor:
    """New rows over a user's cached keys and themselves, [C, H, V]: what `semi_local_attention`
    gives the same rows.

    A row sees its user's cache, or the first `visible` int32 [C] keys of it, and its own key.
    """
    outputs = []
    rows_of, cache_of = row_offsets.tolist(), cache_offsets.tolist()
    for i in range(len(rows_of) - 1):
        rows, cache = slice(rows_of[i], rows_of[i + 1]), slice(cache_of[i], cache_of[i + 1])
        num_rows, num_keys = rows.stop - rows.start, cache.stop - cache.start
        keys, values = (
            torch.cat([k_THD[cache], own_k_CHD[rows]]),
            torch.cat([v_THV[cache], own_v_CHV[rows]]),
        )
        own = torch.eye(num_rows, dtype=torch.bool, device=q_CHD.device)
        seen = torch.ones(num_rows, num_keys, dtype=torch.bool, device=q_CHD.device)
        if visible is not None:
            seen = torch.arange(num_keys, device=q_CHD.device)[None, :] < visible[rows, None]
        score = torch.einsum("qhd,khd->hqk", q_CHD[rows], keys) * attn_alpha
        weight = (
            torch.nn.functional.silu(score).masked_fill(~torch.cat([seen, own], 1), 0.0)
            / scaling_seq_len
        )
        outputs.append(torch.einsum("hqk,khv->qhv", weight, values))
    return torch.cat(outputs) if outputs else own_v_CHV.new_zeros(own_v_CHV.shape)
