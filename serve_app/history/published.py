"""Who did what, as of a time: from the published sequences to the history rows of a request.

A store answers with a user's SEQUENCE row; `histories` cuts rows at the requests' times.
serve_app/history/live.py has a store that also knows what happened since the last publication.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from pipeline.batches.events import Events, offsets_of
from pipeline.batches.examples import flat_events
from pipeline.config import FeatureConfig, SourceConfig, UserError
from pipeline.files import staged_file, sweep_staged
from pipeline.schema import EventColumns
from pipeline.sequences import store

COPIES = "sequences-*.arrow"  # of publications, in the server's folder
STALE_S = 3600.0  # age of a file under way whose writer is dead


class HistoryStore(Protocol):
    """Anything that knows users' sequences."""

    digest: str  # of the publication that it holds
    columns: EventColumns  # of its SEQUENCE rows

    def sequence(self, user_id: int) -> pa.RecordBatch | None:
        """The user's row of SEQUENCE, None for a user never seen."""
        ...


class PublishedSequences:
    """The store that the build job published, read-only and memory-mapped: replicas of a machine
    share its pages.

    Parquet cannot be mapped, so the first to open a publication copies it to an Arrow file under
    `cache`, in the place of the copy of an earlier one.

    Raises:
        UserError: nothing is published there, or its masks and columns are not the ones that
        `source` and `features` name.
    """

    def __init__(
        self, folder: Path, source: SourceConfig, features: FeatureConfig, cache: Path
    ) -> None:
        self.folder = folder
        manifest = store.read_manifest(folder)
        _check_columns(folder, manifest.events, source, features)
        self.digest = manifest.digest
        self.columns = manifest.events

        mapped = _copy_to_arrow(folder, manifest, cache)
        reader = pa.ipc.open_file(pa.memory_map(str(mapped)))
        self._batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]

        # the users in order, and where each one's row lies
        users, batches, rows = [], [], []
        for number, batch in enumerate(self._batches):
            users.append(batch["user_id"].to_numpy())
            batches.append(np.full(len(batch), number))
            rows.append(np.arange(len(batch)))
        nothing = np.zeros(0, np.int64)
        user = np.concatenate([nothing, *users])
        order = np.argsort(user, kind="stable")
        self._user = user[order]
        self._batch = np.concatenate([nothing, *batches])[order]
        self._row = np.concatenate([nothing, *rows])[order]

    @property
    def num_users(self) -> int:
        return len(self._user)

    def sequence(self, user_id: int) -> pa.RecordBatch | None:
        place = int(np.searchsorted(self._user, user_id))
        if place == len(self._user) or self._user[place] != user_id:
            return None
        return self._batches[self._batch[place]].slice(int(self._row[place]), 1)

    def count_events(self, most_users: int) -> tuple[np.ndarray, np.ndarray]:
        """Up to `most_users` users, evenly among all, and how many of each one's events have a
        time, int64 [n].
        """
        places = np.linspace(0, self.num_users - 1, min(most_users, self.num_users))
        users = self._user[places.astype(np.int64)]
        counts = []
        for user_id in users.tolist():
            row = self.sequence(user_id)
            assert row is not None, "a user of this publication"
            order_only = row["order_only"].flatten().to_numpy(zero_copy_only=False)
            counts.append(np.count_nonzero(~order_only))
        return users, np.array(counts, np.int64)


def _check_columns(
    folder: Path, published: EventColumns, source: SourceConfig, features: FeatureConfig
) -> None:
    """The publication has the actions and the outcomes that the model reads."""
    if published.actions != source.actions:
        raise UserError(
            f"the sequences at {folder} have the actions {list(published.actions)}, "
            f"the model was trained with {list(source.actions)}"
        )
    found = {column.name: column.dtype for column in published.outcomes}
    trained = {column.name: column.dtype for column in source.events.outcomes}
    for name in features.outcomes:
        if found.get(name) != trained[name]:
            raise UserError(
                f"the sequences at {folder} have the outcomes {list(found)}, "
                f"the model reads {name!r} of type {trained[name]}"
            )


def _copy_to_arrow(folder: Path, manifest: store.Manifest, cache: Path) -> Path:
    path = cache / f"sequences-{manifest.digest[:32]}.arrow"
    if path.exists():
        return path

    # two replicas at once write the same thing
    with (
        staged_file(path) as stage,
        pa.ipc.new_file(str(stage), manifest.events.sequence_schema()) as writer,
    ):
        for index in range(len(manifest.buckets)):
            writer.write_table(store.read_bucket(folder, manifest, index).combine_chunks())

    sweep_staged(cache, COPIES, min_age_s=STALE_S)
    for older in cache.glob(COPIES):
        if older != path:
            older.unlink(missing_ok=True)  # who has it mapped keeps it
    return path


def forget_copies(cache: Path) -> int:
    """Remove the copies of publications under `cache`, and those that a killed replica left half
    made; whoever opens one makes it anew. Returns how many there were.

    A running server keeps what it has mapped until it reads new sequences.
    """
    copies = list(cache.glob(COPIES))
    for copy in copies:
        copy.unlink(missing_ok=True)
    return len(copies) + sweep_staged(cache, COPIES)


@dataclass(frozen=True, slots=True)
class Histories:
    """The rows that B requests may see."""

    events: Events
    first_position: np.ndarray  # int64 [B], older rows that are not in `events`


def histories(
    sequences: Sequence[pa.RecordBatch],
    request_time_ms: np.ndarray,
    source: SourceConfig,
    features: FeatureConfig,
    max_history: int,
) -> Histories:
    """The newest `max_history` rows of SEQUENCE row b strictly earlier than `request_time_ms[b]`.

    event_time   10 20 20 30      request_time_ms = 30, max_history = 2
    earlier       x  x  x  .
    taken            x  x         one older row is counted in `first_position`
    """
    table = pa.Table.from_batches(sequences)
    events = flat_events(table, source, features)
    offsets = events.offsets

    # times do not fall within a user, so that earlier rows are the first ones
    earlier = events.event_time < np.repeat(request_time_ms, events.lengths)
    before = offsets_of(earlier)
    end = offsets[:-1] + before[offsets[1:]] - before[offsets[:-1]]
    begin = np.maximum(offsets[:-1], end - max_history)

    left_out = begin - offsets[:-1]
    first_position = table["first_position"].to_numpy() + left_out
    if table.num_rows == 1:  # as a rule; nothing is copied
        return Histories(events.slice(int(begin[0]), int(end[0])), first_position)
    return Histories(events.take(begin, end), first_position)


def sequence_row(
    flat: dict[str, np.ndarray], columns: EventColumns, first_position: int = 0
) -> pa.RecordBatch:
    """One SEQUENCE row from flat columns, oldest first; a column left out is unknown, no columns
    are no rows.
    """
    num_rows = len(flat.get("item_id", ()))
    offsets = pa.array([0, num_rows], pa.int64())
    unknown = columns.unknown_values()

    arrays: list[pa.Array] = [
        pa.array([-1], pa.int64()),
        pa.array([0], pa.int32()),
        pa.array([first_position], pa.int64()),
    ]
    for name, dtype in columns.sequence_lists().items():
        values = flat[name] if name in flat else np.full(num_rows, unknown[name])
        arrays.append(pa.LargeListArray.from_arrays(offsets, pa.array(values).cast(dtype)))
    return pa.RecordBatch.from_arrays(arrays, schema=columns.sequence_schema())
