"""Processes of this machine, read from /proc: who lives, and with which words."""

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


def command_line(pid: int) -> bytes:
    """Words of the process's command, each ended by a zero byte; b"" for one that has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
