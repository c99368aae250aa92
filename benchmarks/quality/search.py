"""A search for settings as a whole command: how long `jobs.tune` takes, and what it finds.

    # once: its sequences are searched on
    make demo

    # on CPUs → runs/search_cpu.json and its section of RESULTS.md
    python -m benchmarks.quality.search

    # four trials at a time on one GPU → FILE; with --report its section
    python -m benchmarks.quality.search --trials-per-gpu 4 --out FILE

The search of that name is forgotten first. Timed from the start of Python to its end: Ray, MLflow
(unless --no-tracking), the trials, the page and the preset.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from benchmarks.build.process_tree import Command
from benchmarks.machine import environment
from benchmarks.report import RUNS, read_run, table, write_run, write_section
from pipeline import config
from pipeline.figures import Figures
from pipeline.search.space import read_space, search_config, short_text

CPU_RUN, GPU_RUN = RUNS / "search_cpu.json", RUNS / "search_h200.json"


def run_search(options: argparse.Namespace) -> Figures:
    """The command, its time, and the figures of its trials, best first."""
    overrides = [*options.overrides]
    arguments = []
    if options.trials_per_gpu:
        overrides.append("train.use_gpu=true")
        arguments += ["--trials-per-gpu", str(options.trials_per_gpu)]
    if options.no_tracking:
        arguments.append("--no-tracking")
    for override in overrides:
        arguments += ["--set", override]

    load = os.getloadavg()[0]
    job = ["-m", "jobs.tune", "--config", options.config, "--space", str(options.space), *arguments]
    runs_dir = f"runs_dir={Path(options.runs_dir).resolve()}"
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *job, "--set", runs_dir, "--restart"]
        measured = Command(command, Path(folder) / "log").finish()
    print(measured.output[-3000:], flush=True)

    cfg = config.load(options.config, [*overrides, runs_dir])
    trials = json.loads((search_config(cfg).run_dir / "trials.json").read_text())
    device = "cuda" if options.trials_per_gpu else "cpu"
    return {
        "command": f"python {' '.join(job)}",
        "metric": cfg.train.best_metric,
        "first_share": read_space(options.space, cfg).search.first_share,
        "seconds": round(measured.seconds, 1),
        "cpu_seconds": round(measured.cpu_seconds, 1),
        "trials": trials,
        "environment": environment(device) | {"load": round(load, 1)},
    }


def read_runs() -> list[Figures]:
    """The searches that were measured: on CPUs, and on a GPU if there was one."""
    return [read_run(path) for path in (CPU_RUN, GPU_RUN) if path.exists()]


def section(runs: Sequence[Figures]) -> str:
    """The section of RESULTS.md from one run or more."""
    return "\n\n".join(["## A search for settings", *map(search_text, runs)])


def search_text(run: Figures) -> str:
    """What one search took and found."""
    machine, trials = run["environment"], run["trials"]
    statuses = Counter(trial["status"] for trial in trials)
    told = ", ".join(f"{count} {status}" for status, count in statuses.items())
    # the first one drawn has the preset's own values
    own = min(trials, key=lambda trial: trial["name"])

    rows = []
    for trial in trials:
        drawn = short_text(trial["settings"]) + (" (the preset's own)" if trial is own else "")
        value = "–" if trial["value"] is None else f"{trial['value']:.4f}"
        rows.append([drawn, value, f"{trial['epochs']:.2f}", trial["status"]])
    header = ["settings", f"validation {run['metric']}", "epochs", ""]
    minutes, share = run["seconds"] / 60, run["first_share"]
    return f"""`{run["command"]}` took **{minutes:.1f} minutes** on an {machine["device"]} with
{machine["cores"]} cores (load average before it {machine["load"]:.1f}), and
{run["cpu_seconds"]:.0f} seconds of processors: {len(trials)} trials, {told}; the first decision
after {share:.0%} of the training. The best has {trials[0]["value"]:.4f}, the preset's own
settings {own["value"]:.4f}.

{table(header, rows)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("--config", default="configs/demo.yaml")
    add("--space", type=Path, default=Path("configs/spaces/demo.yaml"))
    add("--runs-dir", default="runs", help="where the run's sequences lie")
    add("--trials-per-gpu", type=int, default=0, metavar="N", help="of jobs.tune; 0: on CPUs")
    add("--no-tracking", action="store_true", help="of jobs.tune")
    add("--out", type=Path, default=CPU_RUN)
    add("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    add("--report", action="store_true", help="write RESULTS.md from runs/search_*.json and end")
    options = parser.parse_args()

    if not options.report:
        run = run_search(options)
        write_run(options.out, run)
        print(search_text(run))
    if options.report or options.out in (CPU_RUN, GPU_RUN):
        write_section("search", section(read_runs()))


if __name__ == "__main__":
    main()
