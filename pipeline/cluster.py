"""The Ray cluster that a job runs on: the one it was submitted to, or a private one for the job's
own time.

A private cluster has its own ports, token and short temp folder, so that it lives beside other
people's clusters on the same machine, and only what was started here is stopped.

`python -m pipeline.cluster` prints that environment for a cluster which `ray start` starts.
"""

import contextlib
import fcntl
import itertools
import logging
import os
import random
import secrets
import shlex
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import ray

from pipeline.config import Outage, RayConfig, UserError
from pipeline.files import hidden_beside
from pipeline.waiting import progress_lines

logger = logging.getLogger(__name__)

OWNER = "owner"  # in a local cluster's folder: the driver's pid, locked while it lives
# Ports of ours lie below those of outgoing sockets (32768 and up on Linux): what is free when it is
# chosen would else be some connection's by the time a server binds it.
SINGLE_PORTS = range(26_000, 32_000)
BLOCKS_OF_PORTS = range(20_000, 26_000)
REPLICA_PORTS = 50  # ports a local cluster sets aside for Serve's replicas, per protocol
# in the environment while a local cluster lives
HAPROXY_STATS_PORT, HAPROXY_METRICS_PORT = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
)
# This process's cluster is a private one, so nobody but us has room on it, and it does not grow.
_is_private = False
KEPT_LOGS = 10  # starts of the server whose logs are kept
OURS = ("RAY_GCS_SERVER_PORT", "RAY_ADDRESS")  # in the environment while a local cluster lives
# By the folder of a cluster, a socket that is bound and never listens: the sign that a block of
# ports is that cluster's.
_signs: dict[Path, socket.socket] = {}


@contextmanager
def ray_cluster(
    cfg: RayConfig,
    *,
    runs_dir: str | Path = "runs",
    include_dashboard: bool = False,
    keep_logs: Path | None = None,
) -> Iterator[Any]:
    """Connect to Ray for the length of the block and yield Ray's context (`.dashboard_url`,
    `.address_info`).

    In this order: a connection that this process already has (left open afterwards), `cfg.address`,
    the RAY_ADDRESS that `ray job submit` sets, and otherwise a local cluster. Import `ray.serve`
    inside the block only: it reads its settings from the environment when it is imported.

    The logs of the servers on a local cluster, which goes with its folder, lie in `keep_logs`.

    Raises:
        UserError: the given address has not the form of one.
        Outage: no cluster answers there, or none of our own starts.
    """
    if ray.is_initialized():
        yield ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
        return

    address = cfg.address or os.environ.get("RAY_ADDRESS", "local")
    if address != "local":
        yield from _joined(address)
    else:
        yield from _local(cfg, Path(runs_dir), include_dashboard, keep_logs)


def is_private(cfg: RayConfig) -> bool:
    """True where `ray_cluster` is connected to a cluster of our own, or would start one."""
    if ray.is_initialized():
        return _is_private
    return (cfg.address or os.environ.get("RAY_ADDRESS", "local")) == "local"


def lost_processes() -> list[str]:
    """Names of processes of our own cluster that have ended and that it cannot live without.

    Only for a cluster that this process started: of another one nothing is known.
    """
    from ray._private import worker

    node: Any = worker._global_node
    if node is None or not _is_private:
        return []
    return [name for name, _ in node.dead_processes()]


def keep_serve_logs(context: Any, folder: Path) -> Path:
    """Let the logs of Serve's processes lie in `folder`, whatever becomes of a cluster of our own;
    returns where.

    Call it before anything of Serve starts. A start has a folder of its own, and the newest
    `KEPT_LOGS` stay.
    """
    logs = folder / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)

    in_session = Path(context.address_info["session_dir"]) / "logs" / "serve"
    if not in_session.exists():
        in_session.symlink_to(logs)

    for older in sorted(folder.iterdir())[:-KEPT_LOGS]:
        shutil.rmtree(older, ignore_errors=True)
    return logs


def require_listening(address: str) -> None:
    """Refuse an address `host:port` at which nothing listens; Ray itself asks it for minutes.

    Raises:
        Outage: nothing does, or the host has no such name.
    """
    host, _, port = address.rpartition(":")
    if not port.isdigit() or "//" in host:
        return
    with _telling_no_cluster(address):
        socket.create_connection((host, int(port)), timeout=10).close()


@contextmanager
def _telling_no_cluster(address: str) -> Iterator[None]:
    """Raise what is found at an address in place of a cluster as one message."""
    try:
        yield
    except (OSError, ValueError) as error:  # ConnectionError is an OSError
        # an address of no form is a mistake, one that does not answer is not
        kind = Outage if isinstance(error, OSError) else UserError
        raise kind(f"ray.address: no Ray cluster to join at {address!r}: {error}") from None


