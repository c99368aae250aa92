"""What a disk refuses, in one message: a full one, and a place where nothing may be written."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

from pipeline.config import Outage, UserError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# what an error of another process, of a library or of SQLite says of it
SAID = (*(os.strerror(number) for number in FULL), "database or disk is full")
# of a path that cannot be written whatever is tried again
CLOSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP),
)


def find_disk_fault(error: Exception, runs_dir: Path) -> UserError | Outage | None:
    """The error as one message where a disk is its reason; None where it has another.

    It may come from a task or a worker elsewhere, wrapped by whoever ran it.

        OSError 28, RayTaskError(OSError 28), CheckpointException of it      Outage
        OSError 13, 30, 20 of a path below `runs_dir`                        UserError
    """
    said = find_full_disk(error)
    if said is not None:
        temporary = Path(tempfile.gettempdir())
        return Outage(
            f"a disk is full: {said} ({_free(runs_dir)}, {_free(temporary)}); free some space "
            "and give the same command again"
        )

    if isinstance(error, OSError) and error.errno in CLOSED and error.filename is not None:
        path = Path(os.fsdecode(error.filename)).absolute()
        # a folder that somebody makes twice is no fault of the disk
        is_made_twice = error.errno == errno.EEXIST and path.is_dir()
        if path.is_relative_to(runs_dir.absolute()) and not is_made_twice:
            return UserError(f"runs_dir: {path} cannot be written: {error.strerror}")
    return None


def find_full_disk(error: Exception) -> str | None:
    """The line of an error that says that a disk is full; None where it says nothing of it."""
    found = None
    for line in str(error).splitlines():
        if any(words in line for words in SAID):
            found = line.strip()
    return found


def _free(folder: Path) -> str:
    """The space that is left where the folder lies, or would lie."""
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    return f"{folder} has {shutil.disk_usage(there).free / 1e6:,.0f} MB left"
