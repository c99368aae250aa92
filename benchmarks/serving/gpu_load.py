"""Requests a second that a GPU answers over HTTP, 99 of 100 within 50 ms.

    python -m benchmarks.serving.gpu_load --prepare --runs-dir FOLDER     # its users; needs Ray
    python -m benchmarks.serving.gpu_load --runs-dir FOLDER [--without-ray] [--device cpu]
    python -m benchmarks.serving.gpu_load --report                        → RESULTS.md

    open loop at a rate → p99 within 50 ms? → twice the rate, or half way back → the highest rate

12 layers of 512, histories of 4,096 events, 512 candidates, an untrained model. *Warm*: the users'
histories are encoded. *Cold*: each request is as of a time of its own, so that its history has been
encoded for nobody. A request that is refused or fails counts as one that takes for ever.

`--without-ray` asks the server of `benchmarks.serving.without_ray`, else one on Ray Serve.
"""

import argparse
import asyncio
import json
import logging
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.machine import environment
from benchmarks.processes import end_process, exit_on_sigterm
from benchmarks.report import RUNS, read_run, table, write_run, write_section
from benchmarks.serving.gpu_replica import SIZES
from benchmarks.serving.stage import PRESET, untrained
from pipeline import config, logs
from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig
from pipeline.sequences import build, store
from serve_app import deployment, load_test
from serve_app.web.limits import QUIET_S

RUN, RAY_RUN = RUNS / "serve_gpu_load.json", RUNS / "serve_gpu_load_ray.json"
MOST_MS, PERCENTILE = 50.0, 99
NUM_CANDIDATES, NUM_WARM_USERS = 512, 64
LEAST_RATE, MOST_RATE, CLOSE_ENOUGH = 1.5, 2_000.0, 1.2
FIRST_RATES = {"warm": 80.0, "cold": 40.0}
TRIAL_S = 6.0
WARM_UP_RATE, WARM_UP_S = 60.0, 2.0  # several requests in a pass, whose kernels are compiled then
SERVER = [
    *("serve.host=127.0.0.1", "serve.port=0", "serve.one_process=false"),
    "serve.max_wait_ms=500",
]
ON_DEVICE = {
    "cpu": ["serve.max_history=200", "serve.cache_mb=256"],
    "cuda": [
        *("serve.use_gpu=true", "serve.precision=bf16", "serve.cuda_graphs=true"),
        *("serve.max_history=4096", "serve.cache_mb=24576", "serve.batch_tokens=65536"),
        # so many that 4,096 lie before each as-of time
        *("source.synthetic.min_history=4224", "source.synthetic.max_history=4224"),
    ],
}
MOST_TRIALS = 3  # of the last ones
COMPILED = re.compile(r"^ranking_kernels_compiled{.*} (\S+)$", re.M)
# as-of times fall on so many of the newest events, and the longest history is still before them
HISTORIES_A_USER = 48


@dataclass(frozen=True)
class Trial:
    """What came of one rate."""

    rate: float  # asked for, requests/s
    num_requests: int
    num_bad: int  # refused, failed or without an answer
    p50_ms: float
    tail_ms: float  # infinite where bad ones are among the slowest hundredth
    late_ms: float  # at the same percentile: the generator's own part of it
    hops_ms: dict[str, Any] = field(default_factory=dict)  # `load_test.hop_figures`

    @property
    def holds(self) -> bool:
        return self.tail_ms <= MOST_MS


def find_highest_rate(ask: Callable[[float], Trial], first: float) -> list[Trial]:
    """Trials until the highest rate that holds is known within a fifth: from `first` twice the rate
    as long as it holds, or half of it until it does, then half way between, by ratio.

        rate    20   40   80   57   67
        holds   yes  yes  no   yes  no       the highest is 57
    """
    trials = [ask(first)]
    factor = 2.0 if trials[0].holds else 0.5
    while trials[-1].holds == trials[0].holds and LEAST_RATE < trials[-1].rate < MOST_RATE:
        trials.append(ask(factor * trials[-1].rate))
    if trials[-1].holds == trials[0].holds:  # beyond what is asked for
        return trials

    holds, fails = sorted([trials[-2].rate, trials[-1].rate])
    while fails / holds > CLOSE_ENOUGH:
        between = math.sqrt(holds * fails)
        trials.append(ask(between))
        if trials[-1].holds:
            holds = between
        else:
            fails = between
    return trials


