"""Examples: which rows of a user are history, and which are candidates; `example_batches.py` makes
batches of them.

An example is (user, request): history is every row of the user strictly earlier than the request,
candidates are the request's rows. Two layouts hold the same examples: one sequence per request
(evaluation, serving), and passes over one user's rows in which every row is also a candidate that
sees only what lay before its request (training).
"""

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.batches.events import Events, UserEvents, offsets_of, ranges, row_gaps
from pipeline.batches.stochastic_length import cut_threshold, stochastic_cuts, weighted_rows
from pipeline.config import FeatureConfig, SourceConfig, SplitConfig, TrainConfig
from pipeline.sequences import arrow_lists


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


def user_events(sequences: pa.Table, source: SourceConfig, features: FeatureConfig) -> UserEvents:
    """SEQUENCE rows as flat columns, with position, gap and request bounds of every row."""
    events = flat_events(sequences, source, features)
    rows = np.arange(events.offsets[-1])
    begin = np.repeat(events.offsets[:-1], events.lengths)

    request_index = arrow_lists.flat_column(sequences, "request_index")
    request_begin = _first_of_run(request_index, begin, rows)
    time_begin = _first_of_run(events.event_time, begin, rows)
    return UserEvents(
        events=events,
        user_id=sequences["user_id"].to_numpy(),
        first_position=sequences["first_position"].to_numpy(),
        request_begin=request_begin,
        visible_end=time_begin[request_begin],
    )


def flat_events(sequences: pa.Table, source: SourceConfig, features: FeatureConfig) -> Events:
    """SEQUENCE rows as flat columns, with position and gap of every row.

    Of the request columns and the outcomes those that `features` name.
    """
    offsets = arrow_lists.list_offsets(sequences)
    lengths = np.diff(offsets)
    first_position = sequences["first_position"].to_numpy()

    def read(*names: str) -> dict[str, np.ndarray]:
        return {name: arrow_lists.flat_column(sequences, name) for name in names}

    columns = read("item_id", "event_time", "order_only", "action_mask", "known_mask")
    stored = [name for name in features.request if name != "hour"]
    gap_ms = row_gaps(
        columns["event_time"], columns["order_only"], offsets, source.order_only_end_is_real
    )
    return Events(
        offsets=offsets,
        position=np.arange(offsets[-1]) + np.repeat(first_position - offsets[:-1], lengths),
        gap_ms=gap_ms,
        request=read(*stored),
        outcomes=read(*features.outcomes),
        **columns,
    )


