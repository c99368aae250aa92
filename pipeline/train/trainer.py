"""Training on a Ray cluster: the loop of `loop.py` on every worker, workers and their restarts by
Ray Train.

sequences → feature maps (driver) → workers: loader + loop → checkpoints → model folder (driver)

Checkpoints are `CheckpointFolder`'s, as without Ray: a checkpoint must be there as a whole or not
at all. Ray Train is told of each, with the newest metrics, and copies none (`worker._report`). A
worker learns from the folder where the run stands, after a crash as after a new start, at this
number of workers or another.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import ray.train
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2.api.callback import RayTrainCallback

from pipeline import config
from pipeline.batches.features import fit_features
from pipeline.batches.passes import run_here
from pipeline.batches.steps import StepPlan, pool_memory, step_plan
from pipeline.cluster import ray_cluster
from pipeline.config import Outage, RayConfig, RunConfig, TrainConfig
from pipeline.model.encoders import check_run
from pipeline.model.ranker import RankingModel
from pipeline.sequences import store
from pipeline.sequences.workers import Workers, workers
from pipeline.tracking import Run
from pipeline.train.checkpoint import Saved, check_identity, run_identity
from pipeline.train.metrics import METRICS, MetricsFeed
from pipeline.train.optim import refuse_long_warmup, resolve_warmup
from pipeline.train.periods import check_periods
from pipeline.train.placement import describe_tables, place_tables
from pipeline.train.publish import open_checkpoints, publish_training
from pipeline.train.supervision import refuse_impossible_size, run_attempt
from pipeline.train.warm_start import (
    WarmStart,
    aside,
    earlier_start,
    prepare_start,
    with_start,
)
from pipeline.train.worker import train_worker, worker_resources

logger = logging.getLogger(__name__)

LOOK_EVERY_S = "0.5"  # of Ray Train at its workers
LARGE_STORE = 3_000_000  # rows: seconds of counting, against those of a cluster's start
RAY_NOTES = "checkpoint_manager_snapshot.json"  # of Ray Train, in the training folder


def fit_model(
    cfg: RunConfig,
    run: Run | None = None,
    *,
    restart: bool = False,
    champion: Path | None = None,
) -> Path:
    """Train on the published sequences and publish the model; returns its folder.

    The same run name goes on from its last checkpoint; a run that is already complete trains
    nothing. Losses go to `train/metrics.jsonl` and, where `run` is given, to that MLflow run.

    Args:
        restart: forget the run's earlier training first.
        champion: folder of the model that a first attempt begins with; None for random weights.

    On SIGTERM and Ctrl-C a last checkpoint is saved.

    Raises:
        UserError: a setting that the encoder does not know, no sequences, nothing to train on,
        more workers than the machine has room for, or an earlier training under this name with
        other settings.
        TrainingStopped: it went wrong; the checkpoints from before are kept.
        Outage: the model is published, and the tracker did not take all of the metrics.
    """
    check_run(cfg.model, cfg.train, retrieval=cfg.retrieval.enabled)
    start = prepare_start(cfg, champion, restart=restart)
    cfg = replace(cfg, train=with_start(cfg.train, start))
    folder = cfg.train_dir

    digest = store.read_manifest(cfg.sequence_dir).digest
    before = earlier_checkpoint(cfg)  # tells a mistake before any worker starts
    train = with_readers(cfg.train, before)
    cfg = replace(cfg, train=train)
    check_periods(cfg.sequence_dir, cfg.split, cfg.tasks, validates=train.validate_every > 0)
    finished = before is not None and before.state.finished
    if not finished:
        refuse_impossible_size(cfg.ray, train)

    with _store_workers(cfg.sequence_dir, cfg.ray, cfg.runs_dir) as each_task:
        maps = fit_features(cfg.with_absolute_folders(), each_task)
        folder.mkdir(parents=True, exist_ok=True)
        maps.save(folder)
        if not finished:
            # here, so that no training worker reads the store to count
            steps = step_plan(cfg.with_absolute_folders(), folder / "steps.json", each_task)

    if not finished:
        refuse_long_warmup(train.warmup_steps, steps.steps_per_epoch * train.epochs)
        # the dashboard has a page for the training
        with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True):
            # Ray Train's notes of an earlier attempt: they name checkpoints that may be gone
            (folder / RAY_NOTES).unlink(missing_ok=True)
            run_attempt(_make_trainer(cfg, digest, steps, run, start), train, folder)

    publish_training(cfg, maps, digest, None if run is None else run.run_id)
    shutil.rmtree(aside(cfg.run_dir), ignore_errors=True)
    if run is not None:
        complete_run(run, folder)
    return cfg.model_dir


def complete_run(run: Run, folder: Path) -> None:
    """Send what the tracker's run lacks of the training in `folder`.

    Raises:
        Outage: it does not answer; the next attempt sends the rest.
    """
    try:
        MetricsFeed(folder, run.run_id, run.log_history).send_rest()
        if (folder / "profile").exists():
            run.log_artifacts(folder / "profile", "profile")
    except Outage as error:
        raise Outage(
            f"training is complete, and {error}: the same command sends the rest of "
            f"{folder / METRICS}"
        ) from error


def earlier_checkpoint(cfg: RunConfig) -> Saved | None:
    """The checkpoint that this run would go on from.

    Raises:
        UserError: the run began with other settings or data, or none of its checkpoints is whole.
    """
    train = with_start(cfg.train, earlier_start(cfg.train_dir))
    found = open_checkpoints(cfg.train_dir, train).newest()
    if found is not None:
        digest = store.read_manifest(cfg.sequence_dir).digest
        wanted = run_identity(replace(cfg, train=with_readers(train, found)), digest)
        check_identity(found.identity, wanted, cfg.name)
    return found


def with_readers(train: TrainConfig, before: Saved | None) -> TrainConfig:
    """The settings with the number of readers: where they leave it open, as many as the run has
    workers when it begins, and as many as it began with when it goes on from `before`.
    """
    if train.readers is not None:
        return train
    readers = train.num_workers if before is None else before.identity.get("train.readers")
    return replace(train, readers=readers)


def trained_on_other_rows(cfg: RunConfig, digest: str) -> bool:
    """True where the run's newest checkpoint has read other sequences than those of `digest`, or
    under another split: the days have moved on.
    """
    found = open_checkpoints(cfg.train_dir, cfg.train).newest()
    if found is None:
        return False
    now = run_identity(cfg, digest)
    rows = [key for key in now if key == "sequences" or key.startswith("split.")]
    return any(found.identity.get(key) != now[key] for key in rows)


@contextmanager
def _store_workers(sequence_dir: Path, cfg: RayConfig, runs_dir: str) -> Iterator[Workers]:
    """Who goes over the store: tasks on the cluster where it is large, else this process."""
    if store.read_manifest(sequence_dir).num_rows < LARGE_STORE:
        yield run_here
        return
    with workers(cfg, runs_dir) as run:
        yield run


def _make_trainer(
    cfg: RunConfig, digest: str, steps: StepPlan, run: Run | None, start: WarmStart | None
) -> "QuietTrainer":
    train = cfg.train
    # at each look Ray Train takes a report; after its own 2 s a second one would be waited for
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", LOOK_EVERY_S)
    settings = {
        "cfg": config.to_dict(cfg.with_absolute_folders()),
        "digest": digest,
        "steps": steps,
        "run": run,
        "start": start,
    }

    backend = "nccl" if train.use_gpu else "gloo"
    return QuietTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=_group_size(train),
            use_gpu=train.use_gpu,
            resources_per_worker=worker_resources(train),
        ),
        run_config=ray.train.RunConfig(
            # its folder holds ours, so that it may name our checkpoints
            name=cfg.train_dir.name,
            storage_path=str(cfg.train_dir.parent),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )


def _group_size(train: TrainConfig) -> int | tuple[int, int]:
    """The number of workers for Ray Train, or the fewest and the most."""
    if train.min_workers is None:
        return train.num_workers
    return train.min_workers, train.num_workers


class QuietTrainer(TorchTrainer):
    """Without Ray Train's cleaner of placement groups.

    It asks the dashboard once a second whether the controller lives, and complains each time where
    there is none, or where the machine has other clusters too. Ray itself removes the groups when
    the job ends, and a job of ours ends with its training.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        kept = []
        for callback in super()._create_default_callbacks():
            if not isinstance(callback, PlacementGroupCleanerCallback):
                kept.append(callback)
        return kept


