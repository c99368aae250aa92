"""The MLflow server: the one that a configuration names, or a real one over `runs_dir/mlflow` for
as long as a job uses it.

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
import socket
import subprocess
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, Any

import httpx

from pipeline import lifeline
from pipeline.cluster import free_port
from pipeline.config import Outage, TrackingConfig, UserError
from pipeline.files import write_atomically
from pipeline.waiting import certificates, progress_lines, wait_until

if typing.TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

logger = logging.getLogger(__name__)

STOP_TIMEOUT_S = 15
LINGER_S = 5

# files beside the server's database
USERS = "users"  # each job that uses the server holds a shared lock on it
PROOF = "alive"  # the server itself holds an exclusive one
NOTE = "server.json"  # its address, process and machine


@contextmanager
def mlflow_server(
    settings: TrackingConfig, runs_dir: str, port: int | None = None
) -> Iterator[str]:
    """The tracking server's address for the length of the block; `runs.py` and `registry.py` talk
    to it.

    With `tracking.uri` that server, which must answer. Otherwise the one over `runs_dir/mlflow`,
    which all jobs of that folder share: started on `port` (None: any free one) by the first of
    them, ended with the last.

    Raises:
        Outage: the server named in the configuration does not answer, or ours does not start.
    """
    if settings.uri is None:
        server = _shared_server(Path(runs_dir).absolute() / "mlflow", port, settings)
    else:
        _require_healthy(settings.uri, settings.start_timeout_s)
        server = nullcontext(settings.uri)

    with server as uri, tracking_uri(uri):
        yield uri


def has_server(settings: TrackingConfig, runs_dir: str) -> bool:
    """True where the configuration names a server, or a job has had one over `runs_dir/mlflow`."""
    return settings.uri is not None or (Path(runs_dir) / "mlflow").exists()


CLIENT_ENVIRONMENT = {
    # Seven retries of two minutes each, MLflow's default, are silence when the server is gone.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def _set_client_environment() -> None:
    for name, value in CLIENT_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


@contextmanager
def tracking_uri(uri: str) -> Iterator[None]:
    _set_client_environment()
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
    _set_client_environment()  # a training worker comes by no other way
    import mlflow

    # Without an address MLflow would make itself a database in the current folder.
    assert uri or mlflow.is_tracking_uri_set(), "call this inside a session"
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def one_message() -> Iterator[None]:
    """MLflow's error for a server that went away as one message.

    Raises:
        Outage: it does not answer after the retries.
    """
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        text = str(error)
        if "failed with exception" in text:  # no answer after the retries
            where = re.search(r"https?://[^/\s]+", text)
            raise Outage(
                f"the MLflow server does not answer any more ({where and where.group()})"
            ) from error
        raise


def is_absent(error: "MlflowException") -> bool:
    return error.error_code == "RESOURCE_DOES_NOT_EXIST" or "not found" in str(error)


@contextmanager
def _shared_server(folder: Path, port: int | None, settings: TrackingConfig) -> Iterator[str]:
    """The server over `folder`, kept alive by this process's lock for the length of the block."""
    limit_s = settings.start_timeout_s
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / USERS, "a") as users:
        with progress_lines("an MLflow server that nobody used to end", limit_s):
            fcntl.flock(users, fcntl.LOCK_SH)
        uri = _start_or_join(folder, port, limit_s)
        try:
            yield uri
        finally:
            _end_if_unused(folder, users)


def _start_or_join(folder: Path, port: int | None, limit_s: float) -> str:
    note = folder / NOTE

    with open(folder / "lock", "w") as lock:
        # two jobs that start at once share one server: sqlite has one writer
        with progress_lines("another job's MLflow server to start", limit_s):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if _is_alive(folder):
            return _join(json.loads(note.read_text()), folder, limit_s)

        uri, process = _start(folder, port or free_port(), limit_s)
        # so that its process goes when it ends, whoever ends it
        threading.Thread(target=process.wait, daemon=True).start()
        facts = {"uri": uri, "pid": process.pid, "host": socket.gethostname()}
        write_atomically(note, json.dumps(facts))
    return uri


