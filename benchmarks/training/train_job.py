"""Training by the job itself, on one GPU and on several: `jobs.train`, Ray Train's workers, the
real loader, from a published store to a published model.

    # measure on the GPUs of this machine → runs/train_job.json
    python -m benchmarks.training.train_job --workers 1 2

    # a try without GPUs
    python -m benchmarks.training.train_job --tiny --out /tmp/train_job.json

    # → its section of RESULTS.md
    python -m benchmarks.training.train_job --report

Histories have Zipf lengths, every file of the store the same ones, so that the readers have equal
parts as they do with many users. Steps count tokens, as many for each worker however many there
are, and are dealt so that all hold equally many (`train.stochastic_length.balance`). A job is a
process of its own with a Ray cluster of its own; speed is read from the lines of its metrics.jsonl,
all but those of its first steps. In one case one worker is killed in the middle (SIGKILL), and Ray
Train starts all of them again from the newest checkpoint.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.machine import environment
from benchmarks.report import RUNS, table, write_run, write_section
from benchmarks.training.collate import bench_config
from benchmarks.training.feeding import publish
from benchmarks.training.model import SEMI_LOCAL, model_config
from pipeline import config
from pipeline.batches.steps import step_plan
from pipeline.config import RunConfig
from pipeline.figures import Figures
from pipeline.train.metrics import METRICS, MetricsLine, parse_line

LOG_EVERY = 10
WARM_STEPS = 50  # in which kernels are compiled and memory grows
CHECKPOINT_EVERY = 50
KILLED_AFTER = 70  # steps
SHORTEST = 64  # part of the longest history that the shortest has
STORE = "train_job_store"
IDLE_RUN, SHARED_RUN = RUNS / "train_job.json", RUNS / "train_job_shared_host.json"
LOOK_EVERY_S = 0.05
# options that a run is told by
SIZES = ("events", "length", "users", "files", "layers", "heads", "width", "balance")


@dataclass(frozen=True, slots=True)
class JobCase:
    """A training, and what is done to it."""

    workers: int
    cuda_graphs: str = "off"  # train.cuda_graphs
    is_killed: bool = False  # one of its workers, once

    @property
    def name(self) -> str:
        workers = "1 worker" if self.workers == 1 else f"{self.workers} workers"
        graphs = "" if self.cuda_graphs == "off" else ", CUDA graphs"
        return f"{workers}{graphs}{', one of them killed' if self.is_killed else ''}"


def zipf_quantiles(num: int, longest: int) -> np.ndarray:
    """`num` lengths, n as often as 1 / n from a part of `longest` up to it, int64: the quantiles,
    not a draw.

        num = 3, longest 64     2 8 32
    """
    shortest = max(longest // SHORTEST, 1)
    places = (np.arange(num) + 0.5) / num
    return np.round(shortest * (longest / shortest) ** places).astype(np.int64)


def job_config(case: JobCase, folder: Path, options: argparse.Namespace) -> RunConfig:
    """What the job is told. The number of epochs is still open."""
    cut = {"truncate_after_layer": max(options.layers // 3, 1), "truncate_to": 1024}
    settings = {"attention": SEMI_LOCAL, **cut}
    like = model_config(settings, options.layers, options.heads, options.width)
    base = bench_config(
        name=case.name.replace(" ", "_").replace(",", ""),
        runs_dir=str(folder),
        sequences={"from_run": STORE},
        ray={"num_cpus": max(2 * case.workers, 4)},
    )
    on_gpu = options.device == "cuda"
    dealt = replace(base.train.stochastic_length, balance=options.balance)
    train = replace(
        base.train,
        num_workers=case.workers,
        use_gpu=on_gpu,
        precision="bf16" if on_gpu else "fp32",
        cuda_graphs=case.cuda_graphs,
        batch_users=None,
        batch_tokens=options.events * case.workers,
        stochastic_length=dealt,
        lr=1e-4,
        embedding_lr=1e-4,
        loader_process=True,
        loader_threads=2,
        log_every=LOG_EVERY,
        checkpoint_every=CHECKPOINT_EVERY if case.is_killed else 10_000,
    )
    return replace(base, model=like.model, train=train)


def with_epochs(cfg: RunConfig, steps: int) -> RunConfig:
    """As many passes over the store as make `steps` steps at least."""
    # as the job sets it: a reader for each worker
    read = replace(cfg, train=replace(cfg.train, readers=cfg.train.num_workers, epochs=1))
    epochs = -(-steps // step_plan(read).steps_per_epoch)
    return replace(cfg, train=replace(cfg.train, epochs=epochs))


def run_job(case: JobCase, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A training: its speed once it is warm, and its losses. A job whose time is up is asked to
    end, and what it has trained counts.

    Raises:
        RuntimeError: the job ended with an error, or its time before it was warm; says the end of
        its log.
    """
    cfg = with_epochs(job_config(case, folder, options), options.steps)
    preset = folder / f"{cfg.name}.yaml"
    preset.write_text(yaml.safe_dump(config.to_dict(cfg)))
    begin = time.monotonic()
    with (folder / f"{cfg.name}.log").open("w+") as log:
        command = [sys.executable, "-m", "jobs.train", "--config", str(preset), "--no-tracking"]
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            if case.is_killed:
                kill_worker(job, cfg.train_dir / METRICS, KILLED_AFTER)
            code = job.wait(options.minutes_a_job * 60)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_job(job)

        lines = read_lines(cfg.train_dir / METRICS)
        is_warm = bool(lines) and lines[-1].step > WARM_STEPS
        if code not in (0, None) or not is_warm:
            log.seek(0)
            raise RuntimeError(f"{case.name}: exit code {code}\n{log.read()[-6000:]}")

    losses = {line.step: line.values["train/loss"] for line in lines}
    seconds = None if code is None else time.monotonic() - begin
    return steady_speed(lines) | {"workers": case.workers, "seconds": seconds, "losses": losses}


