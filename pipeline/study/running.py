"""The points of a study on Ray: as many at once as there is room for, the largest size last.

    count the FLOP of all → train all but the largest size → predict it → train it → the report

The files of the points say how far each is, so the same command goes on with what is left.
"""

import json
import logging
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from pipeline import config
from pipeline.batches.features import fit_features
from pipeline.cluster import ray_cluster
from pipeline.config import RayConfig, RunConfig, TrainConfig
from pipeline.files import json_text, write_atomically
from pipeline.search.trial import shares_features
from pipeline.study.plan import Point, StudyPlan, plan_points, study_config, study_name
from pipeline.study.point import POINT, WORK, count_work, run_point
from pipeline.study.predictions import PREDICTIONS, predict_largest
from pipeline.tracking import Run
from pipeline.train.periods import check_periods
from pipeline.train.supervision import refuse_impossible_size

logger = logging.getLogger(__name__)

# of the report
FILES = ("study.html", "figures.json", PREDICTIONS, "slopes.png", "laws.png", "fronts.png")

Told = Callable[[str], None]  # the name of a point that has come to its end


def check_room(ray: RayConfig, train: TrainConfig) -> None:
    """Raises UserError where this machine's Ray could not hold a point."""
    refuse_impossible_size(ray, replace(train, num_workers=1))


def forget_study(base: RunConfig) -> None:
    """Remove the files of the study and of all its points."""
    folder = study_config(base).run_dir
    for path in folder.parent.glob(f"{study_name(base.name)}-*"):
        shutil.rmtree(path)
    shutil.rmtree(folder, ignore_errors=True)


def run_study(base: RunConfig, plan: StudyPlan, told: Told) -> dict[str, str]:
    """Run what is left of the points; why a point did not come to its end, by its name.

    The largest size is predicted from the smaller ones before its first point is run.

    Raises:
        UserError: nothing to train on, or no row to score.
        Outage: no cluster.
    """
    points = plan_points(base, plan)
    if all((point.trial.cfg.run_dir / POINT).exists() for point in points):
        return {}

    folder = study_config(base).run_dir
    first = points[0].trial.cfg
    check_periods(replace(first, train=replace(first.train, validate_every=1)))
    with ray_cluster(base.ray, runs_dir=base.runs_dir):
        if any(shares_features(point.trial.cfg, base) for point in points):
            fit_features(first).save(folder)
        _count_all(base, plan, points, folder)

        largest = list(plan.sizes)[-1]
        smaller = [point for point in points if point.size != largest]
        failed = _run_all(base, plan, smaller, folder, told)

        predictions = folder / PREDICTIONS
        if not predictions.exists() and not failed:
            found = predict_largest(plan, points)
            found["made"] = datetime.now(UTC).isoformat(timespec="seconds")
            write_atomically(predictions, json_text(found))
        rest = [point for point in points if point.size == largest]
        return failed | _run_all(base, plan, rest, folder, told)


def _count_all(base: RunConfig, plan: StudyPlan, points: Sequence[Point], folder: Path) -> None:
    task = ray.remote(num_cpus=base.train.threads_per_worker)(_count_point)
    left = [point for point in points if not (point.trial.cfg.run_dir / WORK).exists()]
    ray.get([task.remote(*_arguments(base, plan, point, folder)) for point in left])


def _run_all(
    base: RunConfig, plan: StudyPlan, points: Sequence[Point], folder: Path, told: Told
) -> dict[str, str]:
    """The points to their ends, those with the most FLOP first."""
    task = ray.remote(
        num_cpus=base.train.threads_per_worker,
        num_gpus=float(base.train.use_gpu),
        max_retries=base.train.max_failures,
    )(_run_point)

    left = [point for point in points if not (point.trial.cfg.run_dir / POINT).exists()]
    left.sort(key=_train_gflop, reverse=True)
    pending = {task.remote(*_arguments(base, plan, point, folder)): point for point in left}

    failed: dict[str, str] = {}
    while pending:
        (ready, *_), _ = ray.wait(list(pending))
        name = pending.pop(ready).trial.name
        try:
            why = ray.get(ready)
        except RayError as error:
            why = str(error).strip().splitlines()[-1]
        if why:
            failed[name] = why
        logger.info("%s %s, %d to go", name, why or "finished", len(pending))
        told(name)
    return failed


def _train_gflop(point: Point) -> float:
    return json.loads((point.trial.cfg.run_dir / WORK).read_text())["train_gflop"]


def _arguments(base: RunConfig, plan: StudyPlan, point: Point, folder: Path) -> tuple[Any, ...]:
    absolute = replace(point.trial.cfg, runs_dir=str(base.run_dir.parent))
    shared = folder if shares_features(point.trial.cfg, base) else None
    task = plan.study.task or base.tasks[0]
    return config.to_dict(absolute), point.trial.settings, plan.study.split, task, shared


def _count_point(
    cfg: dict[str, Any], settings: dict[str, Any], split: str, task: str, shared: Path | None
) -> None:
    count_work(config.from_dict(cfg), split, shared)


def _run_point(
    cfg: dict[str, Any], settings: dict[str, Any], split: str, task: str, shared: Path | None
) -> str:
    """One point, in a process of its own."""
    read = config.from_dict(cfg)
    form = f"%(asctime)s {read.name} %(message)s"
    # a worker of Ray's takes one point after another
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", force=True)
    return run_point(read, settings, split, task, shared)


def log_study(parent: Run, figures: dict[str, Any], folder: Path) -> None:
    """The report's files into the study's own run, with what can be compared between studies."""
    metrics = {}
    for cost, by_encoder in figures["slopes"].items():
        for encoder, entry in by_encoder.items():
            metrics[f"slope/{cost}/{encoder}"] = entry["slope"]["value"]
            if entry["ratio"] is not None:
                metrics[f"ratio/{cost}/{encoder}"] = entry["ratio"]["value"]
    for name, entry in figures["predictions"].items():
        for law in ("log", "power"):
            if f"{law}_error" in entry:
                metrics[f"prediction_error/{law}/{name}"] = entry[f"{law}_error"]
    known = {name: value for name, value in metrics.items() if value is not None}
    if known:
        parent.log_metrics(known, 0)

    parent.set_tags({"kind": "scaling study", "points": str(len(figures["points"]))})
    for name in FILES:
        if (folder / name).exists():
            parent.log_artifacts(folder / name)
