"""Jagged batches: the one input of the model in training, evaluation and serving.

    sequences (Arrow lists) → Events (flat columns + offsets) → `collate` → SequenceBatch

A batch holds sequences `[uih, oldest first | candidates]`; the model puts its context tokens before
them. Training, evaluation and serving differ only in where the `Events` come from; all three call
`collate`.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.batches.events import NO_GAP, Events, offsets_of, request_gaps
from pipeline.batches.features import FeatureMaps
from pipeline.batches.next_items import NextItems
from pipeline.batches.packing import Packed, copy_packed, pack_tensors
from pipeline.batches.rates import candidate_features
from pipeline.config import FeatureConfig, InputConfig, ModelConfig
from pipeline.schema import WATCH_MS

MS_PER_HOUR = 3_600_000


@dataclass(frozen=True, slots=True)
class Filling:
    """Sizes of a batch that was filled up (`pipeline/batches/filling.py`)."""

    own_tokens: int  # those of the batch before it was filled
    num_tokens: int
    num_targets: int
    num_sequences: int
    max_seq_len: int
    # after truncation, context tokens among them; 0 without
    kept_tokens: int = 0
    kept_seq_len: int = 0

    @property
    def sizes(self) -> "Filling":
        """The same without what differs between batches of one CUDA graph."""
        return replace(self, own_tokens=0)


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
    item_codes: Tensor  # int32 [T, 1 + item codes]: item id, then `features.item` in order
    request_codes: Tensor  # int32 [T, request columns]: `features.request` in order
    # int32 [T], bit per action of source.actions, then per watch-time threshold
    action_mask: Tensor
    known_mask: Tensor  # int32 [T]
    position: Tensor  # int64 [T]
    gap_ms: Tensor  # int64 [T]
    user_codes: Tensor  # int32 [B, user codes]: `features.user` in order
    max_seq_len: int  # longest sequence
    # int32 [C]: the candidate sees uih tokens 0..target_visible-1; None: all
    target_visible: Tensor | None = None
    # int32 [C]: of these those from here on; None: from the first
    target_from: Tensor | None = None
    # int32 [B], of sequences that hold several requests: uih tokens that the first does not see;
    # of the sequence that fills a batch up it may be below 0: so many fewer are left of it
    target_span: Tensor | None = None
    # int32 [T, history columns]: `features.history` in order, 0 unknown and on candidates, then the
    # buckets from 1; None where the configuration names none
    history_codes: Tensor | None = None
    dense: Tensor | None = None  # float32 [C, F]: rates and counts, `features.dense`
    labels: Tensor | None = None  # float32 [C, tasks]
    label_weight: Tensor | None = None  # float32 [C, tasks], 0 where the action is unknown
    # in training for retrieval, P next items in all, ordered by sequence: their number per
    # sequence, int32 [B]; the history rows of its sequence that lie before each, int32 [P], 1 or
    # more; its code in the table of item ids, int64 [P]; its weight, float32 [P]
    num_next: Tensor | None = None
    next_visible: Tensor | None = None
    next_code: Tensor | None = None
    next_weight: Tensor | None = None
    host: "SequenceBatch | None" = None  # on a GPU: the batch on the CPU of which this is a copy
    packed: Packed | None = None  # the buffer of which the tensors are views, if any
    filling: Filling | None = None  # of a batch that was filled up: to which sizes

    @property
    def num_sequences(self) -> int:
        return self.num_targets.numel()

    @property
    def num_tokens(self) -> int:
        return self.position.numel()

    @property
    def own_tokens(self) -> int:
        """Its tokens without those that only fill it up."""
        return self.num_tokens if self.filling is None else self.filling.own_tokens

    @property
    def on_host(self) -> "SequenceBatch":
        """The batch on the CPU, where sizes of what follows are counted without waiting for a GPU
        that `to` led to.
        """
        return self.to("cpu") if self.host is None else self.host

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The columns that there are, by name."""
        found = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                found[field.name] = value
        return found

    def pack(self, *, pin_memory: bool = False) -> "SequenceBatch":
        """The same batch, on the CPU, its tensors views of one buffer."""
        packed = pack_tensors(self.tensors, pin_memory=pin_memory)
        return replace(self, **packed.views(), packed=packed)

    def to(self, device: torch.device | str) -> "SequenceBatch":
        """The batch on a device. From the CPU it goes as one buffer, which a batch that `pack`
        made has already.
        """
        device = torch.device(device)
        if self.position.device.type == device.type == "cpu":
            return self
        if self.position.device.type != "cpu":  # nothing is in flight when the values are read
            moved = {name: tensor.to(device) for name, tensor in self.tensors.items()}
            return replace(self, **moved, host=None, packed=None)

        packed = self.packed
        if packed is None or not packed.holds(self.tensors):
            packed = pack_tensors(self.tensors, pin_memory=device.type == "cuda")
        there = copy_packed(packed, device)
        return replace(self, **there.views(), host=self, packed=there)


