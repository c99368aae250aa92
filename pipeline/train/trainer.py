"""Training on a Ray cluster: the loop of `loop.py` on every worker, workers and their restarts by
Ray Train.

sequences → feature maps (driver) → workers: loader + loop → checkpoints → model folder (driver)

Checkpoints are `CheckpointFolder`'s, as without Ray, and not handed to Ray Train: it would upload
each rank's folder by itself, and a checkpoint must be there as a whole or not at all. A worker
learns from the folder where the run stands, after a crash as after a new start, at this number of
workers or another.
"""

import json
import logging
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import config
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import StepPlan, pool_memory, step_plan
from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig, TrainConfig, UserError
from pipeline.files import write_atomically
from pipeline.model.artifact import publish_model
from pipeline.model.encoders import check_run
from pipeline.model.ranker import RankingModel
from pipeline.sequences import store
from pipeline.tracking import Run
from pipeline.train import loop
from pipeline.train.checkpoint import (
    CheckpointFolder,
    MetricsFile,
    Saved,
    check_identity,
    copy_tensors,
    only_writer,
    run_identity,
)
from pipeline.train.guards import TrainingStopped
from pipeline.train.placement import describe_tables, place_tables
from pipeline.train.validation import Validator

STOPPED = "stopped.json"  # why a training cannot go on, from its workers to the driver

logger = logging.getLogger(__name__)


def fit_model(cfg: RunConfig, run: Run | None = None, *, restart: bool = False) -> Path:
    """Train on the published sequences and publish the model; returns its folder.

    The same run name goes on from its last checkpoint; a run that is already complete trains
    nothing. Losses go to `train/metrics.jsonl` and, where `run` is given, to that MLflow run.

    Args:
        restart: forget the run's earlier training first.

    Raises:
        UserError: a setting that the encoder does not know, no sequences, nothing to train on, or
        an earlier training under this name with other settings.
        TrainingStopped: it went wrong; the checkpoints from before are kept.
    """
    check_run(cfg)
    folder, train = cfg.train_dir, cfg.train
    if restart:
        shutil.rmtree(folder, ignore_errors=True)

    digest = store.read_manifest(cfg.sequence_dir).digest
    before = earlier_checkpoint(cfg)  # tells a mistake before any worker starts
    maps = fit_features(cfg)
    folder.mkdir(parents=True, exist_ok=True)
    maps.save(folder)

    if before is None or not before.state.finished:
        # here, so that no worker reads the store to count
        steps = step_plan(cfg, folder / "steps.json")
        with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir):
            _run_trainer(_make_trainer(cfg, digest, steps, run), folder)
    if run is not None and (folder / "profile").exists():
        run.log_artifacts(folder / "profile", "profile")

    trained = _chosen_checkpoint(_open_checkpoints(folder, train), train.publish)
    with torch.device("meta"):  # names and shapes: tables may be larger than this machine
        like = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).state_dict()
    facts = {
        "steps": trained.state.step,
        "train_seconds": trained.state.seconds,
        "sequences": digest,
    }
    if run is not None:
        facts["mlflow_run_id"] = run.run_id

    def write_weights(path: Path) -> None:
        copy_tensors(trained.folder, like, path, "model.")

    publish_model(cfg.model_dir, write_weights, cfg, maps, facts)
    return cfg.model_dir


def _run_trainer(trainer: TorchTrainer, folder: Path) -> None:
    """Run it to its end; a user's mistake that only a worker could see is a `UserError` as well."""
    stopped = folder / STOPPED
    stopped.unlink(missing_ok=True)
    # Ray Train's notes of an earlier attempt
    shutil.rmtree(folder / "ray", ignore_errors=True)

    try:
        trainer.fit()
    except ray.train.WorkerGroupError as error:
        for failure in error.worker_failures.values():
            cause = getattr(failure, "_base_exc", failure)  # Ray Train wraps what a worker raised
            if isinstance(cause, UserError):
                raise UserError(str(cause)) from error
        raise

    if stopped.exists():
        raise TrainingStopped(json.loads(stopped.read_text())["reason"])


def earlier_checkpoint(cfg: RunConfig) -> Saved | None:
    """The checkpoint that this run would go on from.

    Raises:
        UserError: the run began with other settings or data, or none of its checkpoints is whole.
    """
    found = _open_checkpoints(cfg.train_dir, cfg.train).newest()
    if found is not None:
        digest = store.read_manifest(cfg.sequence_dir).digest
        check_identity(found.identity, run_identity(cfg, digest), cfg.name)
    return found


