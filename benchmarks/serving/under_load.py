"""The server under load: latency, what HTTP adds, overload, changes of version, events while
replicas are killed.

    python -m benchmarks.serving.under_load             # every part: about ten minutes on two cores
    python -m benchmarks.serving.under_load --parts reference --seconds 600
    python -m benchmarks.serving.under_load --report    # what was measured last, into RESULTS.md

Serves configs/serve_reference.yaml (generated users, untrained models, what was served written to
its log) on a Ray cluster of its own. The load comes from a second process on the same cores
(`python -m serve_app.load_test`). Every part adds its figures to benchmarks/runs/serving.json.
"""

import argparse
import asyncio
import hashlib
import json
import logging
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np
import torch

from benchmarks.report import write_run
from benchmarks.serving.under_load_report import PLOT, RUN, write_report
from pipeline import config, logs
from pipeline.batches.features import fit_features
from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig
from pipeline.model.artifact import save_model
from pipeline.model.ranker import RankingModel
from pipeline.sequences import build
from pipeline.tracking import PinnedModel
from serve_app import deployment

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "configs" / "serve_reference.yaml"
TRIVIAL = {"d_model": 16, "num_layers": 1, "num_heads": 1, "d_qk": 16, "d_v": 16, "head_hidden": 16}
NUM_EVENTS, NUM_WRITERS, EVENTS_TOGETHER, SECONDS_BETWEEN_KILLS = 100_000, 8, 10, 4.0
EVENTS_A_USER = 2_500  # below serve.max_user_events
REFERENCE_RATE, OVERHEAD_RATE = 20, 50


@dataclass(frozen=True)
class Stage:
    """A cluster with the reference users published."""

    cfg: RunConfig
    dashboard_url: str
    seconds: float
    made: dict[tuple, PinnedModel] = field(default_factory=dict)

    def deploy(
        self,
        version: int,
        *,
        replicas: int = 1,
        apart: bool = False,
        shadow: int | None = None,
        **model: Any,
    ) -> str:
        """Serve an untrained model; `model` changes its size.

        `apart`: one replica, yet not the ingress' process.
        """
        together = self.cfg.serve.one_process and replicas == 1 and not apart
        cfg = replace(
            self.cfg, serve=replace(self.cfg.serve, num_replicas=replicas, one_process=together)
        )
        on_trial = None if shadow is None else self.model(shadow, **model)
        wanted = deployment.user_config(cfg, self.model(version, **model), shadow=on_trial)
        return deployment.send_update(cfg.serve, self.dashboard_url, wanted)

    def model(self, version: int, **model: Any) -> PinnedModel:
        """Made once: what that takes from the server is no part of a change of version."""
        key = version, *sorted(model.items())
        if key not in self.made:
            sized = replace(self.cfg, model=replace(self.cfg.model, **model))
            self.made[key] = untrained(sized, version)
        return self.made[key]

    def load(self, url: str, rate: float, seconds: float, *options: str) -> dict[str, Any]:
        command = [
            sys.executable,
            "-m",
            "serve_app.load_test",
            "--config",
            str(PRESET),
            "--url",
            url,
        ]
        command += [
            "--set",
            f"runs_dir={self.cfg.runs_dir}",
            "--rate",
            str(rate),
            "--seconds",
            str(seconds),
            *options,
        ]
        before = _busy_s()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout)
        # counters in hundredths: nobody else can come out as less than nobody
        others_s = max(_busy_s() - before, 0.0)
        figures["others_cores"] = round(others_s / (seconds + 3), 2)
        print(
            json.dumps(
                {
                    key: figures[key]
                    for key in ("statuses", "latency_ms", "ranker_ms", "overhead_ms")
                }
            )
        )
        return figures


