"""Jagged batches: the one input of the model in training, evaluation and serving.

    sequences (Arrow lists) → Events (flat columns + offsets) → `collate` → SequenceBatch

A batch holds sequences `[uih, oldest first | candidates]`; the model puts its context tokens before
them. Training, evaluation and serving differ only in where the `Events` come from; all three call
`collate`.
"""

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from pipeline.batches.events import NO_GAP, Events, request_gaps
from pipeline.batches.features import FeatureMaps
from pipeline.batches.rates import candidate_features
from pipeline.config import RunConfig

MS_PER_HOUR = 3_600_000


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """B sequences of T tokens in all, packed without padding; the last `num_targets[b]` tokens of b
    are candidates.

    Codes are embedding rows, 0 = missing or not seen in the training period. On candidates both
    masks are 0: a candidate carries no action. `position` is the number of the user's earlier rows,
    dropped ones counted; `gap_ms` the time since the previous row, -1 where there is none or it is
    not real. A candidate has the position after the last event it sees and the gap from that event
    to its request, so that nothing in the history depends on the request; with `model.time_anchor:
    query` both are counted from the request instead (`query_anchored`).
    """

    seq_offsets: Tensor  # int64 [B + 1], from 0 to T
    num_targets: Tensor  # int32 [B]
    item_codes: Tensor  # int32 [T, 1 + item columns]: item id, then `features.item` in order
    request_codes: Tensor  # int32 [T, request columns]: `features.request` in order
    # int32 [T], bit per action of source.actions, then per watch-time threshold
    action_mask: Tensor
    known_mask: Tensor  # int32 [T]
    position: Tensor  # int64 [T]
    gap_ms: Tensor  # int64 [T]
    user_codes: Tensor  # int32 [B, user columns]: `features.user` in order
    max_seq_len: int  # longest sequence
    # int32 [C]: the candidate sees uih tokens 0..target_visible-1; None: all
    target_visible: Tensor | None = None
    dense: Tensor | None = None  # float32 [C, F]: rates and counts, `features.dense`
    labels: Tensor | None = None  # float32 [C, tasks]
    label_weight: Tensor | None = None  # float32 [C, tasks], 0 where the action is unknown
    host: "SequenceBatch | None" = None  # on a GPU: the batch on the CPU of which this is a copy

    @property
    def num_sequences(self) -> int:
        return self.num_targets.numel()

    @property
    def num_tokens(self) -> int:
        return self.position.numel()

    @property
    def on_host(self) -> "SequenceBatch":
        """The batch on the CPU, where sizes of what follows are counted without waiting for a GPU
        that `to` led to.
        """
        return self.to("cpu") if self.host is None else self.host

    def to(self, device: torch.device | str) -> "SequenceBatch":
        device = torch.device(device)
        if device.type == "cpu" and self.position.device.type == "cpu":
            return self
        tensors = {
            f.name: getattr(self, f.name)
            for f in fields(self)
            if isinstance(getattr(self, f.name), Tensor)
        }
        # Back to the CPU nothing may be in flight when the values are read.
        moved = {
            name: tensor.to(device, non_blocking=device.type != "cpu")
            for name, tensor in tensors.items()
        }
        return replace(self, **moved, host=None if device.type == "cpu" else self.on_host)


def candidates(
    history: Events,
    first_position: np.ndarray,
    item_id: np.ndarray,
    offsets: np.ndarray,
    request_time: np.ndarray,
    request: dict[str, np.ndarray],
    maps: FeatureMaps,
    cfg: RunConfig,
) -> Events:
    """Items to score for B users, after all of `history`, at one `request_time` (int64 [B], ms UTC)
    each.

    `item_id` and the request columns are flat [C] with `offsets` [B + 1]; `first_position` int64
    [B] counts rows that the history itself left out.
    """
    lengths = np.diff(offsets)
    end_is_real = cfg.source.order_only_end_is_real
    gap = request_gaps(
        history, history.offsets[1:] - 1, history.offsets[:-1], request_time, end_is_real
    )
    zeros = np.zeros(len(item_id), np.int32)
    targets = Events(
        offsets=offsets,
        item_id=item_id,
        event_time=np.repeat(request_time, lengths),
        order_only=np.zeros(len(item_id), bool),
        action_mask=zeros,
        known_mask=zeros,
        position=np.repeat(first_position + history.lengths, lengths),
        gap_ms=np.repeat(gap, lengths),
        watch_ms=np.full(len(item_id), -1),
        request=request,
    )
    return replace(
        targets,
        dense=candidate_features(history, targets, np.repeat(history.lengths, lengths), maps, cfg),
    )


