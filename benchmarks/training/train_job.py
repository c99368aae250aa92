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
all but those of its first steps.

Losses and weights of some jobs are held against those of the plain job of as many workers: with
CUDA graphs; with one worker killed in the middle (SIGKILL), after which Ray Train starts all of
them again from the newest checkpoint; asked to end (SIGTERM) and gone on with by a single worker.
The last two run beside each other, and no speed is read from them. With `--at-once` all cases do.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors.numpy import load_file

from benchmarks.machine import environment
from benchmarks.processes import descendants, end_process, exit_on_sigterm
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
BROKEN_AFTER = 70  # steps, of a job whose worker is killed or that is asked to end
SHORTEST = 64  # part of the longest history that the shortest has
STORE, WEIGHTS = "train_job_store", "model.safetensors"
ENDED = 143  # exit code of a job that SIGTERM has ended
KILLED, ENDED_BY_ONE = BROKEN = ("one of them killed", "then 1 worker")  # ends of cases' names
IDLE_RUN, SHARED_RUN = RUNS / "train_job.json", RUNS / "train_job_shared_host.json"
AT_ONCE_RUN = RUNS / "train_job_at_once.json"  # all cases beside each other
LOOK_EVERY_S = 0.05
EVENTS = 262_144  # of a worker's step, unless said otherwise
# options that a run is told by
SIZES = ("events", "length", "users", "files", "layers", "heads", "width", "balance")


@dataclass(frozen=True, slots=True)
class JobCase:
    """A training, and what is done to it."""

    workers: int
    cuda_graphs: str = "off"  # train.cuda_graphs
    is_killed: bool = False  # one of its workers, once
    ended_by_one: bool = False  # asked to end, and gone on with by a job of one worker

    @property
    def name(self) -> str:
        told = ["1 worker" if self.workers == 1 else f"{self.workers} workers"]
        if self.cuda_graphs != "off":
            told.append("CUDA graphs")
        if self.is_killed:
            told.append(KILLED)
        if self.ended_by_one:
            told.append(ENDED_BY_ONE)
        return ", ".join(told)

    @property
    def is_broken(self) -> bool:
        return self.is_killed or self.ended_by_one

    @property
    def is_plain(self) -> bool:
        return not self.is_broken and self.cuda_graphs == "off"


@dataclass(frozen=True, slots=True)
class Trained:
    """What a job has left behind."""

    losses: dict[int, float]  # by the step of a line
    model_dir: Path
    is_complete: bool  # it ended by itself


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
        checkpoint_every=CHECKPOINT_EVERY if case.is_broken else 10_000,
    )
    return replace(base, model=like.model, train=train)


