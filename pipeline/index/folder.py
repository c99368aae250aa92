"""The index as a folder inside its model's: built when the version is registered, loaded with it.

    model/index/
      catalogue.parquet      ids, popularity, columns for filters
      vectors.safetensors    items' vectors, where the model has a retrieval head
      lists.faiss            inverted lists, beyond index.ivf_above
      new_items.safetensors  items that came after training: ids and codes of their columns
      artifact.json          sha256 of the others, and of the model that it belongs to

A model that is promoted changes all vectors, so an index serves its own model and no other.
"""

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file as save_arrays
from safetensors.torch import load_file, save_file
from torch import Tensor

from pipeline.batches.features import FeatureMaps
from pipeline.batches.stored import StoredUsers
from pipeline.config import IndexConfig, UserError, to_dict
from pipeline.config.reading import build_section
from pipeline.files import folder_digests, sha256_of, staged_folder
from pipeline.index import ivf, towers
from pipeline.index.catalogue import ITEM_ID, RECENCY, Catalogue, make_table
from pipeline.index.exact import ExactIndex, VectorIndex
from pipeline.index.histories import history_before
from pipeline.index.popularity import count_items
from pipeline.model.artifact import INDEX as DIGESTS
from pipeline.model.artifact import LoadedModel, load_model, verified
from pipeline.model.retrieval import RetrievalHead
from pipeline.sequences import store
from pipeline.sequences.dictionary import own_ids

logger = logging.getLogger(__name__)

FOLDER = "index"  # inside the model's
CATALOGUE, VECTORS, LISTS = "catalogue.parquet", "vectors.safetensors", "lists.faiss"
NEW_ITEMS = "new_items.safetensors"
RECALL_USERS, RECALL_ITEMS = 256, 100


@dataclass(frozen=True, slots=True)
class LoadedIndex:
    """What can be recommended by one model."""

    catalogue: Catalogue
    vectors: VectorIndex | None  # None: the model has no retrieval head
    # share of the 100 best items that a search finds, of a sample of users
    recall: float
    version: str  # digest of the folder's files
    settings: IndexConfig  # with which it was built

    @property
    def kind(self) -> str:
        """How vectors are searched: exact, ivf, or none."""
        if self.vectors is None:
            return "none"
        return "exact" if isinstance(self.vectors, ExactIndex) else "ivf"

    def describe(self) -> dict[str, Any]:
        """Facts for people, as `GET /v1/model` and logs say them."""
        dim = 0 if self.vectors is None else self.vectors.vectors.shape[1]
        return {
            "version": self.version,
            "items": len(self.catalogue),
            "columns": {name: column.kind for name, column in self.catalogue.columns.items()},
            "search": self.kind,
            "dimensions": dim,
            "recall": self.recall,
        }


def build_index(cfg: IndexConfig, stored: StoredUsers, end_ms: int, model_dir: Path) -> Path:
    """Build the index of the model at `model_dir` from the sequences that it was trained on, whose
    training rows are those before `end_ms` (ms UTC); returns its folder.

    Items are those that the model's feature maps know, of the training rows and of the item table,
    and those that the item table has had since: known by their columns and the unknown id. One of
    the same model, sequences and settings that is there already stays.

    Raises:
        UserError: no whole model or no sequences, a configured column is missing, or the package
            for inverted lists is.
    """
    folder = model_dir / FOLDER
    manifest = stored.read_manifest()
    facts = {
        "model": sha256_of(model_dir / DIGESTS),
        "sequences": manifest.digest,
        "settings": to_dict(cfg),
    }
    if _is_built(folder, facts):
        return folder

    loaded = load_model(model_dir)
    items = store.read_side_table(stored.folder, "items")
    maps = _maps_of_today(loaded, items)
    item_ids = np.union1d(maps.item_ids, maps.new_ids)
    if len(item_ids) == 0:
        raise UserError("index.enabled: the training period holds no item to recommend")

    counts = count_items(stored.folder, item_ids, end_ms, stored.source, cfg)
    texts = None
    if ITEM_ID in manifest.text_ids:
        texts = own_ids(stored.folder, manifest, ITEM_ID, item_ids)
    table = make_table(item_ids, counts.popularity, counts.first_seen, items, cfg, texts)
    if cfg.followed is not None and cfg.followed.time_column is not None:
        table = _with_recency(table, cfg.followed.time_column)

    with staged_folder(folder) as stage:
        pq.write_table(table, stage / CATALOGUE)
        head = loaded.model.retrieval
        if head is not None:
            codes = maps.item_codes[maps.item_rows(item_ids)]
            vectors = towers.item_vectors(loaded.model, head, codes).cpu()
            sample = partial(_sample_users, loaded, head, stored, end_ms)
            _write_vectors(stage, vectors, cfg.ivf_above, sample)
        if len(maps.new_ids):
            _write_new_items(stage, loaded.maps, maps)
        digests = {"files": folder_digests(stage), "extra": facts}
        (stage / DIGESTS).write_text(json.dumps(digests, indent=2))
    return folder


def _is_built(folder: Path, facts: dict[str, Any]) -> bool:
    """Tell whether a whole index of these facts is at `folder`."""
    try:
        return verified(folder, "index")["extra"] == facts
    except UserError:  # none, or half of one: it is built anew
        return False