def plan_training(cfg: RunConfig) -> dict[str, object]:
    """What training would do, for `--dry-run`: sizes and steps, without starting anything.

    Raises:
        UserError: no published sequences, or more workers than the local cluster has CPUs.
    """
    check_run(cfg.model, cfg.train, retrieval=cfg.retrieval.enabled)
    train = cfg.train
    refuse_impossible_size(cfg.ray, train)
    validates = train.validate_every > 0
    periods = check_periods(cfg.sequence_dir, cfg.split, cfg.tasks, validates=validates)

    before = open_checkpoints(cfg.train_dir, train).newest()
    cfg = replace(cfg, train=with_readers(train, before))
    maps = fit_features(cfg)
    tables = place_tables(cfg.features, cfg.model, train, maps.vocab_sizes, train.num_workers)
    with torch.device("meta"):  # shapes alone: a table may be larger than this machine
        model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates)
    table_values = sum(table.rows * table.width for table in tables.values())
    all_values = sum(parameter.numel() for parameter in model.parameters())
    dense = all_values - table_values
    placed, steps = describe_tables(tables), step_plan(cfg)
    total_steps = steps.steps_per_epoch * train.epochs
    refuse_long_warmup(train.warmup_steps, total_steps)

    return {
        "world_size": train.num_workers,
        "device": "cuda" if train.use_gpu else "cpu",
        "readers": steps.readers,
        "steps_per_epoch": steps.steps_per_epoch,
        "epochs": train.epochs,
        "warmup_steps": resolve_warmup(train.warmup_steps, total_steps),
        "periods": periods,
        "parameters": {"dense": dense, "tables": table_values},
        # Float32 weights, their gradients and two moments: what a step needs beside tables and
        # activations.
        "bytes_per_worker": {
            "dense": 16 * dense,
            **placed["total"],
            "sequences": pool_memory(cfg.sequence_dir, cfg.train, steps),
        },
        "tables": placed["tables"],
        "resumes_from_step": 0 if before is None else before.state.step,
    }
