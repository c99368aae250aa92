"""Requests through a Serve handle and over HTTP to a replica on a GPU: do they get the ranker's own
scores?

    python -m benchmarks.serving.gpu_replica [--device cpu]      → runs/serve_gpu_<device>.json
    python -m benchmarks.serving.gpu_replica --report FILE       → the section of RESULTS.md

Generated users, an untrained model. The server is started by its configuration with
`serve.use_gpu`, as `jobs.deploy` does it; the same requests go to a `Ranker` in this process. What
the replica says of its device and kernels is part of the result. Needs Ray, and no MLflow: the
model lies where a server keeps the versions that it has fetched.
"""

import argparse
import asyncio
import json
import logging
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.machine import environment
from benchmarks.report import table, write_run, write_section
from benchmarks.serving.stage import PRESET, untrained
from pipeline import config, logs
from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig
from pipeline.sequences import build
from serve_app import deployment
from serve_app.columns import RankColumns, RankedColumns
from serve_app.metrics import ReplicaMetrics
from serve_app.ranking import rollout
from serve_app.schemas import RankHead

RUNS = Path(__file__).parents[1] / "runs"
LARGEST_DIFFERENCE = 1e-5
NUM_USERS, NUM_CANDIDATES = 40, 1024
REQUEST_TIME_MS = 1_768_176_000_000  # after the last event of the preset
# no reason to refuse
SERVER = ["serve.one_process=false", "serve.max_wait_ms=20000", "serve.request_timeout_s=60"]
SIZES = {
    "cpu": [],
    "cuda": [
        *("model.num_layers=12", "model.d_model=512", "model.d_qk=128", "model.d_v=128"),
        *("model.attention.window=256", "model.attention.full_rows=256"),
        *(
            "source.synthetic.num_users=200",
            "source.synthetic.min_history=4096",
            "source.synthetic.max_history=4096",
        ),
    ],
}
FORMATS = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "bf16 and FP8": {"precision": "bf16", "fp8": True},
}


@contextmanager
def running_loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own: a handle listens to the cluster in it between requests
    too.
    """
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield loop
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


def requests(cfg: RunConfig) -> list[RankColumns]:
    rng = np.random.default_rng(0)
    num_items = cfg.source.synthetic.num_items
    return [
        RankColumns(
            RankHead(user_id=user, request_time_ms=REQUEST_TIME_MS, request_features={"tab": 1}),
            rng.choice(num_items, NUM_CANDIDATES, replace=False),
            {},
        )
        for user in range(NUM_USERS)
    ]


def measure(
    cfg: RunConfig, dashboard_url: str, log_folder: Path, loop: asyncio.AbstractEventLoop
) -> dict[str, Any]:
    """The server with the number formats of `cfg.serve`, beside the ranker alone; `loop` is the
    handle's.
    """
    from ray import serve

    wanted = deployment.user_config(cfg.folders, cfg.serve, untrained(cfg, version=1))
    url = deployment.send_update(cfg.serve, dashboard_url, wanted)
    ranker = rollout.load_rollout(wanted, ReplicaMetrics()).champion
    handle = serve.get_deployment_handle("RankerReplica", deployment.APPLICATION)
    asked = requests(cfg)
    through_handle = lambda request: _scores(
        asyncio.run_coroutine_threadsafe(_ask(handle, request), loop).result()
    )
    alone = lambda request: _scores(ranker.rank([request])[0])
    ways = {
        "handle, cold": through_handle,
        "handle, warm": through_handle,
        "HTTP, warm": lambda request: _over_http(url, request),
        "ranker, cold": alone,
        "ranker, warm": alone,
    }
    answers: dict[str, list[np.ndarray]] = {way: [] for way in ways}
    times_ms: dict[str, list[float]] = {way: [] for way in ways}
    # user by user, so that a history encoded for the first way is still there for the next
    for request in asked:
        for way, ask in ways.items():
            begin = time.perf_counter()
            answers[way].append(ask(request))
            times_ms[way].append(1000 * (time.perf_counter() - begin))
    own = np.stack(answers["ranker, cold"])
    return {
        "largest_difference": {
            way: float(np.abs(np.stack(given) - own).max()) for way, given in answers.items()
        },
        "p50_ms": {way: round(float(np.median(taken)), 2) for way, taken in times_ms.items()},
        "replica_says": _said(log_folder),
    }


async def _ask(handle: Any, request: RankColumns) -> RankedColumns:
    return await handle.rank.remote(request)


def _scores(answer: RankedColumns) -> np.ndarray:
    """float32 [C, tasks]"""
    assert isinstance(answer, RankedColumns), answer
    return np.stack(list(answer.scores.values()), axis=1)


def _over_http(url: str, request: RankColumns) -> np.ndarray:
    head = request.head
    body = {
        "user_id": head.user_id,
        "request_time_ms": head.request_time_ms,
        "request_features": head.request_features,
    }
    body["candidates"] = [{"item_id": item} for item in request.item_id.tolist()]
    answer = httpx.post(f"{url}/v1/rank", json=body, timeout=30).raise_for_status().json()
    return np.array(list(answer["scores"].values()), np.float32).T


def _said(log_folder: Path) -> str:
    """The newest line of the replica's log about a version that it has ready."""
    lines = [
        line
        for file in log_folder.glob("replica_*RankerReplica*.log")
        for line in file.read_text().splitlines()
    ]
    ready = sorted(line for line in lines if " ready: " in line)
    assert ready, f"no replica under {log_folder} tells of a version"
    return ready[-1].partition(" ready: ")[2]


