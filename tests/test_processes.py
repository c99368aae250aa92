"""What a benchmark starts ends with it, by SIGTERM too."""

import argparse
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from benchmarks.processes import descendants, end_process
from benchmarks.training.train_job import TINY, JobCase, job_config, run_part
from pipeline.waiting import wait_until

ROOT = Path(__file__).parents[1]
PATIENCE_S = 60.0
# in the place of a job: says who it is, and when it is asked to end does so once it may
STAND_IN = """#!/bin/sh
trap 'touch {folder}/asked; until test -e {folder}/go; do sleep 0.1; done; exit 143' TERM
echo $$ > {folder}/part && mv {folder}/part {folder}/pid
while true; do sleep 0.1; done
"""
STUBBORN = "trap '' TERM; sleep 300 & echo $!; wait"
BENCHMARK = """
import sys
from pathlib import Path
from benchmarks.processes import exit_on_sigterm
from benchmarks.serving.deployed import ray_head, run_job

folder, sys.executable = Path(sys.argv[1]), sys.argv[2]
exit_on_sigterm()
try:
    if sys.argv[3] == "job":
        run_job("deploy", log=folder / "log", settings=[])
    else:
        with ray_head(folder, folder / "log"):
            pass
finally:
    has_waited = (folder / "go").exists()
    (folder / "left").write_text(str(has_waited))
"""


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    path = tmp_path / "stand_in"
    path.write_text(STAND_IN.format(folder=tmp_path))
    path.chmod(0o755)
    return path


def is_alive(pid: int) -> bool:
    """False of one that has ended and that nobody has waited for yet, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("what", ["job", "head"])
def test_the_chain_waits_for_what_it_has_started_when_it_is_asked_to_end(
    tmp_path: Path, stand_in: Path, what: str
) -> None:
    """Also when it is asked twice, as `timeout` does."""
    command = [sys.executable, "-c", BENCHMARK, tmp_path, stand_in, what]
    with subprocess.Popen(command, cwd=ROOT) as benchmark:
        wait_until((tmp_path / "pid").exists, "the process", PATIENCE_S)
        for _ in range(2):
            benchmark.terminate()
            wait_until((tmp_path / "asked").exists, "the process", PATIENCE_S)

        time.sleep(1.0)  # in which it leaves where the second one breaks off the first
        (tmp_path / "go").touch()
        assert benchmark.wait(PATIENCE_S) == 128 + signal.SIGTERM
    assert (tmp_path / "left").read_text() == "True"
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_a_training_job_ends_when_its_benchmark_is_asked_to(
    tmp_path: Path, stand_in: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", str(stand_in))
    options = argparse.Namespace(**TINY, minutes_a_job=10.0)
    case = JobCase(2, is_killed=True)
    cfg = job_config(case, tmp_path, options)
    stopping = threading.Event()

    def stop_once_it_runs() -> None:
        wait_until((tmp_path / "pid").exists, "the job", PATIENCE_S)
        stopping.set()
        (tmp_path / "go").touch()

    stopper = threading.Thread(target=stop_once_it_runs)
    stopper.start()
    with pytest.raises(RuntimeError, match="asked to end"):
        run_part(case, cfg, tmp_path, options, stopping)
    stopper.join()
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_what_does_not_end_is_killed_with_all_that_it_has_started() -> None:
    process = subprocess.Popen(["sh", "-c", STUBBORN], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    os.kill(child, 0)
    end_process(process, patience_s=0.2)
    assert process.returncode == -signal.SIGKILL
    wait_until(lambda: not is_alive(child), "the child's end", PATIENCE_S)


def test_descendants_are_children_and_their_children() -> None:
    script = (
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'input()'], stdin=sys.stdin)\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    grandchild = int(parent.stdout.readline())
    assert grandchild in descendants(parent.pid)

    parent.stdin.close()
    parent.wait(10)
    assert descendants(parent.pid) == []