def best_of(trials: list[Trial]) -> Trial | None:
    """The highest rate that holds, None where no rate does."""
    holding = [trial for trial in trials if trial.holds]
    return max(holding, key=lambda trial: trial.rate, default=None)


# Requests --------------------------------------------------------------------


@dataclass
class Asker:
    """Makes the bodies of requests, warm or cold."""

    users: list[int]
    newest_ms: dict[int, list[int]]  # of each user the times of the newest events, newest first
    items: np.ndarray
    rng: np.random.Generator
    num_asked: int = 0

    @classmethod
    def of_store(cls, sequence_dir: Path) -> "Asker":
        """Users and items of the published sequences."""
        rows = store.read_sequences(sequence_dir)
        newest_ms: dict[int, list[int]] = {}
        for row in rows.select(["user_id", "event_time"]).to_pylist():
            times = sorted(set(row["event_time"]), reverse=True)
            newest_ms[row["user_id"]] = times[:HISTORIES_A_USER]
        users, items = load_test.known_ids(sequence_dir)
        return cls(users.tolist(), newest_ms, items, np.random.default_rng(0))

    def warm_body(self, user: int | None = None) -> bytes:
        """A request of one of few users, as of now."""
        if user is None:
            user = int(self.rng.choice(self.users[:NUM_WARM_USERS]))
        return json.dumps({"user_id": user, "candidates": self._candidates()}).encode()

    def cold_body(self) -> bytes:
        """A request as of a time that nobody has asked for: user after user at their newest event,
        then at the one before it.
        """
        round_of_users, place = divmod(self.num_asked, len(self.users))
        self.num_asked += 1
        user = self.users[place]
        times = self.newest_ms[user]
        body = {"user_id": user, "request_time_ms": times[round_of_users % len(times)]}
        return json.dumps(body | {"candidates": self._candidates()}).encode()

    def _candidates(self) -> list[dict[str, int]]:
        drawn = self.rng.choice(self.items, NUM_CANDIDATES, replace=False)
        return [{"item_id": item} for item in drawn.tolist()]


def try_rate(url: str, body: Callable[[], bytes], rate: float, seconds: float) -> Trial:
    """Send requests at Poisson times for so long."""
    load = load_test.RequestLoad(rate=rate, seconds=seconds, candidates=NUM_CANDIDATES)
    asked = load_test.draw_arrivals(load, np.arange(1))
    bodies = [body() for _ in asked.due_s]
    answers = asyncio.run(load_test.send_requests(url, load, asked, bodies, {}))

    is_good = answers.status == 200
    latency_ms = np.where(is_good, answers.latency_ms, np.inf)
    trial = Trial(
        rate=round(rate, 1),
        num_requests=len(bodies),
        num_bad=int(np.count_nonzero(~is_good)),
        p50_ms=_percentile(latency_ms, 50),
        tail_ms=_percentile(latency_ms, PERCENTILE),
        late_ms=_percentile(answers.late_ms, PERCENTILE),
        hops_ms=load_test.hop_figures(answers),
    )
    print(json.dumps(plain_trial(trial)), flush=True)
    if not trial.holds:
        time.sleep(2 * QUIET_S)  # the server forgets the overload, which is no part of the next
    return trial


def _percentile(values: np.ndarray, percent: float) -> float:
    """The smallest value that so many percent do not exceed."""
    return round(float(np.percentile(values, percent, method="inverted_cdf")), 2)


def plain_trial(trial: Trial) -> dict[str, Any]:
    """A trial for JSON, which has no infinity."""
    finite = {}
    for name, value in vars(trial).items():
        finite[name] = None if isinstance(value, float) and math.isinf(value) else value
    return finite | {"holds": trial.holds}


# Runs ------------------------------------------------------------------------


