"""What happened since the last publication: an event log, and a history store that merges it with
the published rows.

POST /v1/events → EventLog (durable before the answer) ─┐
published sequences ────────────────────────────────────┴→ LiveHistory → SEQUENCE row → the next
rank
"""

import fcntl
import json
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline import config
from pipeline.config import RunConfig
from pipeline.schema import DAY_MS
from serve_app.history.published import HistoryStore, sequence_row
from serve_app.schemas import Event, EventsRequest, EventsResponse, EventStatus, Refusal, StoreDown

BUSY_TIMEOUT_S = 30.0  # for a writer's turn; a commit takes one fsync
# rows of one time without a request_id are one request, as in the builder
NO_REQUEST = np.iinfo(np.int64).max
TABLE = """
CREATE TABLE IF NOT EXISTS event (
    user_id INTEGER NOT NULL, event_time INTEGER NOT NULL, item_id INTEGER NOT NULL, request_id INTEGER,
    watch_ms INTEGER, actions TEXT NOT NULL, request_features TEXT NOT NULL,
    PRIMARY KEY (user_id, event_time, item_id)
) WITHOUT ROWID
"""


class EventLog(Protocol):
    """Events by user, each (user_id, item_id, event_time) once; shared by all replicas.

    Both methods raise `StoreDown`.
    """

    def append(self, events: Sequence[Event]) -> list[EventStatus]:
        """Durable when it returns, all or none."""
        ...

    def of_user(self, user_id: int) -> list[Event]:
        """In any order."""
        ...

    def users(self) -> Iterable[int]:
        """All who have events, each once."""
        ...

    def remove(self, events: Sequence[Event]) -> int:
        """Take these out; how many there were."""
        ...

    def forget(self, user_ids: Iterable[int]) -> int:
        """Take out all events of these users, from the files too; how many there were."""
        ...


