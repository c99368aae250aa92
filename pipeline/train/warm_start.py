"""A training that begins with the weights of a model that is there, the champion above all.

    model folder, its feature maps ┐
    feature maps of this training  ┴→ for each embedding row the row it begins with → `Trainee`

Dense weights are taken as they are. Rows of an embedding table go by id: the vocabularies of two
trainings differ, since each has the ids of its own period. An id that the model did not know begins
where the model has all it does not know, in row 0.

Where the checkpoint that the model came from is there too, the optimizer's moments go on.
"""

import json
import logging
import shutil
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from pipeline import config
from pipeline.batches.features import FeatureMaps, first_code
from pipeline.config import FeatureConfig, RunConfig, TrainConfig, UserError
from pipeline.files import sha256_of, write_atomically
from pipeline.model.artifact import INDEX, verified
from pipeline.sequences import store
from pipeline.train.checkpoint import CheckpointFolder, read_tensors
from pipeline.train.trainee import Trainee

logger = logging.getLogger(__name__)

NOTE = "warm_start.json"  # in the training folder: what the run began with, for later attempts
# sections that must agree: columns of codes, bits of actions, shapes
FITTING = ("tasks", "features", "model", "retrieval")
# of these, what the loss alone reads: the second stage of LARES has others than the first
OF_THE_LOSS = {
    "retrieval.loss",
    "retrieval.label_smoothing",
    "retrieval.align_trajectories",
    "retrieval.align_steps",
    "retrieval.align_temperature",
    "retrieval.reinforce",
    "retrieval.reinforce_passes",
    "retrieval.reinforce_kl",
}
COPY_ROWS = 2**18  # of a table, read at a time


@dataclass(frozen=True, slots=True)
class WarmStart:
    """What a training begins with."""

    model: str  # folder
    digest: str  # sha256 of its index
    targets_since: str  # of this training: the end of the model's, unless the settings say
    checkpoint: str | None = None  # folder of the checkpoint it came from, where that is there

    def save(self, folder: Path) -> None:
        write_atomically(folder / NOTE, json.dumps(asdict(self), indent=2))


def earlier_start(folder: Path) -> WarmStart | None:
    """What the run with this training folder began with; None for random weights."""
    note = folder / NOTE
    return WarmStart(**json.loads(note.read_text())) if note.exists() else None


def start_from(cfg: RunConfig, model: Path) -> WarmStart:
    """A start of the training `cfg` with the model in a folder.

    Raises:
        UserError: the model has other columns, tasks or layers, or no row has joined the training
        period since its own ended.
    """
    verified(model, "model")
    began = config.from_dict(json.loads((model / "config.json").read_text()))
    _refuse_other_shape(config.to_dict(cfg), config.to_dict(began))
    columns = store.read_manifest(cfg.sequence_dir).events
    FeatureMaps.load(model).refuse_other_ids(columns, cfg.sequence_dir)

    since_ms, end_ms = cfg.train.since_ms or began.split.train_end_ms, cfg.split.train_end_ms
    since = datetime.fromtimestamp(since_ms / 1000, UTC).isoformat()
    if since_ms >= end_ms and cfg.train.replay_share < 1:
        end = datetime.fromtimestamp(end_ms / 1000, UTC).isoformat()
        raise UserError(
            f"train.init: the training period ends at {end}, and the champion has learned all rows "
            f"before {since}: move split.t_val on, or set train.replay_share to 1 to train on all "
            "of them again"
        )
    return WarmStart(str(model), sha256_of(model / INDEX), since)