def _joined(address: str) -> Iterator[Any]:
    require_listening(address)
    with _telling_no_cluster(address):
        context = _init(address=address, logging_level=logging.WARNING)

    # for whatever in this process asks for "the" cluster of the machine
    before = os.environ.get("RAY_ADDRESS")
    os.environ["RAY_ADDRESS"] = context.address_info["gcs_address"]
    try:
        yield context
    finally:
        ray.shutdown()
        if before is None:
            del os.environ["RAY_ADDRESS"]
        else:
            os.environ["RAY_ADDRESS"] = before


def _local(
    cfg: RayConfig, runs_dir: Path, include_dashboard: bool, keep_logs: Path | None
) -> Iterator[Any]:
    global _is_private
    remove_orphans()
    folder = private_folder()
    lock = _owned(folder)

    os.environ |= serve_environment(folder)
    # one machine, which nobody calls back: Train's watcher has nothing to find, and writes errors
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    use_token(runs_dir)
    try:
        context = _started(cfg, folder, include_dashboard)
        _is_private = True
        if keep_logs is not None:
            keep_serve_logs(context, keep_logs)
        yield context
    finally:
        _is_private = False
        ray.shutdown()
        release_replica_ports(folder)
        for name in OURS:
            os.environ.pop(name, None)
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()


def _started(cfg: RayConfig, folder: Path, include_dashboard: bool) -> Any:
    """Start a local cluster, anew where Ray gives up: it allows its own processes 30 s, which a
    busy machine may not keep.

    Raises:
        Outage: no start succeeded within `ray.start_timeout_s`.
    """
    end = time.monotonic() + cfg.start_timeout_s
    with progress_lines("Ray's start", cfg.start_timeout_s):
        for attempt in itertools.count():
            # Ray's own actors look for "the" cluster of the machine: beside another one they must
            # be told which is theirs.
            port = free_port()
            os.environ |= {"RAY_GCS_SERVER_PORT": str(port), "RAY_ADDRESS": f"127.0.0.1:{port}"}
            try:
                return _init(
                    address="local",
                    num_cpus=cfg.num_cpus,
                    object_store_memory=cfg.object_store_mb * 2**20,
                    include_dashboard=include_dashboard,
                    dashboard_port=free_port() if include_dashboard else None,
                    logging_level=logging.WARNING,
                    _temp_dir=str(folder / f"ray{attempt or ''}"),  # which Ray opens to everybody
                )
            except (ValueError, TypeError):  # settings that Ray refuses: no matter of time
                raise
            except Exception as error:  # Ray raises a bare Exception where its time is up
                ray.shutdown()
                reason = str(error).strip().splitlines() or [repr(error)]

                if time.monotonic() > end:
                    raise Outage(
                        f"Ray did not start within {cfg.start_timeout_s:.0f} s "
                        f"(ray.start_timeout_s): {reason[0]}"
                    ) from error
                logger.warning("Ray did not start, once more: %s", reason[0])
    raise AssertionError("the loop has no other end")


def private_folder() -> Path:
    """A new folder for one cluster. Its path is short: those of sockets end at 107 characters."""
    return Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))


def _owned(folder: Path) -> IO[str]:
    """Mark `folder` as this process's, for as long as it lives and the returned file is open."""
    marking = folder / ".owner"
    lock = open(marking, "w")  # noqa: SIM115
    fcntl.flock(lock, fcntl.LOCK_EX)
    lock.write(str(os.getpid()))
    lock.flush()
    marking.rename(folder / OWNER)  # locked from the first moment that it is seen
    return lock


def remove_orphans(parent: Path = Path("/tmp")) -> None:
    """Remove the folders of local clusters whose driver was killed; their processes have ended with
    it.
    """
    for mark in parent.glob(f"ray-*/{OWNER}"):
        try:
            with open(mark, "r+") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(mark.parent, ignore_errors=True)
        except OSError:
            continue  # its owner lives, it is another user's, or somebody else has just removed it


def _init(**options: Any) -> Any:
    """`ray.init`, and this process's own answer to SIGTERM put back.

    Ray's prints a stack and aborts the process 3 s later, in the middle of stopping what it
    started.
    """
    answer = signal.getsignal(signal.SIGTERM)
    context = ray.init(**options)

    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, answer)
    return context