def _first_of_run(values: np.ndarray, begin: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """For each row the first row of its run of equal values inside its user.

    rows     0 1 2 3 4        begin = 0 0 0 3 3
    values   5 5 6 6 6
    first    0 0 2 3 3
    """
    starts = (rows == begin) | (values != np.roll(values, 1))
    return np.maximum.accumulate(np.where(starts, rows, 0))


def request_examples(
    users: UserEvents, t_from: int, t_to: int, max_history: int | None = None
) -> Examples:
    """One example per request with t_from <= its time < t_to (ms UTC), with the newest
    `max_history` rows before it; order_only rows are never candidates here.
    """
    events = users.events
    time = users.request_time
    rows = np.flatnonzero((time >= t_from) & (time < t_to) & ~events.order_only)
    first = rows[users.request_begin[rows] == rows]
    return newest_history(users, _whole_requests(users, first), max_history)


def newest_history(users: UserEvents, examples: Examples, max_history: int | None) -> Examples:
    """The same with the newest `max_history` rows that the first target of each sees, and what lies
    between that target and the last; None: all rows.

        rows of a user      0 1 2 3 4 5 6 7      max_history = 2
        targets of a pass             5 6 7
        history begins at         3
    """
    if max_history is None:
        return examples
    newest = users.visible_end[examples.target_begin] - max_history
    return replace(examples, history_begin=np.maximum(examples.history_begin, newest))


def request_passes(users: UserEvents, t_from: int, t_to: int, max_targets: int) -> Examples:
    """The candidates of `request_examples` with all requests of a user in one sequence, or in
    several of at most `max_targets` candidates.

    Its history is what the last of them sees; `example_batch(shared=True)` says how much each does.
    """
    time = users.request_time
    inside = (time >= t_from) & (time < t_to) & ~users.events.order_only
    return _cut_passes(users, inside, max_targets)


def _whole_requests(users: UserEvents, first: np.ndarray) -> Examples:
    """The requests that begin at the rows `first`, each with its whole visible history.

    rows            0 1 2 3 4          request_begin = 0 1 1 3 3
    starts, stops   0..1  1..3  3..5
    first           1 3                targets 1..3 and 3..5
    """
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


def training_examples(
    users: UserEvents, split: SplitConfig, train: TrainConfig, rng: np.random.Generator
) -> Examples:
    """One epoch's examples of these users in the configured layout, stochastic length applied."""
    examples = whole_examples(users, split, train)
    cut = stochastic_cuts(examples.num_history, train.stochastic_length, rng)
    return cut_histories(users, examples, cut, train)


def whole_examples(
    users: UserEvents, split: SplitConfig, train: TrainConfig, max_history: int | None = None
) -> Examples:
    """The training examples of these users in the configured layout, each with its newest
    `max_history` rows; None: its whole history.

    The candidates are the rows of the training period, and the order_only rows where their labels
    weigh something. With `train.targets_since` those before it make examples of their own, of
    which a share is taken.
    """
    training = users.request_time < split.train_end_ms
    if train.history_label_weight == 0:
        training &= ~users.events.order_only
    if train.since_ms is None:
        return newest_history(users, _cut_examples(users, training, train), max_history)

    recent = (users.request_time >= train.since_ms) & ~users.events.order_only
    older = _cut_examples(users, training & ~recent, train)
    older = older[_is_replayed(users, older, train.since_ms, train.replay_share)]
    joined = _joined(older, _cut_examples(users, training & recent, train))
    return newest_history(users, joined, max_history)


def _is_replayed(users: UserEvents, examples: Examples, since_ms: int, share: float) -> np.ndarray:
    """bool [n], true for about a `share` of the examples: others for each `since_ms`, the same
    ones however often they are asked for.
    """
    place = examples.target_begin - users.events.offsets[examples.user]
    place += users.first_position[examples.user]
    # splitmix64's last steps over user, place and time
    key = users.user_id[examples.user].astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    key ^= place.astype(np.uint64) * np.uint64(0xD6E8FEB86659FD93) + np.uint64(since_ms)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        key = (key ^ (key >> np.uint64(shift))) * np.uint64(factor)
    return (key ^ (key >> np.uint64(31))) < np.uint64(min(share * 2.0**64, 2.0**64 - 2**11))


def _joined(first: Examples, second: Examples) -> Examples:
    columns = []
    for name in Examples.__slots__:
        columns.append(np.concatenate([getattr(first, name), getattr(second, name)]))
    return Examples(*columns)


def _cut_examples(users: UserEvents, training: np.ndarray, train: TrainConfig) -> Examples:
    """Examples of the rows where `training`, bool [N], in the configured layout."""
    if train.layout == "request":
        rows = np.flatnonzero(training)
        return _whole_requests(users, rows[users.request_begin[rows] == rows])
    return _cut_passes(users, training, train.max_targets_per_sequence)


def cut_histories(
    users: UserEvents, examples: Examples, cut: np.ndarray, train: TrainConfig
) -> Examples:
    """The same, of the histories where `cut`, bool [n], is true only as much as stochastic length
    keeps, counted from what the first target sees.

        rows of a user      0 1 2 3 4 5 6 7 8      3 kept, targets 6 7 8
        first target sees   0 1 2 3 4 5
        history kept              3 4 5 6 7
    """
    begin = shared_end(users, examples) - cut_threshold(train.stochastic_length)
    newest = np.maximum(begin, examples.history_begin)
    return replace(examples, history_begin=np.where(cut, newest, examples.history_begin))


@dataclass(frozen=True, slots=True)
class KeptRows:
    """Which history rows of some examples are left, and how many there are before each."""

    kept: np.ndarray  # bool [N]
    begin: np.ndarray  # int64 [n], where each example's rows begin among the N
    before: np.ndarray  # int64 [N + 1]

    def count(self, example: np.ndarray, visible: np.ndarray) -> np.ndarray:
        """int32 [C]: how many of the first `visible` rows of its example each candidate still
        sees.

        kept       1 0 1 1      visible    1 2 3 4
                                left       1 1 2 3
        """
        begin = self.begin[example]
        return (self.before[begin + visible] - self.before[begin]).astype(np.int32)


def keep_weighted(
    users: UserEvents, examples: Examples, cut: np.ndarray, num_kept: int, seed: tuple[int, ...]
) -> KeptRows:
    """`num_kept` drawn rows of the whole histories where `cut`, bool [n], is true, of those that
    the first target sees; what lies between it and the last one stays.

    `seed` is of the run and the epoch: the draw is that of an example, whatever rank takes it.
    """
    begin = offsets_of(examples.num_history)
    kept = np.ones(begin[-1], bool)
    num_shared = np.maximum(shared_end(users, examples) - examples.history_begin, 0)

    for i in np.flatnonzero(cut & (num_shared > num_kept)):
        first, target = examples.history_begin[i], examples.target_begin[i]
        user_id = int(users.user_id[examples.user[i]])
        position = int(users.events.position[target])
        rng = np.random.default_rng([*seed, user_id, position])

        time = users.events.event_time[first : first + num_shared[i]]
        kept[begin[i] : begin[i] + num_shared[i]] = weighted_rows(time, num_kept, rng)
    return KeptRows(kept, begin[:-1], offsets_of(kept))


def shared_end(users: UserEvents, examples: Examples) -> np.ndarray:
    """int64 [n]: the end of the history rows that every target of an example sees, and its first
    one no more.
    """
    if len(users.visible_end) == 0:
        return examples.history_end
    first = np.minimum(examples.target_begin, len(users.visible_end) - 1)
    has_targets = examples.target_end > examples.target_begin
    end = np.where(has_targets, users.visible_end[first], examples.history_end)
    return np.minimum(end, examples.history_end)


def _cut_passes(users: UserEvents, training: np.ndarray, max_targets: int) -> Examples:
    """Each user's training rows, cut into passes of at most `max_targets` targets; the newest pass
    is full.

        rows of a user      0 1 2 3 4 5 6 7      max_targets = 3
        training            x x x x x x x .
        passes, in order    [4 5 6] [1 2 3] [0]

    The rows of a period follow each other and order_only rows come before all others, so the
    targets of a user are one range of rows.
    """
    offsets = users.events.offsets
    before = offsets_of(training)  # training rows before each row

    # the users who have targets, and where theirs lie
    num_targets = before[offsets[1:]] - before[offsets[:-1]]
    user = np.flatnonzero(num_targets)
    rows = np.flatnonzero(training)
    start = rows[before[offsets[user]]]
    stop = rows[before[offsets[user + 1]] - 1] + 1

    # pass 0 of a user is the newest
    num_passes = -(-num_targets[user] // max_targets)
    number, _ = ranges(np.zeros_like(num_passes), num_passes)
    target_end = np.repeat(stop, num_passes) - number * max_targets

    return Examples(
        user=np.repeat(user, num_passes),
        history_begin=np.repeat(offsets[user], num_passes),
        history_end=users.visible_end[target_end - 1],
        target_begin=np.maximum(target_end - max_targets, np.repeat(start, num_passes)),
        target_end=target_end,
    )
