"""The server under load: latency, what HTTP adds, overload, changes of version, events while
replicas are killed.

    python -m benchmarks.serving.under_load             # every part: about half an hour
    python -m benchmarks.serving.under_load --parts reference --seconds 600
    python -m benchmarks.serving.under_load --parts swaps --share 0.1 --out swaps.json
    python -m benchmarks.serving.under_load --report    # what was measured last, into RESULTS.md

Serves configs/serve_reference.yaml (generated users, untrained models, what was served written to
its log) on a Ray cluster of its own. The load comes from a second process on the same cores
(`python -m serve_app.load_test`). Every part adds its figures to benchmarks/runs/serving.json.
"""

import argparse
import json
import logging
import os
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from benchmarks.report import write_run
from benchmarks.serving import heavy_user, hops, killed, memory, posted_events, two_servers
from benchmarks.serving.stage import (
    OVERHEAD_RATE,
    PRESET,
    REFERENCE_RATE,
    ROOT,
    TRIVIAL,
    Stage,
    describe_machine,
    paced_ms,
    processor_seconds,
    replica_pids,
)
from benchmarks.serving.under_load_report import PLOT, RUN, write_report
from pipeline import config, logs
from pipeline.cluster import ray_cluster
from pipeline.sequences import build

# Parts -----------------------------------------------------------------------


def overhead(stage: Stage) -> dict[str, Any]:
    """What lies around the ranker's own time, for a model that costs next to nothing."""
    return _overhead(stage, apart=False)


def overhead_apart(stage: Stage) -> dict[str, Any]:
    """The same with the ingress in a process of its own, as it is in front of several replicas."""
    return _overhead(stage, apart=True)


def _overhead(stage: Stage, *, apart: bool) -> dict[str, Any]:
    url = stage.deploy(1, apart=apart, **TRIVIAL)
    stage.load(url, OVERHEAD_RATE, 5, "--candidates", "20")
    nothing = {
        name: paced_ms(f"{url}{path}")
        for name, path in (("ingress", "/healthz"), ("replica", "/v1/model"))
    }
    before = processor_seconds()
    figures = stage.load(url, OVERHEAD_RATE, stage.seconds, "--candidates", "20")
    figures["routes_without_work_ms"] = nothing
    spent = {name: seconds - before[name] for name, seconds in processor_seconds().items()}
    figures["processor_ms_per_request"] = {
        name: round(1000 * seconds / figures["requests"], 2) for name, seconds in spent.items()
    }
    return figures


def reference(stage: Stage) -> dict[str, Any]:
    """100 candidates, histories of 256 events; half of the users asked in the last minute."""
    url = stage.deploy(2)
    stage.load(url, REFERENCE_RATE, 5)
    before = _cache(url)
    drawn = [] if stage.plot is None else ["--plot", str(stage.plot)]
    figures = stage.load(url, REFERENCE_RATE, stage.seconds, *drawn)
    hits, misses = (now - then for now, then in zip(_cache(url), before, strict=True))
    figures["history_cache_hit_rate"] = round(hits / max(hits + misses, 1), 3)
    return figures


def overload(stage: Stage) -> dict[str, Any]:
    """The reference rate, twenty seconds of five times what the server can do, and the reference
    rate again.
    """
    url = stage.deploy(2)
    stage.load(url, REFERENCE_RATE, 5)
    capacity = stage.load(url, 150, 10)["answered_per_s"]
    time.sleep(3)
    # 1,200 requests before: with 200 p99 is the second worst
    burst = f"{5 * capacity - REFERENCE_RATE:.0f}:60:80"
    return {"capacity_per_s": capacity, **stage.load(url, REFERENCE_RATE, 100, "--burst", burst)}


