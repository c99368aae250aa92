"""The server that the benchmarks under load measure, and what the machine says of it.

Serves configs/serve_reference.yaml (generated users, untrained models, what was served written to
its log) on a Ray cluster of its own. The load comes from a second process on the same cores
(`python -m serve_app.load_test`).
"""

import asyncio
import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import torch

from pipeline.batches.features import fit_features
from pipeline.config import RunConfig
from pipeline.model.artifact import save_model
from pipeline.model.ranker import RankingModel
from pipeline.tracking import PinnedModel
from serve_app import deployment

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "configs" / "serve_reference.yaml"
TRIVIAL: dict[str, Any] = {
    "d_model": 16,
    "num_layers": 1,
    "num_heads": 1,
    "d_qk": 16,
    "d_v": 16,
    "head_hidden": 16,
}
REFERENCE_RATE, OVERHEAD_RATE = 20, 50  # requests/s
PROXIES = ("haproxy", "HAProxyManager", "ProxyActor")  # the process, who starts it, the fallback


@dataclass(frozen=True)
class Stage:
    """A cluster with the reference users published."""

    cfg: RunConfig
    dashboard_url: str
    seconds: float
    share: float = 1.0  # of a part's whole number of requests
    plot: Path | None = None  # a picture of the reference load
    made: dict[tuple, PinnedModel] = field(default_factory=dict)

    def deploy(
        self,
        version: int,
        *,
        replicas: int = 1,
        apart: bool = False,
        shadow: int | None = None,
        settings: Mapping[str, Any] | None = None,
        **model: Any,
    ) -> str:
        """Serve an untrained model; `model` changes its size, `settings` those of `serve`.

        `apart`: one replica, yet not the ingress' process.
        """
        together = self.cfg.serve.one_process and replicas == 1 and not apart
        wanted_settings = {"num_replicas": replicas, "one_process": together, **(settings or {})}
        cfg = replace(self.cfg, serve=replace(self.cfg.serve, **wanted_settings))
        on_trial = None if shadow is None else self.model(shadow, **model)
        wanted = deployment.user_config(
            cfg.folders, cfg.serve, self.model(version, **model), shadow=on_trial
        )
        return deployment.send_update(cfg.serve, self.dashboard_url, wanted)

    def model(self, version: int, **model: Any) -> PinnedModel:
        """Made once: what that takes from the server is no part of a change of version."""
        key = version, *sorted(model.items())
        if key not in self.made:
            sized = replace(self.cfg, model=replace(self.cfg.model, **model))
            self.made[key] = untrained(sized, version)
        return self.made[key]

    def load(self, url: str, rate: float, seconds: float, *options: str) -> dict[str, Any]:
        """Figures of `serve_app.load_test`, and what others took of the machine meanwhile."""
        command = [sys.executable, "-m", "serve_app.load_test"]
        command += ["--config", str(PRESET), "--set", f"runs_dir={self.cfg.runs_dir}"]
        command += ["--url", url, "--rate", str(rate), "--seconds", str(seconds), *options]

        before = _busy_s()
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        figures = json.loads(done.stdout)
        # counters in hundredths: nobody else can come out as less than nobody
        others_s = max(_busy_s() - before, 0.0)
        figures["others_cores"] = round(others_s / (seconds + 3), 2)
        shown = ("statuses", "latency_ms", "ranker_ms", "overhead_ms")
        print(json.dumps({name: figures[name] for name in shown}), flush=True)
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


def paced_ms(url: str, seconds: float = 10.0) -> dict[str, float]:
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


# The machine -----------------------------------------------------------------


def replica_pids(deployment_name: str) -> list[int]:
    """Of the replicas of this cluster."""
    return _actor_pids(f"ServeReplica:{deployment.APPLICATION}:{deployment_name}")


def find_pids(kind: str) -> list[int]:
    """Processes of this cluster's server: `Api`, `RankerReplica`, or one of `PROXIES`."""
    if kind == "haproxy":
        managers = set(_actor_pids("HAProxyManager"))
        return [pid for pid, parent in _parents().items() if parent in managers]
    return _actor_pids(kind) if kind in PROXIES else replica_pids(kind)


def kill_one(kind: str) -> bool:
    """SIGKILL to one of `find_pids`; False where there is none at the moment."""
    for pid in find_pids(kind):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
        return True
    return False


def _actor_pids(class_name: str) -> list[int]:
    from ray.util.state import list_actors

    alive = list_actors(filters=[("class_name", "=", class_name), ("state", "=", "ALIVE")])
    return [actor.pid for actor in alive]


def _parents() -> dict[int, int]:
    """Parent of each process of this machine."""
    parents: dict[int, int] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            parents[int(folder.name)] = _stat(int(folder.name))[0]
    return parents


def _stat(pid: int) -> tuple[int, float]:
    """A process's parent, and the seconds of processor time that it and its ended children took."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[1]), sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def processor_seconds() -> dict[str, float]:
    """Processor time of the ingresses and of the replicas so far."""
    spent = {}
    for name in ("Api", "RankerReplica"):
        spent[name] = sum(_stat(pid)[1] for pid in replica_pids(name))
    return spent


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


def describe_machine() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if "model name" in line
    ]
    return f"{len(names)} cores of {names[0]}"
