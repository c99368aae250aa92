"""Live events in an SQLite file, for the processes of one machine."""

import fcntl
import json
import queue
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from pipeline.files import make_private_file
from pipeline.schema import EventColumns
from serve_app.history.merging import merge_postings
from serve_app.history.rows import logged_columns
from serve_app.ids import id_text, read_id, read_request_id, request_text
from serve_app.schemas import END_OF_TIME, Event, EventKey, EventStatus, StoreDown

BUSY_TIMEOUT_S = 30.0  # for a writer's turn; a commit takes one fsync
# A user with many events is read in parts, with a pause after each: Python runs one thread at a
# time, and would give the others little of it until the last row.
ROWS_TOGETHER, PAUSE_S = 256, 0.0005
TABLE = """
CREATE TABLE IF NOT EXISTS event (
    user_id INTEGER NOT NULL,
    event_time INTEGER NOT NULL,
    item_id INTEGER NOT NULL,
    request_id INTEGER,
    watch_ms INTEGER,
    actions TEXT NOT NULL,
    request_features TEXT NOT NULL,
    outcomes TEXT NOT NULL DEFAULT '{}',
    user_text TEXT,
    item_text TEXT,
    request_text TEXT,
    PRIMARY KEY (user_id, event_time, item_id)
) WITHOUT ROWID
"""
# what a file of an earlier version may lack
ADDED = {
    "outcomes": "TEXT NOT NULL DEFAULT '{}'",
    # of ids that are text, whose codes the integers are
    "user_text": "TEXT",
    "item_text": "TEXT",
    "request_text": "TEXT",
}
LOGGED_ROW = "event_time, item_id, request_id, watch_ms, actions, request_features, outcomes"
COLUMNS = f"user_id, {LOGGED_ROW}, user_text, item_text, request_text"
KEY = "user_id = ? AND event_time = ? AND item_id = ?"  # as a row begins


