"""The whole chain on GPUs, and `jobs.deploy` on a cluster with several of them: does the server
give the evaluation's scores?

    python -m benchmarks.serving.deployed [--replicas 2] [--device cpu]    → runs/deployed.json
    python -m benchmarks.serving.deployed --report                         → RESULTS.md

    jobs.pipeline (configs/smoke.yaml, a worker and a replica a GPU)
    → ray start → jobs.deploy, more replicas → requests of the test period → again, updated

Each is the job itself, in a process of its own, with MLflow. Their output lies beside the result.
"""

import argparse
import json
import logging
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from benchmarks.machine import environment
from benchmarks.processes import end_process, exit_on_sigterm
from benchmarks.report import RUNS, read_run, table, write_run, write_section
from pipeline import config
from pipeline.cluster import free_port, serve_environment
from pipeline.config import RunConfig
from pipeline.waiting import wait_until
from serve_app import replay

RUN = RUNS / "deployed.json"
PRESET = Path(__file__).parents[2] / "configs" / "smoke.yaml"
REQUESTS = 200  # of the test period, each to whichever replica takes it
START_S = 120.0  # of a cluster


def settings_of(options: argparse.Namespace, folder: Path) -> list[str]:
    """What is changed of the preset."""
    on_gpu = "true" if options.device == "cuda" else "false"
    return [
        f"runs_dir={folder / 'runs'}",
        f"train.use_gpu={on_gpu}",
        f"train.num_workers={options.replicas}",
        f"serve.use_gpu={on_gpu}",
        "serve.one_process=false",
        f"serve.parity_requests={REQUESTS}",
    ]


def run_job(name: str, *arguments: str, log: Path, settings: list[str]) -> float:
    """Run a job of the project to its end; returns its seconds.

    Raises:
        RuntimeError: it ended with an error; says the end of its output.
    """
    command = [sys.executable, "-m", f"jobs.{name}", "--config", str(PRESET), *arguments]
    for setting in settings:
        command += ["--set", setting]
    begin = time.monotonic()
    with log.open("w+") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            code = job.wait()
        finally:
            end_process(job)

        if code != 0:
            output.seek(0)
            told = output.read()[-6000:]
            raise RuntimeError(f"jobs.{name}: exit code {code}\n{told}")
    return round(time.monotonic() - begin, 1)


@contextmanager
def ray_head(folder: Path, log: Path) -> Iterator[str]:
    """Address of a cluster that is nobody's job, for the length of the block; what it asks for is
    in the environment.
    """
    port, dashboard = free_port(), free_port()
    command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
    command += ["--disable-usage-stats", f"--port={port}", f"--dashboard-port={dashboard}"]
    command += [f"--temp-dir={folder}", "--min-worker-port=0", "--max-worker-port=0"]
    for name in ("dashboard-agent-listen-port", "runtime-env-agent-port", "metrics-export-port"):
        command.append(f"--{name}={free_port()}")
    known: Mapping[str, str] = {**os.environ, **serve_environment(folder)}

    with log.open("w") as output:
        head = subprocess.Popen(command, env=known, stdout=output, stderr=subprocess.STDOUT)
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{dashboard}"), "Ray's head", START_S)
            yield f"127.0.0.1:{port}"
        finally:
            end_process(head)


def use_token(folder: Path) -> None:
    """Let the cluster and whoever joins it know one token, as docs/operate/cluster.md has it."""
    path = folder / "ray-token"
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(path)}
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/version", timeout=5).status_code < 500
    except httpx.HTTPError:
        return False


def compare_server(cfg: RunConfig, url: str) -> dict[str, Any]:
    """Requests of the test period over HTTP against the evaluation's scores of the same rows."""
    report = replay.replay(replay.PastPeriod.of_run(cfg), cfg.serve, url, cfg.model_dir)
    return {
        "requests": report.num_requests,
        "largest_difference": report.max_abs_diff,
        "p50_ms": round(report.p50_ms, 2),
        "p99_ms": round(report.p99_ms, 2),
    }