def _refuse_other_shape(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Hold the settings of a run, as `to_dict` gives them, against those of the champion's."""
    actions = ours["source"]["actions"], theirs["source"]["actions"]
    pairs: dict[str, tuple[Any, Any]] = {"source.actions": actions}
    for section in FITTING:
        here = config.flatten({section: ours[section]})
        there = config.flatten({section: theirs[section]})
        for key in (here.keys() | there.keys()) - OF_THE_LOSS:
            pairs[key] = here.get(key), there.get(key)

    for key, (here, there) in sorted(pairs.items()):
        if here != there:
            raise UserError(
                f"train.init: the champion has {key} = {there!r}, this run {here!r}: train anew "
                "(train.init=random)"
            )


def prepare_start(cfg: RunConfig, model: Path | None, *, restart: bool) -> WarmStart | None:
    """Note what the training `cfg` begins with, before its first step; None for random weights.

    An attempt that goes on keeps the start of the first. With `restart` the earlier training is
    removed; where the model came from it, it is kept aside until this one is complete, for the
    optimizer's moments.

    Raises:
        UserError: as `start_from`.
    """
    folder = cfg.train_dir
    if not restart and folder.exists():
        earlier = earlier_start(folder)
        if earlier is not None or CheckpointFolder(folder / "checkpoints", keep=1).folders():
            return earlier

    start = None
    if model is not None:
        start = start_from(cfg, model)
        if own_checkpoint(folder, model) is not None:
            shutil.rmtree(aside(cfg.run_dir), ignore_errors=True)
            folder.rename(aside(cfg.run_dir))
        kept = own_checkpoint(aside(cfg.run_dir), model)
        start = replace(start, checkpoint=None if kept is None else str(kept))

    if restart:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    if start is not None:
        start.save(folder)
    return start


def aside(run_dir: Path) -> Path:
    """Where the training before waits until this one is complete."""
    return run_dir / "train_before"


def with_start(train: TrainConfig, start: WarmStart | None) -> TrainConfig:
    """The settings of a training that begins so: the time from which rows are new, its own number
    of passes, and a warm-up that fits however few steps a day has.
    """
    if start is None:
        return train
    return replace(
        train,
        targets_since=start.targets_since,
        epochs=train.champion_epochs,
        warmup_steps=None,
    )


def own_checkpoint(folder: Path, model: Path) -> Path | None:
    """The checkpoint in a training folder that `model` was published from, None where it was from
    another.
    """
    facts = verified(model, "model")["extra"]
    checkpoints = CheckpointFolder(folder / "checkpoints", keep=1)
    place = checkpoints.at(facts.get("steps", 0))
    try:
        saved = checkpoints.read(place)
    except UserError:
        return None
    return place if saved.identity["sequences"] == facts.get("sequences") else None


def load_start(trainee: Trainee, start: WarmStart, maps: FeatureMaps, cfg: FeatureConfig) -> None:
    """Set the weights of `trainee`, and its optimizers' moments where they are to be had.

    Raises:
        UserError: a weight that the model has not, or has in another shape.
    """
    old = FeatureMaps.load(Path(start.model))
    rows = match_vocabularies(old, maps, cfg)
    by_path = {path: name for name, path in trainee.table_paths.items()}

    with safe_open(Path(start.model) / "model.safetensors", "pt") as weights:
        there = set(weights.keys())
        for path, tensor in trainee.model.state_dict().items():
            if path not in there:
                raise UserError(f"train.init: the champion has no weight {path}")
            mapped = rows.get(by_path.get(path, ""))
            if mapped is not None:
                block = trainee.blocks.get(path)
                first = 0 if block is None else block.first_row
                _copy_rows(weights.get_slice(path), mapped[first : first + len(tensor)], tensor)
                continue

            value = weights.get_tensor(path)
            if value.shape != tensor.shape:
                raise UserError(
                    f"train.init: the champion's {path} is {tuple(value.shape)}, this run's "
                    f"{tuple(tensor.shape)}"
                )
            tensor.copy_(value)

    if start.checkpoint is not None:
        _load_moments(trainee, Path(start.checkpoint), old, rows, by_path)


def _copy_rows(source, rows: np.ndarray, into: torch.Tensor) -> None:
    """Rows of a stored table, by number, a piece of the table at a time: ids are in order, so that
    near rows are near there.
    """
    for begin in range(0, len(rows), COPY_ROWS):
        wanted = rows[begin : begin + COPY_ROWS]
        known = wanted[wanted > 0]
        piece = into[begin : begin + len(wanted)]
        piece.copy_(source[0:1].expand(len(wanted), -1))
        if len(known) > 0:
            low, high = int(known.min()), int(known.max())
            block = source[low : high + 1][torch.from_numpy(known - low)]
            piece[torch.from_numpy(wanted > 0)] = block.to(piece)


def _load_moments(
    trainee: Trainee,
    checkpoint: Path,
    old: FeatureMaps,
    rows: dict[str, np.ndarray],
    by_path: dict[str, str],
) -> None:
    """Moments of the dense weights, and of the tables that this rank holds whole."""
    found = trainee.tensors()
    dense = {name: found[name] for name in found if name.startswith("adamw.")}
    tables: dict[str, torch.Tensor] = {}
    for name, moment in trainee.rowwise.state_dict().items():
        path = name[2:]  # after "m." or "v."
        if path not in trainee.blocks:
            size = old.vocab_sizes.get(by_path[path], len(moment))
            tables[f"rowwise.{name}"] = torch.zeros(size, *moment.shape[1:], dtype=moment.dtype)

    try:
        read_tensors(checkpoint, dense | tables)
    except UserError as error:
        logger.info("the optimizer's moments begin anew: %s", error)
        return

    for name, value in tables.items():
        kind, path = name.removeprefix("rowwise.").split(".", 1)
        moment = (trainee.rowwise.m if kind == "m" else trainee.rowwise.v)[path]
        mapped = rows.get(by_path[path])
        if mapped is None:
            moment.copy_(value)
            continue
        value[0] = 0  # an id that is new has none
        moment.copy_(value[torch.from_numpy(mapped)])
    state = json.loads((checkpoint / "state.json").read_text())["state"]
    trainee.rowwise.step_count = state["step"]


def match_vocabularies(
    old: FeatureMaps, new: FeatureMaps, features: FeatureConfig
) -> dict[str, np.ndarray]:
    """For each table of `FeatureMaps` and each of its new rows the old row, int64, 0 where the old
    vocabulary has none.

        item ids, old    7 9 12         codes 1 2 3
        item ids, new    5 9 12 20      codes 1 2 3 4
        item_id          [0, 0, 2, 3, 0]

    The codes of a side column are known by the items or users that have them: a new code is the old
    one that most of these had.
    """
    shared_items = np.intersect1d(old.item_ids, new.item_ids)
    shared_users = np.intersect1d(old.user_ids, new.user_ids)
    old_items = old.item_codes[old.item_rows(shared_items)]
    new_items = new.item_codes[new.item_rows(shared_items)]
    old_users = old.user_codes[old.user_rows(shared_users)]
    new_users = new.user_codes[new.user_rows(shared_users)]

    found = {"item_id": _match_codes(old_items[:, 0], new_items[:, 0], new.vocab_sizes["item_id"])}
    sides = (
        ("item", features.item, old_items[:, 1:], new_items[:, 1:]),
        ("user", features.user, old_users, new_users),
    )
    for side, columns, before, after in sides:
        for name, column in columns.items():
            place = first_code(columns, name)
            own = slice(place, place + column.num_codes)
            size = new.vocab_sizes[f"{side}.{name}"]
            pairs = before[:, own].ravel(), after[:, own].ravel()
            found[f"{side}.{name}"] = _match_codes(*pairs, size)

    for name, values in new.request_values.items():
        codes = old.request_codes(
            {name: values} | dict.fromkeys(old.request_values, values), len(values)
        )
        place = list(old.request_values).index(name)
        found[f"request.{name}"] = np.concatenate([[0], codes[:, place]]).astype(np.int64)
    return found


def _match_codes(old: np.ndarray, new: np.ndarray, num_codes: int) -> np.ndarray:
    """int64 [num_codes]: the old code that most rows with a new code have, 0 for a code of none.

    old    1 1 2 3
    new    1 1 1 4      num_codes = 5
    found  [0, 1, 0, 0, 3]
    """
    pairs, counts = np.unique(np.stack([new, old], axis=1), axis=0, return_counts=True)
    found = np.zeros(num_codes, np.int64)
    # the most frequent pair of a new code last: of an index that repeats the last value stays
    order = np.lexsort((-pairs[:, 1], counts))
    found[pairs[order, 0]] = pairs[order, 1]
    found[0] = 0
    return found