def end_job(job: "subprocess.Popen[bytes]") -> None:
    """End a job that still runs; it ends its cluster."""
    if job.poll() is None:
        job.terminate()
        try:
            job.wait(20)
        except subprocess.TimeoutExpired:
            job.kill()


def read_lines(path: Path) -> list[MetricsLine]:
    """The whole lines of a file that may still be written."""
    if not path.exists():
        return []
    whole = path.read_text().rpartition("\n")[0]
    return [parse_line(line) for line in whole.splitlines()]


def steady_speed(lines: Sequence[MetricsLine], warm_steps: int = WARM_STEPS) -> dict[str, float]:
    """Speed over all steps after the first `warm_steps`: what they held over what they took.

    `lines` begin within these, and go on after them.

        lines           step 10, 900 ms     step 20, 60 ms      step 30, 80 ms
        after 10        20 steps of 70 ms
    """
    early = [line for line in lines if line.step <= warm_steps]
    late = lines[len(early) :]
    seconds = tokens = for_data = for_messages = 0.0
    before = early[-1].step
    for line in late:
        took = (line.step - before) * line.values["train/step_ms"] / 1000
        seconds += took
        tokens += took * line.values["train/tokens_per_s"]
        for_data += took * line.values["train/data_wait_share"]
        for_messages += took * line.values["train/message_wait_share"]
        before = line.step

    steps = late[-1].step - early[-1].step
    gaps = [after.at_seconds - line.at_seconds for line, after in pairwise(lines)]
    return {
        "steps": steps,
        "step_ms": 1000 * seconds / steps,
        "tokens_per_s": tokens / seconds,
        "data_wait_share": for_data / seconds,
        "message_wait_share": for_messages / seconds,
        "graphs": late[-1].values.get("train/graphs_captured", 0),
        "longest_gap_s": max(gaps),
    }


