"""One trial of a search: a training of one process, which says after each validation where it is.

    settings → feature maps → `loop.train` → report after a validation → model folder

A trial is a run like any other, with checkpoints, metrics.jsonl and a model under its own name. It
learns from these files where it stands. What it had reported before it reports again, so that
whoever judges the trials knows as much as before.
"""

import json
import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import StepPlan, step_plan
from pipeline.config import RunConfig, TrainConfig, UserError
from pipeline.files import json_text, write_atomically
from pipeline.run_note import noted_run
from pipeline.sequences import store
from pipeline.train import loop
from pipeline.train.checkpoint import CheckpointFolder, only_writer
from pipeline.train.guards import TrainingStopped
from pipeline.train.metrics import METRICS, MetricsFile, parse_line
from pipeline.train.optim import refuse_long_warmup
from pipeline.train.publish import publish_training
from pipeline.train.validation import Validator

logger = logging.getLogger(__name__)

TRIAL = "trial.json"  # in a trial's run folder: its settings and its steps
OUTCOME = "outcome.json"  # what became of it, once nothing more will
FINISHED, ENDED_EARLY, DIVERGED, REFUSED = "finished", "ended early", "diverged", "refused"
VALIDATIONS = 8  # of a trial, where train.validate_every does not say

Report = Callable[[float, float], None]  # epochs that are done, and the metric


def objective(best_metric: str) -> str:
    """The metric by which trials are judged."""
    return f"val_sample/{best_metric}"


def shares_features(cfg: RunConfig, base: RunConfig) -> bool:
    """True where a trial's feature maps are those of the preset."""
    same_weight = cfg.train.history_label_weight == base.train.history_label_weight
    return (cfg.features, cfg.retrieval) == (base.features, base.retrieval) and same_weight


def train_trial(
    cfg: RunConfig, settings: dict[str, Any], report: Report, shared_maps: Path | None
) -> None:
    """Train the run `cfg` to its end, or from where it stands; `report` may never return.

    Args:
        settings: what was drawn, for the record.
        shared_maps: folder of the preset's feature maps; None where the trial needs its own.
    """
    key = objective(cfg.train.best_metric)
    if (outcome := read_outcome(cfg.run_dir)) is not None:
        logger.info("trial %s: %s", cfg.name, outcome["status"])
        for epochs, value in reported(cfg.run_dir, key):
            report(epochs, value)
        return

    cfg.train_dir.mkdir(parents=True, exist_ok=True)
    with only_writer(cfg.train_dir):
        try:
            _train(cfg, settings, report, shared_maps)
        except TrainingStopped as stopped:  # too high a rate is an answer, too
            write_outcome(cfg.run_dir, DIVERGED, str(stopped))
        except UserError as mistake:
            write_outcome(cfg.run_dir, REFUSED, str(mistake))
        else:
            write_outcome(cfg.run_dir, FINISHED)


def _train(
    cfg: RunConfig, settings: dict[str, Any], report: Report, shared_maps: Path | None
) -> None:
    torch.set_num_threads(cfg.train.threads_per_worker)
    folder, key = cfg.train_dir, objective(cfg.train.best_metric)
    maps = fit_features(cfg) if shared_maps is None else FeatureMaps.load(shared_maps)
    # the order of examples that jobs.train would begin with under these settings
    readers = cfg.train.readers or cfg.train.num_workers
    cfg = replace(cfg, train=replace(cfg.train, readers=readers))
    steps = step_plan(cfg, folder / "steps.json")
    total_steps = steps.steps_per_epoch * cfg.train.epochs
    refuse_long_warmup(cfg.train.warmup_steps, total_steps)
    cfg = replace(cfg, train=with_validations(cfg.train, steps))

    facts = {"settings": settings, "steps_per_epoch": steps.steps_per_epoch}
    facts["total_steps"] = total_steps
    write_atomically(cfg.run_dir / TRIAL, json_text(facts))

    checkpoints = CheckpointFolder(folder / "checkpoints", cfg.train.keep_checkpoints)
    resume = checkpoints.newest()
    file = MetricsFile(folder / METRICS, resumed_at=resume.state.step if resume else 0)
    for epochs, value in reported(cfg.run_dir, key):
        report(epochs, value)

    def log(step: int, values: dict[str, float]) -> None:
        file.append(step, values)
        if math.isfinite(values.get(key, math.nan)):
            report(step / steps.steps_per_epoch, values[key])

    device = torch.device("cuda" if cfg.train.use_gpu else "cpu")
    digest = store.read_manifest(cfg.sequence_dir).digest
    loop.train(
        cfg,
        maps,
        TrainLoader(cfg, maps, steps),
        digest,
        device=device,
        resume=resume,
        checkpoints=checkpoints,
        validate=Validator(cfg, maps, device),
        log=log,
    )
    publish_training(cfg, maps, digest, noted_run(cfg.run_dir))


def with_validations(train: TrainConfig, steps: StepPlan) -> TrainConfig:
    """`train` with a validation every so many steps that there are `VALIDATIONS`, unless it says
    how often, and a checkpoint at least as often.
    """
    every = train.validate_every
    if every == 0:
        every = math.ceil(steps.steps_per_epoch * train.epochs / VALIDATIONS)
    checkpoint_every = min(train.checkpoint_every, every)
    return replace(train, validate_every=every, checkpoint_every=checkpoint_every)


def reported(run_dir: Path, key: str) -> Iterator[tuple[float, float]]:
    """(epochs that were done, value) of each validation of a trial so far."""
    facts, metrics = run_dir / TRIAL, run_dir / "train" / METRICS
    if not facts.exists() or not metrics.exists():
        return

    steps_per_epoch = json.loads(facts.read_text())["steps_per_epoch"]
    for text in metrics.read_text().splitlines(keepends=True):
        if not text.endswith("\n"):  # a kill has cut it
            return
        line = parse_line(text)
        if key in line.values:
            yield line.step / steps_per_epoch, line.values[key]


def read_outcome(run_dir: Path) -> dict[str, Any] | None:
    """What became of a trial: `status` and `why`; None while it has steps to do."""
    path = run_dir / OUTCOME
    return json.loads(path.read_text()) if path.exists() else None


def write_outcome(run_dir: Path, status: str, why: str = "") -> None:
    write_atomically(run_dir / OUTCOME, json_text({"status": status, "why": why}))
