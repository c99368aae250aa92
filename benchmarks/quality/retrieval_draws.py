"""The settings that the retrieval of KuaiRand is chosen from, and the choice by validation."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.figures import Figures, read_runs

ID_DROPOUT, DROPOUT = "features.item_id_dropout=", "model.dropout="
TEMPERATURE = "retrieval.temperature="
LR, EMBEDDING_LR = "train.lr=", "train.embedding_lr="
LAYERS = "model.num_layers="
DRAWS: tuple[tuple[str, ...], ...] = (
    (),  # ids .5, dropout .05, temperature .05, rates .002 and .008, two layers
    (ID_DROPOUT + "0.1",),
    (ID_DROPOUT + "0.1", DROPOUT + "0.2"),
    (ID_DROPOUT + "0.2", DROPOUT + "0.1"),
    (ID_DROPOUT + "0.3", DROPOUT + "0.2"),
    (ID_DROPOUT + "0.2", DROPOUT + "0.2", TEMPERATURE + "0.07"),
    (ID_DROPOUT + "0.3", DROPOUT + "0.1", TEMPERATURE + "0.07"),
    (ID_DROPOUT + "0.2", DROPOUT + "0.2", EMBEDDING_LR + "4e-3"),
    (ID_DROPOUT + "0.2", DROPOUT + "0.1", LR + "1e-3", EMBEDDING_LR + "4e-3"),
    (ID_DROPOUT + "0.1", DROPOUT + "0.1", LAYERS + "4"),
    (ID_DROPOUT + "0.3", DROPOUT + "0.2", LAYERS + "4"),
    (ID_DROPOUT + "0.2", DROPOUT + "0.2", EMBEDDING_LR + "4e-3", LAYERS + "4"),
)
NUM_FINALISTS = 2  # draws of an encoder that get the second seed
SEEDS = (0, 1)

# by draw: seed → NDCG@10 of the validation period at the best epoch
Tried = dict[tuple[str, ...], dict[int, float]]


def tried_draws(runs: Sequence[Figures], name: str) -> Tried:
    """What has been trained of an encoder, in the order of `DRAWS`."""
    found: Tried = {}
    for draw in DRAWS:
        for run in runs:
            if run["name"] == name and draw == draw_of(run) and run["seed"] in SEEDS:
                best = max(run["validation"].values())
                found.setdefault(draw, {})[run["seed"]] = best
    return found


def draw_of(run: Figures) -> tuple[str, ...]:
    """The settings of a run that are its draw's."""
    keys = (ID_DROPOUT, DROPOUT, TEMPERATURE, LR, EMBEDDING_LR, LAYERS)
    return tuple(part for part in run["set"] if part.startswith(keys))


def finalists(tried: Tried) -> list[tuple[str, ...]]:
    """The draws with the best values of the first seed, best first."""
    begun = [draw for draw, values in tried.items() if SEEDS[0] in values]
    return sorted(begun, key=lambda draw: -tried[draw][SEEDS[0]])[:NUM_FINALISTS]


def chosen_draw(tried: Tried) -> tuple[str, ...]:
    """Of the draws with the most seeds the one with the best mean."""
    most = max(len(values) for values in tried.values())
    complete = [draw for draw, values in tried.items() if len(values) == most]
    return max(complete, key=lambda draw: np.mean(list(tried[draw].values())))


def read_choice(path: Path, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """The settings chosen for each encoder."""
    runs = read_runs(path)
    return {name: chosen_draw(tried_draws(runs, name)) for name in names}
