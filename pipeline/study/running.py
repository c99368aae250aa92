"""The points of a study on Ray: as many at once as there is room for, the largest size last.

    count the FLOP of all → train all but the largest size → predict it → train it → the report

The files of the points say how far each is, so the same command goes on with what is left.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from pipeline.study.plan import Point, StudyConfig, StudyPlan, plan_points, study_config
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


def forget_study(folder: Path) -> None:
    """Remove the study's folder, and those of its points beside it."""
    for path in folder.parent.glob(f"{folder.name}-*"):
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
    if not _without(POINT, points):
        return {}

    folder = study_config(base).run_dir
    first = points[0].trial.cfg
    check_periods(first.sequence_dir, first.split, first.tasks, validates=True)

    # the largest size waits for its prediction
    largest_size = list(plan.sizes)[-1]
    smaller, largest, jobs = [], [], {}
    for point in points:
        if point.size == largest_size:
            largest.append(point)
        else:
            smaller.append(point)
        maps = folder if shares_features(point.trial.cfg, base) else None
        jobs[point.trial.name] = _make_job(point, plan.study, maps)

    with ray_cluster(base.ray, runs_dir=base.runs_dir):
        if any(job.shared_maps is not None for job in jobs.values()):
            fit_features(first).save(folder)
        _count_all(base.train, points, jobs)
        failed = _run_all(base.train, smaller, jobs, told)

        predictions = folder / PREDICTIONS
        if not predictions.exists() and not failed:
            found = predict_largest(plan, points)
            found["made"] = datetime.now(UTC).isoformat(timespec="seconds")
            write_atomically(predictions, json_text(found))
        return failed | _run_all(base.train, largest, jobs, told)


@dataclass(frozen=True, slots=True)
class PointJob:
    """What a worker is told of a point."""

    cfg: dict[str, Any]  # its folders are absolute: a worker has a working directory of its own
    settings: dict[str, Any]  # the trial's
    split: str  # that is scored
    task: str
    shared_maps: Path | None  # folder of the feature maps; None: the point fits its own


def _make_job(point: Point, study: StudyConfig, shared_maps: Path | None) -> PointJob:
    trial = point.trial
    return PointJob(
        cfg=config.to_dict(trial.cfg.with_absolute_folders()),
        settings=trial.settings,
        split=study.split,
        task=study.task or trial.cfg.tasks[0],
        shared_maps=shared_maps,
    )


def _without(file: str, points: Sequence[Point]) -> list[Point]:
    """The points that have not written their `file` yet."""
    left = []
    for point in points:
        if not (point.trial.cfg.run_dir / file).exists():
            left.append(point)
    return left


def _count_all(train: TrainConfig, points: Sequence[Point], jobs: Mapping[str, PointJob]) -> None:
    """Write the FLOP of each point."""
    task = ray.remote(num_cpus=train.threads_per_worker)(_count_point)
    pending = []
    for point in _without(WORK, points):
        pending.append(task.remote(jobs[point.trial.name]))
    ray.get(pending)


def _run_all(
    train: TrainConfig, points: Sequence[Point], jobs: Mapping[str, PointJob], told: Told
) -> dict[str, str]:
    """The points to their ends, those with the most FLOP first; why one failed, by its name."""
    task = ray.remote(
        num_cpus=train.threads_per_worker,
        num_gpus=float(train.use_gpu),
        max_retries=train.max_failures,
    )(_run_point)

    left = _without(POINT, points)
    left.sort(key=_train_gflop, reverse=True)
    pending = {}
    for point in left:
        name = point.trial.name
        pending[task.remote(jobs[name])] = name

    failed: dict[str, str] = {}
    while pending:
        (ready, *_), _ = ray.wait(list(pending))
        name = pending.pop(ready)
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


def _count_point(job: PointJob) -> None:
    count_work(config.from_dict(job.cfg), job.split, job.shared_maps)


def _run_point(job: PointJob) -> str:
    """One point, in a process of its own."""
    cfg = config.from_dict(job.cfg)
    form = f"%(asctime)s {cfg.name} %(message)s"
    # a worker of Ray's takes one point after another
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S", force=True)
    return run_point(cfg, job.settings, job.split, job.task, job.shared_maps)


def log_study(parent: Run, figures: dict[str, Any], folder: Path) -> None:
    """The report's files into the study's own run, with what can be compared between studies."""
    known = {}
    for name, value in _study_metrics(figures).items():
        if value is not None:
            known[name] = value
    if known:
        parent.log_metrics(known, 0)

    parent.set_tags({"kind": "scaling study", "points": str(len(figures["points"]))})
    for name in FILES:
        if (folder / name).exists():
            parent.log_artifacts(folder / name)


def _study_metrics(figures: dict[str, Any]) -> dict[str, float | None]:
    """Slopes, their ratios and the errors of the predictions; None for what is not defined."""
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
    return metrics
