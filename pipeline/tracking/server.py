"""The MLflow server: the one that a configuration names, or a real one over `runs_dir/mlflow` for a
job's own time.

Everything speaks HTTP to one server, so that no two processes share its sqlite file. `tracking.py`
and `registry.py` talk to it, inside `with mlflow_server(...)`, and import MLflow where they use it:
two seconds that a job without it does not pay.
"""

import fcntl
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from pipeline import lifeline
from pipeline.cluster import free_port
from pipeline.config import TrackingConfig, UserError
from pipeline.files import write_atomically
from pipeline.waiting import progress_lines, wait_until

if typing.TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 15


@contextmanager
def mlflow_server(
    settings: TrackingConfig, runs_dir: str, port: int | None = None
) -> Iterator[str]:
    """The tracking server's address for the length of the block; `runs.py` and `registry.py` talk
    to it.

    With `tracking.uri` that server, which must answer. Otherwise a server over `runs_dir/mlflow`:
    the one that another job has running there, or our own on `port` (None: any free one), ended
    with the block.

    Raises:
        UserError: the server named in the configuration does not answer, or ours does not start.
    """
    process, limit_s = None, settings.start_timeout_s
    if settings.uri is not None:
        uri = settings.uri
        _require_healthy(uri, limit_s)
    else:
        uri, process = _start_or_join(Path(runs_dir).absolute() / "mlflow", port, limit_s)

    try:
        with tracking_uri(uri):
            yield uri
    finally:
        if process is not None:
            _end(process)


@contextmanager
def tracking_uri(uri: str) -> Iterator[None]:
    # Seven retries, MLflow's default, are four minutes of silence when the server is gone.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
    import mlflow

    before = mlflow.get_tracking_uri() if mlflow.is_tracking_uri_set() else None
    mlflow.set_tracking_uri(uri)
    try:
        yield
    finally:
        mlflow.set_tracking_uri(before)  # pyright: ignore[reportArgumentType] None resets it


def current_url() -> str:
    """Address of the server whose session this is."""
    import mlflow

    return mlflow.get_tracking_uri()


def mlflow_client(uri: str | None = None) -> "MlflowClient":
    import mlflow

    # Without an address MLflow would make itself a database in the current folder.
    assert uri or mlflow.is_tracking_uri_set(), "call this inside a session"
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def one_message() -> Iterator[None]:
    """MLflow's errors for what a user can get wrong, a server that went away above all, as
    `UserError`.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = str(error)
        if "failed with exception" in text:  # no answer after the retries
            where = re.search(r"https?://[^/\s]+", text)
            raise UserError(
                f"the MLflow server does not answer any more ({where and where.group()})"
            ) from error
        raise


def is_absent(error: "MlflowException") -> bool:
    return error.error_code == "RESOURCE_DOES_NOT_EXIST" or "not found" in str(error)


def _start_or_join(
    folder: Path, port: int | None, limit_s: float
) -> tuple[str, subprocess.Popen | None]:
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "server.json"

    with open(folder / "lock", "w") as lock:
        # two jobs that start at once share one server: sqlite has one writer
        with progress_lines("another job's MLflow server to start", limit_s):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if note.exists():
            uri = json.loads(note.read_text())["uri"]
            if _healthy(uri, limit_s):
                logger.info("joining the MLflow server at %s", uri)
                return uri, None

        uri, process = _start(folder, port or free_port(), limit_s)
        write_atomically(note, json.dumps({"uri": uri, "pid": process.pid}))
    return uri, process


def _start(folder: Path, port: int, limit_s: float) -> tuple[str, subprocess.Popen]:
    uri = f"http://127.0.0.1:{port}"
    options = {
        "host": "127.0.0.1",
        "port": str(port),
        "workers": "1",
        "backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "artifacts-destination": str(folder / "artifacts"),
    }
    # a job that is killed leaves no server behind
    command = [sys.executable, "-I", lifeline.__file__, sys.executable, "-m", "mlflow", "server"]
    for name, value in options.items():
        command += [f"--{name}", value]
    quiet = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "DO_NOT_TRACK": "true",
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }

    log = folder / "server.log"
    with open(log, "ab") as output:
        process = subprocess.Popen(
            command,
            env=os.environ | quiet,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=folder,
            start_new_session=True,
        )

    def healthy_or_ended() -> bool:
        return process.poll() is not None or _healthy(uri)

    try:
        # a busy machine takes most of a minute to import MLflow three times
        wait_until(healthy_or_ended, "the MLflow server", limit_s)
        started = process.poll() is None
    except TimeoutError:
        started = False
    if not started:
        _end(process)
        last = log.read_text(errors="replace").splitlines()[-3:]
        raise UserError(
            f"the MLflow server over {folder} did not start ({log}): {' / '.join(last)}"
        )
    logger.info("MLflow server at %s, over %s", uri, folder)
    return uri, process


def _end(process: subprocess.Popen) -> None:
    """End the server and its workers: the process group that it leads, and nothing else."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break

        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            logger.warning("the MLflow server (pid %d) did not end on %s", process.pid, number.name)
    process.wait()

    until = time.monotonic() + STOP_TIMEOUT_S
    # a worker that was killed takes a moment to go
    while _group_lives(process.pid) and time.monotonic() < until:
        time.sleep(0.05)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _require_healthy(uri: str, limit_s: float) -> None:
    if not _healthy(uri, limit_s):
        raise UserError(f"tracking.uri: no MLflow server answers at {uri!r}")


def _healthy(uri: str, limit_s: float = 5) -> bool:
    """True if a server answers at `uri`; one that is there but slow is given `limit_s` seconds."""
    try:
        with progress_lines(f"an answer from {uri}", limit_s):
            answer = httpx.get(
                f"{uri.rstrip('/')}/health", timeout=httpx.Timeout(limit_s, connect=5)
            )
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return answer.status_code == 200


def plan_server(settings: TrackingConfig, runs_dir: str) -> dict[str, object]:
    """Where runs and versions are, for `--dry-run`.

    Raises:
        UserError: the server named in the configuration does not answer.
    """
    uri = settings.uri
    if uri is not None:
        _require_healthy(uri, settings.start_timeout_s)
    return {
        "tracking": uri or str(Path(runs_dir).absolute() / "mlflow"),
        "model": settings.model_name,
    }