def kill_worker(job: "subprocess.Popen[bytes]", metrics: Path, step: int) -> None:
    """Wait until the job has logged `step`, and kill the last of its training workers."""
    while job.poll() is None:
        lines = read_lines(metrics)
        if lines and lines[-1].step >= step:
            break
        time.sleep(LOOK_EVERY_S)

    workers = [pid for pid in descendants(job.pid) if "RayTrainWorker" in command_line(pid)]
    if workers:
        os.kill(workers[-1], signal.SIGKILL)


def descendants(ancestor: int) -> list[int]:
    """Processes that this one started, and those that they started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                facts = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended meanwhile
                continue
            parents[int(entry.name)] = int(facts[1])

    found, fresh = set(), {ancestor}
    while fresh:
        found |= fresh
        fresh = {pid for pid, parent in parents.items() if parent in fresh} - found
    return sorted(found - {ancestor})


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def furthest_loss(a: dict[int, float], b: dict[int, float]) -> float:
    """The largest relative distance of two runs' losses, over the steps that both have logged."""
    return max(abs(a[step] - b[step]) / abs(b[step]) for step in a.keys() & b.keys())


def cases(options: argparse.Namespace) -> list[JobCase]:
    """All numbers of workers, their steps launched one by one; a killed worker; and CUDA graphs,
    which several workers have not by themselves.
    """
    found = []
    for workers in options.workers:
        found.append(JobCase(workers))
    most = max(options.workers)
    if most > 1:
        found.append(JobCase(most, is_killed=True))
    if options.device == "cuda":
        for workers in options.workers:
            found.append(JobCase(workers, cuda_graphs="auto" if workers == 1 else "on"))
    return found


