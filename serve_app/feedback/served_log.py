"""What was served: a row for each of the best places of an answer, in rotating Parquet files.

    answer → bounded queue → a thread of the ingress → served/2026-11-29/<ingress>-<number>.parquet

An answer never waits for it. Where the queue is full, or a file cannot be written, answers are left
out and counted.
"""

import logging
import queue
import random
import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from pydantic import BaseModel

from pipeline.files import make_private_folder, staged_file
from pipeline.schema import DAY_MS
from serve_app.columns import RankColumns, RankedColumns
from serve_app.feedback.served_rows import (
    FEATURE,
    FIXED,
    FailedRequest,
    Served,
    head_of,
)
from serve_app.metrics import IngressMetrics
from serve_app.page.schemas import TRIAL_KEY
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import RecommendRequest

logger = logging.getLogger("ray.serve")

MAX_WAITING = 2000  # answers that the queue holds
MAX_ROWS = 200_000  # of one file
Kept = dict[tuple[str, ...], list[pa.Table]]  # rows of answers, by their columns
WRITTEN = re.compile(r"-(\d+)-\d+\.parquet$")  # when a file was written, in ms, and its number


class ServedLogSettings(BaseModel):
    """`serve.served_*` as the ingress gets them."""

    folder: str
    share: float = 1.0
    histories: bool = False
    places: int = 100
    days: float = 30.0
    flush_s: float = 60.0


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
        self._waiting: queue.Queue[Served | FailedRequest | None] = queue.Queue(MAX_WAITING)
        self._number = 0
        self._thread = threading.Thread(target=self._write_all, name="served", daemon=True)
        self._thread.start()

    def note_answer(
        self,
        request: RankColumns | RecommendRequest,
        answer: RankedColumns | RecommendedList,
        request_id: str,
    ) -> None:
        """Keep what was served, if it is in the sample."""
        if self._is_left_out(request):
            return
        if head_of(request).history is not None and not self.settings.histories:
            return
        if random.random() >= self.settings.share:
            return
        try:
            served_at = int(time.time() * 1000)
            self._waiting.put_nowait(Served(request, answer, request_id, served_at))
        except queue.Full:
            self.metrics.served.labels("dropped").inc()

    def note_failure(self, request: RankColumns | RecommendRequest, failure: str) -> None:
        """Keep that a request got no answer, if it is in the sample."""
        if self._is_left_out(request) or random.random() >= self.settings.share:
            return
        failed = FailedRequest(head_of(request), failure, int(time.time() * 1000))
        try:
            self._waiting.put_nowait(failed)
        except queue.Full:
            self.metrics.served.labels("dropped").inc()

    def _is_left_out(self, request: RankColumns | RecommendRequest) -> bool:
        """True for the page, which looks at lists and serves nobody."""
        return (head_of(request).trial_key or "").startswith(TRIAL_KEY)

    def close(self) -> None:
        """Write what is there; nothing may be noted afterwards."""
        self._waiting.put(None)
        self._thread.join()

    def _write_all(self) -> None:
        kept: Kept = {}
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
                    num_rows += self._keep_rows(one, kept)
                del one  # an answer may hold thousands of candidates more

            if ended or num_rows >= MAX_ROWS or time.monotonic() >= due:
                self._write_files(kept)
                kept, num_rows = {}, 0
                due = time.monotonic() + self.settings.flush_s

    def _keep_rows(self, one: Served | FailedRequest, kept: Kept) -> int:
        """Add the rows of an answer to those of the same columns; returns how many there are."""
        try:
            rows = one.rows(self.settings.places)
        except Exception:  # whatever is wrong with one answer: the thread keeps the others
            logger.exception("an answer is not in the served log")
            self.metrics.served.labels("dropped").inc()
            return 0
        kept.setdefault(tuple(rows.column_names), []).append(rows)
        return rows.num_rows

    def _write_files(self, kept: Kept) -> None:
        """One file for the answers of each set of tasks and features; the thread goes on whatever
        happens to it.
        """
        for answers in kept.values():
            try:
                self._write_file(pa.concat_tables(answers))
                self.metrics.served.labels("written").inc(len(answers))
            except Exception:  # a disk that is full, a bucket that is gone: ranking goes on
                logger.exception("%d answers are not in the served log", len(answers))
                self.metrics.served.labels("dropped").inc(len(answers))

        try:
            remove_older(self.settings.folder, self.settings.days)
        except OSError:
            logger.exception("older files of the served log are still there")

    def _write_file(self, table: pa.Table) -> None:
        day = time.strftime("%Y-%m-%d", time.gmtime())
        name = f"{day}/{self.name}-{int(time.time() * 1000)}-{self._number}.parquet"
        self._number += 1

        if is_remote(self.settings.folder):
            files, folder = open_folder(self.settings.folder)
            pq.write_table(table, f"{folder}/{name}", filesystem=files, compression="zstd")
            return

        make_private_folder(Path(self.settings.folder))
        with staged_file(Path(self.settings.folder) / name) as stage:
            pq.write_table(table, stage, compression="zstd")


