"""A trained model as a folder: what the registry holds and the server loads. Nothing in it is
unpickled.

    model.safetensors, config.json, features.json, features.safetensors, artifact.json (sha256 of
    the others)

`metrics.json` joins them when the model is evaluated. The folder is staged beside its place and
renamed, so that a reader finds a whole model or none.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pipeline.batches.features import FeatureMaps
from pipeline.config import ConfigError, RunConfig, UserError, from_dict, to_dict
from pipeline.files import folder_digests, sha256_of, staged_folder
from pipeline.model.ranker import RankingModel

INDEX = "artifact.json"


@dataclass(frozen=True, slots=True)
class LoadedModel:
    model: RankingModel
    cfg: RunConfig
    maps: FeatureMaps
    extra: dict  # what training wrote about itself


def save_model(
    folder: Path, model: RankingModel, cfg: RunConfig, maps: FeatureMaps, extra: dict
) -> None:
    """Publish the model at `folder`, in the place of whatever model was there."""
    publish_model(folder, lambda path: save_file(model.state_dict(), path), cfg, maps, extra)


def publish_model(
    folder: Path,
    write_weights: Callable[[Path], None],
    cfg: RunConfig,
    maps: FeatureMaps,
    extra: dict,
) -> None:
    """The same for weights that are not a model in memory: `write_weights` makes the safetensors
    file at its path.
    """
    with staged_folder(folder) as stage:
        write_weights(stage / "model.safetensors")
        (stage / "config.json").write_text(json.dumps(to_dict(cfg), indent=2))
        maps.frozen().save(stage)
        index = {"files": folder_digests(stage), "extra": extra}
        (stage / INDEX).write_text(json.dumps(index, indent=2))


def load_model(folder: Path, device: str = "cpu") -> LoadedModel:
    """The model at `folder`, in evaluation mode and frozen, so that kernels may keep forms of its
    weights.

    Raises:
        UserError: there is none, or a file is missing or not what was saved.
    """
    extra = verified(folder, "model")["extra"]
    try:
        cfg = from_dict(json.loads((folder / "config.json").read_text()))
        maps = FeatureMaps.load(folder)
        model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates)
        model.load_state_dict(load_file(folder / "model.safetensors"))
    except (ConfigError, SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise UserError(
            f"the model at {folder} was saved by another version of this project: {error}"
        ) from error
    return LoadedModel(model.to(device).eval().requires_grad_(False), cfg, maps, extra)


def verified(folder: Path, what: str) -> dict:
    """The index of a folder that was staged with one, its files held against their digests.

    Raises:
        UserError: no such folder, no index in it, or a file that is missing or altered.
    """
    if not folder.is_dir():
        advice = ": run jobs.train first" if what == "model" else ""
        raise UserError(f"no {what} at {folder}{advice}")
    try:
        index = json.loads((folder / INDEX).read_text())
        expected = index["files"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise UserError(
            f"the {what} at {folder} is half-written: {INDEX} is missing or broken"
        ) from None
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            raise UserError(
                f"the {what} at {folder} is corrupted: {name} is missing or not what was saved"
            )
    return index
