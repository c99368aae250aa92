"""What was served: a row for each of the best places of an answer, in rotating Parquet files.

    answer → bounded queue → a thread of the ingress → served/2026-11-29/<ingress>-<number>.parquet

An answer never waits for it. Where the queue is full, or a file cannot be written, answers are left
out and counted.
"""

import logging
import queue
import random
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from pydantic import BaseModel

from pipeline.files import make_private_folder, staged_file
from pipeline.schema import DAY_MS
from serve_app.columns import RankColumns, RankedColumns
from serve_app.metrics import IngressMetrics
from serve_app.page.schemas import TRIAL_KEY

logger = logging.getLogger("ray.serve")

MAX_WAITING = 2000  # answers that the queue holds
MAX_ROWS = 200_000  # of one file
SCORE, FEATURE = "score.", "feature."
FIXED = pa.schema(
    [
        ("request_id", pa.int64()),
        ("unit", pa.string()),  # whose trial it is: the user, or the key that the client gave
        ("user_id", pa.int64()),  # null: the request named none
        ("event_time", pa.int64()),  # the request's, in ms
        ("served_at", pa.int64()),  # ms
        ("item_id", pa.int64()),
        ("place", pa.int32()),  # 0 is best
        ("version", pa.int32()),
        ("role", pa.string()),
        ("sequences", pa.string()),  # digest of the published sequences behind the history
        ("history_length", pa.int32()),
        ("ranker_ms", pa.float32()),
    ]
)


class ServedLogSettings(BaseModel):
    """`serve.served_*` as the ingress gets them."""

    folder: str
    share: float = 1.0
    histories: bool = False
    places: int = 100
    days: float = 30.0
    flush_s: float = 60.0


@dataclass(frozen=True, slots=True)
class Served:
    """One answer on its way to a file."""

    request: RankColumns
    answer: RankedColumns
    request_id: int
    served_at: int


class ServedLog:
    """Takes answers without waiting, and writes them in a thread of its own.

    Args:
        settings: where to, and what of it.
        name: of this ingress, part of the files' names.
        metrics: counts what was written and what was left out.
    """

    def __init__(self, settings: ServedLogSettings, name: str, metrics: IngressMetrics) -> None:
        self.settings = settings
        self.name = name
        self.metrics = metrics
        self._waiting: queue.Queue[Served | None] = queue.Queue(MAX_WAITING)
        self._number = 0
        self._thread = threading.Thread(target=self._write_all, name="served", daemon=True)
        self._thread.start()

    def note_answer(self, request: RankColumns, answer: RankedColumns, request_id: int) -> None:
        """Keep what was served, if it is in the sample."""
        if (request.trial_key or "").startswith(TRIAL_KEY):
            return  # the page looks at lists and serves nobody
        if request.head.history is not None and not self.settings.histories:
            return
        if random.random() >= self.settings.share:
            return
        try:
            served_at = int(time.time() * 1000)
            self._waiting.put_nowait(Served(request, answer, request_id, served_at))
        except queue.Full:
            self.metrics.served.labels("dropped").inc()

    def close(self) -> None:
        """Write what is there; nothing may be noted afterwards."""
        self._waiting.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        kept: list[Served] = []
        num_rows, due = 0, time.monotonic() + self.settings.flush_s
        ended = False
        while not ended:
            try:
                one = self._waiting.get(timeout=max(0.0, due - time.monotonic()))
            except queue.Empty:
                pass
            else:
                ended = one is None
                if one is not None:
                    kept.append(one)
                    num_rows += min(len(one.request), self.settings.places)

            if ended or num_rows >= MAX_ROWS or time.monotonic() >= due:
                self._write_files(kept)
                kept, num_rows = [], 0
                due = time.monotonic() + self.settings.flush_s

    def _write_files(self, kept: Sequence[Served]) -> None:
        """One file for the answers of each set of tasks and features."""
        by_columns: dict[tuple[str, ...], list[Served]] = {}
        for one in kept:
            features = {*one.request.head.request_features, *one.request.features}
            names = [FEATURE + name for name in sorted(features)]
            names += [SCORE + task for task in one.answer.scores]
            by_columns.setdefault(tuple(names), []).append(one)

        for same in by_columns.values():
            try:
                self._write_file(served_table(same, self.settings.places))
                self.metrics.served.labels("written").inc(len(same))
            except Exception:  # a disk that is full, a bucket that is gone: ranking goes on
                logger.exception("%d answers are not in the served log", len(same))
                self.metrics.served.labels("dropped").inc(len(same))
        remove_older(self.settings.folder, self.settings.days)

    def _write_file(self, table: pa.Table) -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        name = f"{day}/{self.name}-{int(time.time() * 1000)}-{self._number}.parquet"
        self._number += 1

        if "://" in self.settings.folder:
            files, folder = pyarrow.fs.FileSystem.from_uri(self.settings.folder)
            pq.write_table(table, f"{folder}/{name}", filesystem=files, compression="zstd")
            return

        make_private_folder(Path(self.settings.folder))
        with staged_file(Path(self.settings.folder) / name) as stage:
            pq.write_table(table, stage, compression="zstd")


