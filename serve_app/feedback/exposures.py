"""What was served as rows of the logs: each place of an answer is an exposure, and what nobody
posted of it within a while did not happen.

    served/<day>/<ingress>-<written, ms>-<number>.parquet → LOG rows → runs/<name>/live_logs

Posted events are rows of their own. The build merges the rows of one event (user, item and time):

    served   user 3, item 10, 12:00, request "a"      click no     like no      final
    posted   user 3, item 10, 12:00, request "a"      click yes
    built    user 3, item 10, 12:00                   click yes    like no

Where the event of an answer was posted with another time, the exposure takes that time.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa

from pipeline.config import ExposureConfig, SequenceConfig
from pipeline.files import write_atomically
from pipeline.schema import NAMED_IDS
from serve_app.columns import UNKNOWN
from serve_app.feedback.served_log import read_files, served_files
from serve_app.feedback.served_rows import FEATURE
from serve_app.history.posting import PostingRules
from serve_app.ids import id_text, request_id_of
from serve_app.schemas import Event

MARK = "served.json"
READ = ("request_id", "user_id", "user_text", "event_time", "served_at", "item_id", "item_text")
READ += ("place", "failure")


@dataclass(frozen=True, slots=True)
class ExposureRules:
    """Which served rows are exposures, and what is known of them (`serve.exposures`)."""

    places: int  # of an answer, that its user was shown
    wait_ms: float  # from a file's end until what was not posted did not happen
    max_age_ms: float  # between the request's time and its answer
    actions: tuple[str, ...]  # that clients post
    # With `sequences.repeats: first` the first row of an event is the one that is kept: then an
    # exposure waits until all is known of it, and adds nothing to what was posted.
    first_only: bool = False

    @classmethod
    def of(cls, cfg: ExposureConfig, actions: tuple[str, ...], *, first_only: bool) -> Self:
        return cls(
            places=cfg.places,
            wait_ms=cfg.wait_h * 3_600_000,
            max_age_ms=cfg.max_age_s * 1000,
            actions=actions if cfg.actions is None else cfg.actions,
            first_only=first_only,
        )


class Outcomes:
    """What was posted, to tell which of the served rows have an event, and what it says itself."""

    def __init__(self) -> None:
        self.by_request: dict[tuple[int, int, str], int] = {}  # user, item, request_id -> time
        # user, item, time -> the request columns that the event has, request_id among them
        self.said: dict[tuple[int, int, int], frozenset[str]] = {}
        self._each: dict[frozenset[str], frozenset[str]] = {}  # of equal sets one is held

    def note_events(self, events: Iterable[Event]) -> None:
        for event in events:
            user, item = int(event.user_id), int(event.item_id)
            said = set(event.request_features)
            request = id_text(event.request_id)
            if request is not None:
                said.add("request_id")
                self.by_request[user, item, request] = event.event_time
            names = frozenset(said)
            self.said[user, item, event.event_time] = self._each.setdefault(names, names)


@dataclass(frozen=True, slots=True)
class ServedAnswers:
    """A served log (`folder`, s3://… too), and what of it is an exposure."""

    folder: str
    cfg: ExposureConfig

    def open_exposures(
        self,
        actions: tuple[str, ...],
        sequences: SequenceConfig,
        posting: PostingRules,
        schema: pa.Schema,
    ) -> "Exposures":
        """The exposures, as LOG rows of `schema`."""
        first_only = sequences.repeats == "first"
        rules = ExposureRules.of(self.cfg, actions, first_only=first_only)
        return Exposures(self.folder, rules, posting, schema)


def read_mark(folder: Path) -> int:
    """Since when (ms) files of the served log are to be read; all that came before is exported."""
    file = folder / MARK
    return json.loads(file.read_text())["final_until_ms"] if file.exists() else 0


def write_mark(folder: Path, final_until_ms: int) -> None:
    """Note that earlier files need not be read again."""
    write_atomically(folder / MARK, json.dumps({"final_until_ms": final_until_ms}))


def settled_before(folder: Path, cfg: ExposureConfig, flush_s: float) -> float:
    """The time (ms) of the earliest event that an exposure may still ask for.

    An exposure finds its event by the request, and takes its time. Were the event pruned before the
    exposure is final, there would be one at the request's time, of which nothing came.

        request, answer      12:00     an hour may lie between them: max_age_s
        in a file            12:01     flush_s later
        final                12:01 of the next day, with wait_h 24
    """
    return read_mark(folder) - 1000 * (cfg.max_age_s + flush_s)


class Exposures:
    """The exposures of a served log that are not exported yet.

    Args:
        folder: of the served log, s3://… too.
        rules: which of its rows are exposures.
        posting: what the sequences have a place for.
        schema: of the rows that come out: LOG as its own files have it.
    """

    def __init__(
        self, folder: str, rules: ExposureRules, posting: PostingRules, schema: pa.Schema
    ) -> None:
        self.folder = folder
        self.rules = rules
        self.posting = posting
        self.schema = schema
        self.left_out: Counter[str] = Counter()  # rows by why they are no exposures
        self.final_until_ms = 0
        self._seen: set[int] = set()  # hashes of user, item and time

    def read_rows(self, outcomes: Outcomes, since_ms: int) -> Iterator[pa.Table]:
        """LOG rows of the files that were written at `since_ms` or later, file after file.

        What came before `final_until_ms`, known when all are read, need not be read again.
        """
        self.final_until_ms = int(time.time() * 1000 - self.rules.wait_ms)
        for path, written_ms in served_files(self.folder):
            is_final = written_ms < self.final_until_ms
            if written_ms < since_ms or (self.rules.first_only and not is_final):
                continue

            columns = [*READ, *(FEATURE + name for name in self.posting.columns.request)]
            served = self._keep_exposures(read_files(self.folder, [path], columns))
            rows = self._log_rows(served, outcomes, is_final=is_final)
            if rows.num_rows:
                yield rows

    def _keep_exposures(self, served: pa.Table) -> pa.Table:
        """The rows that were shown to somebody who is known, at a time that the logs take."""
        failed = served["failure"].is_valid()
        self.left_out["failed"] += failed.to_numpy().sum().item()
        served = served.filter(pa.array(~failed.to_numpy()))

        text_ids = self.posting.columns.text_ids
        times = served["event_time"].to_numpy()
        latest_ms = self.posting.latest_of(int(time.time() * 1000))

        wrong = {
            "no user_id": served["user_id"].is_null(),
            "another time": np.abs(served["served_at"].to_numpy() - times) > self.rules.max_age_ms,
            "event_time": (times < self.posting.earliest_ms) | (times > latest_ms),
        }
        wrong["not shown"] = served["place"].to_numpy() >= self.rules.places
        for name, texts in zip(NAMED_IDS, ("user_text", "item_text"), strict=True):
            has_text = served[texts].is_valid().to_numpy()
            wrong[name] = has_text != (name in text_ids)

        # each row for the first reason alone
        kept = np.ones(served.num_rows, bool)
        for reason, rows in wrong.items():
            found = kept & np.asarray(rows)
            self.left_out[reason] += int(found.sum())
            kept &= ~found
        return served.filter(pa.array(kept))

    def _log_rows(self, served: pa.Table, outcomes: Outcomes, *, is_final: bool) -> pa.Table:
        """The rows in the form of LOG, each event once.

        Of an event that was posted they say what it does not say itself.
        """
        names = ("user_id", "item_id", "event_time")
        keys = [served[name].to_numpy().tolist() for name in names]
        requests: list[str] = served["request_id"].to_pylist()  # pyright: ignore
        times: list[int] = []
        said: list[frozenset[str] | None] = []  # None: nothing was posted
        is_first: list[bool] = []
        for user, item, asked_at, request in zip(*keys, requests, strict=True):
            posted_at = outcomes.by_request.get((user, item, request))
            event_time = int(asked_at) if posted_at is None else posted_at
            key = (user, item, event_time)
            times.append(event_time)
            said.append(outcomes.said.get(key))
            is_first.append(hash(key) not in self._seen)
            self._seen.add(hash(key))

        columns = {
            "user_id": served["user_text" if self._is_text("user_id") else "user_id"],
            "item_id": served["item_text" if self._is_text("item_id") else "item_id"],
            "event_time": pa.array(times, pa.int64()),
            "request_id": self._request_ids(requests, _says(said, "request_id")),
        }
        for name in self.posting.columns.request:
            columns[name] = _whole_numbers(served[FEATURE + name], _says(said, name))
        if is_final:
            no = pa.array(np.zeros(served.num_rows, np.int8))
            columns |= dict.fromkeys(self.rules.actions, no)

        arrays = []
        for field in self.schema:
            unknown = pa.nulls(served.num_rows, field.type)
            arrays.append(columns.get(field.name, unknown))
        rows = pa.table(arrays, schema=self.schema)

        kept = np.array(is_first, bool)
        self.left_out["again"] += int((~kept).sum())
        if self.rules.first_only:
            kept &= np.array([names is None for names in said], bool)
        return rows.filter(pa.array(kept))

    def _is_text(self, name: str) -> bool:
        return name in self.posting.columns.text_ids

    def _request_ids(self, requests: list[str], is_said: np.ndarray) -> pa.Array:
        if pa.types.is_string(self.schema.field("request_id").type):
            return pa.array(requests, pa.string(), mask=is_said)
        codes = {text: int(request_id_of(text)) for text in set(requests)}
        return pa.array([codes[text] for text in requests], pa.int64(), mask=is_said)


def _says(said: Sequence[frozenset[str] | None], name: str) -> np.ndarray:
    """bool: the row's event was posted with a value of this column."""
    return np.array([names is not None and name in names for names in said], bool)


def _whole_numbers(values: pa.ChunkedArray, is_said: np.ndarray) -> pa.Array:
    """int32: null where the logs have no place for it, or the event's own row says it."""
    numbers = values.fill_null(UNKNOWN).to_numpy().astype(np.int32)
    return pa.array(numbers, pa.int32(), mask=is_said | (numbers < 0))