def collate(
    history: Events,
    targets: Events,
    user_id: np.ndarray,
    maps: FeatureMaps,
    cfg: RunConfig,
    *,
    target_visible: np.ndarray | None = None,
    labels: np.ndarray | None = None,
    label_weight: np.ndarray | None = None,
) -> SequenceBatch:
    """One batch of B sequences: history b, then candidates b. No Python per sequence, no padding.

    Args:
        user_id: int64 [B].
        target_visible: int32 [C], how many rows of its history each candidate sees; None: all.
        labels, label_weight: float32 [C, tasks], in training.
    """
    num_history, num_targets = history.lengths, targets.lengths
    assert targets.dense is not None or not cfg.features.dense or num_targets.sum() == 0
    offsets = np.concatenate([[0], np.cumsum(num_history + num_targets)]).astype(np.int64)
    at_history = np.arange(history.offsets[-1]) + np.repeat(
        offsets[:-1] - history.offsets[:-1], num_history
    )
    at_targets = np.arange(targets.offsets[-1]) + np.repeat(
        offsets[1:] - targets.offsets[1:], num_targets
    )

    def merge(past: np.ndarray, now: np.ndarray) -> np.ndarray:
        merged = np.empty(offsets[-1], past.dtype)
        merged[at_history], merged[at_targets] = past, now
        return merged

    no_action = np.zeros(len(at_targets), np.int32)
    event_time = merge(history.event_time, targets.event_time)
    order_only = merge(history.order_only, targets.order_only)
    columns = {
        name: merge(history.request[name], targets.request[name]) if name != "hour" else
        hour_of_day(event_time, order_only, cfg.features.hour_utc_offset)
        for name in cfg.features.request
    }  # fmt: skip

    def tensor(array: np.ndarray | None) -> Tensor | None:
        return None if array is None else torch.from_numpy(array)

    position, gap_ms = (
        merge(history.position, targets.position),
        merge(history.gap_ms, targets.gap_ms),
    )
    if cfg.model.time_anchor == "query":
        position, gap_ms = query_anchored(
            event_time, order_only, offsets, num_targets, cfg.model.position_buckets
        )
    action_mask, known_mask = history_masks(history, maps, cfg)
    items = maps.item_rows(merge(history.item_id, targets.item_id))
    lengths = np.diff(offsets)
    return SequenceBatch(
        seq_offsets=torch.from_numpy(offsets),
        num_targets=torch.from_numpy(num_targets.astype(np.int32)),
        item_codes=torch.from_numpy(maps.item_codes.take(items, axis=0)),
        request_codes=torch.from_numpy(maps.request_codes(columns, int(offsets[-1]))),
        action_mask=torch.from_numpy(merge(action_mask, no_action)),
        known_mask=torch.from_numpy(merge(known_mask, no_action)),
        position=torch.from_numpy(position),
        gap_ms=torch.from_numpy(gap_ms),
        user_codes=torch.from_numpy(maps.user_codes[maps.user_rows(user_id)]),
        max_seq_len=int(lengths.max()) if len(lengths) else 0,
        target_visible=tensor(target_visible),
        dense=tensor(targets.dense),
        labels=tensor(labels),
        label_weight=tensor(label_weight),
    )


def query_anchored(
    event_time: np.ndarray,
    order_only: np.ndarray,
    offsets: np.ndarray,
    num_targets: np.ndarray,
    buckets: int,
) -> tuple[np.ndarray, np.ndarray]:
    """`position` and `gap_ms` of the authors' form, int64 [T] each.

    Candidates are at position 0, the newest event at 1, the one before at 2, the last of the
    `buckets` for all older ones; the gap is the time from the row to the request, NO_GAP where the
    row's time is only an order.
    """
    lengths = np.diff(offsets)
    first_target = offsets[1:] - num_targets
    back = np.repeat(first_target, lengths) - np.arange(offsets[-1])
    request_time = (
        event_time[np.minimum(first_target, max(len(event_time) - 1, 0))]
        if len(event_time)
        else event_time
    )
    age = np.repeat(request_time, lengths) - event_time
    return np.clip(back, 0, buckets - 1), np.where(order_only, NO_GAP, age)


def history_masks(
    history: Events, maps: FeatureMaps, cfg: RunConfig
) -> tuple[np.ndarray, np.ndarray]:
    """The action mask and the known mask of history rows with the bits of the watch-time
    thresholds, int32 [N].
    """
    features = cfg.features
    action, known = history.action_mask, history.known_mask
    if cfg.num_action_bits == len(cfg.source.actions):
        return action, known
    seen = history.watch_ms >= 0
    bits = [(seen, history.watch_ms >= 1000 * seconds) for seconds in features.watch_seconds]
    if features.watch_shares:
        duration = maps.item_duration_ms[maps.item_rows(history.item_id)]  # 0: unknown
        bits += [
            (seen & (duration > 0), history.watch_ms >= share * duration)
            for share in features.watch_shares
        ]
    for bit, (is_known, is_long) in enumerate(bits, start=len(cfg.source.actions)):
        known = known | (is_known.astype(np.int32) << bit)
        action = action | ((is_known & is_long).astype(np.int32) << bit)
    return action, known


def hour_of_day(event_time: np.ndarray, order_only: np.ndarray, utc_offset: float) -> np.ndarray:
    """int32 [N], 0..23 at `utc_offset` hours from UTC, -1 where the time is only an order."""
    hour = (event_time + int(utc_offset * MS_PER_HOUR)) // MS_PER_HOUR % 24
    return np.where(order_only, -1, hour).astype(np.int32)
