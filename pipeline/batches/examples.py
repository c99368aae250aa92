"""Examples: which rows of a user are history, which are candidates, and what their labels are.

An example is (user, request): history is every row of the user strictly earlier than the request,
candidates are the request's rows. Two layouts hold the same examples: one sequence per request
(evaluation, serving), and passes over one user's rows in which every row is also a candidate that
sees only what lay before its request (training).
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.batches.collate import SequenceBatch, collate
from pipeline.batches.events import Events, ranges, request_gaps, row_gaps
from pipeline.batches.features import FeatureMaps, label_counts
from pipeline.batches.rates import candidate_features
from pipeline.batches.stochastic_length import cut_threshold, stochastic_cuts
from pipeline.config import RunConfig
from pipeline.sequences import arrow_lists


@dataclass(frozen=True, slots=True)
class UserEvents:
    """All rows of some users, and for each row the request it belongs to."""

    events: Events
    user_id: np.ndarray  # int64 [B]
    first_position: np.ndarray  # int64 [B]
    request_begin: np.ndarray  # int64 [N], first row of the row's request
    # int64 [N], rows begin..visible_end-1 of the user are strictly earlier than the request
    visible_end: np.ndarray

    @property
    def row_user(self) -> np.ndarray:
        """Which user each row is of, int64 [N]."""
        return np.repeat(np.arange(len(self.user_id)), self.events.lengths)

    @property
    def request_time(self) -> np.ndarray:
        """When each row's request was made, int64 [N], ms UTC."""
        return self.events.event_time[self.request_begin]


@dataclass(frozen=True, slots=True)
class Examples:
    """n sequences to build from `UserEvents`, int64 [n] each: history rows and target rows, flat
    row numbers.
    """

    user: np.ndarray
    history_begin: np.ndarray
    history_end: np.ndarray
    target_begin: np.ndarray
    target_end: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, index: np.ndarray | slice) -> "Examples":
        return Examples(*(getattr(self, name)[index] for name in self.__slots__))

    @property
    def num_history(self) -> np.ndarray:
        return self.history_end - self.history_begin

    @property
    def num_tokens(self) -> np.ndarray:
        return self.num_history + (self.target_end - self.target_begin)


def user_events(sequences: pa.Table, cfg: RunConfig) -> UserEvents:
    """SEQUENCE rows as flat columns, with position, gap and request bounds of every row."""
    events = flat_events(sequences, cfg)
    rows = np.arange(events.offsets[-1])
    begin = np.repeat(events.offsets[:-1], events.lengths)
    request_begin = _first_of_run(arrow_lists.flat_column(sequences, "request_index"), begin, rows)
    time_begin = _first_of_run(events.event_time, begin, rows)
    return UserEvents(
        events=events,
        user_id=sequences["user_id"].to_numpy(),
        first_position=sequences["first_position"].to_numpy(),
        request_begin=request_begin,
        visible_end=time_begin[request_begin],
    )


def flat_events(sequences: pa.Table, cfg: RunConfig) -> Events:
    """SEQUENCE rows as flat columns, with position and gap of every row."""
    offsets = arrow_lists.list_offsets(sequences)
    lengths = np.diff(offsets)
    columns = {
        name: arrow_lists.flat_column(sequences, name)
        for name in ("item_id", "event_time", "order_only", "action_mask", "known_mask", "watch_ms")
    }
    first_position = sequences["first_position"].to_numpy()
    return Events(
        offsets=offsets,
        position=np.arange(offsets[-1]) + np.repeat(first_position - offsets[:-1], lengths),
        gap_ms=row_gaps(
            columns["event_time"], columns["order_only"], offsets, cfg.source.order_only_end_is_real
        ),
        request={
            n: arrow_lists.flat_column(sequences, n) for n in cfg.features.request if n != "hour"
        },
        **columns,
    )