def measure(options: argparse.Namespace, run: Figures, keep: Callable[[], None]) -> bool:
    """All cases, each kept as soon as it has ended; False where one did not."""
    everything_ran = True
    losses: dict[int, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = bench_config(name=STORE, runs_dir=name)
        lengths = zipf_quantiles(options.users, options.length)
        publish(base.sequence_dir, base, np.tile(lengths, options.files), options.files)

        for case in cases(options):
            if time.monotonic() > options.end:
                print(f"left out, no time: {case.name}", flush=True)
                continue
            try:
                found = run_job(case, folder, options)
            except RuntimeError as error:
                print(f"FAILED: {error}", flush=True)
                everything_ran = False
                continue

            of_case = found.pop("losses")
            if not case.is_killed:
                losses.setdefault(case.workers, of_case)
            elif case.workers in losses:
                found["furthest_loss"] = furthest_loss(of_case, losses[case.workers])
            run["cases"][case.name] = found
            keep()
            print(case.name, json.dumps(found), flush=True)
    return everything_ran


def read_runs() -> list[Figures]:
    """The jobs that were measured; first those of a host that did nothing else."""
    return [json.loads(path.read_text()) for path in (IDLE_RUN, SHARED_RUN) if path.exists()]


def section(runs: Sequence[Figures]) -> str:
    """The section of RESULTS.md from one run or more."""
    alone = []
    for run in runs:
        cases = run["cases"].values()
        alone += [case["tokens_per_s"] for case in cases if case["workers"] == 1]
    text = f"""## Training by the job

`jobs.train` with Ray Train's workers on a published store, histories of Zipf lengths in passes of
at most 64 targets. Speed is over all steps after the first {WARM_STEPS}. The ratio is to the
fastest job of one worker, in a run without one (†) to that of the other runs. The whole job begins
with Ray's start and ends with the published model."""
    return "\n\n".join([text, *(run_text(run, max(alone, default=None)) for run in runs)])


def run_text(run: Figures, of_others: float | None) -> str:
    """The jobs of one run; `of_others` is the best tokens/s of one worker in any run."""
    machine, found, sizes = run["environment"], run["cases"], run["sizes"]
    dealt = "dealt by tokens" if sizes["balance"] == "dealing" else "cut as they come"
    alone = [case["tokens_per_s"] for case in found.values() if case["workers"] == 1]
    of_one, mark = (max(alone), "") if alone else (of_others, " †")

    rows = []
    for name, case in found.items():
        if "furthest_loss" in case:
            continue
        has_ratio = case["workers"] > 1 and of_one is not None
        ratio = f"**{case['tokens_per_s'] / of_one:.2f}x**{mark}" if has_ratio else "–"
        rows.append(
            [
                name,
                f"{case['step_ms']:.1f}",
                f"{case['tokens_per_s']:,.0f}",
                ratio,
                f"{case['message_wait_share']:.1%}",
                f"{case['data_wait_share']:.1%}",
                f"{case['graphs']:.0f}",
                f"{case['steps']:.0f}",
                "–" if case["seconds"] is None else f"{case['seconds']:.0f}",
            ]
        )
    header = ["", "ms a step", "tokens/s", "of one worker's", "waiting for messages", "for data"]
    header += ["graphs recorded", "steps counted", "whole job, s"]
    note = f" ({run['note']})" if "note" in run else ""  # written into its file by hand
    text = f"""`{run["command"]}`{note}: {machine["device"]}, {machine["cores"]} cores,
torch {machine["torch"]}, Ray {machine["ray"]}. {sizes["events"]:,} tokens a worker and step,
{dealt}; histories up to {sizes["length"]:,}; ULTRA-HSTU of {sizes["layers"]} layers,
d = {sizes["heads"] * sizes["width"]}.

{table(header, rows)}"""
    killed = [name for name, case in found.items() if "furthest_loss" in case]
    return "\n\n".join([text, *(killed_text(name, found[name]) for name in killed)])


def killed_text(name: str, case: Figures) -> str:
    return f"""{name}: by SIGKILL after step {KILLED_AFTER}; Ray Train started all of them again
from the newest checkpoint, of which there is one every {CHECKPOINT_EVERY} steps. Losses of all
lines are within {case["furthest_loss"]:.1e} of the unbroken run's; the longest time between two
lines was {case["longest_gap_s"]:.0f} s."""


TINY = {
    "events": 2048,
    "length": 256,
    "users": 4,
    "files": 4,
    "steps": 100,
    "layers": 2,
    "heads": 2,
    "width": 16,
    "device": "cpu",
    "balance": "dealing",
}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--workers", type=int, nargs="+", default=[1, 2])
    add("--events", type=int, default=262_144, help="tokens of a worker's step")
    add("--length", type=int, default=16_384, help="of the longest history")
    add("--users", type=int, default=20, help="of a file of the store")
    add("--files", type=int, default=8, help="of the store")
    add("--steps", type=int, default=150, help="of a training, at least")
    add("--layers", type=int, default=12)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=128, help="of a head")
    add("--balance", choices=["none", "dealing"], default="dealing", help="of the steps' tokens")
    add("--device", choices=["cpu", "cuda"], default="cuda")
    add("--tiny", action="store_true", help="the sizes of a try without GPUs")
    add("--minutes", type=float, default=8.0, help="after which no job begins")
    add("--minutes-a-job", type=float, default=3.0, help="after which a job is ended")
    add("--out", type=Path, default=IDLE_RUN)
    add("--report", action="store_true", help="write RESULTS.md from runs/train_job*.json and end")
    options = parser.parse_args()
    if options.tiny:
        vars(options).update(TINY)
    options.end = time.monotonic() + 60 * options.minutes
    return options


def main() -> None:
    options = read_options()
    if options.report:
        write_section("train_job", section(read_runs()))
        return

    workers = " ".join(map(str, options.workers))
    run: Figures = {
        "command": f"python -m benchmarks.training.train_job --workers {workers}",
        "environment": environment(options.device) | {"ray": version("ray")},
        "sizes": {name: getattr(options, name) for name in SIZES},
        "cases": {},
    }
    everything_ran = measure(options, run, keep=lambda: write_run(options.out, run))
    if run["cases"]:
        print(f"\n{section([run])}", flush=True)
    raise SystemExit(not everything_ran)


if __name__ == "__main__":
    main()
