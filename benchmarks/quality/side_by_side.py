"""Many small trainings on one GPU, each in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def run_side_by_side(
    commands: Sequence[Sequence[str]], out: Path, processes: int, budget: float
) -> None:
    """Begin the commands in their order, `processes` at a time, and end after `budget` seconds.

    A command is what stands behind `python -m`. Lines that they print are added to `out` as they
    come; what is cut off by the time has added those that it had got to.
    """
    waiting, running = list(commands), []
    begin = time.monotonic()
    with out.open("ab") as lines:
        while waiting or running:
            running = [process for process in running if process.poll() is None]
            if time.monotonic() - begin > budget:
                for process in running:
                    process.kill()
                print(f"out of time: {len(running)} cut off, {len(waiting)} not begun", flush=True)
                return

            while waiting and len(running) < processes:
                command = [sys.executable, "-m", *waiting.pop(0)]
                one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
                running.append(subprocess.Popen(command, stdout=lines, env=one_thread))
            time.sleep(0.2)