def rollout(stage: Stage) -> dict[str, Any]:
    """Promote, a killed replica, roll back, a shadow, while requests come at the reference rate."""
    url = stage.deploy(2, replicas=2)
    stage.model(3)
    done: list[str] = []

    def change() -> None:
        time.sleep(8)
        steps: list[tuple[str, Callable[[], object]]] = [
            ("version 3 promoted", lambda: stage.deploy(3, replicas=2)),
            ("a replica killed", lambda: os.kill(replica_pids("RankerReplica")[0], signal.SIGKILL)),
            ("back to version 2", lambda: stage.deploy(2, replicas=2)),
            ("shadow 3", lambda: stage.deploy(2, replicas=2, shadow=3)),
        ]
        for name, step in steps:
            step()
            done.append(name)
            time.sleep(8)

    changing = threading.Thread(target=change)
    changing.start()
    figures = stage.load(url, REFERENCE_RATE, 60, "--timeout-s", "30")
    changing.join()
    return {"done_meanwhile": done, **figures}


def malformed(stage: Stage) -> dict[str, Any]:
    """10,000 broken bodies over the wire, and a good request after them."""
    from tests.support import hostile_bodies

    url = stage.deploy(1, **TRIVIAL)
    rng, statuses, leaks = random.Random(0), {}, 0
    with httpx.Client(
        base_url=url, timeout=30, headers={"content-type": "application/json"}
    ) as client:
        for number in range(10_000):
            answer = client.post(
                ("/v1/rank", "/v1/events")[number % 2], content=hostile_bodies.malformed(rng)
            )
            statuses[str(answer.status_code)] = statuses.get(str(answer.status_code), 0) + 1
            leaks += bool(hostile_bodies.insides(answer.text))
        good = client.post(
            "/v1/rank", json={"user_id": 1, "candidates": [{"item_id": 1}]}
        ).status_code
    return {
        "statuses": statuses,
        "answers_that_show_insides": leaks,
        "good_request_afterwards": good,
    }


PARTS: dict[str, Callable[[Stage], dict[str, Any]]] = {
    "overhead": overhead,
    "overhead_apart": overhead_apart,
    "reference": reference,
    "hops": hops.measure,
    "overload": overload,
    "rollout": rollout,
    "events": posted_events.measure,
    "malformed": malformed,
    "two_servers": two_servers.measure,
    "killed_ingress": killed.measure,
    "heavy_user": heavy_user.measure,
    "cache_memory": memory.measure_cache,
    "swaps": memory.measure_swaps,
}


# Helpers ---------------------------------------------------------------------


def _cache(url: str) -> tuple[float, float]:
    """Hits and misses of the encoded histories so far."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    names = ("ranking_history_cache_hits_total", "ranking_history_cache_misses_total")
    hits, misses = (
        sum(float(x.split()[-1]) for x in lines if x.startswith(name + "{")) for name in names
    )
    return hits, misses


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of the parts overhead, overhead_apart, reference, hops and killed_ingress",
    )
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the requests and swaps of the other parts"
    )
    parser.add_argument("--out", type=Path, default=RUN, help="default: benchmarks/runs")
    parser.add_argument("--runs-dir", default=str(ROOT / "runs"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        logging.basicConfig(level=logging.WARNING)
        cfg = config.load(PRESET, [f"runs_dir={options.runs_dir}"])
        with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True) as cluster:
            logs.import_logs(cfg)
            build.build_sequences(cfg)
            plot = PLOT if options.out == RUN else options.out.with_suffix(".png")
            stage = Stage(cfg, cluster.dashboard_url, options.seconds, options.share, plot)
            for name in options.parts:
                _measure(stage, name, options.out)
    if options.out == RUN:
        write_report(json.loads(RUN.read_text()))


def _measure(stage: Stage, name: str, out: Path) -> None:
    """Print the figures of one part, and add them to the file `out`."""
    print(f"== {name}", flush=True)
    figures = PARTS[name](stage) | {"one_process": not replica_pids("Api")}
    print(json.dumps(figures), flush=True)
    kept = json.loads(out.read_text()) if out.exists() else {}
    write_run(out, kept | {"machine": describe_machine(), name: figures})


if __name__ == "__main__":
    main()
