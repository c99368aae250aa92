"""What happened since the last publication: a history store that merges an event log with the
published rows.

    POST /v1/events → EventLog (durable before the answer) ─┐
    published sequences ────────────────────────────────────┴→ LiveHistory → SEQUENCE row → rank
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline.config import SequenceConfig
from pipeline.schema import WATCH_MS, Column, EventColumns
from serve_app.history.merging import merge_postings
from serve_app.history.posting import PostingRules
from serve_app.history.published import HistoryStore, sequence_row
from serve_app.ids import NO_REQUEST
from serve_app.schemas import (
    END_OF_TIME,
    Event,
    EventKey,
    EventsRequest,
    EventsResponse,
    EventStatus,
    Refusal,
)


class EventLog(Protocol):
    """Events by user, each (user_id, item_id, event_time) once; shared by all replicas.

    All methods raise `StoreDown`.
    """

    is_checked: bool  # False: it did not answer at the start, so nobody knows what it is

    def append(self, events: Sequence[Event]) -> list[EventStatus]:
        """Durable when it returns, all or none; postings of one event merge by `merge_postings`."""
        ...

    def of_user(self, user_id: int) -> list[Event]:
        """In any order."""
        ...

    def newest_of_user(
        self, user_id: int, before_ms: int, most: int, columns: EventColumns
    ) -> dict[str, np.ndarray]:
        """The newest `most` events earlier than `before_ms`, and all that have the time of the
        oldest of those, as `rows.event_columns`; empty for none.
        """
        ...

    def keys_of_user(self, user_id: int, before_ms: int = END_OF_TIME) -> list[EventKey]:
        """Time and item of every event earlier than `before_ms`, in any order."""
        ...

    def count_events(self, user_ids: Sequence[int]) -> list[int]:
        """How many events each of these users has."""
        ...

    def count_before(self, user_id: int, before_ms: int) -> int:
        """How many events of a user are earlier than `before_ms`."""
        ...

    def users(self) -> Iterable[int]:
        """All who have events, each once."""
        ...

    def remove(self, events: Sequence[Event]) -> int:
        """Take out those to which nothing was added since they were read; how many there were."""
        ...

    def forget(self, user_ids: Iterable[int]) -> int:
        """Take out all events of these users, from the files too; how many there were."""
        ...


class LiveHistory:
    """A `HistoryStore`: published rows and events since, as a rebuild of the sequences with those
    events would have it.

    What a publication contains is not doubled by the log: an event of a published row adds to it,
    unless `sequences.repeats` is `first`. Published rows come without their
    request_id, so an event that has one is taken for a request of its own.
    """

    def __init__(
        self,
        published: HistoryStore,
        log: EventLog,
        cfg: SequenceConfig,
        max_events: int,
        max_user_events: int = 10_000,
    ) -> None:
        self.published = published
        self.log = log
        self.max_events = max_events
        self.max_user_events = max_user_events
        self.digest = published.digest
        self.columns = published.columns
        self.max_rows = cfg.max_rows_per_user
        self.merges = cfg.repeats == "merge"
        self.last_outcome = cfg.repeated_outcomes == "last_file"  # posted events come last
        self.rules = PostingRules.of(cfg, self.columns)

    def sequence(self, user_id: int, before_ms: int = END_OF_TIME) -> pa.RecordBatch | None:
        """The user's SEQUENCE row; of the log it has the newest events before `before_ms`."""
        published = self.published.sequence(user_id)
        events = self.log.newest_of_user(user_id, before_ms, self.max_rows, self.columns)
        if not events:
            return published
        if published is None:
            published = sequence_row({}, self.columns)

        num_older = 0
        if len(events["event_time"]) >= self.max_rows:
            oldest_ms = int(events["event_time"].min())
            num_older = self._count_older(user_id, oldest_ms, published)
        if self.merges:
            published = add_to_published(published, events, self.columns, self.last_outcome)
        return merge_events(published, events, self.columns, self.max_rows, num_older)

    def _count_older(self, user_id: int, before_ms: int, published: pa.RecordBatch) -> int:
        """How many logged events lie before `before_ms` and are not among the published rows.

        Where the publication has cut rows off, an event older than what it kept may be one of them.
        """
        num_older = self.log.count_before(user_id, before_ms)
        times = _flat_values(published, "event_time")
        items = _flat_values(published, "item_id")
        if num_older == 0 or len(times) == 0:
            return num_older

        # later than all that is published are the most of those who have many: they are counted
        last_ms = int(times.max())
        keys = self.log.keys_of_user(user_id, min(before_ms, last_ms + 1))
        if not keys:
            return num_older
        is_cut = published["first_position"][0].as_py() > 0
        first = (int(times[0]), int(items[0])) if is_cut else (-1, -1)

        # only few have the time of a published row: the rest need no closer look
        logged_times, _ = zip(*keys, strict=True)
        doubtful = np.isin(np.array(logged_times), times)
        doubtful |= np.array(logged_times) <= first[0]

        known = set(zip(times.tolist(), items.tolist(), strict=True))
        num_there = 0
        for place in np.flatnonzero(doubtful).tolist():
            num_there += keys[place] in known or keys[place] <= first
        return num_older - num_there

    def append(self, events: Sequence[Event]) -> list[EventStatus]:
        """Status of each event; one that says no more than the published row is not logged."""
        statuses: list[EventStatus] = [self._compare_published(event) for event in events]
        new = [i for i, status in enumerate(statuses) if status in ("accepted", "merged")]

        over_quota = self._find_over_quota([events[i] for i in new])
        kept: list[int] = []
        for i, is_over in zip(new, over_quota, strict=True):
            if is_over:
                statuses[i] = "over_quota"
            else:
                kept.append(i)

        logged = self.log.append([events[i] for i in kept])
        for i, status in zip(kept, logged, strict=True):
            if status != "accepted":  # else new to the log, and perhaps no more than that
                statuses[i] = status
        return statuses

    def _find_over_quota(self, events: Sequence[Event]) -> list[bool]:
        """True for each event that its user has no room for.

        An event that is there already needs none. Two replicas that append for one user at once may
        exceed the quota by what one of them was sent.
        """
        num_posted = Counter(event.user_id for event in events)
        users = list(num_posted)
        num_kept = dict(zip(users, self.log.count_events(users), strict=True))

        # only of those who may run out of room it matters which events are there
        keys: dict[int, set[EventKey]] = {}
        for user in users:
            if num_kept[user] + num_posted[user] > self.max_user_events:
                keys[user] = set(self.log.keys_of_user(user))

        over = []
        for event in events:
            mine = keys.get(event.user_id)
            key = (event.event_time, event.item_id)
            is_over = mine is not None and key not in mine and len(mine) >= self.max_user_events
            if mine is not None and not is_over:
                mine.add(key)
            over.append(is_over)
        return over

    def append_all(self, requests: Sequence[EventsRequest]) -> list[EventsResponse | Refusal]:
        """The answers to requests that wait together, from one transaction; a refused one leaves
        nothing behind.
        """
        refusals = [self.find_refusal(request) for request in requests]
        events: list[Event] = []
        for request, refusal in zip(requests, refusals, strict=True):
            if refusal is None:
                events += request.events

        statuses = iter(self.append(events))
        answers: list[EventsResponse | Refusal] = []
        for request, refusal in zip(requests, refusals, strict=True):
            if refusal is None:
                answers.append(EventsResponse.of([next(statuses) for _ in request.events]))
            else:
                answers.append(refusal)
        return answers

    def _compare_published(self, event: Event) -> EventStatus:
        """The status that the event has by the published rows alone."""
        row = self.published.sequence(event.user_id)
        if row is None:
            return "accepted"
        same_time = _flat_values(row, "event_time") == event.event_time
        places = np.flatnonzero(same_time & (_flat_values(row, "item_id") == event.item_id))
        if len(places) == 0:
            return "accepted"
        if not self.merges:
            return "already_there"

        known = published_event(row, int(places[0]), event, self.columns)
        return compare_events(known, event, self.last_outcome)

    def find_refusal(self, request: EventsRequest) -> Refusal | None:
        """The first thing in events that the schema allows and the sequences have no place for."""
        if len(request.events) > self.max_events:
            rule = f"at most {self.max_events} events"
            return Refusal.of(["body", "events"], rule, len(request.events))

        now_ms = int(time.time() * 1000)
        for i, event in enumerate(request.events):
            refusal = self.rules.find_refusal(event, ["body", "events", i], now_ms)
            if refusal is not None:
                return refusal
        return None


