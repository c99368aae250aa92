"""Processes of this machine, read from /proc: who lives, and who was started by whom."""

import contextlib
import os
import signal
import subprocess
from pathlib import Path


def running() -> dict[int, int]:
    """Parent by process id, those that have ended and wait for their parent left out."""
    rows = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    found = {}
    for row in rows.splitlines():
        pid, parent, state = row.split()
        if state[0] != "Z":
            found[int(pid)] = int(parent)
    return found


def gone(pid: int) -> bool:
    """True for a process that has ended, one that nobody has waited for yet included."""
    return pid not in running()


def descendants(root: int) -> set[int]:
    """Children of the process, their children and so on, without `root` itself."""
    parents, found, new = running(), set(), {root}
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in new} - found
    return found - {root}


def command_line(pid: int) -> bytes:
    """Words of the process's command, each ended by a zero byte; b"" for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def kill_tree(root: int) -> None:
    """SIGKILL to the process and everything below it, as when a machine is lost."""
    for pid in (root, *descendants(root)):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
