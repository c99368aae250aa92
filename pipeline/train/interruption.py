"""What makes a training save before its time: somebody ends the job, or Ray gives notice that a
machine is about to go.

    SIGTERM, Ctrl-C, `ray job stop` → driver → wishes.txt → rank 0 ┐
    notice of a preemption → Ray Train → every rank                 ┴→ sum over ranks → checkpoint

A rank hears of it at a moment of its own. It puts its wish into the message that the ranks exchange
in each step anyway, and all act on the sum, so that they save after the same step.
"""

import json
import logging
import threading
import time
from pathlib import Path
from typing import Protocol

from pipeline.files import write_atomically

logger = logging.getLogger(__name__)

WISH = "wishes.txt"  # what the driver asks its workers for; always there, so that no cache lies
RUN, STOP = "run", "stop"
INTERRUPTED = "interrupted.json"  # rank 0's answer: the step of the checkpoint
UNDER_WAY = "under_way.json"  # there while steps are done
POLL_S = 0.5


class Wishes(Protocol):
    """What one rank asks all others for."""

    def take_wishes(self) -> tuple[bool, bool]:
        """(save, stop) since the last call."""
        ...

    def tell_stopped(self, step: int) -> None:
        """The checkpoint after `step` is saved, and no more steps are done."""
        ...


class WishWatcher:
    """Looks for wishes in a thread of one rank, while the block runs.

    Rank 0 reads the driver's file; `preempted` of each rank says whether notice was given.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        self.folder, self.rank = folder, rank
        self.save, self.stop = threading.Event(), threading.Event()
        self.ended = threading.Event()

    def take_wishes(self) -> tuple[bool, bool]:
        save, stop = self.save.is_set(), self.stop.is_set()
        self.save.clear()
        return save, stop

    def tell_stopped(self, step: int) -> None:
        if self.rank == 0:
            write_atomically(self.folder / INTERRUPTED, json.dumps({"step": step}))

    def __enter__(self) -> "WishWatcher":
        if self.rank == 0:
            write_atomically(self.folder / UNDER_WAY, json.dumps({"since": time.time()}))
        threading.Thread(target=self._watch, name="wishes", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.rank == 0:
            (self.folder / UNDER_WAY).unlink(missing_ok=True)

    def _watch(self) -> None:
        warned = False
        while not self.ended.wait(POLL_S):
            if not warned and is_preempted():
                logger.warning("a machine of this training is about to go: saving a checkpoint")
                self.save.set()
                warned = True
            if self.rank == 0 and read_wish(self.folder) == STOP:
                self.stop.set()


def is_preempted() -> bool:
    """True once Ray Train has given notice to this worker.

    Its public `ray.train.get_preemption_info` is a barrier over all ranks: too much for a step.
    """
    from ray.train.v2._internal.execution.context import get_train_context

    try:
        return get_train_context().preemption_context.preemption_info is not None
    except RuntimeError:  # no worker of Ray Train
        return False


def read_wish(folder: Path) -> str:
    """What the driver asks for at this moment."""
    try:
        return (folder / WISH).read_text().strip()
    except OSError:
        return RUN


def forget_wishes(folder: Path) -> None:
    """Before workers start: nobody wishes anything, and nothing was interrupted."""
    (folder / WISH).write_text(RUN)
    for name in (INTERRUPTED, UNDER_WAY):
        (folder / name).unlink(missing_ok=True)


def ask_to_stop(folder: Path, timeout_s: float) -> int | None:
    """Ask the workers for a checkpoint and their end; the step that they saved after.

    None where there is nothing to save: no step was under way, or none came within `timeout_s`.
    """
    if not (folder / UNDER_WAY).exists():
        return None

    (folder / WISH).write_text(STOP)
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and (folder / UNDER_WAY).exists():
        time.sleep(0.05)
    answer = folder / INTERRUPTED
    return json.loads(answer.read_text())["step"] if answer.exists() else None
