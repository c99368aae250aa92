"""A training step of the demo on a CPU, of this checkout and of others, in turns.

    make demo                                       # once: its sequences are read
    python -m benchmarks.training.cpu_step --beside ../before      → runs/cpu_step.json
    python -m benchmarks.training.cpu_step --workers 1 2 4 --loaders threads process \
        --out benchmarks/runs/cpu_step_cores.json   # where each worker and loader has a core
    python -m benchmarks.training.cpu_step --users shared each   # 64 of all, and of each worker
    python -m benchmarks.training.cpu_step --report                → its section of RESULTS.md

The loop is `loop.train` with its own loader and, for several workers, gloo on this machine; Ray is
not part of it. A turn is a process of its own for each checkout, number of workers and form of the
loader, one thread each.
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
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from benchmarks.machine import cpu_name
from benchmarks.report import RUNS, read_run, table, write_run, write_section
from pipeline import config
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import StepPlan, step_plan
from pipeline.config import RunConfig
from pipeline.figures import Figures
from pipeline.train import loop

PRESET = "configs/demo.yaml"
RUN, CORES_RUN = RUNS / "cpu_step.json", RUNS / "cpu_step_cores.json"
LOADERS = ("threads", "process")  # of the worker, or one of the loader's own
USERS = ("shared", "each")  # the preset's users a step are of all workers together, or of each
EACH = "as many users each"  # in a case's name
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


def run_turn(workers: int, loader: str, users: str, steps: int, runs_dir: str) -> dict[str, float]:
    """The times of a step with so many workers, of the slowest one."""
    overrides = [f"runs_dir={runs_dir}", f"train.num_workers={workers}"]
    if loader == "process":
        overrides.append("train.loader_process=true")
    cfg = config.load(PRESET, overrides)

    if users == "each":
        batch_users = cfg.train.batch_users
        assert batch_users is not None, "the preset counts users, not tokens"
        cfg = config.load(PRESET, [*overrides, f"train.batch_users={workers * batch_users}"])
    maps, plan = fit_features(cfg), step_plan(cfg)
    with tempfile.TemporaryDirectory() as folder:
        arguments = (workers, cfg, maps, plan, steps, Path(folder))
        if workers == 1:
            train_rank(0, *arguments)
        else:
            mp.spawn(train_rank, arguments, nprocs=workers)
        found = [json.loads(path.read_text()) for path in Path(folder).glob("*.json")]
    return {name: max(each[name] for each in found) for name in ("clock", "processor")}


def ask_checkout(
    checkout: Path, workers: int, loader: str, users: str, steps: int, runs_dir: str
) -> dict[str, float]:
    """A turn of another process, with the code of `checkout`."""
    command = [sys.executable, __file__, "--turn", str(workers)]
    command += ["--loaders", loader, "--users", users]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--steps", str(steps), "--runs-dir", runs_dir],
        cwd=checkout,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def take_turns(checkouts: dict[str, Path], options: argparse.Namespace, run: Figures) -> None:
    """Every checkout, form of the loader and number of workers once a round; `run` is written after
    each turn.
    """
    found: dict[str, dict[str, list[dict[str, float]]]] = run["turns"]
    for number in range(options.rounds):
        for workers, loader, users in product(options.workers, options.loaders, options.users):
            if workers == 1 and users == "each" and "shared" in options.users:
                continue  # one worker has all of them: the same step twice

            case = case_name(workers, loader, users)
            for name, checkout in checkouts.items():
                turn = ask_checkout(
                    checkout, workers, loader, users, options.steps, options.runs_dir
                )
                found.setdefault(name, {}).setdefault(case, []).append(turn)
                print(f"round {number + 1}: {name}, workers {case}: {turn}", flush=True)
                write_run(options.out, run | {"rounds": number + 1})


def case_name(workers: int, loader: str, users: str) -> str:
    """`2, loader a process, 64 users each`: what differs from the first form of each is told."""
    words = [str(workers)]
    if loader == "process":
        words.append("loader a process")
    if users == "each" and workers > 1:
        words.append(EACH)
    return ", ".join(words)


def commit_of(checkout: Path) -> str:
    command = ["git", "-C", str(checkout), "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


def read_runs() -> list[Figures]:
    """What was measured on two cores, and on more where there were some."""
    return [read_run(path) for path in (RUN, CORES_RUN) if path.exists()]


def section(runs: Sequence[Figures]) -> str:
    """The section of RESULTS.md from one run or more."""
    text = f"""## A training step on a CPU