@contextmanager
def noting_failures(
    served: ServedLog | None, requests: Sequence[RankColumns | RecommendRequest]
) -> Iterator[None]:
    """Keep the requests as failed if the block raises, or is cancelled for taking too long."""
    try:
        yield
    except BaseException as error:
        if served is not None:
            for request in requests:
                served.note_failure(request, type(error).__name__)
        raise


# Reading ---------------------------------------------------------------------


def is_remote(folder: str) -> bool:
    """True of s3://… and the like."""
    return "://" in folder


def open_folder(folder: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """The file system of a served log, and the folder's path there."""
    if is_remote(folder):
        return pyarrow.fs.FileSystem.from_uri(folder)
    return pyarrow.fs.LocalFileSystem(), folder


def served_files(folder: str) -> list[tuple[str, int]]:
    """Path and time of writing (ms) of every file, the oldest first.

    All of a file's rows were served before that time.
    """
    files, place = open_folder(folder)
    selector = pyarrow.fs.FileSelector(place, recursive=True, allow_not_found=True)
    found = []
    for file in files.get_file_info(selector):
        name = WRITTEN.search(file.path)
        if name is not None:
            found.append((file.path, int(name[1])))
    return sorted(found, key=lambda file: (file[1], file[0]))


def read_files(folder: str, paths: Iterable[str], columns: Sequence[str]) -> pa.Table:
    """These columns of some files of a served log; one that a file does not have is null there."""
    files, _ = open_folder(folder)
    schema = pa.schema([_column_field(name) for name in columns])
    parts = [schema.empty_table()]
    for path in paths:
        known = pq.read_schema(path, filesystem=files).names
        there = [name for name in columns if name in known]
        parts.append(pq.read_table(path, columns=there, filesystem=files))
    return pa.concat_tables(parts, promote_options="default").select(columns)


def _column_field(name: str) -> pa.Field:
    if name in FIXED.names:
        return FIXED.field(name)
    return pa.field(name, pa.int32() if name.startswith(FEATURE) else pa.float32())


def read_served(folder: str, columns: Sequence[str]) -> pa.Table:
    """These columns of all files."""
    return read_files(folder, [path for path, _ in served_files(folder)], columns)


# Removing --------------------------------------------------------------------


def remove_older(folder: str, days: float) -> None:
    """Remove local files older than `days`; a bucket has rules of its own for that."""
    if is_remote(folder):
        return
    limit_ms = time.time() * 1000 - days * DAY_MS
    for path in Path(folder).glob("*/*.parquet"):
        # by its name: whoever forgets users writes the file anew
        name = WRITTEN.search(path.name)
        if name is not None and int(name[1]) < limit_ms:
            path.unlink(missing_ok=True)  # each ingress does so


def forget_served(folder: str, user_ids: Iterable[int]) -> int:
    """Take the rows of these users out of the files; returns how many there were."""
    users = np.array(list(user_ids), np.int64)
    files, _ = open_folder(folder)
    removed = 0
    for path, _ in served_files(folder):
        table = pq.read_table(path, filesystem=files)
        theirs = np.isin(table["user_id"].fill_null(-1).to_numpy(), users)
        kept = table.filter(pa.array(~theirs))
        removed += table.num_rows - kept.num_rows
        if kept.num_rows == table.num_rows:
            continue

        if kept.num_rows == 0:
            files.delete_file(path)
        elif is_remote(folder):  # an object is replaced as a whole
            pq.write_table(kept, path, filesystem=files, compression="zstd")
        else:
            with staged_file(Path(path)) as stage:
                pq.write_table(kept, stage, compression="zstd")
    return removed
