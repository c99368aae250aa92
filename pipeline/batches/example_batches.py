"""Examples as batches: candidates with what they may see, and their labels; `collate` makes tensors
of them.

    examples ─→ history rows ───────────────────────────────┐
             └→ candidates (and drawn negatives) → targets ─┼→ `collate` → SequenceBatch
                         └→ views, labels, next items ──────┘   in training
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from pipeline.batches.collate import SequenceBatch, TargetView, collate
from pipeline.batches.events import Events, UserEvents, ranges, request_gaps
from pipeline.batches.examples import Examples, KeptRows, keep_weighted, shared_end
from pipeline.batches.features import FeatureMaps
from pipeline.batches.labels import label_counts
from pipeline.batches.negatives import (
    Candidates,
    negative_labels,
    own_candidates,
    with_negatives,
)
from pipeline.batches.next_items import NextItems, next_items
from pipeline.batches.rates import candidate_features
from pipeline.batches.stochastic_length import cut_threshold
from pipeline.config import InputConfig, RunConfig, StochasticLengthConfig, TrainConfig


def example_candidates(
    users: UserEvents,
    examples: Examples,
    maps: FeatureMaps,
    task_bits: tuple[int, ...],
    negatives: int,
    drawn_by: tuple[int, ...] | None = None,
) -> Candidates:
    """What these examples ask: their rows, and beside each positive so many drawn `negatives`.

    `drawn_by`, the seed and the epoch, in training, where each draws its own; None draws the same
    for every run.
    """
    rows, offsets = ranges(examples.target_begin, examples.target_end)
    if negatives == 0:
        return own_candidates(users, rows, offsets)

    seed = (0,) if drawn_by is None else (1, *drawn_by)
    return with_negatives(users, rows, offsets, maps, task_bits, negatives, seed)


def example_batch(
    users: UserEvents,
    examples: Examples,
    maps: FeatureMaps,
    cfg: RunConfig,
    *,
    training: bool,
    shared: bool = False,
    epoch: int = 0,
    candidates: Candidates | None = None,
    cut: np.ndarray | None = None,
) -> SequenceBatch:
    """These examples as one batch; `training` adds what each target may see, and labels with their
    weights; `shared`, for examples of several requests, what each target may see alone.

    `candidates`: those of the examples, where they are at hand. `cut`, bool [n]: the examples that
    `cut_histories` has cut, or of which `keep_weighted` is to keep some rows; None for none.
    """
    events, train = users.events, cfg.train
    if candidates is None:
        drawn_by = (cfg.seed, epoch) if training else None
        candidates = example_candidates(
            users, examples, maps, cfg.task_bits, cfg.examples.negatives, drawn_by
        )
    history = events.take(examples.history_begin, examples.history_end)
    targets = _example_targets(users, examples, candidates, history, maps, cfg.inputs)

    left = _drawn_rows(users, examples, cut, train.stochastic_length, (cfg.seed, epoch))
    if left is not None:
        history = history.keep(left.kept)

    view = TargetView()
    if training:
        view = _training_view(users, examples, candidates, train, cut, left)
    elif shared:
        view = TargetView(_visible_rows(users, examples, candidates, left))

    labels, weight, following = None, None, None
    if training:
        order_only_weight = train.history_label_weight
        labels, weight = candidate_labels(events, candidates, cfg.task_bits, order_only_weight)
        if cfg.retrieval.enabled:
            bits = cfg.positive_bits
            following = _next_items(users, examples, maps, bits, order_only_weight, left)
        if not cfg.tasks:  # nothing to score: no candidates
            none = np.zeros(len(examples), np.int64)
            targets, view = targets.take(none, none), view.without_candidates()
            labels, weight = labels[:0], weight[:0]

    return collate(
        history,
        targets,
        users.user_id[examples.user],
        maps,
        cfg.inputs,
        view=view,
        labels=labels,
        label_weight=weight,
        next_items=following,
    )


def _drawn_rows(
    users: UserEvents,
    examples: Examples,
    cut: np.ndarray | None,
    lengths: StochasticLengthConfig,
    seed: tuple[int, ...],
) -> KeptRows | None:
    """The rows that are left of cut histories where they are drawn; None where they are the newest,
    which `cut_histories` keeps, or nothing is cut.
    """
    if cut is None or lengths.rows != "weighted":
        return None
    return keep_weighted(users, examples, cut, cut_threshold(lengths), seed)


def _training_view(
    users: UserEvents,
    examples: Examples,
    candidates: Candidates,
    train: TrainConfig,
    cut: np.ndarray | None,
    left: KeptRows | None,
) -> TargetView:
    """What each candidate may see by the layout and `train.target_view`."""
    visible = _visible_rows(users, examples, candidates, left)
    if train.layout != "user":
        return TargetView(visible)

    least = np.maximum(shared_end(users, examples), examples.history_begin)
    span = (examples.history_end - least).astype(np.int32)
    if cut is None or train.target_view != "exact":
        return TargetView(visible, None, span)

    # of a cut history so many rows before each candidate as stochastic length keeps
    is_cut = np.repeat(cut, np.diff(candidates.offsets))
    begin = visible - cut_threshold(train.stochastic_length)
    oldest = np.where(is_cut, begin.clip(min=0), 0).astype(np.int32)
    return TargetView(visible, oldest, span)


def _example_targets(
    users: UserEvents,
    examples: Examples,
    candidates: Candidates,
    history: Events,
    maps: FeatureMaps,
    inputs: InputConfig,
) -> Events:
    """The candidates as rows of their requests, with their dense features."""
    rows, offsets = candidates.rows, candidates.offsets
    lengths = np.diff(offsets)
    user = np.repeat(examples.user, lengths)
    targets = target_events(users, rows, offsets, user, inputs.source.order_only_end_is_real)
    targets = replace(targets, item_id=candidates.item_id)
    if not inputs.features.dense:
        return targets

    # counted over all that lies before a request, a history cut in training included
    first = users.events.offsets[examples.user]
    is_whole = np.array_equal(first, examples.history_begin)
    seen = history if is_whole else users.events.take(first, examples.history_end)
    before = users.visible_end[rows] - np.repeat(first, lengths)
    dense = candidate_features(seen, targets, before, maps, inputs.features, inputs.task_bits)
    return replace(targets, dense=dense)


def _visible_rows(
    users: UserEvents, examples: Examples, candidates: Candidates, left: KeptRows | None
) -> np.ndarray:
    """int32 [C]: how many rows of its example's history, of those `left`, each candidate's request
    may see.
    """
    example = np.repeat(np.arange(len(examples)), np.diff(candidates.offsets))
    begin = examples.history_begin[example]
    visible = np.clip(users.visible_end[candidates.rows] - begin, 0, None)
    return visible.astype(np.int32) if left is None else left.count(example, visible)


def _next_items(
    users: UserEvents,
    examples: Examples,
    maps: FeatureMaps,
    positives: int,
    order_only_weight: float,
    left: KeptRows | None,
) -> NextItems:
    """The rows of the examples that count by the bits `positives`, none drawn beside them."""
    rows, offsets = ranges(examples.target_begin, examples.target_end)
    own = own_candidates(users, rows, offsets)
    visible = _visible_rows(users, examples, own, left)
    return next_items(users.events, rows, offsets, visible, maps, positives, order_only_weight)


def history_batch(
    users: UserEvents, examples: Examples, maps: FeatureMaps, inputs: InputConfig
) -> SequenceBatch:
    """The histories of these examples as one batch without candidates."""
    history = users.events.take(examples.history_begin, examples.history_end)
    none = np.zeros(len(examples), np.int64)
    targets = users.events.take(none, none)
    return collate(history, targets, users.user_id[examples.user], maps, inputs)


def target_events(
    users: UserEvents, rows: np.ndarray, offsets: np.ndarray, user: np.ndarray, end_is_real: bool
) -> Events:
    """The rows, of the users `user`, as candidates of their requests.

    Time, position and gap are the request's, actions and outcomes are left out.
    """
    events = users.events
    first, visible_end = events.offsets[user], users.visible_end[rows]
    time = events.event_time[users.request_begin[rows]]
    gap = request_gaps(events, visible_end - 1, first, time, end_is_real)
    no_action = np.zeros(len(rows), np.int32)
    return Events(
        offsets=offsets,
        item_id=events.item_id[rows],
        event_time=time,
        order_only=events.order_only[rows],
        action_mask=no_action,
        known_mask=no_action,
        position=users.first_position[user] + visible_end - first,
        gap_ms=np.where(events.order_only[rows], -1, gap),
        request={name: column[rows] for name, column in events.request.items()},
        outcomes={},
    )


def candidate_labels(
    events: Events, candidates: Candidates, task_bits: Sequence[int], order_only_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """`target_labels` of candidates: a drawn item is a negative where its row is a positive."""
    labels, weights = target_labels(events, candidates.rows, task_bits, order_only_weight)
    if not candidates.drawn.any():
        return labels, weights
    return negative_labels(candidates, labels, weights)


def target_labels(
    events: Events, rows: np.ndarray, task_bits: Sequence[int], order_only_weight: float
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and their loss weights, float32 [C, tasks].

    The weight is 0 where the action of the row is unknown, `order_only_weight` in order_only rows,
    and 1 in all others.
    """
    counts = label_counts(events.action_mask[rows], events.known_mask[rows], task_bits)
    known, labels = np.split(counts, 2, axis=1)
    weight = np.where(events.order_only[rows, None], order_only_weight, 1.0)
    return labels.astype(np.float32), (known * weight).astype(np.float32)
