"""Metrics of retrieval's baselines, kept beside the sequences: they are the same for every model.

    <sequences>/baselines/val-<digest>.json     what they are of, and the metrics of one period

The digest is of all that decides them: the sequences, the periods, the items that training knew and
how often each was taken, what counts as taken, and the settings of the lists. A build of other
sequences removes the files; one that is missing is made again.
"""

import hashlib
import json
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import EvaluateConfig, SplitConfig, to_dict
from pipeline.files import json_text, write_atomically
from pipeline.model.artifact import LoadedModel

FOLDER = "baselines"
FORM = 1  # to be raised when other code gives other metrics

logger = logging.getLogger(__name__)


def baseline_facts(
    digest: str, split: SplitConfig, cfg: EvaluateConfig, loaded: LoadedModel
) -> dict[str, Any]:
    """All that decides the metrics of the baselines, as JSON has it.

    Args:
        digest: of the sequences.
        split, cfg: of the evaluation; all else is the model's own.
    """
    model, maps = loaded.cfg, loaded.maps
    return {
        "form": FORM,
        "sequences": digest,
        "split": to_dict(split),
        "train_end_ms": model.split.train_end_ms,
        "actions": list(model.source.actions),
        "positives": list(model.retrieval.positives),
        "items": _digest_of(maps.item_ids),
        "taken": _digest_of(maps.next_count),
        "retrieval_protocol": cfg.retrieval_protocol,
        "remove_seen": cfg.remove_seen,
        "cutoffs": list(cfg.cutoffs),
    }


def _digest_of(numbers: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(numbers).tobytes()).hexdigest()


def read_baselines(sequence_dir: Path, split: str, facts: dict[str, Any]) -> dict[str, float]:
    """Metrics by name, such as `popularity/hr_10`; empty where none are kept."""
    path = _path(sequence_dir, split, facts)
    try:
        kept = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, json.JSONDecodeError) as error:
        logger.warning("%s cannot be read and is made again: %s", path, error)
        return {}
    metrics = kept["metrics"]
    return {name: math.nan if value is None else value for name, value in metrics.items()}


def keep_baselines(
    sequence_dir: Path, split: str, facts: dict[str, Any], metrics: dict[str, float]
) -> None:
    """Keep the metrics; where the sequences cannot be written to, the next evaluation has none."""
    path = _path(sequence_dir, split, facts)
    try:
        path.parent.mkdir(exist_ok=True)
        write_atomically(path, json_text({"of": facts, "metrics": metrics}))
    except OSError as error:
        logger.warning("the metrics of the baselines are not kept: %s", error)


def _path(sequence_dir: Path, split: str, facts: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return sequence_dir / FOLDER / f"{split}-{digest[:16]}.json"
