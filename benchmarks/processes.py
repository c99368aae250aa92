"""The processes that a benchmark starts: all of them end with it."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

PATIENCE_S = 60.0  # for a last checkpoint and the end of a Ray cluster


def exit_on_sigterm() -> None:
    """Let SIGTERM raise `SystemExit`, so that `with` blocks end what they started.

    A second one is ignored: `timeout` sends two, and it would break off what the first began.
    """

    def leave(number: int, _: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)


def end_process(process: "subprocess.Popen[Any]", patience_s: float = PATIENCE_S) -> None:
    """Ask a process that still runs to end. After `patience_s` it is killed, and all that it has
    started too.
    """
    if process.poll() is not None:
        return

    process.terminate()
    try:
        process.wait(patience_s)
    except subprocess.TimeoutExpired:
        kill_tree(process.pid)
        process.wait()


def kill_tree(root: int) -> None:
    """SIGKILL to the process and all that it has started, as when a machine is lost."""
    for pid in (root, *descendants(root)):
        with contextlib.suppress(ProcessLookupError):  # it has ended meanwhile
            os.kill(pid, signal.SIGKILL)


def descendants(ancestor: int) -> list[int]:
    """Processes that this one started, and those that they started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                facts = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            state, parent = facts[0], int(facts[1])
            if state != "Z":  # it has ended, and waits for its parent
                parents[int(entry.name)] = parent

    found, fresh = set(), {ancestor}
    while fresh:
        found |= fresh
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
    return sorted(found - {ancestor})
