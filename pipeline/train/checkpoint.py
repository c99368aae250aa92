"""Checkpoints of a training run: a folder of safetensors and JSON, whole or not there.

model.safetensors, optimizer.safetensors, state.json (position, config, running sums), artifact.json (sha256)
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.config import RunConfig, UserError, flatten, to_dict
from pipeline.model.artifact import INDEX, file_digests, staged, verified

logger = logging.getLogger(__name__)

# Settings that say how a run is carried out, not what it computes: they may change between two attempts.
FREE_SETTINGS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
    "threads_per_worker",
    "loader_threads",
)
FREE_SETTINGS += ("tables", "shard_above_mb", "host_state_tables")
SETTINGS = ("seed", "split", "tasks", "features", "model", "train")  # the sections that decide the losses


@dataclass
class TrainState:
    """Where a run stands. `step` counts optimizer steps from the start of the run, `epoch_step` from the epoch's."""

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    seconds: float = 0.0  # spent in training by all attempts together
    loss_sum: list[float] = field(default_factory=list)  # per task, since the last line of metrics
    weight_sum: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    state: TrainState
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    identity: dict[str, Any]


def run_identity(cfg: RunConfig, data_digest: str, world_size: int) -> dict[str, Any]:
    """What must not change between the attempts of one run."""
    settings = to_dict(cfg)
    settings["train"] = {key: value for key, value in settings["train"].items() if key not in FREE_SETTINGS}
    chosen = flatten({key: settings[key] for key in SETTINGS})
    return chosen | {"source.actions": list(cfg.source.actions), "sequences": data_digest, "world_size": world_size}


def check_identity(saved: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    """Raises UserError naming the first setting in which the saved run differs."""
    for key in sorted(saved.keys() | wanted.keys()):
        if saved.get(key) != wanted.get(key):
            raise UserError(
                f"run {name!r} began with {key} = {saved.get(key)!r} and would go on with {wanted.get(key)!r}: "
                "choose another name, or --restart to train it anew"
            )


def write_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """The files of a checkpoint into the existing `folder`, the index of their digests last."""
    save_file(checkpoint.model, folder / "model.safetensors")
    save_file(checkpoint.optimizer, folder / "optimizer.safetensors")
    state = {"state": asdict(checkpoint.state), "identity": checkpoint.identity}
    (folder / "state.json").write_text(json.dumps(state, indent=2))
    (folder / INDEX).write_text(json.dumps({"files": file_digests(folder)}, indent=2))


def read_checkpoint(folder: Path) -> Checkpoint:
    """Raises UserError where the checkpoint is missing, half-written or corrupted."""
    verified(folder, "checkpoint")
    saved = json.loads((folder / "state.json").read_text())
    return Checkpoint(
        state=TrainState(**saved["state"]),
        model=load_file(folder / "model.safetensors"),
        optimizer=load_file(folder / "optimizer.safetensors"),
        identity=saved["identity"],
    )


def last_good(folders: Sequence[Path]) -> Checkpoint | None:
    """The newest whole checkpoint of `folders`, given oldest first; None where there are no folders.

    Raises:
        UserError: there are folders, and none of them is whole.
    """
    for folder in reversed(folders):
        try:
            return read_checkpoint(folder)
        except UserError as error:
            logger.error("skipped: %s", error)
    if folders:
        raise UserError(
            f"none of the {len(folders)} checkpoints under {folders[0].parent} is whole: --restart trains anew"
        )
    return None


class CheckpointFolder:
    """The newest `keep` checkpoints of a run without Ray, `root/step_00000200` and so on."""

    def __init__(self, root: Path, keep: int) -> None:
        self.root, self.keep = root, keep

    def folders(self) -> list[Path]:
        return sorted(self.root.glob("step_*"))

    def save(self, checkpoint: Checkpoint) -> None:
        with staged(self.root / f"step_{checkpoint.state.step:08d}") as stage:
            write_checkpoint(stage, checkpoint)
        for folder in self.folders()[: -self.keep]:
            shutil.rmtree(folder)


class MetricsFile:
    """One JSON line per logged step, rank 0's. A resumed run drops the lines after the checkpoint it starts from."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A crash may have cut the last line short.
        whole = [line for line in lines if line.endswith("\n")]
        path.write_text("".join(line for line in whole if json.loads(line)["step"] <= resumed_at))
        self.path = path

    def append(self, step: int, values: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors as they are now, on the CPU, each with memory of its own (safetensors refuses shared memory)."""
    return {name: torch.clone(tensor.detach()).cpu().contiguous() for name, tensor in tensors.items()}
