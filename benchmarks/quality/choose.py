"""From a plan's runs on validation to the plan of its test: which one is best, said by a rule that
was there before the figures.

    plan + its lines on validation → `compare_runs` → the best one → `plan_of_test` (YAML)

    python -m benchmarks.quality.choose benchmarks/plans/kuairand.yaml --runs FILE --beside preset
        --out TEST.yaml

The rule: the highest AUC, a mean over tasks and then over the seeds that all have. Runs of fewer
seeds than `--seeds` take no part. The plan that is written trains the best and the one beside it up
to the test period, and scores them there; `benchmarks.quality.train_plan` carries it out, once.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.quality.train_plan import read_plan_file
from benchmarks.report import table
from pipeline.config import ConfigError, UserError
from pipeline.figures import Figures, read_runs


@dataclass(frozen=True, slots=True)
class Compared:
    """A run of the plan over its seeds; differences are to the run beside it, of the same seed."""

    name: str
    seeds: tuple[int, ...]
    auc: float  # mean over tasks and seeds, on validation
    ne: float
    gains: np.ndarray  # float64 [seeds], of AUC

    @property
    def gain(self) -> str:
        """Mean and standard error over seeds."""
        error = self.gains.std(ddof=1) / np.sqrt(len(self.gains)) if len(self.gains) > 1 else 0.0
        return f"{self.gains.mean():+.4f} ± {error:.4f}"


def compare_runs(
    lines: Sequence[Figures], names: Sequence[str], beside: str, num_seeds: int
) -> list[Compared]:
    """The plan's runs that have enough seeds, the best first.

    Raises:
        UserError: the one beside has too few, or another lacks some of its seeds' company.
    """
    found: dict[str, dict[int, tuple[float, float]]] = {name: {} for name in names}
    for line in lines:
        if line["name"] in found:
            found[line["name"]][line["seed"]] = validation_means(line)

    whole = found[beside]
    if len(whole) < num_seeds:
        raise UserError(f"--beside {beside}: it has {len(whole)} seeds of {num_seeds}")

    # the same seeds of all, so that none is ahead by its seeds
    enough = {name: by_seed for name, by_seed in found.items() if len(by_seed) >= num_seeds}
    seeds = sorted(set.intersection(*map(set, enough.values())))
    if len(seeds) < num_seeds:
        raise UserError(
            f"--runs: {sorted(enough)} have {len(seeds)} seeds of {num_seeds} in common"
        )

    compared = []
    for name, by_seed in enough.items():
        auc, ne = np.array([by_seed[seed] for seed in seeds]).T
        gains = auc - np.array([whole[seed][0] for seed in seeds])
        compared.append(Compared(name, tuple(seeds), float(auc.mean()), float(ne.mean()), gains))
    return sorted(compared, key=lambda one: -one.auc)


def validation_means(line: Figures) -> tuple[float, float]:
    """AUC and NE of a run on validation, over its tasks."""
    tasks, metrics = line["config"]["tasks"], line["metrics"]
    means = [
        np.mean([metrics[f"val/{metric}/{task}"] for task in tasks]) for metric in ("auc", "ne")
    ]
    return float(means[0]), float(means[1])


def plan_of_test(plan: Mapping[str, Any], best: str, beside: str) -> dict[str, Any]:
    """The plan that trains both up to the test period and scores them there, each with `_test` at
    the end of its name; a best one that is taught comes with its teachers.
    """
    taught = plan.get("taught", {}).get(best)
    wanted = dict.fromkeys([beside, best] if taught is None else [beside, taught["by"], best])
    found = {
        "config": plan["config"],
        "splits": ["test"],
        "set": {**plan.get("set", {}), "split.refit": True},
        "runs": {f"{name}_test": plan["runs"][name] for name in wanted},
    }
    if taught is not None:
        found["taught"] = {f"{best}_test": {**taught, "by": f"{taught['by']}_test"}}
    return found


def comparison_table(compared: Sequence[Compared], beside: str) -> str:
    """Markdown, the best first."""
    rows = []
    for one in compared:
        gain = "" if one.name == beside else one.gain
        rows.append([one.name, f"{one.auc:.4f}", gain, f"{one.ne:.4f}", str(len(one.seeds))])
    header = ["", "mean AUC, validation", f"less {beside}'s ± standard error", "mean NE", "seeds"]
    return table(header, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("plan", type=Path, metavar="PLAN", help="of the runs on validation")
    parser.add_argument("--runs", type=Path, required=True, help="JSON Lines file of their figures")
    parser.add_argument(
        "--beside", required=True, metavar="NAME", help="what is tested in any case"
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="fewest seeds of a run that takes part"
    )
    parser.add_argument("--out", type=Path, required=True, help="the plan of the test, YAML")
    options = parser.parse_args()

    try:
        plan = read_plan_file(options.plan)
        if options.beside not in plan["runs"]:
            raise ConfigError(f"--beside {options.beside}: the plan has {list(plan['runs'])}")
        compared = compare_runs(
            read_runs(options.runs), list(plan["runs"]), options.beside, options.seeds
        )
    except UserError as error:
        sys.exit(f"error: {error}")

    best = compared[0].name
    print(comparison_table(compared, options.beside))
    left_out = set(plan["runs"]) - {one.name for one in compared}
    print(f"best={best} left_out={json.dumps(sorted(left_out))} out={options.out}")
    text = yaml.safe_dump(plan_of_test(plan, best, options.beside), sort_keys=False)
    options.out.write_text(text)


if __name__ == "__main__":
    main()