The demo's steps of 64 users, those after the first {WARM_STEPS}: medians, and in brackets the
smallest and the largest turn. Each worker has one thread. *As fast*: users a second by the clock,
over those of one worker whose loader has the same form. The 64 users are shared among the workers,
or each has so many."""
    return "\n\n".join([text, *map(run_text, runs)])


def run_text(run: Figures) -> str:
    """What one run measured."""
    machine, rows = run["environment"], []
    for name, by_case in run["turns"].items():
        alone_ms: dict[str, float] = {}  # by the form of the loader
        for case, turns in by_case.items():
            workers, *form = case.split(", ")
            users = int(workers) if EACH in form else 1  # times those of one worker
            loader = ", ".join(word for word in form if word != EACH)
            cells = [name, case]
            for kind in ("clock", "processor"):
                values = [turn[kind] for turn in turns]
                spread = f"{min(values):.0f} to {max(values):.0f}"
                cells.append(f"**{statistics.median(values):.1f}** ({spread})")

            clock_ms = statistics.median(turn["clock"] for turn in turns)
            if workers == "1":
                alone_ms[loader] = clock_ms
            ratio = "–" if workers == "1" else f"{users * alone_ms[loader] / clock_ms:.2f}x"
            rows.append([*cells, ratio])

    header = ["code", "workers", "ms a step by the clock", "processor ms of a worker", "as fast"]
    turns = "a turn" if run["rounds"] == 1 else f"{run['rounds']} turns"
    note = f" ({run['note']})" if "note" in run else ""  # written into its file by hand
    return f"""`{run["command"]}`{note}: {run["steps"]} steps, {turns}, on an
{machine["cpu"]} with {machine["cores"]} cores; load average before the run {machine["load"]:.1f}.
PyTorch {machine["torch"]}.

{table(header, rows)}"""


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--beside", type=Path, action="append", default=[], metavar="CHECKOUT")
    add("--commit", help="this checkout's, where it is no clone")
    add("--workers", type=int, nargs="+", default=[1, 2], metavar="N")
    add("--loaders", nargs="+", choices=LOADERS, default=["threads"])
    add("--users", nargs="+", choices=USERS, default=["shared"], help="who has the 64 of a step")
    add("--rounds", type=int, default=5)
    add("--steps", type=int, default=100, help="of a turn, the first ones counted")
    add("--runs-dir", default="runs", help="where demo/sequences lies")
    add("--out", type=Path, default=RUN)
    add("--report", action="store_true", help="write RESULTS.md from runs/cpu_step*.json and end")
    add("--turn", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.runs_dir = str(Path(options.runs_dir).resolve())
    return options


def main() -> None:
    options = read_options()
    if options.report:
        write_section("cpu_step", section(read_runs()))
        return
    if options.turn is not None:
        (loader,), (users,) = options.loaders, options.users
        turn = run_turn(options.turn, loader, users, options.steps, options.runs_dir)
        print(json.dumps(turn))
        return

    here = Path(__file__).resolve().parents[2]
    checkouts = {commit_of(path): path.resolve() for path in options.beside}
    checkouts[options.commit or commit_of(here)] = here
    run: dict[str, Any] = {
        "command": _command(options),
        "steps": options.steps - WARM_STEPS,
        "turns": {},
        "environment": {
            "cpu": cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
    }
    take_turns(checkouts, options, run)


def _command(options: argparse.Namespace) -> str:
    """The command as a reader types it."""
    command = "python -m benchmarks.training.cpu_step"
    if options.workers != [1, 2]:
        command += " --workers " + " ".join(map(str, options.workers))
    if options.loaders != ["threads"]:
        command += " --loaders " + " ".join(options.loaders)
    if options.users != ["shared"]:
        command += " --users " + " ".join(options.users)
    return command


if __name__ == "__main__":
    main()
