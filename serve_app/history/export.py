"""Events that the server was sent, taken over into the logs: what was posted becomes part of the
next build.

    event log → runs/<name>/live_logs/*.parquet → jobs.build_sequences → jobs.deploy
                                                                       → the log may forget them

The files have LOG's own columns and types, whatever the other logs look like. An event to which
something was added since is exported again, and the build merges its rows
(pipeline/sequences/repeats.py).
"""

import fcntl
import logging
import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SequenceConfig, SourceConfig
from pipeline.files import hidden_beside, publish_file, sweep_staged
from pipeline.logs import LIVE_FILES, live_log_dir
from pipeline.logs.cleaning import log_form, row_digest
from pipeline.schema import LOG_REQUIRED, EventColumns
from pipeline.sequences import store
from serve_app.feedback.exposures import Outcomes, ServedAnswers, read_mark, write_mark
from serve_app.history.live import EventLog, compare_events, published_event
from serve_app.history.posting import PostingRules
from serve_app.history.published import STALE_S
from serve_app.ids import own_id
from serve_app.schemas import Event

ROWS_PER_WRITE = 50_000
LogRow = dict[str, float | str | None]  # by LOG column

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Export:
    """One file of events, and what it could not hold."""

    path: Path | None  # None: there was nothing new
    num_events: int
    # values that the sequences have no column for by now, by name: left out of their events
    dropped: dict[str, int]
    # events that the build would not take, by the field that is wrong: left in the event log
    refused: dict[str, int]
    num_exposures: int = 0  # rows of what was served
    # served rows that are no exposures, by the reason
    left_out: dict[str, int] = field(default_factory=dict)


def export_events(
    source: SourceConfig,
    sequences: SequenceConfig,
    run_dir: Path,
    log: EventLog,
    served: ServedAnswers | None = None,
) -> Export:
    """Write the events that no earlier export holds as they are now as one more file of the logs,
    which the next build reads; of `served` answers the exposures too.

    With `sequences.repeats: first` the build keeps one row of an event, so an event that was
    exported once is not exported again. One export of a run goes on at a time.
    """
    folder = live_log_dir(run_dir)
    with only_export(folder):
        return _export(source, sequences, run_dir, folder, log, served)