class SqliteEvents:
    """An `EventLog` in one file, for the processes of one machine: write-ahead log, synced at every
    commit.

    SQLite's write-ahead log needs shared memory: on a network file system two machines would
    destroy the file.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            # the switch to the write-ahead log does not wait for others
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._writer = _connect(path)
            self._writer.execute(TABLE)
        self._reader = _connect(path)  # of its own: a rank does not wait for a commit
        self._write_lock, self._read_lock = threading.Lock(), threading.Lock()

    def append(self, events: Sequence[Event]) -> list[EventStatus]:
        with self._write_lock, _store_errors():
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                statuses: list[EventStatus] = [self._insert(event) for event in events]
                self._writer.execute("COMMIT")
            except BaseException:
                # SQLite has rolled back by itself when the disk is full
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise
        return statuses

    def of_user(self, user_id: int) -> list[Event]:
        with self._read_lock, _store_errors():
            rows = self._reader.execute(
                "SELECT * FROM event WHERE user_id = ?", (user_id,)
            ).fetchall()
        return [_event(row) for row in rows]

    def users(self) -> list[int]:
        with self._read_lock, _store_errors():
            return [
                user
                for (user,) in self._reader.execute(
                    "SELECT DISTINCT user_id FROM event ORDER BY user_id"
                )
            ]

    def remove(self, events: Sequence[Event]) -> int:
        keys = [(event.user_id, event.event_time, event.item_id) for event in events]
        key = "DELETE FROM event WHERE user_id = ? AND event_time = ? AND item_id = ?"
        # each by itself: what is gone already need not be put back
        with self._write_lock, _store_errors():
            return sum(self._writer.execute(key, values).rowcount for values in keys)

    def forget(self, user_ids: Iterable[int]) -> int:
        with self._write_lock, _store_errors():
            # overwritten, where it would only be marked as free
            self._writer.execute("PRAGMA secure_delete = ON")
            of_user = "DELETE FROM event WHERE user_id = ?"
            removed = sum(self._writer.execute(of_user, (user,)).rowcount for user in user_ids)
            self._writer.execute("PRAGMA secure_delete = OFF")
            # The write-ahead log has older pages: empty it, waiting for readers as long as for
            # other writers.
            busy, _, _ = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreDown(
                "the write-ahead log is in use and could not be emptied: forget the users again"
            )
        return removed

    def _insert(self, event: Event) -> EventStatus:
        row = _row(event)
        done = self._writer.execute(
            "INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO NOTHING", row
        )
        if done.rowcount == 1:
            return "accepted"
        key = "SELECT * FROM event WHERE user_id = ? AND event_time = ? AND item_id = ?"
        return (
            "already_there" if self._writer.execute(key, row[:3]).fetchone() == row else "conflict"
        )


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except sqlite3.OperationalError as error:  # locked for too long, disk full, file gone
        raise StoreDown(str(error)) from error


def _connect(path: Path) -> sqlite3.Connection:
    # isolation_level None: transactions are begun here, not by the module; the locks keep threads
    # apart
    connection = sqlite3.connect(
        path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
    )
    connection.execute("PRAGMA journal_mode = WAL")
    connection.execute("PRAGMA synchronous = FULL")
    return connection


def _row(event: Event) -> tuple[int, int, int, int | None, int | None, str, str]:
    return (
        event.user_id,
        event.event_time,
        event.item_id,
        event.request_id,
        event.watch_ms,
        json.dumps(event.actions, sort_keys=True),  # by name: the next model may have other actions
        json.dumps(event.request_features, sort_keys=True),
    )


def _event(row: tuple) -> Event:
    user_id, event_time, item_id, request_id, watch_ms, actions, features = row
    return Event.model_construct(
        user_id=user_id,
        item_id=item_id,
        event_time=event_time,
        actions=json.loads(actions),
        request_features=json.loads(features),
        request_id=request_id,
        watch_ms=watch_ms,
    )


class LiveHistory:
    """A `HistoryStore`: published rows and events since, as a rebuild of the sequences with those
    events would have it.

    What a publication contains is not doubled by the log. Published rows come without their
    request_id, so an event that has one is taken for a request of its own.
    """

    def __init__(
        self, published: HistoryStore, log: EventLog, cfg: RunConfig, max_events: int
    ) -> None:
        self.published, self.log, self.cfg, self.max_events = published, log, cfg, max_events
        self.digest, self.request_columns = published.digest, published.request_columns
        self.earliest_ms = config.parse_time("sequences.earliest_time", cfg.sequences.earliest_time)

    def sequence(self, user_id: int) -> pa.RecordBatch | None:
        published, events = self.published.sequence(user_id), self.log.of_user(user_id)
        if not events:
            return published
        if published is None:
            published = sequence_row({}, self.request_columns)
        return merged(published, events, self.cfg, self.request_columns)

    def append(self, events: Sequence[Event]) -> list[EventStatus]:
        """What became of each; an event that is published already is not logged."""
        new = [not self._is_published(event) for event in events]
        logged = iter(
            self.log.append([event for event, fresh in zip(events, new, strict=True) if fresh])
        )
        return [next(logged) if fresh else "already_there" for fresh in new]

    def append_all(self, requests: Sequence[EventsRequest]) -> list[EventsResponse | Refusal]:
        """The answers to requests that wait together, from one transaction; a refused one leaves
        nothing behind.
        """
        refusals = [self.refusal(request) for request in requests]
        accepted = [r for r, refusal in zip(requests, refusals, strict=True) if refusal is None]
        statuses = iter(self.append([event for request in accepted for event in request.events]))
        return [
            refusal or EventsResponse.of([next(statuses) for _ in request.events])
            for request, refusal in zip(requests, refusals, strict=True)
        ]

    def _is_published(self, event: Event) -> bool:
        row = self.published.sequence(event.user_id)
        if row is None:
            return False
        at = _flat(row, "event_time") == event.event_time
        return bool((_flat(row, "item_id")[at] == event.item_id).any())

    def refusal(self, request: EventsRequest) -> Refusal | None:
        """What the sequences have no place for in events that the schema allows, if anything."""
        if len(request.events) > self.max_events:
            return Refusal.of(
                ["body", "events"], f"at most {self.max_events} events", len(request.events)
            )
        latest = int(time.time() * 1000) + DAY_MS
        actions = self.cfg.source.actions
        for i, event in enumerate(request.events):
            if not self.earliest_ms <= event.event_time <= latest:
                rule = f"in ms since 1970, between {self.earliest_ms} and a day from now ({latest})"
                return Refusal.of(["body", "events", i, "event_time"], rule, event.event_time)
            for name in event.actions:
                if name not in actions:
                    return Refusal.of(
                        ["body", "events", i, "actions"], f"one of {list(actions)}", name
                    )
            for name in event.request_features:
                if name not in self.request_columns:
                    rule = f"one of {list(self.request_columns)}"
                    return Refusal.of(["body", "events", i, "request_features"], rule, name)
        return None


def merged(
    published: pa.RecordBatch,
    events: Sequence[Event],
    cfg: RunConfig,
    request_columns: Sequence[str],
) -> pa.RecordBatch:
    """One user's SEQUENCE row with `events` in their places: the order, requests and cap of
    `build_bucket`.

    Published rows keep their order among themselves, which a tie_breaker may have decided. Where
    the publication has cut older rows off, an event older than what it kept is left out: it may be
    one of them.
    """
    past = {name: _flat(published, name) for name in _columns(request_columns)}
    live = _live_columns(events, cfg, request_columns)
    # nothing changes before
    split = int(np.searchsorted(past["event_time"], live["event_time"].min()))
    head, tail = (
        {name: values[part] for name, values in past.items()}
        for part in (slice(split), slice(split, None))
    )
    first_position = published["first_position"][0].as_py()
    order, request = _order(tail, live, cut=first_position > 0 and split == 0)
    merge = {name: np.concatenate([tail[name], live[name]])[order] for name in past}
    merge["request_index"] = np.cumsum(np.diff(request, prepend=request[:1]) != 0)
    merge["request_index"] += head["request_index"][-1] + 1 if split else 0
    dropped = max(0, split + len(order) - cfg.sequences.max_rows_per_user)
    columns = {name: np.concatenate([head[name], merge[name]])[dropped:] for name in past}
    columns["request_index"] -= columns["request_index"][:1].copy()
    return sequence_row(columns, request_columns, first_position + dropped)


def _order(
    past: dict[str, np.ndarray], live: dict[str, np.ndarray], *, cut: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of past + live come in which order, and for each the number of its request.

    `cut`: rows older than `past` exist but are not there.
    """
    num_past = len(past["item_id"])
    time, item = (np.concatenate([past[name], live[name]]) for name in ("event_time", "item_id"))
    _, time_rank = np.unique(time, return_inverse=True)
    _, item_rank = np.unique(item, return_inverse=True)
    key = time_rank * len(item) + item_rank  # by time, then item
    kept = ~np.isin(key, key[:num_past])
    if cut and num_past:
        kept &= key > key[0]
    kept[:num_past] = True
    key[:num_past] = np.maximum.accumulate(key[:num_past])
    order = np.argsort(key, kind="stable")
    order = order[kept[order]]
    request = _requests(past, live)[order]
    _, first, label = np.unique(request, return_index=True, return_inverse=True)
    # a request stays together, in the place of its first row
    together = np.argsort(first[label], kind="stable")
    return order[together], request[together]


