"""What a killed driver leaves: nothing.

Processes end with the lock it held, folders go when the next one starts.
"""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from pipeline import cluster, lifeline
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import gone

USER = """
import fcntl, sys, time
held = open(sys.argv[1], "a")
fcntl.flock(held, fcntl.LOCK_SH)
print("uses it", flush=True)
time.sleep(600)
"""
COMMAND = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


def use_lock(folder: Path) -> subprocess.Popen[str]:
    """A process that uses what `lifeline` runs in the folder."""
    command = [sys.executable, "-c", USER, str(folder / "users")]
    user = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert user.stdout is not None
    assert user.stdout.readline() == "uses it\n"
    return user


def hold(folder: Path, program: str) -> subprocess.Popen[str]:
    """`program` under a lifeline in the folder."""
    command = [
        sys.executable,
        "-I",
        lifeline.__file__,
        str(folder / "users"),
        str(folder / "alive"),
    ]
    command += [sys.executable, "-c", program]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)


def is_locked(path: Path) -> bool:
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_a_command_ends_with_the_last_process_that_uses_it(tmp_path: Path) -> None:
    first, second = use_lock(tmp_path), use_lock(tmp_path)
    held = hold(tmp_path, COMMAND)
    assert held.stdout is not None
    child = int(held.stdout.readline())
    assert is_locked(tmp_path / "alive"), "the proof that it is the one of this folder"

    first.kill()
    first.wait()
    time.sleep(3 * lifeline.POLL_S)
    assert not gone(child), "another process uses it"
    second.kill()
    second.wait()
    wait_until(lambda: gone(child), f"process {child} to end with its last user")
    held.wait(PATIENCE_S)
    assert not is_locked(tmp_path / "alive")


def test_a_command_that_ends_by_itself_gives_its_exit_code(tmp_path: Path) -> None:
    user = use_lock(tmp_path)
    assert hold(tmp_path, "raise SystemExit(3)").wait(PATIENCE_S) == 3

    held = hold(tmp_path, COMMAND)
    assert held.stdout is not None
    assert int(held.stdout.readline()) > 0
    os.killpg(held.pid, signal.SIGTERM)
    assert held.wait(PATIENCE_S) == 256 - signal.SIGTERM
    user.kill()
    user.wait()


def test_the_folder_of_a_killed_driver_goes_and_those_of_the_living_stay(tmp_path: Path) -> None:
    for name in ("ray-ours", "ray-killed", "ray-foreign"):
        (tmp_path / name / "ray").mkdir(parents=True)
    lock = cluster._owned(tmp_path / "ray-ours")
    cluster._owned(tmp_path / "ray-killed").close()  # as the kernel does it
    assert (tmp_path / "ray-killed" / cluster.OWNER).read_text() == str(os.getpid())
    cluster.remove_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ray-foreign", "ray-ours"]
    lock.close()