def published_event(row: pa.RecordBatch, place: int, event: Event, columns: EventColumns) -> Event:
    """The published row at `place` of a user's SEQUENCE row, as a posting of `event`.

    Its request_id is not published: it is taken to be the event's.
    """
    value = {name: _flat_values(row, name)[place].item() for name in columns.sequence_lists()}
    actions = {}
    for bit, name in enumerate(columns.actions):
        if value["known_mask"] >> bit & 1:
            actions[name] = bool(value["action_mask"] >> bit & 1)

    features = {}
    for column in columns.request_columns:
        if not column.is_unknown(value[column.name]):
            features[column.name] = value[column.name]

    outcomes = {}
    for column in columns.outcomes:
        if not column.is_unknown(value[column.name]):
            outcomes[column.name] = value[column.name]
    watch_ms = outcomes.pop(WATCH_MS.name, None)

    known = {"actions": actions, "request_features": features, "outcomes": outcomes}
    return event.model_copy(update=known | {"watch_ms": watch_ms})


def compare_events(known: Event, event: Event, last_outcome: bool) -> EventStatus:
    """The status of an event of which so much is published."""
    merged = merge_postings(known, event)
    if merged is None:
        return "conflict"
    if last_outcome and not _says_outcomes(known, event):
        return "merged"
    return "already_there" if merged == known else "merged"