def untrained(cfg: RunConfig, version: int) -> PinnedModel:
    """A model of random weights in the place where the server keeps the versions that it has
    fetched and checked.
    """
    cache = deployment.cache_folder(cfg.runs_dir)
    folder = cache / "new"
    torch.manual_seed(version)
    maps = fit_features(cfg)
    save_model(folder, RankingModel(cfg, maps.vocab_sizes, maps.base_rates), cfg, maps, {})
    digests = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()
    }
    model = PinnedModel("", cfg.model_name, version, digests)
    shutil.rmtree(cache / model.folder_name, ignore_errors=True)
    folder.rename(cache / model.folder_name)
    return model


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
        name: _paced(f"{url}{path}")
        for name, path in (("ingress", "/healthz"), ("replica", "/v1/model"))
    }
    before = _processor_s()
    figures = stage.load(url, OVERHEAD_RATE, stage.seconds, "--candidates", "20")
    figures["routes_without_work_ms"] = nothing
    spent = {name: seconds - before[name] for name, seconds in _processor_s().items()}
    figures["processor_ms_per_request"] = {
        name: round(1000 * seconds / figures["requests"], 2) for name, seconds in spent.items()
    }
    return figures


def reference(stage: Stage) -> dict[str, Any]:
    """100 candidates, histories of 256 events; half of the users asked in the last minute."""
    url = stage.deploy(2)
    stage.load(url, REFERENCE_RATE, 5)
    before = _cache(url)
    figures = stage.load(url, REFERENCE_RATE, stage.seconds, "--plot", str(PLOT))
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
            ("a replica killed", lambda: os.kill(_pids("RankerReplica")[0], signal.SIGKILL)),
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


