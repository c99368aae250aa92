"""Checkpoints of a training run: folders of safetensors and JSON, whole or not there.

    step_00000200/shard-00001-model-….safetensors   what rank 0 has written
                  shard-00002-model-….safetensors   what rank 1 has written, and so on
                  state.json                        where the run stands, its identity
                  artifact.json                     sha256 of the others; written last

Tensors go through `torch.distributed.checkpoint` with its safetensors storage: a tensor that all
ranks hold is written by one of them, a `Block` of a sharded table by its owner, and each file says
which rows it holds. So a checkpoint loads at any number of ranks, and nothing of it is ever
unpickled.
"""

import fcntl
import json
import logging
import shutil
import struct
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from pipeline.config import RunConfig, UserError, flatten, to_dict
from pipeline.files import publish_folder, sha256_of
from pipeline.model.artifact import INDEX, verified

logger = logging.getLogger(__name__)

# Settings that say how a run is carried out, not what it computes: they may change between two
# attempts.
FREE_SETTINGS = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "max_failures",
    "stop_timeout_s",
    "threads_per_worker",
    "loader_threads",
    "num_workers",
    "min_workers",
    "tables",
    "shard_above_mb",
    "host_state_tables",
    "publish",
    "max_bad_steps",
    "max_loss_ratio",
    "profile_steps",
)
COPY_BYTES = 2**28
SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
# the sections that decide the losses
SETTINGS = ("seed", "split", "tasks", "examples", "features", "model", "train")


@dataclass
class TrainState:
    """Where a run stands. `step` counts optimizer steps from the start of the run, `epoch_step`
    from the epoch's.
    """

    epoch: int = 0
    epoch_step: int = 0
    step: int = 0
    steps_per_epoch: int = 0
    finished: bool = False  # by its last epoch, or early
    seconds: float = 0.0  # spent in training by all attempts together
    loss_sum: list[float] = field(default_factory=list)  # per task, since the last line of metrics
    weight_sum: list[float] = field(default_factory=list)
    bad_steps: int = 0  # left out, since loss or gradient was not finite
    # of the last lines of metrics, newest last
    recent_losses: list[float] = field(default_factory=list)
    high_losses: int = 0  # lines in a row far above the median of those
    best: float | None = None  # of train.best_metric
    best_step: int | None = None
    not_better: int = 0  # validations since

    def advance(self) -> None:
        """One optimizer step further."""
        self.step += 1
        self.epoch, self.epoch_step = divmod(self.step, self.steps_per_epoch)


