"""One training of a name at a time.

In a file of its own, which imports neither Ray nor PyTorch: a second job is refused before it has
loaded them, which on a busy machine takes most of a minute.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

from pipeline.config import UserError

LOCK_TIMEOUT_S = 5.0  # for one that is just about to end


@contextmanager
def only_training(runs_dir: str, name: str, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Keep every other job away from the training of this name for the length of the block.

    The lock is the kernel's: it goes with the process that holds it, however that ends.

    Raises:
        UserError: another job trains under this name; says which.
    """
    path = Path(runs_dir).absolute() / f".{name}.training"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+") as lock:
        if not _locked(lock, timeout_s):
            raise UserError(
                f"run {name!r} is being trained by another job ({path.read_text().strip()}): "
                "wait for it, end it, or choose another name"
            )
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}, since {now}\n")
        lock.flush()
        yield


def _locked(lock: IO[str], timeout_s: float) -> bool:
    """True once the exclusive lock on the file is ours; False where it is not within the time."""
    until = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > until:
                return False
            time.sleep(0.1)