def served_table(served: Sequence[Served], places: int) -> pa.Table:
    """A row for each of the best `places` of each answer; all have the same tasks and features.

    item_id   10 11 12      order  1 2 0      places = 2
    rows      (11, place 0) (12, place 1)
    """
    parts = []
    for one in served:
        best = one.answer.order[:places]
        asked = best if one.answer.rows is None else one.answer.rows[best]
        head, num = one.request.head, len(best)
        user, key = one.request.user_id, head.trial_key
        unit = key if key is not None else None if user is None else str(user)
        columns = {
            "request_id": [one.request_id] * num,
            "unit": [unit] * num,
            "user_id": [user] * num,
            "event_time": [head.request_time_ms] * num,
            "served_at": [one.served_at] * num,
            "item_id": one.answer.item_id[best],
            "place": np.arange(num, dtype=np.int32),
            "version": [one.answer.model_version] * num,
            "role": [one.answer.role] * num,
            "sequences": [one.answer.sequences] * num,
            "history_length": [one.answer.head["history_length"]] * num,
            "ranker_ms": [one.answer.ranker_ms] * num,
        }
        arrays = [pa.array(columns[field.name], field.type) for field in FIXED]
        names = list(FIXED.names)

        for name in sorted({*head.request_features, *one.request.features}):
            names.append(FEATURE + name)
            arrays.append(pa.array(one.request.feature(name)[asked], pa.int32()))
        for task, scores in one.answer.scores.items():
            names.append(SCORE + task)
            arrays.append(pa.array(scores[best], pa.float32()))
        parts.append(pa.table(arrays, names))
    return pa.concat_tables(parts)


def read_served(folder: str, columns: Sequence[str]) -> pa.Table:
    """These columns of all files; one that a file does not have is null there."""
    if "://" in folder:
        files, place = pyarrow.fs.FileSystem.from_uri(folder)
    else:
        files, place = pyarrow.fs.LocalFileSystem(), folder
    selector = pyarrow.fs.FileSelector(place, recursive=True, allow_not_found=True)
    found = [file.path for file in files.get_file_info(selector) if file.path.endswith(".parquet")]

    parts = [FIXED.empty_table().select([name for name in columns if name in FIXED.names])]
    for path in sorted(found):
        schema = pq.read_schema(path, filesystem=files)
        there = [name for name in columns if name in schema.names]
        parts.append(pq.read_table(path, columns=there, filesystem=files))
    return pa.concat_tables(parts, promote_options="default")


def remove_older(folder: str, days: float) -> None:
    """Remove local files older than `days`; a bucket has rules of its own for that."""
    if "://" in folder:
        return
    limit_s = time.time() - days * DAY_MS / 1000
    for path in Path(folder).glob("*/*.parquet"):
        if path.stat().st_mtime < limit_s:
            path.unlink(missing_ok=True)


def forget_served(folder: str, user_ids: Iterable[int]) -> int:
    """Take the rows of these users out of the local files; returns how many there were."""
    users = np.array(list(user_ids), np.int64)
    removed = 0
    for path in Path(folder).glob("*/*.parquet"):
        table = pq.read_table(path)
        theirs = np.isin(table["user_id"].fill_null(-1).to_numpy(), users)
        kept = table.filter(pa.array(~theirs))
        removed += table.num_rows - kept.num_rows
        if kept.num_rows == 0:
            path.unlink()
        elif kept.num_rows < table.num_rows:
            with staged_file(path) as stage:
                pq.write_table(kept, stage, compression="zstd")
    return removed