@contextmanager
def only_export(folder: Path) -> Iterator[None]:
    """Wait for another job's export into a run's `live_logs`: of two at once one would give its
    file the other's name, and note as read what only the other has written.

    Who forgets users keeps exports out too, which may have read theirs already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".export.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _export(
    source: SourceConfig,
    sequences: SequenceConfig,
    run_dir: Path,
    folder: Path,
    log: EventLog,
    served: ServedAnswers | None,
) -> Export:
    columns = replace(source.events, text_ids=_text_ids(run_dir))
    schema = log_form(columns)
    compared = schema.names if sequences.repeats == "merge" else list(LOG_REQUIRED)
    rules = PostingRules.of(sequences, columns)
    sweep_staged(folder, LIVE_FILES, min_age_s=STALE_S)
    exported = _exported_digests(folder, compared)

    num_events, num_exposures = 0, 0
    outcomes = Outcomes()
    exposures = None
    if served is not None:
        exposures = served.open_exposures(source.actions, sequences, rules, schema)
    dropped: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    with hidden_beside(folder / "events-new.parquet") as stage:
        with pq.ParquetWriter(stage, schema) as writer:
            for events in _batches_of_events(log):
                good = _refuse_events(events, rules, refused)
                rows = _log_table(good, schema)
                new = ~np.isin(row_digest(rows.select(compared)), exported)
                rows = rows.filter(pa.array(new))

                writer.write_table(rows)
                num_events += rows.num_rows
                dropped += _count_dropped(events, source.events)
                if exposures is not None:
                    outcomes.note_events(good)

            if exposures is not None:
                for rows in exposures.read_rows(outcomes, read_mark(folder)):
                    new = ~np.isin(row_digest(rows.select(compared)), exported)
                    rows = rows.filter(pa.array(new))
                    writer.write_table(rows)
                    num_exposures += rows.num_rows

        path = None
        if num_events or num_exposures:
            path = _next_file(folder)
            publish_file(stage, path)

    left_out: Counter[str] = Counter()
    if exposures is not None:
        write_mark(folder, exposures.final_until_ms)
        left_out = exposures.left_out
    return Export(
        path, num_events, _by_name(dropped), _by_name(refused), num_exposures, _by_name(left_out)
    )


def _text_ids(run_dir: Path) -> tuple[str, ...]:
    """The ids that are text in the sequences that the server has; without them nothing is."""
    folder = run_dir / "sequences"
    if not (folder / store.MANIFEST).exists():
        return ()
    return store.read_manifest(folder).text_ids


def _refuse_events(
    events: Sequence[Event], rules: PostingRules, refused: Counter[str]
) -> list[Event]:
    """The events without what has no column by now; those that are refused all the same are counted
    and left out.
    """
    now_ms = int(time.time() * 1000)
    good = []
    for event in events:
        stripped = _strip_unknown(event, rules.columns)
        refusal = rules.find_refusal(stripped, [], now_ms)
        if refusal is None:
            good.append(stripped)
            continue

        field = ".".join(map(str, refusal.loc))
        if field not in refused:
            logger.warning("%s must be %s, got %s: %r", field, refusal.msg, refusal.input, event)
        refused[field] += 1
    return good


def _strip_unknown(event: Event, columns: EventColumns) -> Event:
    """The event without actions, request columns and outcomes that the sequences do not have."""
    declared = [column.name for column in columns.declared]
    return event.model_copy(
        update={
            "actions": _only(event.actions, columns.actions),
            "request_features": _only(event.request_features, columns.request),
            "outcomes": _only(event.outcomes, declared),
        }
    )


def _only(values: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name in names}


def _count_dropped(events: Sequence[Event], columns: EventColumns) -> Counter[str]:
    """The values by name of which `_strip_unknown` frees the events."""
    counts: Counter[str] = Counter()
    for event in events:
        stripped = _strip_unknown(event, columns)
        counts.update(event.actions.keys() - stripped.actions.keys())
        counts.update(event.request_features.keys() - stripped.request_features.keys())
        counts.update(event.outcomes.keys() - stripped.outcomes.keys())
    return counts


def _by_name(counts: Counter[str]) -> dict[str, int]:
    return {name: number for name, number in sorted(counts.items()) if number}


def _next_file(folder: Path) -> Path:
    """Behind all that are there: somebody may have removed those that are built."""
    numbers = (int(path.stem.removeprefix("events-")) for path in folder.glob(LIVE_FILES))
    return folder / f"events-{max(numbers, default=-1) + 1:05}.parquet"


def prune_events(
    sequence_dir: Path,
    sequences: SequenceConfig,
    log: EventLog,
    settled_ms: float = math.inf,
) -> int:
    """Remove the events of which the published sequences hold all that is known; returns how many.

    Only once the server has read those. Events at `settled_ms` or later stay: the exposures that
    they came of are still to be exported (`exposures.settled_before`).
    """
    manifest = store.read_manifest(sequence_dir)
    posted = np.array(list(log.users()), np.int64)
    removed = 0
    for index in range(len(manifest.buckets)):
        table = store.read_bucket(sequence_dir, manifest, index)
        # of millions who are published few have posted something
        theirs = pa.array(np.isin(table["user_id"].to_numpy(), posted))
        for row in table.filter(theirs).to_batches(max_chunksize=1):
            events = log.of_user(row["user_id"][0].as_py())
            held: list[Event] = []
            for event in events:
                is_settled = event.event_time < settled_ms
                if is_settled and _is_held(row, event, manifest.events, sequences):
                    held.append(event)
            removed += log.remove(held)
    return removed


def _is_held(
    row: pa.RecordBatch, event: Event, columns: EventColumns, sequences: SequenceConfig
) -> bool:
    """True if the user's SEQUENCE row has the event, and all that is known of it."""
    times = row["event_time"].flatten().to_numpy()
    items = row["item_id"].flatten().to_numpy()
    places = np.flatnonzero((times == event.event_time) & (items == event.item_id))
    if len(places) == 0:
        return False
    if sequences.repeats == "first":
        return True

    stripped = _strip_unknown(event, columns)
    known = published_event(row, int(places[0]), stripped, columns)
    last_outcome = sequences.repeated_outcomes == "last_file"
    return compare_events(known, stripped, last_outcome) != "merged"


def _batches_of_events(log: EventLog) -> Iterator[list[Event]]:
    """All events, user after user in a fixed order, in groups of about `ROWS_PER_WRITE`."""
    waiting: list[Event] = []
    for user in sorted(log.users()):
        waiting += sorted(log.of_user(user), key=lambda event: (event.event_time, event.item_id))
        if len(waiting) >= ROWS_PER_WRITE:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _exported_digests(folder: Path, compared: Sequence[str]) -> np.ndarray:
    """Digests, uint64, of the rows that earlier exports hold, over the columns `compared`."""
    found = [np.zeros(0, np.uint64)]
    for file in sorted(folder.glob(LIVE_FILES)):
        names = [name for name in compared if name in pq.read_schema(file).names]
        found.append(row_digest(pq.read_table(file, columns=names)))
    return np.concatenate(found)


def _log_table(events: Sequence[Event], schema: pa.Schema) -> pa.Table:
    """The events as LOG rows."""
    text_requests = pa.types.is_string(schema.field("request_id").type)
    rows = [_log_row(event, text_requests) for event in events]
    return pa.Table.from_pylist(rows, schema=schema)


def _log_row(event: Event, text_requests: bool) -> LogRow:
    """LOG's columns; an action that the client did not name stays null: unknown, not "no".

    Where the logs number their requests, one that is text has its code.
    """
    actions = {name: int(did) for name, did in event.actions.items()}
    request_id = event.request_id
    if request_id is not None:
        request_id = own_id(request_id) if text_requests else int(request_id)
    return {
        "user_id": own_id(event.user_id),
        "item_id": own_id(event.item_id),
        "event_time": event.event_time,
        "request_id": request_id,
        "watch_ms": event.watch_ms,
        **actions,
        **event.request_features,
        **event.outcomes,
    }