def _says_outcomes(known: Event, event: Event) -> bool:
    """True if the numbers of the event, where it has any, are those that are known."""
    if event.watch_ms not in (None, known.watch_ms):
        return False
    return all(known.outcomes.get(name) == value for name, value in event.outcomes.items())


def add_to_published(
    published: pa.RecordBatch,
    events: dict[str, np.ndarray],
    columns: EventColumns,
    last_outcome: bool,
) -> pa.RecordBatch:
    """One user's SEQUENCE row with what `events` add to the rows that it has, by the rule of
    `merge_postings`; `last_outcome`: a posted number takes the place of a published one.

        published   1 a click no, watch 900     event   1 a click yes, watch 700
        result      1 a click yes, watch 900
    """
    past = {name: _flat_values(published, name) for name in columns.sequence_lists()}
    place, event = _same_events(past, events)
    if len(place) == 0:
        return published

    def change(name: str, merge: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        values = past[name].copy()
        values[place] = merge(values[place], events[name][event])
        past[name] = values

    change("known_mask", np.bitwise_or)
    change("action_mask", np.bitwise_or)
    for column in columns.request_columns:
        change(column.name, lambda old, new, no=column.unknown: np.where(old == no, new, old))
    for column in columns.outcomes:
        if last_outcome:
            change(column.name, partial(_replace_known, column))
        else:
            change(column.name, np.fmax)  # an unknown one is NaN, or -1
    return sequence_row(past, columns, published["first_position"][0].as_py())


def _replace_known(column: Column, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    unknown = np.isnan(new) if column.is_float else new == column.unknown
    return np.where(unknown, old, new)


def _same_events(
    past: dict[str, np.ndarray], live: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The places in `past` and in `live` of the rows that have one time and item, pair by pair."""
    # few have a time in common
    times = np.intersect1d(past["event_time"], live["event_time"])
    places = {}
    for place in np.flatnonzero(np.isin(past["event_time"], times)).tolist():
        places[past["event_time"][place], past["item_id"][place]] = place

    found: list[int] = []
    events: list[int] = []
    for event in np.flatnonzero(np.isin(live["event_time"], times)).tolist():
        key = live["event_time"][event], live["item_id"][event]
        if key in places:
            found.append(places[key])
            events.append(event)
    return np.array(found, np.int64), np.array(events, np.int64)


def merge_events(
    published: pa.RecordBatch,
    events: dict[str, np.ndarray],
    columns: EventColumns,
    max_rows: int,
    num_older: int = 0,
) -> pa.RecordBatch:
    """One user's SEQUENCE row with `events` (`rows.event_columns`) in their places: the order,
    requests and cap of `build_bucket`.

    Published rows keep their order among themselves, which a tie_breaker may have decided. Where
    the publication has cut older rows off, an event older than what it kept is left out: it may be
    one of them. `num_older` events that are older than `events` are counted and not there.

        published   10 20 30 40        events 25 50        max_rows = 5
        head, tail  10 20 | 30 40      nothing changes before the first event
        merged      10 20 25 30 40 50  the oldest is dropped and counted
    """
    past = {name: _flat_values(published, name) for name in columns.sequence_lists()}
    num_events = len(events["item_id"])
    live = events | {"order_only": np.zeros(num_events, bool)}
    live["request_index"] = np.zeros(num_events, np.int64)  # numbered anew below

    # only what follows the first event is merged
    split = int(np.searchsorted(past["event_time"], live["event_time"].min()))
    tail = {name: values[split:] for name, values in past.items()}
    first_position = published["first_position"][0].as_py()
    order, request = _merged_order(tail, live, cut=first_position > 0 and split == 0)

    # the newest rows of head and merged tail
    dropped = max(0, split + len(order) - max_rows)
    flat = {}
    for name, values in past.items():
        merged = np.concatenate([tail[name], live[name]])[order]
        if name == "request_index":
            merged = np.cumsum(np.diff(request, prepend=request[:1]) != 0)
            merged += values[split - 1] + 1 if split else 0
        flat[name] = np.concatenate([values[:split], merged])[dropped:]
    flat["request_index"] -= flat["request_index"][:1].copy()
    return sequence_row(flat, columns, first_position + dropped + num_older)


def _merged_order(
    past: dict[str, np.ndarray], live: dict[str, np.ndarray], *, cut: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of past + live in their order, and for each the number of its request.

    `cut`: rows older than `past` exist but are not there. Live rows go by time and item; a
    published row goes behind the published rows before it, whatever its item.

        row          p0    p1    p2    l0    l1    l2
        time, item   1 a   1 d   1 c   1 b   1 d   2 a
        key          0     3     3     1     -     6       l1 is p1 once more
        order        p0 l0 p1 p2 l2

    A request that has rows in several places comes together in the place of its first row.
    """
    num_past = len(past["item_id"])
    time = np.concatenate([past["event_time"], live["event_time"]])
    item = np.concatenate([past["item_id"], live["item_id"]])

    # one number per row that compares by time, then item
    _, time_rank = np.unique(time, return_inverse=True)
    _, item_rank = np.unique(item, return_inverse=True)
    key = time_rank * len(item) + item_rank

    # live rows that are published already, or may have been cut off
    kept = ~np.isin(key, key[:num_past])
    if cut and num_past:
        kept &= key > key[0]
    kept[:num_past] = True

    # published rows never change places with one another
    key[:num_past] = np.maximum.accumulate(key[:num_past])
    order = np.argsort(key, kind="stable")
    order = order[kept[order]]

    # requests together, in the place of their first rows
    request = _number_requests(past, live)[order]
    _, first, label = np.unique(request, return_index=True, return_inverse=True)
    together = np.argsort(first[label], kind="stable")
    return order[together], request[together]


def _number_requests(past: dict[str, np.ndarray], live: dict[str, np.ndarray]) -> np.ndarray:
    """A number per row that rows of one request share: published rows, then live ones.

    A live row without a request_id joins the published request of its time.

        published   time 1 1 2   request_index 0 0 1
        live        time 2 2 3   request_id    - 7 -
        numbers          0 0 1                 1 2 4     3 is what the first would have been alone
    """
    time, request_id = live["event_time"], live["request_id"]
    numbers = past["request_index"].astype(np.int64)

    # live requests by themselves, numbered behind the published ones
    own = _number_pairs(time, request_id) + numbers.max(initial=-1) + 1

    # those that join the last published row of their time
    if len(numbers):
        before = np.searchsorted(past["event_time"], time, side="right") - 1
        same_time = (before >= 0) & (past["event_time"][before] == time)
        joins = same_time & (request_id == NO_REQUEST)
        own = np.where(joins, numbers[before], own)
    return np.concatenate([numbers, own])


def _number_pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """A number per pair, from 0 on in the order of the pairs; equal ones share it.

    `np.unique` of both rows would sort them as objects of two fields, which lets no other thread
    run meanwhile.

        first    5 5 4 5        second   1 0 9 1
        number   2 1 0 2
    """
    order = np.lexsort((second, first))
    is_other = np.zeros(len(order), bool)
    is_other[1:] = (np.diff(first[order]) != 0) | (np.diff(second[order]) != 0)
    numbers = np.empty(len(order), np.int64)
    numbers[order] = np.cumsum(is_other)
    return numbers


def _flat_values(row: pa.RecordBatch, name: str) -> np.ndarray:
    return row[name].flatten().to_numpy(zero_copy_only=False)
