"""Events that the server was sent, taken over into the logs: what was posted becomes part of the
next build.

event log → runs/<name>/live_logs/*.parquet → jobs.build_sequences → jobs.deploy → the log may
forget them

Only for events that no other log brings: to the builder, rows of two files that differ anywhere are
two rows.
"""

import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import RunConfig
from pipeline.logs import live_log_dir, open_logs
from pipeline.logs.parquet import read_schema
from pipeline.sequences import store
from serve_app.history.live import EventLog
from serve_app.schemas import Event

ROWS_PER_WRITE = 50_000


@dataclass(frozen=True, slots=True)
class Export:
    path: Path | None  # None: there was nothing new
    num_events: int
    num_without: int  # events with a watch_ms or request_id that the logs have no column for


def export(cfg: RunConfig, log: EventLog) -> Export:
    """Write the events that no earlier export holds as one more file of the logs, which the next
    build reads.

    It has the columns and types of the logs' first file, so that all of them are read alike.
    """
    logs = open_logs(cfg)
    schema = read_schema(logs.files[0])
    ours = {theirs: name for name, theirs in logs.columns.items()}
    folder = live_log_dir(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    known = _exported(folder, logs.columns)
    num_events, num_without = 0, 0
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".live-", delete=False) as staging:
        with pq.ParquetWriter(staging, schema) as writer:
            for events in _groups(log, known):
                rows = [_row(event) for event in events]
                columns = {
                    theirs: [row.get(ours.get(theirs, "")) for row in rows]
                    for theirs in schema.names
                }
                arrays = [_typed(columns[field.name], field) for field in schema]
                writer.write_table(pa.Table.from_arrays(arrays, schema=schema))
                num_events += len(rows)
                extra = [
                    name
                    for name in ("watch_ms", "request_id")
                    if logs.columns[name] not in schema.names
                ]
                num_without += sum(any(row[name] is not None for name in extra) for row in rows)
        if not num_events:
            os.unlink(staging.name)
            return Export(None, 0, 0)
        staging.flush()
        os.fsync(staging.fileno())
        path = _next_file(folder)
        os.rename(staging.name, path)
    return Export(path, num_events, num_without)


def _next_file(folder: Path) -> Path:
    """Behind all that are there: somebody may have removed those that are built."""
    numbers = (int(path.stem.removeprefix("events-")) for path in folder.glob("events-*.parquet"))
    return folder / f"events-{max(numbers, default=-1) + 1:05}.parquet"


def prune(cfg: RunConfig, log: EventLog) -> int:
    """Remove the events that the published sequences hold; returns how many.

    Only once the server has read those.
    """
    manifest = store.read_manifest(cfg.sequence_dir)
    removed = 0
    for index in range(len(manifest.buckets)):
        for row in store.read_bucket(cfg.sequence_dir, manifest, index).to_batches(max_chunksize=1):
            user = row["user_id"][0].as_py()
            events = log.of_user(user)
            if events:
                times, items = (
                    row[name].flatten().to_numpy() for name in ("event_time", "item_id")
                )
                held = set(zip(times.tolist(), items.tolist(), strict=True))
                removed += log.remove([e for e in events if (e.event_time, e.item_id) in held])
    return removed


def _groups(log: EventLog, known: set[tuple[int, int, int]]) -> Iterator[list[Event]]:
    """New events, user after user in a fixed order, in groups of about `ROWS_PER_WRITE`."""
    waiting: list[Event] = []
    for user in sorted(log.users()):
        events = sorted(log.of_user(user), key=lambda event: (event.event_time, event.item_id))
        waiting += [e for e in events if (e.user_id, e.event_time, e.item_id) not in known]
        if len(waiting) >= ROWS_PER_WRITE:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _exported(folder: Path, columns: dict[str, str]) -> set[tuple[int, int, int]]:
    names = [columns[name] for name in ("user_id", "event_time", "item_id")]
    found: set[tuple[int, int, int]] = set()
    for file in folder.glob("*.parquet"):
        table = pq.read_table(file, columns=names)
        found |= set(zip(*(_integers(table[name]) for name in names), strict=True))
    return found


def _integers(column: pa.ChunkedArray) -> list[int]:
    """Ids, or times in ms, whatever type the logs give them."""
    if pa.types.is_timestamp(column.type):
        column = column.cast(pa.timestamp("ms", "UTC"))
    return column.cast(pa.int64()).to_pylist()


def _row(event: Event) -> dict[str, int | None]:
    """LOG's columns; an action that the client did not name stays null: unknown, not "no"."""
    return {
        "user_id": event.user_id,
        "item_id": event.item_id,
        "event_time": event.event_time,
        "request_id": event.request_id,
        "watch_ms": event.watch_ms,
        **{name: int(did) for name, did in event.actions.items()},
        **event.request_features,
    }


def _typed(values: list[int | None], field: pa.Field) -> pa.Array:
    """As the logs have it: integers, booleans, floats, or a time with its zone."""
    numbers = pa.array(values, pa.int64())
    if pa.types.is_timestamp(field.type):
        return numbers.cast(pa.timestamp("ms", "UTC")).cast(field.type)
    return numbers.cast(field.type)
