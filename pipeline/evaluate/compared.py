"""Which runs a comparison is of: those that were named, a search standing for its trials."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline import config
from pipeline.config import EvaluateConfig, UserError
from pipeline.evaluate import evaluator

logger = logging.getLogger(__name__)

TRIALS = "trials.json"  # in the folder of a search, best first

Told = Callable[[Path, dict[str, float], Path], object]  # model folder, metrics, their folder


def expand_searches(runs_dir: str, names: Sequence[str]) -> list[str]:
    """The runs behind `names`, each once: of a search of jobs.tune the trials that were trained to
    their end, best first.

    demo demo-tune    demo demo-tune-03 demo-tune-00

    Raises:
        UserError: a search without such a trial.
    """
    found: dict[str, None] = {}
    for name in names:
        path = Path(runs_dir).absolute() / name / TRIALS
        if not path.exists():
            found[name] = None
            continue
        trials = [trial for trial in json.loads(path.read_text()) if trial["status"] == "finished"]
        if not trials:
            raise UserError(f"search {name!r}: no trial was trained to its end")
        found |= dict.fromkeys(trial["name"] for trial in trials)
    return list(found)


def evaluate_missing(
    runs_dir: str, names: Sequence[str], settings: EvaluateConfig, split: str, tell: Told
) -> None:
    """Score the runs that have a model and no predictions of `split` yet, both of its periods, and
    `tell` the metrics of each.
    """
    for name in names:
        folder = Path(runs_dir).absolute() / name
        predictions = folder / "evaluation" / "predictions" / f"{split}.parquet"
        if predictions.exists() or not (folder / "model" / "config.json").exists():
            continue
        logger.info("evaluating %s", name)
        trained = config.from_dict(json.loads((folder / "model" / "config.json").read_text()))
        own = replace(trained, runs_dir=runs_dir, evaluate=settings)
        metrics = evaluator.evaluate_model(own, own.model_dir)
        tell(own.model_dir, metrics, evaluator.evaluation_folder(own.run_dir, settings))
