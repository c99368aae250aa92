"""Events that the server was sent, taken over into the logs: what was posted becomes part of the
next build.

    event log → runs/<name>/live_logs/*.parquet → jobs.build_sequences → jobs.deploy
                                                                       → the log may forget them

Only for events that no other log brings: to the builder, rows of two files that differ anywhere are
two rows.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SourceConfig
from pipeline.files import hidden_beside, publish_file
from pipeline.logs import live_log_dir, open_logs
from pipeline.logs.cleaning import has_log_form, log_form
from pipeline.logs.parquet import read_schema
from pipeline.sequences import store
from serve_app.history.live import EventLog
from serve_app.schemas import Event

ROWS_PER_WRITE = 50_000
LogRow = dict[str, float | None]  # by LOG column


@dataclass(frozen=True, slots=True)
class Export:
    """One file of events, and what it could not hold."""

    path: Path | None  # None: there was nothing new
    num_events: int
    # events with a value that the logs have no column for, by LOG column
    dropped: dict[str, int]


def export_events(source: SourceConfig, run_dir: Path, log: EventLog) -> Export:
    """Write the events that no earlier export holds as one more file of the logs, which the next
    build reads.

    It has the columns and types of the logs' first file, so that all of them are read alike; where
    `source.columns` says more than names, those of LOG: no event is a row per action, say.
    """
    logs = open_logs(source, run_dir)
    if source.readings:
        schema = log_form(source.events)
        names = {name: name for name in schema.names}
    else:
        schema = read_schema(logs.files[0])
        names = {theirs: name for name, theirs in logs.columns.items()}
    folder = live_log_dir(run_dir)
    known = _exported_keys(folder, logs.columns)

    num_events = 0
    dropped: Counter[str] = Counter()
    with hidden_beside(folder / "events.parquet") as stage:
        with pq.ParquetWriter(stage, schema) as writer:
            for events in _new_events(log, known):
                rows = [_log_row(event) for event in events]
                arrays = []
                for field in schema:
                    name = names.get(field.name, "")
                    arrays.append(_typed_array([row.get(name) for row in rows], field))
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

                num_events += len(rows)
                dropped += _count_dropped(rows, logs.columns, schema)

        if num_events == 0:
            return Export(None, 0, {})
        path = _next_file(folder)
        publish_file(stage, path)
    return Export(path, num_events, dict(sorted(dropped.items())))


def _count_dropped(
    rows: Sequence[LogRow], columns: dict[str, str], schema: pa.Schema
) -> Counter[str]:
    """The values of `rows` by LOG column, of the columns that the logs' files do not have."""
    columns = columns if not has_log_form(schema) else {name: name for name in columns}
    missing = {name for name, theirs in columns.items() if theirs not in schema.names}
    counts: Counter[str] = Counter()
    for row in rows:
        counts.update(name for name in missing if row.get(name) is not None)
    return counts


def _next_file(folder: Path) -> Path:
    """Behind all that are there: somebody may have removed those that are built."""
    numbers = (int(path.stem.removeprefix("events-")) for path in folder.glob("events-*.parquet"))
    return folder / f"events-{max(numbers, default=-1) + 1:05}.parquet"


def prune_events(sequence_dir: Path, log: EventLog) -> int:
    """Remove the events that the published sequences hold; returns how many.

    Only once the server has read those.
    """
    manifest = store.read_manifest(sequence_dir)
    removed = 0
    for index in range(len(manifest.buckets)):
        sequences = store.read_bucket(sequence_dir, manifest, index)
        for row in sequences.to_batches(max_chunksize=1):
            events = log.of_user(row["user_id"][0].as_py())
            if not events:
                continue

            time, item = row["event_time"].flatten(), row["item_id"].flatten()
            held = set(zip(time.to_pylist(), item.to_pylist(), strict=True))
            removed += log.remove([e for e in events if (e.event_time, e.item_id) in held])
    return removed


def _new_events(log: EventLog, known: set[tuple[int, int, int]]) -> Iterator[list[Event]]:
    """New events, user after user in a fixed order, in groups of about `ROWS_PER_WRITE`."""
    waiting: list[Event] = []
    for user in sorted(log.users()):
        for event in sorted(log.of_user(user), key=lambda event: (event.event_time, event.item_id)):
            if (event.user_id, event.event_time, event.item_id) not in known:
                waiting.append(event)

        if len(waiting) >= ROWS_PER_WRITE:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _exported_keys(folder: Path, columns: dict[str, str]) -> set[tuple[int, int, int]]:
    """User, time and item of the events that earlier exports hold."""
    found: set[tuple[int, int, int]] = set()
    for file in folder.glob("*.parquet"):
        names = ["user_id", "event_time", "item_id"]
        if not has_log_form(pq.read_schema(file)):
            names = [columns[name] for name in names]
        table = pq.read_table(file, columns=names)
        user, time, item = map(_integers, table.select(names).columns)
        found |= set(zip(user, time, item, strict=True))
    return found


def _integers(column: pa.ChunkedArray) -> list[int]:
    """Ids, or times in ms, whatever type the logs give them."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ms", "UTC"))
    return column.cast(pa.int64()).to_pylist()


def _log_row(event: Event) -> LogRow:
    """LOG's columns; an action that the client did not name stays null: unknown, not "no"."""
    actions = {name: int(did) for name, did in event.actions.items()}
    return {
        "user_id": event.user_id,
        "item_id": event.item_id,
        "event_time": event.event_time,
        "request_id": event.request_id,
        "watch_ms": event.watch_ms,
        **actions,
        **event.request_features,
        **event.outcomes,
    }


def _typed_array(values: list[float | None], field: pa.Field) -> pa.Array:
    """As the logs have it: integers, booleans, floats, decimals, or a time with its zone."""
    if any(isinstance(value, float) for value in values):
        return pa.array(values, pa.float64()).cast(field.type)

    numbers = pa.array(values, pa.int64())
    if pa.types.is_timestamp(field.type):
        return numbers.cast(pa.timestamp("ms", "UTC")).cast(field.type)
    return numbers.cast(field.type)