def section(run: dict[str, Any]) -> str:
    machine, rows = run["environment"], run["formats"]
    ways = list(next(iter(rows.values())).get("p50_ms", ()))
    cells = [
        [
            name,
            row["replica_says"],
            f"{max(row['largest_difference'].values()):.1e}",
            *(f"{row['p50_ms'][way]:.1f}" for way in ways),
        ]
        for name, row in rows.items()
    ]
    times = "; times are medians in ms" if ways else ""
    said = (
        f"`{run['command']}`, {machine['device']}, torch {machine['torch']}, triton "
        f"{machine['triton']}, Ray "
        f"{run['ray']}; {run['model']}, {run['candidates']} candidates, one client. The largest "
        "difference of a score "
        f"is between the ranker alone and every way to the replica, over {run['users']} "
        f"users{times}."
    )
    header = ["format", "the replica's log", "largest difference", *ways]
    return "\n\n".join(["## Requests through Serve on a GPU", said, table(header, cells)])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, help="default: runs/serve_gpu_<device>.json")
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write RESULTS.md from FILE and end"
    )
    options = parser.parse_args()
    if options.report:
        write_section("serve_gpu", section(json.loads(options.report.read_text())))
        return
    logging.basicConfig(level=logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        run = run_all(options.device, Path(folder))
    path = options.out or RUNS / f"serve_gpu_{options.device}.json"
    write_run(path, run)
    largest = max(max(row["largest_difference"].values()) for row in run["formats"].values())
    print(f"largest difference from the ranker alone {largest:.1e}; {path}")
    raise SystemExit(not largest <= LARGEST_DIFFERENCE)


def run_all(device: str, folder: Path) -> dict[str, Any]:
    cfg = config.load(PRESET, [f"runs_dir={folder}", *SERVER, *SIZES[device]])
    model = cfg.model
    run = {
        "command": "python -m benchmarks.serving.gpu_replica" + " --device cpu" * (device == "cpu"),
        "environment": environment(device),
        "model": f"{model.num_layers} layers of {model.d_model}, "
        f"{cfg.source.synthetic.max_history:,} events",
        "candidates": NUM_CANDIDATES,
        "users": NUM_USERS,
        "formats": {},
    }
    with (
        ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True) as cluster,
        running_loop() as loop,
    ):
        import ray

        run["ray"] = ray.__version__
        logs.import_logs(cfg)
        build.build_sequences(cfg)
        log_folder = Path(cluster.address_info["session_dir"]) / "logs" / "serve"
        for name, formats in FORMATS.items():
            served = replace(cfg, serve=replace(cfg.serve, use_gpu=device == "cuda", **formats))
            run["formats"][name] = measure(served, cluster.dashboard_url, log_folder, loop)
            print(f"{name:14}{json.dumps(run['formats'][name])}", flush=True)
    return run


if __name__ == "__main__":
    main()