def events(stage: Stage) -> dict[str, Any]:
    """100,000 events from eight writers while replicas are killed; a writer sends again what got no
    answer.
    """
    url = stage.deploy(1, replicas=2, **TRIVIAL)
    path = stage.cfg.run_dir / "serving" / "events.sqlite"
    acknowledged: list[set[tuple[int, int]]] = [set() for _ in range(NUM_WRITERS)]
    answers: list[str] = []
    stop = threading.Event()
    first_user = int(time.time()) % 1_000_000 * 1000 + 1_000_000  # users of this run alone

    def write(writer: int) -> None:
        with httpx.Client(base_url=url, timeout=10) as client:
            for begin in range(0, NUM_EVENTS // NUM_WRITERS, EVENTS_TOGETHER):
                items = range(begin, begin + EVENTS_TOGETHER)
                user = first_user + NUM_WRITERS * (begin // EVENTS_A_USER) + writer
                now = 1_767_500_000_000
                body = {
                    "events": [
                        {"user_id": user, "item_id": item, "event_time": now + item}
                        for item in items
                    ]
                }
                while True:
                    try:
                        answer = client.post("/v1/events", json=body)
                    except httpx.HTTPError as error:
                        answers.append(type(error).__name__)
                        continue
                    status = answer.status_code
                    answers.append(str(status))
                    if status == 200:
                        assert answer.json()["over_quota"] == 0
                        acknowledged[writer] |= {(user, item) for item in items}
                        break
                    assert status in (429, 503, 504), status
                    time.sleep(0.2)

    def kill() -> int:
        killed = 0
        while not stop.wait(SECONDS_BETWEEN_KILLS):
            for pid in _pids("RankerReplica")[:1]:
                os.kill(pid, signal.SIGKILL)
                killed += 1
        return killed

    killer = _Result(kill)
    writers = [threading.Thread(target=write, args=(writer,)) for writer in range(NUM_WRITERS)]
    started = time.perf_counter()
    for thread in (killer, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    took_s = time.perf_counter() - started
    stop.set()
    killer.join()
    with sqlite3.connect(path) as connection:
        between = (first_user, first_user + NUM_EVENTS // EVENTS_A_USER)
        kept = connection.execute(
            "SELECT user_id, item_id FROM event WHERE user_id >= ? AND user_id < ?", between
        )
        kept = kept.fetchall()
    sent = set().union(*acknowledged)
    return {
        "acknowledged": len(sent),
        "kept": len(kept),
        "acknowledged_and_lost": len(sent - set(kept)),
        "kept_twice": len(kept) - len(set(kept)),
        "replicas_killed": killer.result,
        "seconds": round(took_s, 1),
        "answers": {answer: answers.count(answer) for answer in sorted(set(answers))},
    }


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


PARTS = {
    part.__name__: part
    for part in (overhead, overhead_apart, reference, overload, rollout, events, malformed)
}


# The machine -----------------------------------------------------------------


class _Result(threading.Thread):
    """A thread that keeps what its work returned."""

    def __init__(self, work: Callable[[], int]) -> None:
        super().__init__()
        self.work, self.result = work, 0

    def run(self) -> None:
        self.result = self.work()


def _pids(deployment_name: str) -> list[int]:
    """Of the replicas of this cluster."""
    from ray.util.state import list_actors

    name = f"ServeReplica:{deployment.APPLICATION}:{deployment_name}"
    return [
        actor.pid
        for actor in list_actors(filters=[("class_name", "=", name), ("state", "=", "ALIVE")])
    ]


def _stat(pid: int) -> tuple[int, float]:
    """A process's parent, and the seconds of processor time that it and its ended children took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def _processor_s() -> dict[str, float]:
    return {name: sum(_stat(pid)[1] for pid in _pids(name)) for name in ("Api", "RankerReplica")}


def _busy_s() -> float:
    """Seconds of processor time on this machine that were not ours, since it started."""
    user, nice, system, _, _, irq, softirq, *_ = map(
        int, Path("/proc/stat").read_text().split()[1:11]
    )
    total = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    parents, spent = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)], spent[int(folder.name)] = _stat(int(folder.name))
        except OSError:  # it has just ended
            continue
    ours = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in ours} - ours:
        ours |= more
    return total - sum(spent.get(pid, 0.0) for pid in ours)


def _paced(url: str, seconds: float = 10.0) -> dict[str, float]:
    """p50 and p99 in ms of a route that does nothing, at the same rate from the same kind of
    client.
    """
    took = []

    async def ask() -> None:
        async with aiohttp.ClientSession() as session:
            for _ in range(int(OVERHEAD_RATE * seconds)):
                started = time.perf_counter()
                async with session.get(url) as answer:
                    await answer.read()
                took.append(1000 * (time.perf_counter() - started))
                await asyncio.sleep(1 / OVERHEAD_RATE)

    asyncio.run(ask())
    return {
        f"p{p}": round(float(value), 2)
        for p, value in zip((50, 99), np.percentile(took, (50, 99)), strict=True)
    }


def _cache(url: str) -> tuple[float, float]:
    """Hits and misses of the encoded histories so far."""
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    names = ("ranking_history_cache_hits_total", "ranking_history_cache_misses_total")
    hits, misses = (
        sum(float(x.split()[-1]) for x in lines if x.startswith(name + "{")) for name in names
    )
    return hits, misses


def machine() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{len(names)} cores of {names[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument(
        "--seconds",
        type=float,
        default=60.0,
        help="of the parts overhead, overhead_apart and reference",
    )
    parser.add_argument("--runs-dir", default=str(ROOT / "runs"))
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.report:
        logging.basicConfig(level=logging.WARNING)
        cfg = config.load(PRESET, [f"runs_dir={options.runs_dir}"])
        with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True) as cluster:
            logs.import_logs(cfg)
            build.build_sequences(cfg)
            stage = Stage(cfg, cluster.dashboard_url, options.seconds)
            for name in options.parts:
                print(f"== {name}", flush=True)
                figures = PARTS[name](stage) | {"one_process": not _pids("Api")}
                print(json.dumps(figures), flush=True)
                kept = json.loads(RUN.read_text()) if RUN.exists() else {}
                write_run(RUN, kept | {"machine": machine(), name: figures})
    write_report(json.loads(RUN.read_text()))


if __name__ == "__main__":
    main()