def _requests(past: dict[str, np.ndarray], live: dict[str, np.ndarray]) -> np.ndarray:
    """A number per row that rows of one request share: published rows, then events."""
    time, request_id = live["event_time"], live["request_id"]
    _, own = np.unique(np.stack([time, request_id]), axis=1, return_inverse=True)
    numbers = past["request_index"].astype(np.int64)
    own = own.reshape(-1) + numbers.max(initial=-1) + 1
    before = np.searchsorted(past["event_time"], time, side="right") - 1
    if len(numbers):
        joins = (before >= 0) & (past["event_time"][before] == time) & (request_id == NO_REQUEST)
        own = np.where(joins, numbers[before], own)
    return np.concatenate([numbers, own])


def _columns(request_columns: Sequence[str]) -> list[str]:
    names = (
        "item_id",
        "event_time",
        "action_mask",
        "known_mask",
        "watch_ms",
        "request_index",
        "order_only",
    )
    return [*names, *request_columns]


def _live_columns(
    events: Sequence[Event], cfg: RunConfig, request_columns: Sequence[str]
) -> dict[str, np.ndarray]:
    """Events as SEQUENCE's columns, and their request_id.

    An action that this model does not know is left out.
    """
    bits = {name: 1 << bit for bit, name in enumerate(cfg.source.actions)}
    columns = {
        "item_id": [event.item_id for event in events],
        "event_time": [event.event_time for event in events],
        "action_mask": [
            sum(bits.get(name, 0) for name, did in event.actions.items() if did) for event in events
        ],
        "known_mask": [sum(bits.get(name, 0) for name in event.actions) for event in events],
        "watch_ms": [-1 if event.watch_ms is None else event.watch_ms for event in events],
        "request_id": [
            NO_REQUEST if event.request_id is None else event.request_id for event in events
        ],
        "request_index": [0] * len(events),  # numbered anew after the merge
    }
    columns |= {
        name: [event.request_features.get(name, -1) for event in events] for name in request_columns
    }
    arrays = {name: np.array(values, np.int64) for name, values in columns.items()}
    return arrays | {"order_only": np.zeros(len(events), bool)}


def _flat(row: pa.RecordBatch, name: str) -> np.ndarray:
    return row[name].flatten().to_numpy(zero_copy_only=False)
