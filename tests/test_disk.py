"""A disk that takes no more is one message, wherever it is met: no stack of Ray's."""

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.config import Outage, UserError
from pipeline.disk import find_disk_fault

ROOT = Path(__file__).parent.parent
SMOKE = ROOT / "configs" / "smoke.yaml"
LARGEST_FILE = 4096  # bytes; the file of smoke.yaml's logs is longer


def run_import(runs_dir: Path, largest: int = resource.RLIM_INFINITY) -> tuple[int, str]:
    """Exit code and error text of `jobs.import_logs`, whose files may have `largest` bytes."""

    def limit_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    command = [sys.executable, "-m", "jobs.import_logs", "--config", str(SMOKE)]
    done = subprocess.run(
        [*command, "--set", f"runs_dir={runs_dir}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=limit_files,
        check=False,
    )
    return done.returncode, done.stderr


def test_a_disk_that_takes_no_more_is_one_message_and_worth_another_try(tmp_path: Path) -> None:
    code, said = run_import(tmp_path / "runs", LARGEST_FILE)
    assert code == 1
    (line,) = said.splitlines()
    assert line.startswith("error: a disk is full: [Errno 27]")
    assert f"{tmp_path / 'runs'} has " in line

    # what was half-written is in nobody's way
    assert run_import(tmp_path / "runs")[0] == 0


def test_a_folder_of_runs_that_is_none_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("a file")
    code, said = run_import(tmp_path / "runs")
    assert code == 2
    (line,) = said.splitlines()
    assert line.startswith(f"error: runs_dir: {tmp_path / 'runs'}")
    assert "cannot be written" in line


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_known_through_what_wraps_it(number: int, tmp_path: Path) -> None:
    error = OSError(number, os.strerror(number), str(tmp_path / "x"))
    # the last line is the error's own, with the path
    stack = f"a task failed: {os.strerror(number)}\n  File somewhere\nOSError: {error}\n"
    wrapped = RuntimeError(stack)
    for one in (error, wrapped):
        fault = find_disk_fault(one, tmp_path)
        assert isinstance(fault, Outage)
        assert f"{os.strerror(number)}: '{tmp_path / 'x'}'" in str(fault)
        assert "\n" not in str(fault)


def test_other_errors_are_none_of_a_disk(tmp_path: Path) -> None:
    elsewhere = PermissionError(errno.EACCES, "Permission denied", "/etc/shadow")
    gone = FileNotFoundError(errno.ENOENT, "gone", "x")
    made_twice = FileExistsError(errno.EEXIST, "File exists", str(tmp_path))
    for error in (ValueError("disk"), gone, elsewhere, made_twice):
        assert find_disk_fault(error, tmp_path) is None
    mine = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "x"))
    fault = find_disk_fault(mine, tmp_path)
    assert isinstance(fault, UserError)
    assert str(tmp_path / "x") in str(fault)