def candidates(
    history: Events,
    first_position: np.ndarray,
    item_id: np.ndarray,
    offsets: np.ndarray,
    request_time: np.ndarray,
    request: dict[str, np.ndarray],
    maps: FeatureMaps,
    inputs: InputConfig,
) -> Events:
    """Items to score for B users, after all of `history`, at one `request_time` (int64 [B], ms UTC)
    each.

    `item_id` and the request columns are flat [C] with `offsets` [B + 1]; `first_position` int64
    [B] counts rows that the history itself left out.
    """
    lengths = np.diff(offsets)
    end_is_real = inputs.source.order_only_end_is_real
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
        request=request,
        outcomes={},
    )
    visible = np.repeat(history.lengths, lengths)
    dense = candidate_features(history, targets, visible, maps, inputs.features, inputs.task_bits)
    return replace(targets, dense=dense)


@dataclass(frozen=True, slots=True)
class TokenPlaces:
    """Where history rows and candidates lie among the tokens of B sequences.

    history      a b | c      offsets 0 2 3
    candidates   x | y z      offsets 0 1 3
    tokens       a b x | c y z
    places       history 0 1 3, candidates 2 4 5
    """

    offsets: np.ndarray  # int64 [B + 1], of the tokens
    history: np.ndarray  # int64 [history rows]
    targets: np.ndarray  # int64 [C]

    @staticmethod
    def of(history: Events, targets: Events) -> "TokenPlaces":
        offsets = offsets_of(history.lengths + targets.lengths)
        history_shift = offsets[:-1] - history.offsets[:-1]
        target_shift = offsets[1:] - targets.offsets[1:]
        at_history = np.arange(history.offsets[-1]) + np.repeat(history_shift, history.lengths)
        at_targets = np.arange(targets.offsets[-1]) + np.repeat(target_shift, targets.lengths)
        return TokenPlaces(offsets, at_history, at_targets)

    def merge(self, past: np.ndarray, now: np.ndarray | int) -> np.ndarray:
        """A column of the tokens, from that of the history and that of the candidates."""
        merged = np.empty((self.offsets[-1], *past.shape[1:]), past.dtype)
        merged[self.history], merged[self.targets] = past, now
        return merged


@dataclass(frozen=True, slots=True)
class TargetView:
    """Which rows of its history each of C candidates of B sequences may see; None: all."""

    visible: np.ndarray | None = None  # int32 [C]: so many of the oldest
    oldest: np.ndarray | None = None  # int32 [C]: of these from here on; None: from the first
    span: np.ndarray | None = None  # int32 [B]: rows that a sequence's first request does not see

    def without_candidates(self) -> "TargetView":
        """The same of the histories alone."""
        visible = None if self.visible is None else self.visible[:0]
        return TargetView(visible, None, self.span)


EVERYTHING = TargetView()


def collate(
    history: Events,
    targets: Events,
    user_id: np.ndarray,
    maps: FeatureMaps,
    inputs: InputConfig,
    *,
    view: TargetView = EVERYTHING,
    labels: np.ndarray | None = None,
    label_weight: np.ndarray | None = None,
    next_items: NextItems | None = None,
) -> SequenceBatch:
    """One batch of B sequences: history b, then candidates b. No Python per sequence, no padding.

    Args:
        user_id: int64 [B].
        view: the rows that each candidate sees, in training and where requests share a sequence.
        labels, label_weight: float32 [C, tasks], in training.
        next_items: in training for retrieval.
    """
    features, num_targets = inputs.features, targets.lengths
    assert targets.dense is not None or not features.dense or num_targets.sum() == 0

    places = TokenPlaces.of(history, targets)
    offsets, merge = places.offsets, places.merge
    event_time = merge(history.event_time, targets.event_time)
    order_only = merge(history.order_only, targets.order_only)
    columns = request_columns(history, targets, places, event_time, order_only, features)
    position, gap_ms = stand_in_time(history, targets, places, event_time, order_only, inputs.model)

    # what the user did, and what came of it: of the history alone
    num_actions = len(inputs.source.actions)
    action_mask, known_mask = history_masks(history, maps, features, num_actions=num_actions)
    codes = bucket_codes(history, features) if features.history else None

    items = maps.item_rows(merge(history.item_id, targets.item_id))
    return SequenceBatch(
        seq_offsets=torch.from_numpy(offsets),
        num_targets=torch.from_numpy(num_targets.astype(np.int32)),
        item_codes=torch.from_numpy(maps.item_codes.take(items, axis=0)),
        request_codes=torch.from_numpy(maps.request_codes(columns, int(offsets[-1]))),
        action_mask=torch.from_numpy(merge(action_mask, 0)),
        known_mask=torch.from_numpy(merge(known_mask, 0)),
        position=torch.from_numpy(position),
        gap_ms=torch.from_numpy(gap_ms),
        user_codes=torch.from_numpy(maps.user_codes[maps.user_rows(user_id)]),
        max_seq_len=int(np.diff(offsets).max(initial=0)),
        target_visible=_tensor(view.visible),
        target_from=_tensor(view.oldest),
        target_span=_tensor(view.span),
        history_codes=None if codes is None else torch.from_numpy(merge(codes, 0)),
        dense=_tensor(targets.dense),
        labels=_tensor(labels),
        label_weight=_tensor(label_weight),
        **_next_columns(next_items),
    )


