"""Jagged batches: the one input of the model in training, evaluation and serving.

    sequences (Arrow lists) → Events (flat columns + offsets) → `collate` → SequenceBatch

A batch holds sequences `[uih, oldest first | candidates]`; the model puts its context tokens before them. Training,
evaluation and serving differ only in where the `Events` come from; all three call `collate`.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """B sequences of T tokens in all, packed without padding; the last `num_targets[b]` tokens of b are candidates.

    Codes are embedding rows, 0 = missing or not seen in the training period. On candidates both masks are 0: a
    candidate carries no action. `position` is the number of the user's earlier rows, dropped ones counted; `gap_ms` the
    time since the previous row, -1 where there is none or it is not real. A candidate has the position after the last
    event it sees and the gap from that event to its request, so that nothing in the history depends on the request
    (`time_anchor: event`).
    """

    seq_offsets: Tensor  # int64 [B + 1], from 0 to T
    num_targets: Tensor  # int32 [B]
    item_codes: Tensor  # int32 [T, 1 + item columns]: item id, then `features.item` in order
    request_codes: Tensor  # int32 [T, request columns]: `features.request` in order
    action_mask: Tensor  # int32 [T], bit per action of source.actions
    known_mask: Tensor  # int32 [T]
    position: Tensor  # int64 [T]
    gap_ms: Tensor  # int64 [T]
    user_codes: Tensor  # int32 [B, user columns]: `features.user` in order
    max_seq_len: int  # longest sequence
    target_visible: Tensor | None = (
        None  # int32 [C]: the candidate sees uih tokens 0..target_visible-1; None: all of it
    )
    labels: Tensor | None = None  # float32 [C, tasks]
    label_weight: Tensor | None = None  # float32 [C, tasks], 0 where the action is unknown

    @property
    def num_sequences(self) -> int:
        return self.num_targets.numel()

    @property
    def num_tokens(self) -> int:
        return self.position.numel()

    def to(self, device: torch.device | str) -> "SequenceBatch":
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()})