def measure(url: str, asker: Asker, out: Path, run: dict[str, Any]) -> None:
    """Warm, then cold; what is known is written after each trial."""
    json_type = {"content-type": "application/json"}
    with httpx.Client(base_url=url, headers=json_type, timeout=120) as client:
        run["largest_difference"] = _compare_cold_and_warm(client, asker)
        for user in asker.users[:NUM_WARM_USERS]:
            client.post("/v1/rank", content=asker.warm_body(user)).raise_for_status()

    bodies: dict[str, Callable[[], bytes]] = {"warm": asker.warm_body, "cold": asker.cold_body}
    for name, body in bodies.items():
        print(f"{name}; first to warm up", flush=True)
        try_rate(url, body, WARM_UP_RATE, WARM_UP_S)
        figures: dict[str, Any] = {"trials": []}
        run[name] = figures

        def ask(rate: float, body=body, figures=figures) -> Trial:
            trial = try_rate(url, body, rate, TRIAL_S)
            figures["trials"].append(plain_trial(trial))
            write_run(out, run)
            return trial

        compiled = kernels_compiled(url)
        best = best_of(find_highest_rate(ask, FIRST_RATES[name]))
        if best is not None:
            again = confirm_rate(
                lambda rate, body=body: try_rate(url, body, rate, TRIAL_S), best.rate
            )
            figures["again"] = plain_trial(again)
        figures["kernels_compiled"] = kernels_compiled(url) - compiled
        write_run(out, run)


def confirm_rate(ask: Callable[[float], Trial], rate: float) -> Trial:
    """A second trial of the rate, or one of lower ones until one holds, `MOST_TRIALS` at most."""
    trial = ask(rate)
    for _ in range(MOST_TRIALS - 1):
        if trial.holds:
            break
        rate /= CLOSE_ENOUGH
        trial = ask(rate)
    return trial


def kernels_compiled(url: str) -> int:
    """Triton kernels that the server has compiled so far."""
    found = COMPILED.search(httpx.get(f"{url}/metrics", timeout=60).text)
    return 0 if found is None else int(float(found[1]))


def _compare_cold_and_warm(client: httpx.Client, asker: Asker) -> float:
    """Largest difference of a score between one request's answers, its history encoded for the
    first of them.
    """
    answers = []
    body = asker.warm_body(asker.users[0])
    for _ in range(2):
        answer = client.post("/v1/rank", content=body).raise_for_status().json()
        answers.append(np.array(list(answer["scores"].values())))
    return float(np.abs(answers[0] - answers[1]).max())


@contextmanager
def server_alone(settings: list[str]) -> Iterator[str]:
    """Address of a server without Ray, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.serving.without_ray", "--set", *settings]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        try:
            url = server.stdout.readline().strip()
            if not url:
                raise SystemExit("the server ended before it had an address")
            yield url
        finally:
            end_process(server)


@contextmanager
def server_on_ray(cfg: RunConfig) -> Iterator[str]:
    """Address of a server on Ray Serve, on a cluster of its own."""
    with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True) as cluster:
        wanted = deployment.user_config(cfg.folders, cfg.serve, untrained(cfg, version=1))
        yield deployment.send_update(cfg.serve, cluster.dashboard_url, wanted)


def prepare_users(cfg: RunConfig) -> None:
    """Generate the users and publish their sequences."""
    with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir):
        logs.import_logs(cfg)
        build.build_sequences(cfg)


def read_runs() -> list[dict[str, Any]]:
    """The loads that were measured: of one process, and of Ray Serve's."""
    return [read_run(path) for path in (RUN, RAY_RUN) if path.exists()]


def section(runs: list[dict[str, Any]]) -> str:
    """What was measured, for RESULTS.md."""
    return "\n\n".join(["## Load on a GPU over HTTP", *(run_text(run) for run in runs)])