def with_epochs(cfg: RunConfig, steps: int) -> RunConfig:
    """As many passes over the store as make `steps` steps at least."""
    # as the job sets it: a reader for each worker
    read = replace(cfg, train=replace(cfg.train, readers=cfg.train.num_workers, epochs=1))
    epochs = -(-steps // step_plan(read).steps_per_epoch)
    return replace(cfg, train=replace(cfg.train, epochs=epochs))


def run_job(
    case: JobCase, folder: Path, options: argparse.Namespace, stopping: threading.Event
) -> tuple[dict[str, Any], Trained]:
    """A training: its speed once it is warm, and what it leaves behind. A job whose time is up is
    asked to end, and what it has trained counts.

    Raises:
        RuntimeError: the job ended with an error, or its time before it was warm; says the end of
        its log. Or `stopping` was set.
    """
    cfg = with_epochs(job_config(case, folder, options), options.steps)
    begin = time.monotonic()
    if case.ended_by_one:
        run_part(case, cfg, folder, options, stopping)
        cfg = replace(cfg, train=replace(cfg.train, num_workers=1))
        code = run_part(replace(case, ended_by_one=False), cfg, folder, options, stopping)
    else:
        code = run_part(case, cfg, folder, options, stopping)

    lines = read_lines(cfg.train_dir / METRICS)
    seconds = None if code is None else time.monotonic() - begin
    losses = {line.step: line.values["train/loss"] for line in lines}
    found = steady_speed(lines) | {"workers": case.workers, "seconds": seconds}
    return found, Trained(losses, cfg.model_dir, is_complete=code == 0)


def run_part(
    case: JobCase,
    cfg: RunConfig,
    folder: Path,
    options: argparse.Namespace,
    stopping: threading.Event,
) -> int | None:
    """A job from its start to its end: its exit code, None of one whose time was up.

    Raises:
        RuntimeError: as `run_job` says, or the job to be broken off was complete before.
    """
    preset = folder / f"{cfg.name}.yaml"
    preset.write_text(yaml.safe_dump(config.to_dict(cfg)))
    metrics = cfg.train_dir / METRICS
    expected = (0, None)
    with (folder / f"{cfg.name}.log").open("a+") as log:
        command = [sys.executable, "-m", "jobs.train", "--config", str(preset), "--no-tracking"]
        job = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        try:
            if case.is_broken:
                await_step(job, metrics, BROKEN_AFTER, stopping)
            if case.is_killed and not kill_worker(job):
                expected = ()
            elif case.ended_by_one:
                expected = (ENDED,)
                job.terminate()
            code = await_end(job, options.minutes_a_job * 60, stopping)
        finally:
            end_process(job)

        lines = read_lines(metrics)
        is_warm = bool(lines) and lines[-1].step > WARM_STEPS
        if code not in expected or not is_warm:
            log.seek(0)
            raise RuntimeError(f"{case.name}: exit code {code}\n{log.read()[-6000:]}")
    return code


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


def await_step(
    job: "subprocess.Popen[bytes]", metrics: Path, step: int, stopping: threading.Event
) -> None:
    """Wait until the job has logged `step`, or has ended.

    Raises:
        RuntimeError: `stopping` was set before.
    """
    while job.poll() is None:
        lines = read_lines(metrics)
        if lines and lines[-1].step >= step:
            break
        look_again(stopping)


def await_end(
    job: "subprocess.Popen[bytes]", seconds: float, stopping: threading.Event
) -> int | None:
    """Wait for the job's end: its exit code, None after so many seconds.

    Raises:
        RuntimeError: `stopping` was set before.
    """
    end = time.monotonic() + seconds
    while job.poll() is None and time.monotonic() < end:
        look_again(stopping)
    return job.poll()


def look_again(stopping: threading.Event) -> None:
    """Return after `LOOK_EVERY_S`.

    Raises:
        RuntimeError: `stopping` was set before.
    """
    if stopping.wait(LOOK_EVERY_S):
        raise RuntimeError("this benchmark was asked to end")


def kill_worker(job: "subprocess.Popen[bytes]") -> bool:
    """Kill the last of the job's training workers; False where it has none any more."""
    workers = [pid for pid in descendants(job.pid) if "RayTrainWorker" in command_line(pid)]
    if workers:
        os.kill(workers[-1], signal.SIGKILL)
    return bool(workers)


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def furthest_loss(a: dict[int, float], b: dict[int, float]) -> float:
    """The largest relative distance of two runs' losses, over the steps that both have logged."""
    return max(abs(a[step] - b[step]) / abs(b[step]) for step in a.keys() & b.keys())


def cases(options: argparse.Namespace) -> list[JobCase]:
    """All numbers of workers, their steps launched one by one and as CUDA graphs, which several
    workers have not by themselves; the most of them, broken off.
    """
    found = []
    for workers in options.workers:
        found.append(JobCase(workers))
        if options.device == "cuda":
            found.append(JobCase(workers, cuda_graphs="auto" if workers == 1 else "on"))
        if workers == max(options.workers) > 1:
            found.append(JobCase(workers, is_killed=True))
            found.append(JobCase(workers, ended_by_one=True))
    return found


def measure(options: argparse.Namespace, run: Figures, keep: Callable[[], None]) -> bool:
    """All cases, each kept as soon as it has ended; False where one did not."""
    everything_ran = True
    plain: dict[int, Trained] = {}  # by the number of workers
    stopping = threading.Event()
    with (
        tempfile.TemporaryDirectory() as name,
        ThreadPoolExecutor() as beside,
        ExitStack() as at_the_end,
    ):
        at_the_end.callback(stopping.set)  # jobs that still run end before the pool does
        folder = Path(name)
        base = bench_config(name=STORE, runs_dir=name)
        lengths = zipf_quantiles(options.users, options.length)
        publish(base.sequence_dir, base, np.tile(lengths, options.files), options.files)

        for group in grouped(cases(options), all_at_once=options.at_once):
            if time.monotonic() > options.end:
                print(f"left out, no time: {[case.name for case in group]}", flush=True)
                continue

            jobs = {}
            for case in group:
                jobs[case] = beside.submit(run_job, case, folder, options, stopping)
            for case, job in jobs.items():
                try:
                    found, trained = job.result()
                except RuntimeError as error:
                    print(f"FAILED: {error}", flush=True)
                    everything_ran = False
                    continue

                if case.is_plain:
                    plain[case.workers] = trained
                elif case.workers in plain:
                    found |= compare(trained, plain[case.workers])
                run["cases"][case.name] = found
                keep()
                print(case.name, json.dumps(found), flush=True)
    return everything_ran


def grouped(all_cases: Sequence[JobCase], *, all_at_once: bool) -> list[list[JobCase]]:
    """Cases in groups that run at once: all of them, or those that are broken off and each other
    alone.
    """
    if all_at_once:
        return [list(all_cases)]
    groups: list[list[JobCase]] = []
    for case in all_cases:
        if case.is_broken and groups and groups[-1][0].is_broken:
            groups[-1].append(case)
        else:
            groups.append([case])
    return groups


def compare(trained: Trained, plain: Trained) -> dict[str, float]:
    """How far a run strays from another: the largest relative distance of two losses, and, where
    both are complete, of two weights the largest distance and the root of the mean square.
    """
    found = {"furthest_loss": furthest_loss(trained.losses, plain.losses)}
    if not (trained.is_complete and plain.is_complete):
        return found

    weights, expected = load_file(trained.model_dir / WEIGHTS), load_file(plain.model_dir / WEIGHTS)
    assert weights.keys() == expected.keys()
    furthest = squares = 0.0
    count = 0
    for name, weight in weights.items():
        away = np.abs(weight.astype(np.float64) - expected[name])
        furthest = max(furthest, float(away.max(initial=0.0)))
        squares += float(np.square(away).sum())
        count += weight.size
    return found | {"furthest_weight": furthest, "weight_rms": (squares / count) ** 0.5}


def read_runs() -> list[Figures]:
    """The jobs that were measured; first those of a host that did nothing else."""
    measured = (IDLE_RUN, SHARED_RUN, AT_ONCE_RUN)
    return [json.loads(path.read_text()) for path in measured if path.exists()]


def section(runs: Sequence[Figures]) -> str:
    """The section of RESULTS.md from one run or more."""
    text = f"""## Training by the job

`jobs.train` with Ray Train's workers on a published store, histories of Zipf lengths in passes of
at most 64 targets. Speed is over all steps after the first {WARM_STEPS}. The ratio is to the
fastest job of one worker, in a run without one (†) to that of the other runs of as many tokens a
step. The whole job begins with Ray's start and ends with the published model."""
    return "\n\n".join([text, *(run_text(run, speeds_alone(run, runs)) for run in runs)])


def speeds_alone(run: Figures, runs: Sequence[Figures]) -> list[float]:
    """Tokens/s of jobs of one worker, in runs of steps as large as those of `run`."""
    speeds = []
    for other in runs:
        if other["sizes"]["events"] == run["sizes"]["events"] and not other.get("at_once"):
            cases = other["cases"].values()
            speeds += [case["tokens_per_s"] for case in cases if case["workers"] == 1]
    return speeds


def run_text(run: Figures, of_others: Sequence[float]) -> str:
    """The jobs of one run; `of_others` are tokens/s of one worker in all runs of such steps."""
    machine, found, sizes = run["environment"], run["cases"], run["sizes"]
    dealt = "dealt by tokens" if sizes["balance"] == "dealing" else "cut as they come"
    alone = [case["tokens_per_s"] for case in found.values() if case["workers"] == 1]
    of_one, mark = (max(alone), "") if alone else (max(of_others, default=None), " †")

    rows = []
    for name, case in found.items():
        if name.endswith(BROKEN):
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
d = {sizes["heads"] * sizes["width"]}."""
    if run.get("at_once"):
        text += " All jobs ran at once, so that no speed is told."
    else:
        text += f"\n\n{table(header, rows)}"
    compared = [name for name, case in found.items() if "furthest_loss" in case]
    return "\n\n".join([text, *(compared_text(name, found[name]) for name in compared)])


def compared_text(name: str, case: Figures) -> str:
    """What was done to a job, and how far it ended from the plain one."""
    every = f"a checkpoint every {CHECKPOINT_EVERY} steps"
    gap = f"the longest time between two lines was {case['longest_gap_s']:.0f} s"
    done = ""
    if name.endswith(KILLED):
        done = f"""one worker was ended by SIGKILL after step {BROKEN_AFTER}; Ray Train started all
of them again from the newest checkpoint ({every}; {gap}). """
    elif name.endswith(ENDED_BY_ONE):
        done = f"""the job was ended by SIGTERM after step {BROKEN_AFTER}; the same command with one
worker went on, with as many tokens a step. """
    told = f"Losses of all lines are within {case['furthest_loss']:.1e} of the plain job's"
    if "furthest_weight" in case:
        told += f""", the model's weights within {case["furthest_weight"]:.1e} (root of the mean
square {case["weight_rms"]:.1e})"""
    return f"{name}: {done}{told}."


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
    add("--events", type=int, default=EVENTS, help="tokens of a worker's step")
    add("--length", type=int, default=16_384, help="of the longest history")
    add("--users", type=int, default=20, help="of a file of the store")
    add("--files", type=int, default=8, help="of the store")
    add("--steps", type=int, default=150, help="of a training, at least")
    add("--layers", type=int, default=12)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=128, help="of a head")
    add("--balance", choices=["none", "dealing"], default="dealing", help="of the steps' tokens")
    add("--device", choices=["cpu", "cuda"], default="cuda")
    add("--at-once", action="store_true", help="all jobs: what they train, not how fast")
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

    exit_on_sigterm()
    command = (
        f"python -m benchmarks.training.train_job --workers {' '.join(map(str, options.workers))}"
    )
    if options.events != EVENTS:
        command += f" --events {options.events}"
    if options.at_once:
        command += " --at-once"
    run: Figures = {
        "command": command,
        "environment": environment(options.device) | {"ray": version("ray")},
        "sizes": {name: getattr(options, name) for name in SIZES},
        "at_once": options.at_once,
        "cases": {},
    }
    everything_ran = measure(options, run, keep=lambda: write_run(options.out, run))
    if run["cases"]:
        print(f"\n{section([run])}", flush=True)
    raise SystemExit(not everything_ran)


if __name__ == "__main__":
    main()
