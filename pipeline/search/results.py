"""What came of the trials of a search, read from their files; a table, and the best as a preset."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipeline import config
from pipeline.config import Outage
from pipeline.files import json_text, write_atomically
from pipeline.search.space import Trial, short_text
from pipeline.search.trial import FINISHED, TRIAL, objective, read_outcome, reported

FAILED, NOT_STARTED, UNDER_WAY = "failed", "not started", "under way"


@dataclass(frozen=True, slots=True)
class TrialResult:
    """One trial: what it was, how far it came and how good it was there."""

    trial: Trial
    status: str
    why: str
    curve: tuple[tuple[float, float], ...]  # (epochs done, metric) of each validation

    @property
    def value(self) -> float:
        """The metric of the model that `train.publish` chooses, so far; NaN where there is none."""
        values = [value for _, value in self.curve]
        if not values:
            return math.nan
        train = self.trial.cfg.train
        if train.publish == "last":
            return values[-1]
        return min(values) if train.best_metric == "ne" else max(values)

    @property
    def epochs(self) -> float:
        return self.curve[-1][0] if self.curve else 0.0


def read_results(trials: Sequence[Trial], failed: Mapping[str, str]) -> list[TrialResult]:
    """The results of all trials, best first: those that were trained to their end before the
    others.
    """
    found = []
    for trial in trials:
        outcome = read_outcome(trial.cfg.run_dir)
        if outcome is not None:
            status, why = outcome["status"], outcome["why"]
        elif trial.name in failed:
            status, why = FAILED, failed[trial.name]
        else:
            started = (trial.cfg.run_dir / TRIAL).exists()
            status, why = UNDER_WAY if started else NOT_STARTED, ""
        curve = tuple(reported(trial.cfg.run_dir, objective(trial.cfg.train.best_metric)))
        found.append(TrialResult(trial, status, why, curve))
    return sorted(found, key=_rank)


def _rank(result: TrialResult) -> tuple[bool, float]:
    sign = 1 if result.trial.cfg.train.best_metric == "ne" else -1
    value = math.inf if math.isnan(result.value) else sign * result.value
    return result.status != FINISHED, value


def require_best(results: Sequence[TrialResult]) -> TrialResult:
    """The best trial of those that were trained to their end.

    Raises:
        Outage: there is none; the same command tries those again that failed.
    """
    best = results[0]
    if best.status != FINISHED or math.isnan(best.value):
        reasons = "; ".join(f"{r.trial.name} {r.status} {r.why}".strip() for r in results)
        raise Outage(f"no trial came to its end with a validation: {reasons}")
    return best


def write_preset(best: TrialResult, path: Path, runs_dir: str, num_workers: int) -> None:
    """The best trial as a preset, with the machine's values of the search's own.

    It is a run already: jobs.pipeline goes on with its model.
    """
    cfg = best.trial.cfg
    trained = json.loads((cfg.model_dir / "config.json").read_text())
    trained["runs_dir"] = runs_dir
    trained["train"]["num_workers"] = num_workers
    text = (
        f"# The best of {path.parent.name}: {objective(cfg.train.best_metric)} "
        f"{best.value:.4f} with {short_text(best.trial.settings)}.\n"
        f"# Trained already, as run {best.trial.name}; another name trains it anew.\n"
    )
    config.from_dict(trained)
    write_atomically(path, text + yaml.safe_dump(trained, sort_keys=False))


def results_table(results: Sequence[TrialResult]) -> str:
    """A line a trial, the best first.

    demo-tune-03  0.8412  1.00 epochs  finished     train.lr=0.004, model.num_layers=2
    demo-tune-01  0.8710  0.25 epochs  ended early  train.lr=0.0006, model.num_layers=3
    """
    width = max(len(result.trial.name) for result in results)
    longest = max(len(result.status) for result in results)
    lines = []
    for result in results:
        value = "     –" if math.isnan(result.value) else f"{result.value:.4f}"
        why = f"  ({result.why})" if result.why else ""
        lines.append(
            f"{result.trial.name:{width}}  {value}  {result.epochs:.2f} epochs  "
            f"{result.status:{longest}}  {short_text(result.trial.settings)}{why}"
        )
    return "\n".join(lines)


def write_figures(results: Sequence[TrialResult], path: Path) -> None:
    """The results as JSON, for whoever wants to draw them another way."""
    figures: list[dict[str, Any]] = []
    for result in results:
        figures.append(
            {
                "name": result.trial.name,
                "status": result.status,
                "why": result.why,
                "value": result.value,
                "epochs": result.epochs,
                "settings": result.trial.settings,
                "curve": [list(point) for point in result.curve],
            }
        )
    write_atomically(path, json_text(figures))