def _join(found: dict[str, Any], folder: Path, limit_s: float) -> str:
    """The address of the server that runs over `folder` already."""
    uri, host = found["uri"], found["host"]
    if host != socket.gethostname():
        raise UserError(
            f"the MLflow server over {folder} runs on {host}, for that machine alone: give all "
            "machines one server of yours (tracking.uri)"
        )
    if not _healthy(uri, limit_s):
        raise Outage(f"the MLflow server over {folder} does not answer at {uri}")
    logger.info("joining the MLflow server at %s", uri)
    return uri


def _is_alive(folder: Path) -> bool:
    """True while the server that was started over this very folder runs.

    It holds the lock on a file in there. An answer at the address that it once had proves nothing:
    any program may listen there by now, and a copy of the folder names the original's address.
    """
    proof = folder / PROOF
    if not proof.exists():
        return False
    with open(proof) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _start(folder: Path, port: int, limit_s: float) -> tuple[str, subprocess.Popen]:
    uri = f"http://127.0.0.1:{port}"
    options = {
        "host": "127.0.0.1",
        "port": str(port),
        "workers": "1",
        "backend-store-uri": f"sqlite:///{folder / 'mlflow.db'}",
        "artifacts-destination": str(folder / "artifacts"),
    }
    # jobs that are killed leave no server behind
    command = [sys.executable, "-I", lifeline.__file__, str(folder / USERS), str(folder / PROOF)]
    command += [sys.executable, "-m", "mlflow", "server"]
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
            stdin=subprocess.DEVNULL,
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
        _end(process.pid, folder)
        last = log.read_text(errors="replace").splitlines()[-3:]
        raise Outage(f"the MLflow server over {folder} did not start ({log}): {' / '.join(last)}")
    logger.info("MLflow server at %s, over %s", uri, folder)
    return uri, process


def _end_if_unused(folder: Path, users: IO[str]) -> None:
    """End the server unless another job uses it, which then ends it, or `lifeline` does."""
    try:
        fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return
    if _is_alive(folder):
        _end(json.loads((folder / NOTE).read_text())["pid"], folder)


def _end(group: int, folder: Path) -> None:
    """End the server and its workers: the process group that it leads, and nothing else."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return
        if _waited(lambda: not _is_alive(folder), STOP_TIMEOUT_S):
            break
        logger.warning("the MLflow server (pid %d) did not end on %s", group, number.name)

    # a worker that was killed takes a moment to go
    _waited(lambda: not _group_lives(group), LINGER_S)


def _waited(happened: Callable[[], bool], limit_s: float) -> bool:
    until = time.monotonic() + limit_s
    while not happened():
        if time.monotonic() > until:
            return False
        time.sleep(0.05)
    return True


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _require_healthy(uri: str, limit_s: float) -> None:
    if not _healthy(uri, limit_s):
        raise Outage(f"tracking.uri: no MLflow server answers at {uri!r}")


def _healthy(uri: str, limit_s: float = 5) -> bool:
    """True if a server answers at `uri`; one that is there but slow is given `limit_s` seconds."""
    try:
        with progress_lines(f"an answer from {uri}", limit_s):
            limits = httpx.Timeout(limit_s, connect=5)
            address = f"{uri.rstrip('/')}/health"
            answer = httpx.get(address, timeout=limits, verify=certificates())
    except (httpx.HTTPError, httpx.InvalidURL):
        return False
    return answer.status_code == 200


def plan_server(settings: TrackingConfig, runs_dir: str) -> dict[str, object]:
    """Where runs and versions are, for `--dry-run`.

    Raises:
        Outage: the server named in the configuration does not answer.
    """
    uri = settings.uri
    if uri is not None:
        _require_healthy(uri, settings.start_timeout_s)
    return {"tracking": uri or str(Path(runs_dir).absolute() / "mlflow")}