def run_text(run: dict[str, Any]) -> str:
    """One server's load."""
    machine = run["environment"]
    rows = []
    for name, found in run.items():
        if name.startswith(("warm", "cold")):
            rows.append([name, *_cells(found.get("again"))])

    # a run from before it said so had shorter trials of all rates but the last
    times = "3 s and once more in 6 s"
    if "trial_s" in run:
        times = f"{run['trial_s']:g} s, and again in as many"
    protocol = run.get(  # of a run whose rates were tried in another way
        "protocol",
        f"Open loop at Poisson times; the highest rate at which 99 of 100 answers came within "
        f"{MOST_MS:g} ms in {times}, whose figures these are (the last that was tried, where none "
        "did)",
    )
    said = (
        f"`{run['command']}`, {machine['device']}, {run['cores']} cores, torch {machine['torch']}, "
        f"triton {machine['triton']}; {run['server']}; {run['model']}, {run['candidates']} "
        f"candidates, {run['formats']}. {protocol}. "
        "Between the first answer to a request and the second, from the kept history, scores "
        f"differ by {run['largest_difference']:.1e} at most."
    )
    if "start_s" in run:
        said += (
            f" The server had loaded, warmed and recorded everything {run['start_s']:.0f} s after "
            "its start."
        )
    if "note" in run:  # of code that has changed since
        said += f" {run['note']}."
    header = ["histories", "requests/s", "p50 / p99, ms", "ranker's pass", "wait for passes"]
    header += ["the rest of the server", "refused or failed"]
    return "\n\n".join([said, table(header, rows)])


def _cells(trial: dict[str, Any] | None) -> list[str]:
    if trial is None:
        return ["–"] * 6

    def pair(*ms: float | None) -> str:
        return " / ".join("–" if value is None else f"{value:.1f}" for value in ms)

    parts = ["–"] * 3
    hops = trial.get("hops_ms")
    if hops:
        own = [name for name in hops if name not in ("ranker", "wait", "late", "network", "total")]
        parts = [
            pair(hops["ranker"]["p50"], hops["ranker"]["p99"]),
            pair(hops["wait"]["p50"], hops["wait"]["p99"]),
            f"{sum(hops[name]['p50'] for name in own):.1f}",
        ]
    return [
        f"{trial['rate']:g}",
        pair(trial["p50_ms"], trial["tail_ms"]),
        *parts,
        f"{trial['num_bad']} of {trial['num_requests']:,}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--runs-dir", default="runs/gpu_load")
    parser.add_argument("--prepare", action="store_true", help="make the users and end")
    parser.add_argument("--without-ray", action="store_true")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, help="default: of `runs`, by the server")
    parser.add_argument("--report", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.report:
        write_section("serve_gpu_load", section(read_runs()))
        return

    exit_on_sigterm()
    logging.basicConfig(level=logging.WARNING)
    settings = [f"runs_dir={options.runs_dir}", *SERVER]
    settings += [*SIZES[options.device], *ON_DEVICE[options.device], *options.set]
    cfg = config.load(PRESET, settings)
    if options.prepare:
        prepare_users(cfg)
        return

    run = _describe(cfg, options.device, options.without_ray)
    if options.set:
        run["command"] += " --set " + " ".join(options.set)
    starting = server_alone(settings) if options.without_ray else server_on_ray(cfg)
    out = options.out or (RUN if options.without_ray else RAY_RUN)
    begun = time.perf_counter()
    with starting as url:
        run["start_s"] = round(time.perf_counter() - begun, 1)
        measure(url, Asker.of_store(cfg.sequence_dir), out, run)


def _describe(cfg: RunConfig, device: str, without_ray: bool) -> dict[str, Any]:
    """All of a run that is known before it."""
    server = "Ray Serve, the ingress in processes of its own"
    if without_ray:
        server = "the server's application in uvicorn and its ranker in one process, no Ray Serve"
    command = "python -m benchmarks.serving.gpu_load"
    command += " --without-ray" * without_ray + " --device cpu" * (device == "cpu")
    model, serve = cfg.model, cfg.serve
    graphs = ", CUDA graphs" if serve.cuda_graphs else ""
    return {
        "command": command,
        "environment": environment(device),
        "cores": len(os.sched_getaffinity(0)),
        "server": server,
        "model": f"{model.num_layers} layers of {model.d_model}, histories of "
        f"{min(serve.max_history, cfg.source.synthetic.max_history):,} events",
        "candidates": NUM_CANDIDATES,
        "trial_s": TRIAL_S,
        "formats": f"{serve.precision}{graphs}",
    }


if __name__ == "__main__":
    main()
