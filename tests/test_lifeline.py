"""What a killed driver leaves: nothing.

Processes end with the pipe it held, folders go when the next one starts.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

from pipeline import cluster, lifeline
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import gone

PARENT = """
import subprocess, sys
child = [sys.executable, "-c", "import os, time; print(os.getpid(), flush=True); time.sleep(600)"]
command = [sys.executable, "-I", sys.argv[1], *child]
subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True).wait()
"""


def test_a_command_ends_with_the_process_that_started_it() -> None:
    command = [sys.executable, "-c", PARENT, lifeline.__file__]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert not gone(child)
    parent.kill()
    parent.wait()
    wait_until(lambda: gone(child), f"process {child} outlived its killed parent")


def test_a_command_that_ends_by_itself_gives_its_exit_code() -> None:
    command = [sys.executable, "-I", lifeline.__file__, sys.executable, "-c", "raise SystemExit(3)"]
    held = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
    assert held.wait(PATIENCE_S) == 3
    slow = [sys.executable, "-c", "print('here', flush=True); import time; time.sleep(600)"]
    held = subprocess.Popen(
        [*command[:3], *slow], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
    )
    assert held.stdout is not None
    assert held.stdout.readline() == b"here\n"
    os.killpg(held.pid, signal.SIGTERM)
    assert held.wait(PATIENCE_S) == 256 - signal.SIGTERM


def test_the_folder_of_a_killed_driver_goes_and_those_of_the_living_stay(tmp_path: Path) -> None:
    for name in ("ray-ours", "ray-killed", "ray-foreign"):
        (tmp_path / name / "ray").mkdir(parents=True)
    lock = cluster._owned(tmp_path / "ray-ours")
    cluster._owned(tmp_path / "ray-killed").close()  # as the kernel does it
    assert (tmp_path / "ray-killed" / cluster.OWNER).read_text() == str(os.getpid())
    cluster.remove_orphans(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ray-foreign", "ray-ours"]
    lock.close()
