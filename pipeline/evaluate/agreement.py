"""Whose numbers an evaluation makes: what must agree with the model, and what must not change
between two evaluations of it.

`metrics.json` beside the weights is what the gate reads. It is of one kind of rows and settings,
those that `evaluation.json` beside it names; any other evaluation has a name of its own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.config import (
    EvaluateConfig,
    SplitConfig,
    UserError,
    flatten,
    to_dict,
)
from pipeline.model.artifact import LoadedModel
from pipeline.sequences.store import Manifest

RECORD = "evaluation.json"  # beside metrics.json: the rows and settings that it is of


def refuse_other_labels(
    loaded: LoadedModel, tasks: Sequence[str], actions: Sequence[str], manifest: Manifest
) -> None:
    """Refuse `tasks` and `source.actions` under which the model's scores would meet other labels.

    Raises:
        UserError: names what differs, the model's value and the given one.
    """
    model = loaded.cfg
    pairs = {
        "tasks": (model.tasks, tasks),
        "source.actions": (model.source.actions, actions),
        "the sequences' actions": (model.source.actions, manifest.actions),
    }
    for name, (ours, given) in pairs.items():
        if tuple(ours) != tuple(given):
            raise UserError(
                f"{name}: the model was trained with {list(ours)}, got {list(given)}; labels are "
                "read in the model's order, so evaluate it under the settings it was trained with"
            )


def rows_and_settings(split: SplitConfig, cfg: EvaluateConfig, digest: str) -> dict[str, Any]:
    """What decides an evaluation's numbers, beside the model: the sequences, by their digest, the
    periods and the number formats.
    """
    chosen = flatten({"split": to_dict(split)}) | {"sequences": digest}
    chosen["evaluate.precision"] = cfg.precision
    chosen["evaluate.int4_tables"] = cfg.int4_tables
    return chosen


def find_differences(given: Mapping[str, Any], loaded: LoadedModel, model_dir: Path) -> str:
    """What sets an evaluation of the `given` rows and settings apart from the model's own, in
    words; "" where it is that one.

    The model's own is of the sequences and the split of its training, in the number formats of its
    first evaluation.
    """
    trained_on = loaded.extra.get("sequences", given["sequences"])
    own = rows_and_settings(loaded.cfg.split, loaded.cfg.evaluate, trained_on)
    for key in ("evaluate.precision", "evaluate.int4_tables"):
        own[key] = given[key]
    own |= read_record(model_dir).get("of", {})

    lines = []
    for key, value in given.items():
        if value != own.get(key):
            lines.append(f"{key} is {own.get(key)!r} of the model and {value!r} here")
    return "; ".join(lines)


def read_record(model_dir: Path) -> Mapping[str, Any]:
    """What `evaluation.json` holds; nothing before the first evaluation."""
    try:
        return json.loads((model_dir / RECORD).read_text())
    except FileNotFoundError:
        return {}