def stand_in_time(
    history: Events,
    targets: Events,
    places: TokenPlaces,
    event_time: np.ndarray,
    order_only: np.ndarray,
    model: ModelConfig,
) -> tuple[np.ndarray, np.ndarray]:
    """`position` and `gap_ms` of the tokens, int64 [T] each, by `model.time_anchor`."""
    if model.time_anchor == "query":
        return query_anchored(
            event_time, order_only, places.offsets, targets.lengths, model.position_buckets
        )
    position = places.merge(history.position, targets.position)
    return position, places.merge(history.gap_ms, targets.gap_ms)


def request_columns(
    history: Events,
    targets: Events,
    places: TokenPlaces,
    event_time: np.ndarray,
    order_only: np.ndarray,
    features: FeatureConfig,
) -> dict[str, np.ndarray]:
    """The tokens' request columns, [T] each, and the derived hour of `event_time`."""
    columns = {}
    for name in features.request:
        if name == "hour":
            columns[name] = hour_of_day(event_time, order_only, features.hour_utc_offset)
        else:
            columns[name] = places.merge(history.request[name], targets.request[name])
    return columns


def _tensor(array: np.ndarray | None) -> Tensor | None:
    return None if array is None else torch.from_numpy(array)


def _next_columns(next_items: NextItems | None) -> dict[str, Any]:
    if next_items is None:
        return {}
    return {
        "num_next": torch.from_numpy(next_items.num),
        "next_visible": torch.from_numpy(next_items.visible),
        "next_code": torch.from_numpy(next_items.code),
        "next_weight": torch.from_numpy(next_items.weight),
    }


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

        rows        10 20 50 90 | 100 100      two candidates, 4 buckets
        position     3  3  2  1 |   0   0
        gap_ms      90 80 50 10 |   0   0
    """
    if len(event_time) == 0:
        return np.zeros(0, np.int64), event_time

    lengths = np.diff(offsets)
    first_target = offsets[1:] - num_targets
    back = np.repeat(first_target, lengths) - np.arange(offsets[-1])

    # a last sequence without candidates would ask for the row behind the end
    request_time = event_time[np.minimum(first_target, len(event_time) - 1)]
    age = np.repeat(request_time, lengths) - event_time
    return np.clip(back, 0, buckets - 1), np.where(order_only, NO_GAP, age)


def history_masks(
    history: Events, maps: FeatureMaps, features: FeatureConfig, num_actions: int
) -> tuple[np.ndarray, np.ndarray]:
    """The action mask and the known mask of history rows with the bits of the watch-time
    thresholds, int32 [N].

        actions: bit 0           watch_seconds [2, 30]: bits 1 and 2
        watch_ms     -1   1999   2000   30000
        known         1    111    111     111
        action        1      1     11     111      where the action of bit 0 happened
    """
    action, known = history.action_mask, history.known_mask
    if not features.watch_seconds and not features.watch_shares:
        return action, known

    watch_ms = history.outcomes[WATCH_MS.name]
    seen = watch_ms >= 0
    bits = [(seen, watch_ms >= 1000 * seconds) for seconds in features.watch_seconds]
    if features.watch_shares:
        duration = maps.item_duration_ms[maps.item_rows(history.item_id)]  # 0: unknown
        timed = seen & (duration > 0)
        bits += [(timed, watch_ms >= share * duration) for share in features.watch_shares]

    for bit, (is_known, is_long) in enumerate(bits, start=num_actions):
        known = known | (is_known.astype(np.int32) << bit)
        action = action | ((is_known & is_long).astype(np.int32) << bit)
    return action, known


def bucket_codes(history: Events, features: FeatureConfig) -> np.ndarray:
    """int32 [N, history columns]: the bucket of each outcome that `features.history` names.

    edges [5, 20]
    value   unknown   4.9    5   19.9   20
    code    0         1      2   2      3
    """
    codes = np.empty((len(history.item_id), len(features.history)), np.int32)
    for i, (name, feature) in enumerate(features.history.items()):
        value = history.outcomes[name]
        # NaN of a float, -1 of an int, which is 0 or more
        unknown = np.isnan(value) if value.dtype.kind == "f" else value < 0
        bucket = 1 + np.searchsorted(feature.edges, value, side="right")
        codes[:, i] = np.where(unknown, 0, bucket)
    return codes


def hour_of_day(event_time: np.ndarray, order_only: np.ndarray, utc_offset: float) -> np.ndarray:
    """int32 [N], 0..23 at `utc_offset` hours from UTC, -1 where the time is only an order."""
    hour = (event_time + int(utc_offset * MS_PER_HOUR)) // MS_PER_HOUR % 24
    return np.where(order_only, -1, hour).astype(np.int32)
