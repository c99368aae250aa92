"""The metrics of a training by step: a file that is the truth, and a feed from it to a tracker.

    loop → metrics.jsonl → feed (a thread of rank 0) → tracker
                         → `send_rest` (the driver, at the end or at the next attempt)

The file is the queue between the two. A step waits for a line to be written and for nothing else: a
tracker that is slow, or gone, neither stops nor slows a training, and takes no memory. What it
missed is sent once it answers.

`metrics_sent.json` says how far a tracker's run has come. Steps up to there are not sent again, so
a run that goes on from a checkpoint repeats no step.
"""

import json
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.config import Outage
from pipeline.files import write_atomically

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"
SENT = "metrics_sent.json"
WRITTEN_AT = "at_seconds"  # since 1970, in each line beside its step
LINES_PER_REQUEST = 30
RETRY_AFTER_S = 5.0
CLOSE_TIMEOUT_S = 20.0


class MetricsLine(NamedTuple):
    """What one step logged, and when, in seconds since 1970."""

    step: int
    at_seconds: float
    values: dict[str, float]


Send = Callable[[Sequence[MetricsLine]], None]


class MetricsFile:
    """One JSON line per logged step, rank 0's.

    A resumed run drops the lines after the checkpoint it starts from.
    """

    def __init__(self, path: Path, resumed_at: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A crash may have cut the last line short.
        whole = [line for line in lines if line.endswith("\n")]
        kept = [line for line in whole if json.loads(line)["step"] <= resumed_at]
        write_atomically(path, "".join(kept))
        self.path = path

    def append(self, step: int, values: dict[str, float]) -> None:
        """Write the values that are numbers: an undefined one is left out."""
        line: dict[str, float] = {"step": step, WRITTEN_AT: round(time.time(), 3)}
        for name, value in values.items():
            if math.isfinite(value):
                line[name] = value
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def parse_line(text: str) -> MetricsLine:
    """A line of the file; one of an older version, without its time, counts as written now."""
    values = json.loads(text)
    return MetricsLine(values.pop("step"), values.pop(WRITTEN_AT, time.time()), values)


class MetricsFeed:
    """Sends the lines of `folder` that the run `run_id` of a tracker does not have yet.

    `send` takes some lines, all or none of them, and raises `Outage` where the tracker does not
    answer. It is called from one thread at a time.
    """

    def __init__(self, folder: Path, run_id: str, send: Send) -> None:
        self.folder, self.run_id, self.send = folder, run_id, send
        self.sent = self._read_sent()  # the last step that the tracker has
        self.offset = 0  # bytes of the file that are done with
        self.written = threading.Event()
        self.closing = threading.Event()
        self.thread: threading.Thread | None = None

    def _read_sent(self) -> int:
        note = self.folder / SENT
        if not note.exists():
            return 0
        found = json.loads(note.read_text())
        return found["step"] if found["run_id"] == self.run_id else 0

    def start(self) -> None:
        """Send in the background, from now on until `close`."""
        self.thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self.thread.start()

    def notify(self) -> None:
        """A line was written."""
        self.written.set()

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Stop the thread; what is not sent within `timeout_s` seconds is left to the driver."""
        if self.thread is not None:
            self.closing.set()
            self.written.set()
            self.thread.join(timeout_s)

    def _run(self) -> None:
        told = False
        while True:
            self.written.wait()
            self.written.clear()
            last = self.closing.is_set()
            try:
                self.send_rest()
                told = False
            except Outage as error:
                if not told:
                    logger.warning("metrics are kept in %s and sent later: %s", METRICS, error)
                told = True
                self.closing.wait(RETRY_AFTER_S)
                self.written.set()
            except Exception:
                logger.exception("metrics are in %s and no longer sent", METRICS)
                return
            if last:
                return

    def send_rest(self) -> None:
        """Send all lines that are missing, oldest first.

        Raises:
            Outage: the tracker does not answer; what it took before is noted.
        """
        while True:
            lines, end = self._next_lines()
            if not lines:
                return

            new = [line for line in lines if line.step > self.sent]
            if new:
                self.send(new)
                self.sent = new[-1].step
                note = {"run_id": self.run_id, "step": self.sent}
                write_atomically(self.folder / SENT, json.dumps(note))
            self.offset = end

    def _next_lines(self) -> tuple[list[MetricsLine], int]:
        """Some whole lines after `offset`, and where they end."""
        path, end = self.folder / METRICS, self.offset
        if not path.exists():
            return [], end

        found: list[MetricsLine] = []
        with path.open("rb") as file:
            file.seek(end)
            for text in file:
                # one that is being written has no end yet
                if len(found) == LINES_PER_REQUEST or not text.endswith(b"\n"):
                    break
                found.append(parse_line(text.decode()))
                end += len(text)
        return found, end
