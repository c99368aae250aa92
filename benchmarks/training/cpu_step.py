"""A training step of the demo on a CPU, of this checkout and of others, in turns.

    make demo                                       # once: its sequences are read
    python -m benchmarks.training.cpu_step --beside ../before   # writes its section of
    benchmarks/RESULTS.md

The loop is `loop.train` with its own loader and, for two workers, gloo on this machine; Ray is not
part of it. A turn is a process of its own for each checkout and number of workers, one thread each.
The clock is the mean of a turn's steps after the first ones; processor time is a worker's own, all
threads of it, and tells more than the clock where the machine has other work.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.machine import cpu_name
from benchmarks.report import RUNS, table, write_run, write_section
from pipeline import config
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import StepPlan, step_plan
from pipeline.config import RunConfig
from pipeline.figures import Figures
from pipeline.train import loop

PRESET = "configs/demo.yaml"
WORKERS = (1, 2)
WARM_STEPS = 20  # before the first counted one


class StopAfter:
    """Wishes that end the loop after some steps, and the times at which the steps began."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.clock: list[float] = []
        self.processor: list[float] = []

    def take_wishes(self) -> tuple[bool, bool]:
        self.clock.append(time.perf_counter())
        self.processor.append(time.process_time())
        return False, len(self.clock) > self.steps

    def tell_stopped(self, step: int) -> None:
        pass

    def step_ms(self) -> dict[str, float]:
        """Mean of the counted steps."""
        found = {}
        for name, times in (("clock", self.clock), ("processor", self.processor)):
            found[name] = 1000 * (times[-1] - times[WARM_STEPS]) / (len(times) - 1 - WARM_STEPS)
        return found


def train_rank(
    rank: int,
    world_size: int,
    cfg: RunConfig,
    maps: FeatureMaps,
    plan: StepPlan,
    steps: int,
    folder: Path,
) -> None:
    """One worker: `steps` steps, their times to a file of its own."""
    torch.set_num_threads(1)
    if world_size > 1:
        store = dist.FileStore(str(folder / "meet"), world_size)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    watch = StopAfter(steps)
    loader = TrainLoader(cfg, maps, plan, rank, world_size)
    loop.train(cfg, maps, loader, "", rank=rank, world_size=world_size, wishes=watch)
    (folder / f"{rank}.json").write_text(json.dumps(watch.step_ms()))
    if world_size > 1:
        dist.destroy_process_group()


def run_turn(workers: int, steps: int, runs_dir: str) -> dict[str, float]:
    """The times of a step with so many workers, of the slowest one."""
    overrides = [f"runs_dir={runs_dir}", f"train.num_workers={workers}"]
    cfg = config.load(PRESET, overrides)
    maps, plan = fit_features(cfg), step_plan(cfg)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, cfg, maps, plan, steps, Path(folder))
        if workers == 1:
            train_rank(0, *arguments)
        else:
            mp.spawn(train_rank, arguments, nprocs=workers)
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return {name: max(each[name] for each in found) for name in ("clock", "processor")}


def ask_checkout(checkout: Path, workers: int, steps: int, runs_dir: str) -> dict[str, float]:
    """A turn of another process, with the code of `checkout`."""
    command = [sys.executable, __file__, "--turn", str(workers), "--steps", str(steps)]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--runs-dir", runs_dir],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(checkouts: dict[str, Path], rounds: int, steps: int, runs_dir: str) -> Figures:
    """Every checkout and number of workers once a round."""
    found: dict[str, dict[str, list[dict[str, float]]]] = {}
    for number in range(rounds):
        for workers in WORKERS:
            for name, checkout in checkouts.items():
                turn = ask_checkout(checkout, workers, steps, runs_dir)
                found.setdefault(name, {}).setdefault(str(workers), []).append(turn)
                print(f"round {number + 1}: {name}, {workers} workers: {turn}", flush=True)
    return found


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def section(run: Figures) -> str:
    """The section of RESULTS.md from a run."""
    machine, rows = run["environment"], []
    for name, by_workers in run["turns"].items():
        for workers, turns in by_workers.items():
            cells = [name, workers]
            for kind in ("clock", "processor"):
                values = [turn[kind] for turn in turns]
                spread = f"{min(values):.0f} to {max(values):.0f}"
                cells.append(f"**{statistics.median(values):.1f}** ({spread})")
            rows.append(cells)

    header = ["code", "workers", "ms a step by the clock", "processor ms of a worker"]
    return f"""## A training step on a CPU

`{run["command"]}`: the demo's steps of 64 users, {run["steps"]} of them after the first
{WARM_STEPS}, in {run["rounds"]} turns; medians, and in brackets the smallest and the largest turn.
Each worker has one thread of an {machine["cpu"]} with {machine["cores"]} cores; load average before
the run {machine["load"]:.1f}. PyTorch {machine["torch"]}.

{table(header, rows)}"""


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--beside", type=Path, action="append", default=[], metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of a turn, the first ones counted")
    parser.add_argument("--runs-dir", default="runs", help="where demo/sequences lies")
    parser.add_argument("--turn", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = read_options()
    runs_dir = str(Path(options.runs_dir).resolve())
    if options.turn is not None:
        print(json.dumps(run_turn(options.turn, options.steps, runs_dir)))
        return

    load = os.getloadavg()[0]
    here = Path(__file__).resolve().parents[2]
    checkouts = {commit_of(path): path.resolve() for path in [*options.beside, here]}
    run: dict[str, Any] = {
        "command": "python -m benchmarks.training.cpu_step",
        "steps": options.steps - WARM_STEPS,
        "rounds": options.rounds,
        "turns": take_turns(checkouts, options.rounds, options.steps, runs_dir),
        "environment": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load": load,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    write_run(RUNS / "cpu_step.json", run)
    write_section("cpu_step", section(run))


if __name__ == "__main__":
    main()
