"""A search for settings as a whole command: how long `jobs.tune` takes, and what it finds.

    make demo                             # once: its sequences are searched on
    python -m benchmarks.quality.search   # writes its section of benchmarks/RESULTS.md

The search of that name is forgotten first. Timed from the start of Python to its end: Ray, MLflow,
the trials, the page and the preset.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path

from benchmarks.build.process_tree import Command
from benchmarks.machine import environment
from benchmarks.report import RUNS, table, write_run, write_section
from pipeline import config
from pipeline.figures import Figures
from pipeline.search.space import read_space, search_config, short_text

RUN = RUNS / "search_cpu.json"


def run_search(preset: str, space: Path, overrides: list[str]) -> Figures:
    """The command, its time, and the figures of its trials, best first."""
    cfg = config.load(preset, overrides)
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", "jobs.tune", "--config", preset, "--space", str(space)]
    for override in overrides:
        command += ["--set", override]

    with tempfile.TemporaryDirectory() as folder:
        measured = Command([*command, "--restart"], Path(folder) / "log").finish()
    print(measured.output[-3000:], flush=True)

    trials = json.loads((search_config(cfg).run_dir / "trials.json").read_text())
    return {
        "command": f"python -m jobs.tune --config {preset} --space {space}",
        "metric": cfg.train.best_metric,
        "first_share": read_space(space, cfg).search.first_share,
        "seconds": round(measured.seconds, 1),
        "cpu_seconds": round(measured.cpu_seconds, 1),
        "trials": trials,
        "environment": environment("cpu") | {"load": round(load, 1)},
    }


def section(run: Figures) -> str:
    """The section of RESULTS.md from a run."""
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
    return f"""## A search for settings

`{run["command"]}` took **{minutes:.1f} minutes** on an {machine["device"]} with {machine["cores"]}
cores (load average before it {machine["load"]:.1f}), and {run["cpu_seconds"]:.0f} seconds of
processors: {len(trials)} trials, {told}; the first decision after {share:.0%} of the training. The
best has {trials[0]["value"]:.4f}, the preset's own settings {own["value"]:.4f}.

{table(header, rows)}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--space", type=Path, default=Path("configs/spaces/demo.yaml"))
    parser.add_argument("--runs-dir", default="runs", help="where the run's sequences lie")
    parser.add_argument("--out", type=Path, default=RUN)
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()

    overrides = [f"runs_dir={Path(options.runs_dir).resolve()}", *options.overrides]
    run = run_search(options.config, options.space, overrides)
    write_run(options.out, run)
    if options.out == RUN:
        write_section("search", section(run))
    print(section(run))


if __name__ == "__main__":
    main()