def trained_on(folder: Path, train: TrainConfig) -> str | None:
    """Digest of the sequences that the newest checkpoint below `folder` (`RunConfig.train_dir`) has
    read; None where there is none.
    """
    found = _open_checkpoints(folder, train).newest()
    return None if found is None else found.identity["sequences"]


def _open_checkpoints(
    folder: Path, train: TrainConfig, rank: int = 0, world_size: int = 1
) -> CheckpointFolder:
    return CheckpointFolder(folder / "checkpoints", train.keep_checkpoints, rank, world_size)


def _chosen_checkpoint(checkpoints: CheckpointFolder, publish: str) -> Saved:
    """The checkpoint that becomes the model, by `train.publish`."""
    last = checkpoints.newest()
    assert last is not None
    if publish == "last" or last.state.best_step is None:
        return last
    return checkpoints.read(checkpoints.at(last.state.best_step))


def _make_trainer(cfg: RunConfig, digest: str, steps: StepPlan, run: Run | None) -> TorchTrainer:
    train = cfg.train
    # a worker has a current folder of its own
    absolute = replace(cfg, runs_dir=str(cfg.run_dir.parent))
    settings = {"cfg": config.to_dict(absolute), "digest": digest, "steps": steps, "run": run}

    backend, resources = "gloo", {"CPU": 1}
    if train.use_gpu:
        backend, resources = "nccl", {"CPU": 1, "GPU": 1}
    return TorchTrainer(
        train_worker,
        train_loop_config=settings,
        torch_config=TorchConfig(backend=backend),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=train.use_gpu,
            resources_per_worker=resources,
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=str(cfg.train_dir),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )


def train_worker(settings: dict[str, Any]) -> None:
    """One rank. It learns where the run stands from the checkpoints, after a crash as after a new
    start.
    """
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    cfg, digest, run = config.from_dict(settings["cfg"]), settings["digest"], settings["run"]

    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(cfg.train.threads_per_worker)
    folder, device = cfg.train_dir, ray.train.torch.get_device()
    maps = FeatureMaps.load(folder)
    checkpoints = _open_checkpoints(folder, cfg.train, rank, world_size)

    with only_writer(folder) if rank == 0 else nullcontext():
        resume = checkpoints.newest()  # the other ranks wait here for rank 0
        metrics = None
        if rank == 0:
            metrics = MetricsFile(
                folder / "metrics.jsonl", resumed_at=resume.state.step if resume else 0
            )

        def log_step(step: int, values: dict[str, float]) -> None:
            if metrics is not None:
                metrics.append(step, values)
                if run is not None:
                    run.log_metrics(values, step)

        try:
            loop.train(
                cfg,
                maps,
                TrainLoader(cfg, maps, settings["steps"], rank, world_size),
                digest,
                rank=rank,
                world_size=world_size,
                device=device,
                resume=resume,
                checkpoints=checkpoints,
                validate=Validator(cfg, maps, device, rank, world_size)
                if cfg.train.validate_every
                else None,
                log=log_step,
                profile_dir=folder / "profile",
            )
        except TrainingStopped as stopped:
            # All ranks end here, at the same step. Raised, it would make Ray Train start them
            # again, to the same end.
            if rank == 0:
                write_atomically(folder / STOPPED, json.dumps({"reason": str(stopped)}))


def plan_training(cfg: RunConfig) -> dict[str, object]:
    """What training would do, for `--dry-run`: sizes and steps, without starting anything.

    Raises:
        UserError: no published sequences, or more workers than the local cluster has CPUs.
    """
    check_run(cfg)
    train = cfg.train
    if cfg.ray.address is None and train.num_workers > cfg.ray.num_cpus:
        raise UserError(
            f"train.num_workers is {train.num_workers}, ray.num_cpus only {cfg.ray.num_cpus}"
        )

    maps = fit_features(cfg)
    tables = place_tables(cfg, maps.vocab_sizes, train.num_workers)
    with torch.device("meta"):  # shapes alone: a table may be larger than this machine
        model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates)
    table_values = sum(table.rows * table.width for table in tables.values())
    all_values = sum(parameter.numel() for parameter in model.parameters())
    dense = all_values - table_values
    placed, steps = describe_tables(tables), step_plan(cfg)
    before = _open_checkpoints(cfg.train_dir, train).newest()

    return {
        "world_size": train.num_workers,
        "device": "cuda" if train.use_gpu else "cpu",
        "steps_per_epoch": steps.steps_per_epoch,
        "epochs": train.epochs,
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