class SqliteEvents:
    """An `EventLog` in one file: write-ahead log, synced at every commit.

    SQLite's write-ahead log needs shared memory: on a network file system two machines would
    destroy the file. A file of an earlier version is migrated in place, its events stay.
    """

    is_checked = True  # it was opened

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            # the switch to the write-ahead log does not wait for others
            fcntl.flock(lock, fcntl.LOCK_EX)
            make_private_file(path)  # the write-ahead log gets its mode
            self._writer = _connect(path)
            _prepare_table(self._writer)

        self._write_lock = threading.Lock()
        # Connections of their own: a look-up waits neither for a commit nor for another look-up.
        self._path = path
        self._idle_readers: queue.SimpleQueue[sqlite3.Connection] = queue.SimpleQueue()

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
        rows = self._read(f"SELECT {COLUMNS} FROM event WHERE user_id = ?", user_id)
        return [_from_row(row) for row in rows]

    def newest_of_user(
        self, user_id: int, before_ms: int, most: int, columns: EventColumns
    ) -> dict[str, np.ndarray]:
        # both queries are ranges of the primary key
        oldest = (
            "SELECT event_time FROM event WHERE user_id = ? AND event_time < ? "
            "ORDER BY event_time DESC LIMIT 1 OFFSET ?"
        )
        found = self._read(oldest, user_id, before_ms, most - 1)
        since_ms = found[0][0] if found else 0

        newest = (
            f"SELECT {LOGGED_ROW} FROM event "
            "WHERE user_id = ? AND event_time >= ? AND event_time < ?"
        )
        parts: list[dict[str, np.ndarray]] = []
        with self._reader() as connection:
            found_rows = connection.execute(newest, (user_id, since_ms, before_ms))
            while rows := found_rows.fetchmany(ROWS_TOGETHER):
                parts.append(logged_columns(rows, columns))
                if len(rows) == ROWS_TOGETHER:
                    time.sleep(PAUSE_S)
        if not parts:
            return {}
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def keys_of_user(self, user_id: int, before_ms: int = END_OF_TIME) -> list[EventKey]:
        query = "SELECT event_time, item_id FROM event WHERE user_id = ? AND event_time < ?"
        return self._read(query, user_id, before_ms)

    def count_events(self, user_ids: Sequence[int]) -> list[int]:
        query = "SELECT COUNT(*) FROM event WHERE user_id = ?"
        return [self._read(query, user)[0][0] for user in user_ids]

    def count_before(self, user_id: int, before_ms: int) -> int:
        query = "SELECT COUNT(*) FROM event WHERE user_id = ? AND event_time < ?"
        return self._read(query, user_id, before_ms)[0][0]

    def users(self) -> list[int]:
        return [user for (user,) in self._read("SELECT DISTINCT user_id FROM event ORDER BY 1")]

    def remove(self, events: Sequence[Event]) -> int:
        removed = 0
        places = ", ".join("?" * len(COLUMNS.split(", ")))
        # each by itself: what is gone already need not be put back
        with self._write_lock, _store_errors():
            for event in events:
                delete = f"DELETE FROM event WHERE ({COLUMNS}) IS ({places})"
                removed += self._writer.execute(delete, _to_row(event)).rowcount
        return removed

    def forget(self, user_ids: Iterable[int]) -> int:
        removed = 0
        with self._write_lock, _store_errors():
            # overwritten, where it would only be marked as free
            self._writer.execute("PRAGMA secure_delete = ON")
            for user in user_ids:
                done = self._writer.execute("DELETE FROM event WHERE user_id = ?", (user,))
                removed += done.rowcount
            self._writer.execute("PRAGMA secure_delete = OFF")

            # The write-ahead log has older pages: empty it, waiting for readers as long as for
            # other writers.
            busy, _, _ = self._writer.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        if busy:
            raise StoreDown(
                "the write-ahead log is in use and could not be emptied: forget the users again"
            )
        return removed

    def _read(self, query: str, *values: int) -> list[tuple]:
        """All rows of a query."""
        with self._reader() as connection:
            return connection.execute(query, values).fetchall()

    @contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        """A connection that nobody else uses in this block."""
        with _store_errors():
            try:
                connection = self._idle_readers.get_nowait()
            except queue.Empty:
                connection = _connect(self._path)

            try:
                yield connection
            finally:
                self._idle_readers.put(connection)

    def _insert(self, event: Event) -> EventStatus:
        row = _to_row(event)
        places = ", ".join("?" * len(row))
        insert = f"INSERT INTO event ({COLUMNS}) VALUES ({places}) ON CONFLICT DO NOTHING"
        if self._writer.execute(insert, row).rowcount == 1:
            return "accepted"

        query = f"SELECT {COLUMNS} FROM event WHERE {KEY}"
        kept = self._writer.execute(query, row[:3]).fetchone()
        if kept == row:
            return "already_there"

        merged = merge_postings(_from_row(kept), event)
        if merged is None:
            return "conflict"
        new = _to_row(merged)
        if new == kept:
            return "already_there"
        self._writer.execute(
            f"UPDATE event SET ({COLUMNS}) = ({places}) WHERE {KEY}", new + new[:3]
        )
        return "merged"


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except (sqlite3.IntegrityError, sqlite3.ProgrammingError):  # mistakes of ours
        raise
    except sqlite3.DatabaseError as error:  # locked for too long, disk full, pages broken
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


def _prepare_table(connection: sqlite3.Connection) -> None:
    """Make the table, or give that of an earlier version what it lacks."""
    connection.execute(TABLE)
    found = connection.execute("SELECT name FROM pragma_table_info('event')").fetchall()
    for name, declared in ADDED.items():
        if (name,) not in found:
            connection.execute(f"ALTER TABLE event ADD COLUMN {name} {declared}")


def _to_row(event: Event) -> tuple[int | str | None, ...]:
    return (
        event.user_id,
        event.event_time,
        event.item_id,
        event.request_id,
        event.watch_ms,
        json.dumps(event.actions, sort_keys=True),  # by name: the next model may have other actions
        json.dumps(event.request_features, sort_keys=True),
        json.dumps(event.outcomes, sort_keys=True),
        id_text(event.user_id),
        id_text(event.item_id),
        request_text(event.request_id),
    )


def _from_row(row: tuple) -> Event:
    user_id, event_time, item_id, request_id, watch_ms, actions, features, outcomes, *texts = row
    user_text, item_text, text_of_request = texts
    return Event.model_construct(
        user_id=read_id(user_id, user_text),
        item_id=read_id(item_id, item_text),
        event_time=event_time,
        actions=json.loads(actions),
        request_features=json.loads(features),
        request_id=read_request_id(request_id, text_of_request),
        watch_ms=watch_ms,
        outcomes=json.loads(outcomes),
    )