def _with_recency(table: pa.Table, name: str) -> pa.Table:
    """The table with the item table's own time in the place of the first row's; null is oldest."""
    catalogue = Catalogue(table)
    column = catalogue.columns[name]
    if column.kind not in ("integer", "number"):
        raise UserError(f"index.followed.time_column: {name!r} holds no numbers and no times")

    recency = np.where(column.known, column.values, -np.inf).astype(np.float64)
    place = table.column_names.index(RECENCY)
    return table.set_column(place, RECENCY, pa.array(recency))


def _maps_of_today(loaded: LoadedModel, items: pa.Table | None) -> FeatureMaps:
    """The model's maps with the items that came since its training."""
    if items is None:
        return loaded.maps
    try:
        return loaded.maps.with_new_items(items, loaded.cfg.features)
    except UserError as error:
        logger.warning("the index has no items that came after training: %s", error)
        return loaded.maps


def _write_new_items(stage: Path, trained: FeatureMaps, today: FeatureMaps) -> None:
    num_trained = len(trained.item_codes)
    tensors = {"ids": today.new_ids, "codes": today.item_codes[num_trained:]}
    if len(today.item_duration_ms):
        tensors["durations"] = today.item_duration_ms[num_trained:]
    packed = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
    save_arrays(packed, stage / NEW_ITEMS)


def _write_vectors(
    stage: Path, vectors: Tensor, ivf_above: int | None, sample: Callable[[], Tensor]
) -> None:
    """Write the items' vectors, float32 [N, d]; beyond `ivf_above` of them with inverted lists and
    the vectors of a `sample` of users.
    """
    if not bool(torch.isfinite(vectors).all()):
        raise UserError("the model's item vectors are not all finite: it cannot be indexed")

    tensors = {"items": vectors}
    if ivf_above is not None and len(vectors) > ivf_above:
        ivf.write_lists(vectors.numpy(), stage / LISTS)
        # users for whom the search is held against the exact one at each load
        tensors["users"] = sample()
    save_file(tensors, stage / VECTORS)


def _sample_users(
    loaded: LoadedModel, head: RetrievalHead, stored: StoredUsers, end_ms: int
) -> Tensor:
    """Vectors of up to `RECALL_USERS` users as of `end_ms`, the end of the training period."""
    parts: list[Tensor] = []
    for users in stored.by_bucket(most_users=RECALL_USERS):
        times = np.full(len(users.user_id), end_ms)
        history = history_before(users, times).events
        batch = towers.history_batch(history, users.user_id, loaded.maps, loaded.cfg.inputs)
        parts.append(towers.user_vectors(loaded.model, head, batch).cpu())
    return torch.cat(parts)


def load_indexed(model_dir: Path, device: str = "cpu") -> tuple[LoadedModel, LoadedIndex | None]:
    """The model at `model_dir` and its index, None where it has none.

    The model's feature maps know the items of the index that came after training.

    Raises:
        UserError: as of `load_model` and `load_index`.
    """
    loaded = load_model(model_dir, device)
    index = load_index(loaded, model_dir)
    path = model_dir / FOLDER / NEW_ITEMS
    if index is None or not path.exists():
        return loaded, index

    arrays, maps = load_arrays(path), loaded.maps
    durations = maps.item_duration_ms
    if "durations" in arrays:
        durations = np.concatenate([durations, arrays["durations"]])
    maps = replace(
        maps,
        new_ids=arrays["ids"],
        item_codes=np.concatenate([maps.item_codes, arrays["codes"]]),
        item_duration_ms=durations,
    )
    return replace(loaded, maps=maps), index


def load_index(loaded: LoadedModel, model_dir: Path) -> LoadedIndex | None:
    """The index in `model_dir`, on the device of its model; None where the version has none.

    Raises:
        UserError: it is cut off or altered, or another model's.
    """
    folder = model_dir / FOLDER
    if not folder.exists():
        return None

    extra = verified(folder, "index")["extra"]
    if extra.get("model") != sha256_of(model_dir / DIGESTS):
        raise UserError(
            f"the index at {folder} belongs to another model: build it anew (jobs.promote)"
        )

    settings = build_section(IndexConfig, extra["settings"], "index")
    catalogue = Catalogue(pq.read_table(folder / CATALOGUE))
    vectors, recall = None, 1.0
    if (folder / VECTORS).exists():
        vectors, recall = _load_vectors(folder, loaded, settings)
    return LoadedIndex(catalogue, vectors, recall, sha256_of(folder / DIGESTS)[:16], settings)


def _load_vectors(
    folder: Path, loaded: LoadedModel, settings: IndexConfig
) -> tuple[VectorIndex, float]:
    device = next(loaded.model.parameters()).device
    tensors = load_file(folder / VECTORS)
    vectors = tensors["items"].to(device)
    path = folder / LISTS
    if not path.exists():
        return ExactIndex(vectors), 1.0

    assert settings.ivf_above is not None, "the lists were written by that setting"
    index = ivf.ListIndex(vectors, path, settings.ivf_probes, settings.ivf_above)
    return index, ivf.measure_recall(index, tensors["users"].to(device), RECALL_ITEMS)
