"""From a complete training to the model folder that is evaluated, registered and served."""

from pathlib import Path

import torch

from pipeline.batches.features import FeatureMaps
from pipeline.config import RunConfig, TrainConfig
from pipeline.model.artifact import publish_model
from pipeline.model.ranker import RankingModel
from pipeline.train.checkpoint import CheckpointFolder, Saved, copy_tensors


def open_checkpoints(
    folder: Path, train: TrainConfig, rank: int = 0, world_size: int = 1
) -> CheckpointFolder:
    return CheckpointFolder(folder / "checkpoints", train.keep_checkpoints, rank, world_size)


def publish_training(
    cfg: RunConfig, maps: FeatureMaps, digest: str, run_id: str | None = None
) -> Path:
    """Publish the checkpoint that `train.publish` chooses; returns the model's folder.

    `digest` is the sequences', `run_id` that of the tracker's run, where there is one.
    """
    trained = _chosen_checkpoint(open_checkpoints(cfg.train_dir, cfg.train), cfg.train.publish)
    with torch.device("meta"):  # names and shapes: tables may be larger than this machine
        like = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).state_dict()
    facts = {
        "steps": trained.state.step,
        "train_seconds": trained.state.seconds,
        "sequences": digest,
    }
    if run_id is not None:
        facts["mlflow_run_id"] = run_id

    def write_weights(path: Path) -> None:
        copy_tensors(trained.folder, like, path, "model.")

    publish_model(cfg.model_dir, write_weights, cfg, maps, facts)
    return cfg.model_dir


def _chosen_checkpoint(checkpoints: CheckpointFolder, publish: str) -> Saved:
    """The checkpoint that becomes the model, by `train.publish`."""
    last = checkpoints.newest()
    assert last is not None
    if publish == "last" or last.state.best_step is None:
        return last
    return checkpoints.read(checkpoints.at(last.state.best_step))