def devices_in_use() -> int:
    """GPUs that some process computes on, by the driver."""
    command = ["nvidia-smi", "--query-compute-apps=gpu_uuid", "--format=csv,noheader"]
    said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return len(set(said.split()))


def measure(options: argparse.Namespace, folder: Path, run: dict[str, Any]) -> None:
    """All parts, each written as soon as it is known."""
    logs = options.out.parent
    use_token(folder)
    settings = settings_of(options, folder)
    cfg = config.load(PRESET, settings)

    seconds = run_job(
        "pipeline", "--force-first", log=logs / "deployed_pipeline.log", settings=settings
    )
    summary = json.loads((cfg.run_dir / "summary.json").read_text())
    run["pipeline"] = {
        "seconds": seconds,
        "requests": summary["parity_requests"],
        "largest_difference": summary["parity_max_abs_diff"],
        "p50_ms": round(summary["http_p50_ms"], 2),
        "p99_ms": round(summary["http_p99_ms"], 2),
        "test_ne": summary["test_ne"],
    }
    write_run(options.out, run)
    print(json.dumps(run["pipeline"]), flush=True)

    # short: paths of sockets end at 107 characters
    with (
        tempfile.TemporaryDirectory(prefix="head-", dir="/tmp") as ray_folder,
        ray_head(Path(ray_folder), logs / "deployed_head.log") as address,
    ):
        port = free_port()
        deployed = [
            *settings,
            f"ray.address={address}",
            f"serve.num_replicas={options.replicas}",
            f"serve.port={port}",
        ]
        cfg = config.load(PRESET, deployed)
        # the second time nothing changes but the update's name: replicas keep their processes
        for name in ("deploy", "deploy again"):
            log = logs / f"{name.replace(' ', '_')}.log"
            seconds = run_job("deploy", log=log, settings=deployed)
            found = compare_server(cfg, f"http://127.0.0.1:{port}")
            if options.device == "cuda":
                found["devices_in_use"] = devices_in_use()
            run[name] = {"seconds": seconds, **found}
            write_run(options.out, run)
            print(name, json.dumps(run[name]), flush=True)


def section(run: dict[str, Any]) -> str:
    """What was found, for RESULTS.md."""
    machine = run["environment"]
    replicas = run["replicas"]
    note = f" ({run['note']})" if "note" in run else ""  # written into its file by hand
    said = f"""`{run["command"]}`{note}: {replicas} × {machine["device"]}, {machine["cores"]} cores,
torch {machine["torch"]}, triton {machine["triton"]}, Ray {run["ray"]}. `jobs.pipeline` with
`configs/smoke.yaml` trains with a worker on each GPU and serves from one; `jobs.deploy` then serves
its champion with {replicas} replicas on a cluster that `ray start` has begun, and once more.
Requests of the test period, from one client; the difference is the largest of a score from the
evaluation's own, which a CPU computed."""
    rows = []
    for name in ("pipeline", "deploy", "deploy again"):
        if name in run:
            found = run[name]
            rows.append(
                [
                    name,
                    f"{found['seconds']:.0f}",
                    str(found["requests"]),
                    f"{found['largest_difference']:.1e}",
                    f"{found['p50_ms']:.1f} / {found['p99_ms']:.1f}",
                    str(found.get("devices_in_use", "–")),
                ]
            )
    header = ["job", "s", "requests", "largest difference", "p50 / p99, ms", "GPUs in use"]
    return "\n\n".join(["## The chain on several GPUs", said, table(header, rows)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--replicas", type=int, default=2, help="and workers of the training")
    parser.add_argument("--out", type=Path, default=RUN)
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.report:
        write_section("deployed", section(read_run(RUN)))
        return

    exit_on_sigterm()
    logging.basicConfig(level=logging.WARNING)
    run: dict[str, Any] = {
        "command": "python -m benchmarks.serving.deployed"
        + f" --replicas {options.replicas}" * (options.replicas != 2)
        + " --device cpu" * (options.device == "cpu"),
        "environment": environment(options.device),
        "ray": version("ray"),
        "replicas": options.replicas,
    }
    with tempfile.TemporaryDirectory() as folder:
        measure(options, Path(folder), run)


if __name__ == "__main__":
    main()