@dataclass(frozen=True, slots=True)
class Saved:
    """A whole checkpoint on disk; `read_tensors` reads what it holds."""

    folder: Path
    state: TrainState
    identity: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Block:
    """This rank's rows [first, first + len(local)) of a tensor of `num_rows` rows that the ranks
    hold in blocks.

    The last two methods are what DCP's planners ask of an object that is not a plain tensor.
    """

    local: Tensor
    first: int
    num_rows: int

    def size(self) -> torch.Size:
        return torch.Size([self.num_rows, *self.local.shape[1:]])

    def _chunk(self) -> ChunkStorageMetadata:
        begin = torch.Size([self.first, *[0] * (self.local.dim() - 1)])
        return ChunkStorageMetadata(begin, self.local.shape)

    def __create_write_items__(self, name: str, _: object) -> list[WriteItem]:
        if len(self.local) == 0:  # more ranks than rows
            return []
        chunk = self._chunk()
        data = TensorWriteData(chunk, TensorProperties.create_from_tensor(self.local), self.size())
        return [
            WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [self._chunk()] if len(self.local) else []


class _SavePlanner(DefaultSavePlanner):
    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return _local(self.state_dict[index.fqn])


class _LoadPlanner(DefaultLoadPlanner):
    def set_up_planner(
        self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # The default also allocates meta tensors, and on the way throws out what is no tensor.
        self.state_dict, self.metadata, self.is_coordinator = state_dict, metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return _local(self.state_dict[index.fqn])


def _local(tensor: Tensor | Block) -> Tensor:
    return tensor.local if isinstance(tensor, Block) else tensor


def run_identity(cfg: RunConfig, data_digest: str) -> dict[str, Any]:
    """What must not change between the attempts of one run; the number of workers may."""
    settings = to_dict(cfg)
    for name in FREE_SETTINGS:
        settings["train"].pop(name, None)

    chosen = flatten({key: settings[key] for key in SETTINGS})
    return chosen | {"source.actions": list(cfg.source.actions), "sequences": data_digest}


def check_identity(saved: dict[str, Any], wanted: dict[str, Any], name: str) -> None:
    """Hold the identity of a run that goes on against that of the checkpoint.

    A setting that the checkpoint's version did not have stood at its default there.

    Raises:
        UserError: names the first setting that differs.
    """
    defaults = to_dict(RunConfig())
    began = flatten({key: defaults[key] for key in SETTINGS}) | saved
    for key in sorted(saved.keys() | wanted.keys()):
        if began.get(key) != wanted.get(key):
            raise UserError(
                f"run {name!r} began with {key} = {began.get(key)!r} and would go on with "
                f"{wanted.get(key)!r}: choose another name, or --restart to train it anew"
            )


def read_tensors(folder: Path, into: Mapping[str, Tensor | Block]) -> None:
    """Fill tensors and blocks with what the checkpoint holds under their names, each process by
    itself.

    Raises:
        UserError: a name is missing there, or has another shape.
    """
    planner = _LoadPlanner(flatten_state_dict=False)
    try:
        reader = HuggingFaceStorageReader(str(folder))
        with _alone():
            state_dict_loader.load(dict(into), storage_reader=reader, planner=planner, no_dist=True)
    except (CheckpointException, RuntimeError, ValueError) as error:
        # of several ranks' failures the first
        failures = list(getattr(error, "failures", {}).values())
        cause = failures[0][0] if failures else error
        raise UserError(f"the checkpoint at {folder} does not fit this model: {cause}") from error


def copy_tensors(folder: Path, like: Mapping[str, Tensor], path: Path, prefix: str) -> None:
    """What the checkpoint holds under `prefix` and the names of `like`, as one safetensors file of
    whole tensors.

    `like` gives types and shapes, and may be on the meta device: of a tensor larger than
    `COPY_BYTES` only so much is in memory at a time.

    Raises:
        UserError: as `read_tensors`.
    """
    # the widest types first, so that each tensor is aligned to its own
    tensors = dict(sorted(like.items(), key=lambda item: -item[1].itemsize))

    # small ones are read together, large ones in blocks of rows as they are written
    small: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.nbytes <= COPY_BYTES:
            small[name] = torch.empty_like(tensor, device="cpu")
    read_tensors(folder, {prefix + name: tensor for name, tensor in small.items()})

    with path.open("wb") as file:
        file.write(_safetensors_header(tensors))
        for name, tensor in tensors.items():
            blocks = [small[name]] if name in small else _row_blocks(folder, prefix + name, tensor)
            for rows in blocks:
                file.write(rows.contiguous().view(-1).view(torch.uint8).numpy().data)


def _safetensors_header(tensors: Mapping[str, Tensor]) -> bytes:
    """What stands in a safetensors file before the tensors: the length of the header in 8 bytes,
    then where each tensor lies, in JSON, filled up with spaces to a multiple of 8.
    """
    header: dict[str, dict[str, Any]] = {}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": SAFETENSORS[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }

    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _row_blocks(folder: Path, name: str, like: Tensor) -> Iterator[Tensor]:
    """A tensor of the checkpoint in blocks of rows, of at most `COPY_BYTES` each."""
    num_rows = len(like)
    size = max(COPY_BYTES * num_rows // like.nbytes, 1)
    for first in range(0, num_rows, size):
        rows = torch.empty(min(size, num_rows - first), *like.shape[1:], dtype=like.dtype)
        read_tensors(folder, {name: Block(rows, first, num_rows)})
        yield rows


class CheckpointFolder:
    """The checkpoints of a run, `root/step_00000200` and so on: the newest `keep`, and the best.

    Every rank makes one over the same folder and calls its methods together with the others.
    """

    def __init__(self, root: Path, keep: int, rank: int = 0, world_size: int = 1) -> None:
        self.root, self.keep, self.rank, self.world_size = root, keep, rank, world_size

    def folders(self) -> list[Path]:
        """Oldest first; whether they are whole is seen when they are read."""
        return sorted(self.root.glob("step_*"))

    def newest(self) -> Saved | None:
        """The newest whole checkpoint, None where there is none at all; rank 0 looks and tells the
        others.

        Raises:
            UserError: there are checkpoints, and none of them is whole.
        """
        found = self._newest() if self.rank == 0 else None
        if self.world_size > 1:
            told = [str(found.folder) if found else None]
            dist.broadcast_object_list(told, src=0)
            found = _read_state(Path(told[0])) if told[0] else None
        return found

    def _newest(self) -> Saved | None:
        folders = self.folders()
        for folder in reversed(folders):
            try:
                return self.read(folder)
            except UserError as error:
                logger.error("skipped: %s", error)
        if folders:
            raise UserError(
                f"none of the {len(folders)} checkpoints under {self.root} is whole: --restart "
                "trains anew"
            )
        return None

    def at(self, step: int) -> Path:
        return self.root / f"step_{step:08d}"

    def read(self, folder: Path) -> Saved:
        """Raises UserError where the checkpoint is missing, half-written or corrupted."""
        verified(folder, "checkpoint")
        return _read_state(folder)

    def save(
        self, tensors: Mapping[str, Tensor | Block], state: TrainState, identity: dict[str, Any]
    ) -> None:
        """Write a checkpoint, from every rank what it holds; when this returns, it is there and
        whole.

        All of it lies in a folder of another name until the last digest is written, so a run that
        is killed meanwhile leaves nothing that could be taken for a checkpoint.
        """
        place = self.at(state.step)
        stage = place.with_name(f".{place.name}.partial")
        if self.rank == 0:
            self._sweep()
            stage.mkdir(parents=True)
        self._wait()

        # every rank its own tensors, and their digests
        writer = HuggingFaceStorageWriter(str(stage), save_distributed=True)
        planner = _SavePlanner(flatten_state_dict=False)
        alone = self.world_size == 1
        with _alone():
            state_dict_saver.save(
                dict(tensors), storage_writer=writer, planner=planner, no_dist=alone
            )
        own_files = stage.glob(f"shard-{self.rank + 1:05d}-*")
        digests = self._gathered({path.name: sha256_of(path) for path in own_files})

        # rank 0 the rest, the digests of all last
        if self.rank == 0:
            text = json.dumps({"state": asdict(state), "identity": identity}, indent=2)
            (stage / "state.json").write_text(text)
            index = {"files": digests | {"state.json": sha256_of(stage / "state.json")}}
            (stage / INDEX).write_text(json.dumps(index, indent=2))
            # a folder of that name is corrupted: else the run would have gone on from it
            publish_folder(stage, place)
            self._retire(state.best_step)
        self._wait()

    def _sweep(self) -> None:
        """Remove what killed attempts have left half-written."""
        for left in self.root.glob(".step_*.partial*"):
            shutil.rmtree(left)

    def _retire(self, best_step: int | None) -> None:
        """Remove all but the newest `keep` and the best."""
        best = None if best_step is None else self.at(best_step)
        for folder in self.folders()[: -self.keep]:
            if folder != best:
                shutil.rmtree(folder)

    def _wait(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def _gathered(self, digests: dict[str, str]) -> dict[str, str]:
        """The digests of all ranks, on each of them."""
        if self.world_size == 1:
            return digests

        parts: list[dict[str, str]] = [{}] * self.world_size
        dist.all_gather_object(parts, digests)
        everybodys: dict[str, str] = {}
        for part in parts:
            everybodys |= part
        return everybodys


@contextmanager
def _alone() -> Iterator[None]:
    """DCP warns in a process that asked it to work by itself."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        yield


def _read_state(folder: Path) -> Saved:
    saved = json.loads((folder / "state.json").read_text())
    try:
        return Saved(folder, TrainState(**saved["state"]), saved["identity"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"the checkpoint at {folder} was saved by another version of this project: {error}"
        ) from None


@contextmanager
def only_writer(folder: Path, timeout_s: float = 120) -> Iterator[None]:
    """Keep every other process out of a run's training folder for the length of the block.

    The workers of a killed driver live on for some seconds: whoever resumes the run waits for their
    end.

    Raises:
        UserError: another process is still there after `timeout_s`.
    """
    with open(folder / ".lock", "w") as lock:
        until = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > until:
                    raise UserError(
                        f"another process is training the run at {folder}: wait for it, or end it"
                    ) from None
                time.sleep(0.2)
        yield