def _first_of_run(values: np.ndarray, begin: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """For each row the first row of its run of equal values inside its user."""
    starts = (rows == begin) | (values != np.roll(values, 1))
    return np.maximum.accumulate(np.where(starts, rows, 0))


def request_examples(users: UserEvents, t_from: int, t_to: int) -> Examples:
    """One example per request with t_from <= its time < t_to (ms UTC); order_only rows are never
    candidates here.
    """
    events = users.events
    time = users.request_time
    rows = np.flatnonzero((time >= t_from) & (time < t_to) & ~events.order_only)
    first = rows[users.request_begin[rows] == rows]
    return _whole_requests(users, first)


def _whole_requests(users: UserEvents, first: np.ndarray) -> Examples:
    """The requests that begin at the rows `first`, each with its whole visible history."""
    user = users.row_user[first]
    starts = np.flatnonzero(users.request_begin == np.arange(len(users.request_begin)))
    stops = np.append(starts[1:], len(users.request_begin))
    return Examples(
        user=user,
        history_begin=users.events.offsets[user],
        history_end=users.visible_end[first],
        target_begin=first,
        target_end=stops[np.searchsorted(starts, first)],
    )


def training_examples(users: UserEvents, cfg: RunConfig, rng: np.random.Generator) -> Examples:
    """One epoch's examples of these users in the configured layout, stochastic length applied."""
    examples = whole_examples(users, cfg)
    return cut_histories(
        examples, stochastic_cuts(examples.num_history, cfg.train.stochastic_length, rng), cfg
    )


def whole_examples(users: UserEvents, cfg: RunConfig) -> Examples:
    """The training examples of these users in the configured layout, each with its whole history.

    The candidates are the rows of the training period, and the order_only rows where their labels
    weigh something.
    """
    events = users.events
    labelled = (
        np.ones_like(events.order_only)
        if cfg.train.history_label_weight > 0
        else ~events.order_only
    )
    training = (users.request_time < cfg.split.train_end_ms) & labelled
    if cfg.train.layout == "request":
        rows = np.flatnonzero(training)
        return _whole_requests(users, rows[users.request_begin[rows] == rows])
    return _passes(users, training, cfg.train.max_targets_per_sequence)


def cut_histories(examples: Examples, cut: np.ndarray, cfg: RunConfig) -> Examples:
    """The same, of the histories where `cut`, bool [n], is true only as much as stochastic length
    keeps.
    """
    begin = examples.history_end - cut_threshold(cfg.train.stochastic_length)
    if cfg.train.layout == "user":  # a pass keeps at least the rows that are its own targets
        begin = np.minimum(begin, examples.target_begin)
    return replace(
        examples,
        history_begin=np.where(
            cut, np.maximum(begin, examples.history_begin), examples.history_begin
        ),
    )


def _passes(users: UserEvents, training: np.ndarray, max_targets: int) -> Examples:
    """Each user's training rows, cut into passes of at most `max_targets` targets, the newest pass
    full.

    The rows of the training period are the oldest ones and order_only rows come before all others,
    so the targets of a user are one range of rows.
    """
    offsets = users.events.offsets
    before = np.concatenate([[0], np.cumsum(training)])
    num_targets = before[offsets[1:]] - before[offsets[:-1]]
    rows = np.flatnonzero(training)
    user = np.flatnonzero(num_targets)
    stop = rows[before[offsets[user + 1]] - 1] + 1
    start = rows[before[offsets[user]]]
    num_passes = -(-num_targets[user] // max_targets)
    passes, _ = ranges(np.zeros_like(num_passes), num_passes)
    target_end = np.repeat(stop, num_passes) - passes * max_targets
    return Examples(
        user=np.repeat(user, num_passes),
        history_begin=np.repeat(offsets[user], num_passes),
        history_end=users.visible_end[target_end - 1],
        target_begin=np.maximum(target_end - max_targets, np.repeat(start, num_passes)),
        target_end=target_end,
    )


def example_batch(
    users: UserEvents, examples: Examples, maps: FeatureMaps, cfg: RunConfig, *, training: bool
) -> SequenceBatch:
    """These examples as one batch; `training` adds what each target may see, and labels with their
    weights.
    """
    history = users.events.take(examples.history_begin, examples.history_end)
    rows, offsets = ranges(examples.target_begin, examples.target_end)
    lengths = np.diff(offsets)
    targets = target_events(users, rows, offsets, np.repeat(examples.user, lengths), cfg)
    first = users.events.offsets[examples.user]
    # counted over all that lies before a request, a history cut in training included
    if cfg.features.dense:
        is_whole = np.array_equal(first, examples.history_begin)
        seen = history if is_whole else users.events.take(first, examples.history_end)
        visible_rows = users.visible_end[rows] - np.repeat(first, lengths)
        targets = replace(targets, dense=candidate_features(seen, targets, visible_rows, maps, cfg))
    begin = np.repeat(examples.history_begin, lengths)
    visible = (
        np.clip(users.visible_end[rows] - begin, 0, None).astype(np.int32) if training else None
    )
    labels, weight = target_labels(users.events, rows, cfg) if training else (None, None)
    return collate(
        history,
        targets,
        users.user_id[examples.user],
        maps,
        cfg,
        target_visible=visible,
        labels=labels,
        label_weight=weight,
    )


def target_events(
    users: UserEvents, rows: np.ndarray, offsets: np.ndarray, user: np.ndarray, cfg: RunConfig
) -> Events:
    """The rows, of the users `user`, as candidates of their requests.

    Time, position and gap are the request's, actions are left out.
    """
    events = users.events
    first, visible_end = events.offsets[user], users.visible_end[rows]
    time = events.event_time[users.request_begin[rows]]
    gap = request_gaps(events, visible_end - 1, first, time, cfg.source.order_only_end_is_real)
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
        watch_ms=np.full(len(rows), -1),  # an outcome
        request={name: column[rows] for name, column in events.request.items()},
    )


def target_labels(
    events: Events, rows: np.ndarray, cfg: RunConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Labels and their loss weights, float32 [C, tasks]; weight 0 where the action of the row is
    unknown.
    """
    known, labels = np.split(
        label_counts(events.action_mask[rows], events.known_mask[rows], cfg), 2, axis=1
    )
    weight = np.where(events.order_only[rows, None], cfg.train.history_label_weight, 1.0)
    return labels.astype(np.float32), (known * weight).astype(np.float32)
