"""Who did what, as of a time: from the published sequences to the history rows of a request.

A store answers with a user's SEQUENCE row; `histories` cuts rows at the requests' times.
serve_app/history/live.py has a store that also knows what happened since the last publication.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline import schema
from pipeline.batches.events import Events
from pipeline.batches.examples import flat_events
from pipeline.config import RunConfig, UserError
from pipeline.sequences import store

COPIES = "sequences-*.arrow"  # of publications, in the server's folder


class HistoryStore(Protocol):
    """Anything that knows users' sequences."""

    digest: str  # of the publication that it holds
    request_columns: tuple[str, ...]  # of its SEQUENCE rows

    def sequence(self, user_id: int) -> pa.RecordBatch | None:
        """The user's row of SEQUENCE, None for a user never seen."""
        ...


class PublishedSequences:
    """The store that the build job published, read-only and memory-mapped: replicas of a machine
    share its pages.

    Parquet cannot be mapped, so the first to open a publication copies it to an Arrow file under
    `cache`, in the place of the copy of an earlier one.

    Raises:
        UserError: nothing is published there, or its masks and columns are not the ones that `cfg`
        names.
    """

    def __init__(self, folder: Path, cfg: RunConfig, cache: Path) -> None:
        manifest = store.read_manifest(folder)
        if tuple(manifest.actions) != cfg.source.actions:
            raise UserError(
                f"the sequences at {folder} have the actions {list(manifest.actions)}, "
                f"the model was trained with {list(cfg.source.actions)}"
            )
        self.digest = manifest.digest
        self.request_columns = tuple(manifest.request_columns)
        mapped = _arrow_copy(folder, manifest, cache)
        reader = pa.ipc.open_file(pa.memory_map(str(mapped)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        ids = [batch["user_id"].to_numpy() for batch in self._batches]
        user = np.concatenate(ids) if ids else np.zeros(0, np.int64)
        order = np.argsort(user, kind="stable")
        lengths = [len(part) for part in ids]
        self._user = user[order]
        self._batch = np.repeat(np.arange(len(ids)), lengths)[order]
        self._row = np.concatenate([np.arange(n) for n in lengths])[order] if ids else order

    @property
    def num_users(self) -> int:
        return len(self._user)

    def sequence(self, user_id: int) -> pa.RecordBatch | None:
        place = int(np.searchsorted(self._user, user_id))
        if place == len(self._user) or self._user[place] != user_id:
            return None
        return self._batches[self._batch[place]].slice(int(self._row[place]), 1)


def _arrow_copy(folder: Path, manifest: store.Manifest, cache: Path) -> Path:
    path = cache / f"sequences-{manifest.digest[:32]}.arrow"
    if path.exists():
        return path
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cache, prefix=".sequences-", delete=False) as staging:
        with pa.ipc.new_file(staging, schema.sequence_schema(manifest.request_columns)) as writer:
            for index in range(len(manifest.buckets)):
                writer.write_table(store.read_bucket(folder, manifest, index).combine_chunks())
        staging.flush()
        # whole or not there; two replicas at once write the same thing
        os.rename(staging.name, path)
    for older in cache.glob(COPIES):
        if older != path:
            older.unlink(missing_ok=True)  # who has it mapped keeps it
    return path


def forget_copies(cache: Path) -> int:
    """Remove the copies of publications under `cache`; whoever opens one makes it anew. Returns how
    many there were.

    A running server keeps what it has mapped until it reads new sequences.
    """
    copies = list(cache.glob(COPIES))
    for copy in copies:
        copy.unlink(missing_ok=True)
    return len(copies)


@dataclass(frozen=True, slots=True)
class Histories:
    """The rows that B requests may see."""

    events: Events
    first_position: np.ndarray  # int64 [B], older rows that are not in `events`


def histories(
    sequences: Sequence[pa.RecordBatch],
    request_time_ms: np.ndarray,
    cfg: RunConfig,
    max_history: int,
) -> Histories:
    """Of SEQUENCE row b the newest `max_history` rows strictly earlier than `request_time_ms[b]`."""
    table = pa.Table.from_batches(sequences)
    events = flat_events(table, cfg)
    offsets = events.offsets
    earlier = events.event_time < np.repeat(request_time_ms, events.lengths)
    before = np.concatenate([[0], np.cumsum(earlier)])
    # times do not fall within a user
    end = offsets[:-1] + before[offsets[1:]] - before[offsets[:-1]]
    begin = np.maximum(offsets[:-1], end - max_history)
    return Histories(
        events.take(begin, end), table["first_position"].to_numpy() + begin - offsets[:-1]
    )


def sequence_row(
    columns: dict[str, np.ndarray], request_columns: Sequence[str], first_position: int = 0
) -> pa.RecordBatch:
    """One SEQUENCE row from flat columns, oldest first; a column left out is unknown, no columns
    are no rows.
    """
    num_rows = len(columns.get("item_id", ()))
    unknown = {"watch_ms": -1, "order_only": False} | dict.fromkeys(request_columns, -1)
    arrays: list[pa.Array] = [
        pa.array([-1], pa.int64()),
        pa.array([0], pa.int32()),
        pa.array([first_position], pa.int64()),
    ]
    for name, dtype in schema.sequence_lists(request_columns).items():
        values = columns.get(name, np.full(num_rows, unknown.get(name, 0)))
        arrays.append(
            pa.LargeListArray.from_arrays(
                pa.array([0, num_rows], pa.int64()), pa.array(values).cast(dtype)
            )
        )
    return pa.RecordBatch.from_arrays(arrays, schema=schema.sequence_schema(request_columns))
