"""One rank of a training inside Ray Train: it finds out where the run stands, and runs the loop.

A user's mistake that only a worker can see ends the training, and is not tried again: the worker
leaves the reason in `stopped.json` for the driver, and whoever is started after it returns at once.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.v2._internal.execution import context as ray_context

from pipeline import config
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import StepPlan
from pipeline.config import RunConfig, TrainConfig, UserError
from pipeline.files import write_atomically
from pipeline.tracking import Run
from pipeline.train import loop
from pipeline.train.checkpoint import only_writer
from pipeline.train.guards import TrainingStopped
from pipeline.train.interruption import WishWatcher
from pipeline.train.metrics import METRICS, MetricsFeed, MetricsFile
from pipeline.train.publish import open_checkpoints
from pipeline.train.trainee import Trainee
from pipeline.train.usage import UsageMonitor
from pipeline.train.validation import Validator
from pipeline.train.warm_start import WarmStart, load_start

STOPPED = "stopped.json"  # why a training cannot go on, from its workers to the driver


def worker_resources(train: TrainConfig) -> dict[str, float]:
    """What Ray gives to each worker."""
    return {"CPU": 1, "GPU": 1} if train.use_gpu else {"CPU": 1}


def train_worker(settings: dict[str, Any]) -> None:
    """One rank. It learns where the run stands from the checkpoints, after a crash as after a new
    start.

    Raises:
        UserError: a mistake that only a worker could see, for the driver in `stopped.json` as well.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    # each rank would print all values of each report
    logging.getLogger(ray_context.__file__).setLevel(logging.WARNING)
    cfg = config.from_dict(settings["cfg"])
    folder = cfg.train_dir
    if (folder / STOPPED).exists():
        return

    try:
        _train_rank(cfg, settings)
    except TrainingStopped as stopped:
        # All ranks end here, at the same step, so nobody waits for another.
        if ray.train.get_context().get_world_rank() == 0:
            write_atomically(folder / STOPPED, json.dumps({"diverged": str(stopped)}))
    except UserError as mistake:
        # Raised, so that Ray Train ends the ranks that wait for this one. It starts all of them
        # once more, and they return.
        write_atomically(folder / STOPPED, json.dumps({"mistake": str(mistake)}))
        raise


def raise_reason(folder: Path) -> None:
    """Raise what the workers have left in `stopped.json`, if anything.

    Raises:
        TrainingStopped: it went wrong.
        UserError: a mistake that only a worker could see.
    """
    if not (folder / STOPPED).exists():
        return
    reason = json.loads((folder / STOPPED).read_text())
    if "diverged" in reason:
        raise TrainingStopped(reason["diverged"])
    raise UserError(reason["mistake"])


def _train_rank(cfg: RunConfig, settings: dict[str, Any]) -> None:
    steps: StepPlan = settings["steps"]
    run: Run | None = settings["run"]
    start: WarmStart | None = settings["start"]
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(cfg.train.threads_per_worker)
    folder, device = cfg.train_dir, ray.train.torch.get_device()
    maps = FeatureMaps.load(folder)
    checkpoints = open_checkpoints(folder, cfg.train, rank, world_size)
    validator = None
    if cfg.train.validate_every:
        validator = Validator(cfg, maps, device, rank, world_size)

    def begin_with(trainee: Trainee) -> None:
        if start is not None:
            load_start(trainee, start, maps, cfg.features)

    with only_writer(folder) if rank == 0 else nullcontext():
        resume = checkpoints.newest()  # the other ranks wait here for rank 0
        begin = resume.state.step if resume else 0
        metrics = _open_metrics(folder, begin, run) if rank == 0 else nullcontext(_log_nothing)
        usage = _watch_usage(run, cfg.tracking.usage_every_s, device, rank, world_size)
        with metrics as log, usage, WishWatcher(folder, rank) as wishes:
            loop.train(
                cfg,
                maps,
                TrainLoader(cfg, maps, steps, rank, world_size),
                settings["digest"],
                rank=rank,
                world_size=world_size,
                device=device,
                resume=resume,
                checkpoints=checkpoints,
                validate=validator,
                log=log,
                profile_dir=folder / "profile",
                wishes=wishes,
                begin_with=begin_with,
                report=_report,
            )


def _watch_usage(
    run: Run | None, every_s: float, device: torch.device, rank: int, world_size: int
) -> AbstractContextManager[object]:
    if run is None:
        return nullcontext()
    return UsageMonitor(run.log_metrics, every_s, device, rank, world_size)


def _report(values: dict[str, float], folder: Path | None) -> None:
    """Tell Ray Train, for its dashboard and for Tune; all ranks call it, and it keeps what rank 0
    says.

    The checkpoint is there already, from all ranks: Ray Train notes where, and copies nothing.
    """
    first = ray.train.get_context().get_world_rank() == 0
    saved = Checkpoint.from_directory(str(folder)) if first and folder is not None else None
    ray.train.report(
        values,
        checkpoint=saved,
        checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        delete_local_checkpoint_after_upload=False,
    )


def _log_nothing(step: int, values: dict[str, float]) -> None:
    """What the ranks but the first log."""


@contextmanager
def _open_metrics(folder: Path, begin: int, run: Run | None) -> Iterator[loop.Log]:
    """A function that logs to the run's file, from where the tracker's run is fed."""
    file = MetricsFile(folder / METRICS, resumed_at=begin)
    if run is None:
        yield file.append
        return

    feed = MetricsFeed(folder, run.run_id, run.log_history)
    feed.start()

    def log(step: int, values: dict[str, float]) -> None:
        file.append(step, values)
        feed.notify()

    try:
        yield log
    finally:
        feed.close()