def use_token(runs_dir: Path) -> None:
    """Point this process and its children to a token of our own, unless the user has chosen a way
    of authentication.

    One token for all local clusters of `runs_dir`: Ray reads it once per process, so a second
    cluster with another token would refuse its own driver. With nothing set, Ray would write one
    into the home directory.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_MODE" in os.environ:
        return

    path = runs_dir.absolute() / ".ray-token"
    if not path.exists():
        with hidden_beside(path) as stage, contextlib.suppress(FileExistsError):
            stage.write_text(secrets.token_hex(32))
            os.link(stage, path)  # whole or not at all: another job may look at this moment
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(path)

    # RAY_AUTH_MODE stays unset: Ray has read it already where it was imported before, and switches
    # itself to tokens in `ray.init`, with a warning that there is nothing to do about.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(
        logging.ERROR
    )


def serve_environment(folder: Path) -> dict[str, str]:
    """What Ray Serve must find in the environment of every node before Ray starts.

    HAProxy in front, user code on the replica's event loop and the usual priority, unless set
    otherwise. And a folder and ports of this cluster alone, instead of the fixed ones of all
    clusters: Serve binds its ports with SO_REUSEPORT, so that two clusters of one user with the
    same number get each other's requests.
    """
    first = reserve_replica_ports(folder)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1"),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": os.environ.get("RAY_SERVE_THROUGHPUT_OPTIMIZED", "1"),
        # Ray's 15 is for work that can wait: a replica would stand behind its own clients and the
        # dashboard.
        "RAY_worker_niceness": os.environ.get("RAY_worker_niceness", "0"),  # noqa: SIM112
        # else the log lags 1,000 lines behind, and a crash takes them
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1",
        # after Ray's 5 s a busy laptop's proxy is killed before it runs
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",
        # a proxy that is gone is missed after three checks: 10 s each would be half a minute
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": os.environ.get(
            "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S", "3"
        ),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/haproxy/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/haproxy/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{folder}/haproxy",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/haproxy/server-state",
        HAPROXY_METRICS_PORT: str(free_port()),
        HAPROXY_STATS_PORT: str(free_port()),
        # What an ingress that dies had taken in, another one answers: no request of ours does harm
        # when it is done twice.
        "RAY_SERVE_HAPROXY_RETRY_ON": os.environ.get(
            "RAY_SERVE_HAPROXY_RETRY_ON", "conn-failure empty-response"
        ),
        # between an ingress' last request and its end: as long as HAProxy needs to hear of it
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": os.environ.get(
            "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S", "2"
        ),
        # a client that sends nothing: Ray's hour would keep its connection
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": os.environ.get(
            "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S", "60"
        ),
        # where HAProxy sends what no replica takes
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + REPLICA_PORTS - 1),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first + REPLICA_PORTS),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first + 2 * REPLICA_PORTS - 1),
    }


def reserve_replica_ports(folder: Path) -> int:
    """First of 2 * `REPLICA_PORTS` ports that are nobody's, and stay this cluster's until
    `release_replica_ports` or the end of this process.

    The port before the block is bound as a sign to all other processes of the machine, so that no
    two clusters take one block.

    Raises:
        Outage: all blocks are taken.
    """
    signs = list(BLOCKS_OF_PORTS)[:: 2 * REPLICA_PORTS + 1][:-1]
    random.SystemRandom().shuffle(signs)

    for number in signs:
        sign = socket.socket()
        try:
            sign.bind(("127.0.0.1", number))
        except OSError:  # another cluster's block
            sign.close()
            continue

        first = number + 1
        if all(_is_free(port) for port in range(first, first + 2 * REPLICA_PORTS)):
            _signs[folder] = sign
            return first
        sign.close()

    raise Outage(f"all blocks of ports in {BLOCKS_OF_PORTS} are taken: end clusters not in use")


def release_replica_ports(folder: Path) -> None:
    """Let other clusters have the ports of the cluster in `folder`, which has ended."""
    _signs.pop(folder).close()


def free_port() -> int:
    """A TCP port that nobody holds at this moment, and that no outgoing connection is given.

    Raises:
        Outage: a thousand that were tried are taken.
    """
    for port in random.SystemRandom().sample(SINGLE_PORTS, 1000):
        if _is_free(port):
            return port
    raise Outage(f"no free port was found in {SINGLE_PORTS}")


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def print_environment() -> None:
    """Print `export` lines for the shell that runs `ray start --head --temp-dir=$RAY_FOLDER`."""
    folder = private_folder()
    lines = {"RAY_FOLDER": str(folder), "RAY_USAGE_STATS_ENABLED": "0", **serve_environment(folder)}
    for name, value in lines.items():
        print(f"export {name}={shlex.quote(value)}")


if __name__ == "__main__":
    print_environment()
