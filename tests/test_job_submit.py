"""The whole chain as a submitted job, beside another server: a head with its own ports and token,
and nothing left behind.
"""

import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import httpx
import pytest

from benchmarks.processes import descendants, kill_tree
from pipeline.cluster import free_port, remove_orphans, serve_environment
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import command_line, running

ROOT = Path(__file__).parent.parent
RAY = Path(sys.executable).with_name("ray")
# the smoke preset makes its own logs
EXCLUDED = ["/.git/", "/.venv/", "/runs/", "/data/", "/docs/"]
pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1200)]


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
        try:
            return subprocess.run(
                # The full path of the interpreter: the job would otherwise run with the `python` of
                # the head's PATH.
                [RAY, "job", "submit", *options, "--", sys.executable, *command],
                cwd=ROOT,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=2 * PATIENCE_S,  # a whole chain, not one step of it
            )
        except subprocess.TimeoutExpired as expired:
            said = (expired.output or b"").decode(errors="replace")
            pytest.fail(f"the job has not ended; it said:\n{said[-8000:]}")


@dataclass
class Neighbour:
    process: subprocess.Popen
    port: int
    log: Path
    identity: str = ""

    def deployment(self) -> str:
        """Identity of what it serves, once it does."""
        if not self.identity:
            assert self.process.stdout is not None
            self.identity = self.process.stdout.readline().strip()
            assert self.identity, self.log.read_text()
        return self.identity


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
    dashboard, port = free_port(), free_port()
    environment["RAY_ADDRESS"] = f"127.0.0.1:{port}"
    options = {
        "port": port,
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
    def answers() -> bool:
        assert head.process.poll() is None, head.log.read_text()
        try:
            answer = httpx.get(
                f"{head.url}/api/jobs/", headers={"Authorization": f"Bearer {token}"}, timeout=5
            )
        except httpx.TransportError:  # not listening yet
            return False
        return answer.status_code == 200

    wait_until(answers, f"the head's dashboard ({head.log})")


def stop(process: subprocess.Popen) -> set[int]:
    """TERM the head and wait for its children; those still there after 30 s are killed and
    returned.
    """
    children = set(descendants(process.pid))
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=PATIENCE_S)
    deadline = time.monotonic() + 30
    while (alive := children & running().keys()) and time.monotonic() < deadline:
        time.sleep(0.5)
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return alive


class Watch:
    """Ask a server all the time who it is, in a thread, and keep each deployment that answered."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.answers: Counter[str] = Counter()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _ask(self) -> None:
        while not self._done.wait(0.05):
            # a connection each time: one that is kept would stay with whoever took it; and not
            # httpx.get, whose certificates would take a processor from what is tested
            asking = HTTPConnection("127.0.0.1", self.port, timeout=5)
            try:
                asking.request("GET", "/readyz")
                answer = asking.getresponse()
                if answer.status == 200:
                    self.answers.update(json.load(answer)["deployments"])
            except (OSError, HTTPException):  # nobody listens, or it died with the request
                continue
            finally:
                asking.close()

    def goes_on(self, what: str, more: int = 20) -> None:
        """Wait for so many further answers."""
        enough = self.answers.total() + more
        wait_until(lambda: self.answers.total() >= enough, what)


@pytest.fixture
def neighbour(tmp_path: Path) -> Iterator[Neighbour]:
    """Another private cluster with a server, still on its way when the test begins."""
    port, log = free_port(), tmp_path / "neighbour.log"
    outside = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.neighbour", tmp_path / "neighbour", str(port)],
            cwd=ROOT,
            env=outside | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        yield Neighbour(process, port, log)
    finally:
        kill_tree(process.pid)
        process.wait()
        remove_orphans()


def ingress_of(head: Head) -> int:
    """Process that answers requests: the one replica of smoke.yaml, the ingress in it."""
    (found,) = (
        pid
        for pid in descendants(head.process.pid)
        if b"ServeReplica:ranking:RankerReplica" in command_line(pid)
    )
    return found


def test_the_chain_runs_as_a_submitted_job_beside_another_server(
    head: Head, neighbour: Neighbour, tmp_path: Path
):
    """Each server answers for itself alone: while the other starts, when its own ingress is killed,
    and when the other's whole cluster is.
    """
    port = free_port()
    options = [f"runs_dir={tmp_path}", f"serve.port={port}", "train.num_workers=1"]
    sets = [word for option in options for word in ("--set", option)]
    with Watch(port) as ours, Watch(neighbour.port) as theirs:
        done = head.submit("-m", "jobs.pipeline", "--config", "configs/smoke.yaml", *sets)
        check_chain(done, tmp_path / "smoke")
        assert neighbour.deployment()

        os.kill(ingress_of(head), signal.SIGKILL)
        time.sleep(5)  # HAProxy has noticed, and asks its fallback
        ours.goes_on("the ingress to come back")
        theirs.goes_on("the neighbour to go on answering")

        kill_tree(neighbour.process.pid)
        ours.goes_on("answers after the neighbour's death")

    assert len(ours.answers) == 1, ours.answers
    assert list(theirs.answers) == [neighbour.deployment()]
    assert len(descendants(head.process.pid)) > 3
    assert stop(head.process) == set()


def check_chain(done: subprocess.CompletedProcess[str], run_dir: Path) -> None:
    output = done.stdout
    assert done.returncode == 0, output
    assert "succeeded" in output
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["promoted"]
    assert summary["parity_requests"] > 0  # asked over HTTP
    assert summary["parity_max_abs_diff"] <= 1e-5
    assert summary["test_ne"]["is_click"] < 1
