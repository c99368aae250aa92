"""The whole chain as a submitted job: a head with its own ports and token, and nothing left behind."""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from pipeline.cluster import free_port, serve_environment

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).with_name("ray")
# the smoke preset makes its own logs
EXCLUDED = ["/.git/", "/.venv/", "/runs/", "/data/", "/docs/"]
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(600)]


@dataclass
class Head:
    process: subprocess.Popen
    url: str
    environment: dict[str, str]
    log: Path

    def submit(self, *command: str) -> subprocess.CompletedProcess[str]:
        options = [
            "--address",
            self.url,
            "--working-dir",
            ".",
            "--runtime-env-json",
            json.dumps({"excludes": EXCLUDED}),
        ]
        return subprocess.run(
            # The full path of the interpreter: the job would otherwise run with the `python` of the
            # head's PATH.
            [RAY, "job", "submit", *options, "--", sys.executable, *command],
            cwd=ROOT,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=500,
        )


@pytest.fixture
def head() -> Iterator[Head]:
    # short: socket paths end at 107 characters
    folder = Path(tempfile.mkdtemp(prefix="head-", dir="/tmp"))
    token = folder / "token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RAY_")},
        **serve_environment(folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }
    dashboard = free_port()
    options = {
        "port": free_port(),
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "dashboard-agent-grpc-port": free_port(),
        "runtime-env-agent-port": free_port(),
        "metrics-export-port": free_port(),
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,  # any free port; the default range is everybody's
        "max-worker-port": 0,
        "num-cpus": 4,
        "object-store-memory": 300_000_000,
        "temp-dir": folder,
    }
    log = folder / "head.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                RAY,
                "start",
                "--head",
                "--block",
                "--disable-usage-stats",
                *(f"--{k}={v}" for k, v in options.items()),
            ],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    started = Head(process, f"http://127.0.0.1:{dashboard}", environment, log)
    try:
        wait_until_ready(started, token.read_text())
        yield started
    finally:
        if process.poll() is None:
            stop(process)
        shutil.rmtree(folder, ignore_errors=True)


def wait_until_ready(head: Head, token: str) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert head.process.poll() is None, head.log.read_text()
        try:
            answer = httpx.get(
                f"{head.url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=5
            )
            if answer.status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.5)
    raise AssertionError(f"no dashboard after 60 s: {head.log.read_text()}")


def running() -> dict[int, int]:
    """Parent by process id, those that have ended and wait for their parent left out."""
    rows = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,stat="], capture_output=True, text=True, check=True
    ).stdout
    return {
        int(pid): int(parent)
        for pid, parent, state in map(str.split, rows.splitlines())
        if state[0] != "Z"
    }


def descendants(root: int) -> set[int]:
    parents, found, new = running(), set(), {root}
    while new:
        found |= new
        new = {pid for pid, parent in parents.items() if parent in new} - found
    return found - {root}


def stop(process: subprocess.Popen) -> set[int]:
    """TERM the head and wait for its children; those still there after 30 s are killed and
    returned.
    """
    children = descendants(process.pid)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    deadline = time.monotonic() + 30
    while (alive := children & running().keys()) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return alive


def test_the_chain_runs_as_a_submitted_job(head, tmp_path):
    done = head.submit(
        "-m", "jobs.pipeline", "--config", "configs/smoke.yaml", "--set", f"runs_dir={tmp_path}"
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0, output
    assert "succeeded" in output
    summary = json.loads((tmp_path / "smoke" / "summary.json").read_text())
    assert summary["promoted"]
    assert summary["parity_requests"] > 0  # asked over HTTP
    assert summary["parity_max_abs_diff"] <= 1e-5
    assert summary["test_ne"]["is_click"] < 1

    assert len(descendants(head.process.pid)) > 3
    assert stop(head.process) == set()
