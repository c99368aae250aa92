"""Quality and calibration of a split by kind of row: where a mean over all rows hides something.

    predictions + what is known of users and items → one line per slice and task

| by | slices |
|---|---|
| user | new (no row in the training period), known |
| history | rows of the user before the request |
| popularity | rows of the item in the training period |
| hour | of the day, at `features.hour_utc_offset` |

NE is over the entropy of the slice's own rate, so slices of different rates compare. Calibration is
the mean score over the rate of positives: 1.1 promises a tenth too much.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.evaluate.item_rates import ItemCounts
from pipeline.evaluate.metrics import auc, normalised_entropy
from pipeline.files import json_text, write_atomically

MS_PER_HOUR = 3_600_000
HISTORY_EDGES = (1, 10, 50, 200, 1000)
POPULARITY_EDGES = (1, 10, 100, 1000)
SLICES = "slices.json"  # beside the weights: the lines of each split


@dataclass(frozen=True, slots=True)
class Slice:
    """One line: the rows of a task with a known label that fall into a slice."""

    by: str
    slice: str
    task: str
    rows: int
    positives: int
    ne: float
    auc: float
    mean_score: float
    calibration: float  # mean score over the rate of positives; NaN without a positive


def slice_lines(
    predictions: pa.Table, counts: ItemCounts, tasks: Sequence[str], hour_utc_offset: float
) -> list[Slice]:
    """The lines of a split, by kind, slice and task; a slice without a row has none."""
    lines = []
    for by, names, number in _kinds(predictions, counts, hour_utc_offset):
        for place, name in enumerate(names):
            inside = number == place
            if not inside.any():
                continue
            rows = predictions.filter(pa.array(inside))
            for task in tasks:
                lines.append(_line(by, name, task, rows))
    return lines


def _kinds(
    predictions: pa.Table, counts: ItemCounts, hour_utc_offset: float
) -> Iterator[tuple[str, list[str], np.ndarray]]:
    """Each kind with the names of its slices and the slice of each row, int64 [n]."""
    is_new = predictions["user_is_new"].to_numpy().astype(np.int64)
    yield "user", ["known", "new"], is_new

    history = predictions["history_rows"].to_numpy()
    number = np.searchsorted(HISTORY_EDGES, history, side="right")
    yield "history", range_names(HISTORY_EDGES), number

    shown = np.append(counts.rows, 0)[counts.find(predictions["item_id"].to_numpy())]
    number = np.searchsorted(POPULARITY_EDGES, shown, side="right")
    yield "popularity", range_names(POPULARITY_EDGES), number

    time = predictions["event_time"].to_numpy() + int(hour_utc_offset * MS_PER_HOUR)
    hours = [f"{hour:02d}" for hour in range(24)]
    yield "hour", hours, time // MS_PER_HOUR % 24


def range_names(edges: Sequence[int]) -> list[str]:
    """Names of the ranges of whole numbers between edges, from 0 on.

    >>> range_names((1, 10, 50))
    ['0', '1–9', '10–49', '50+']
    """
    names = []
    for first, end in zip((0, *edges[:-1]), edges, strict=True):
        names.append(str(first) if end == first + 1 else f"{first}–{end - 1}")
    return [*names, f"{edges[-1]}+"]


def _line(by: str, name: str, task: str, rows: pa.Table) -> Slice:
    known = rows.filter(rows[f"label.{task}"].is_valid())
    labels = known[f"label.{task}"].to_numpy().astype(bool)
    logits = known[f"logit.{task}"].to_numpy().astype(np.float64)
    scores = known[f"score.{task}"].to_numpy().astype(np.float64)
    if len(labels) == 0:
        return Slice(by, name, task, 0, 0, math.nan, math.nan, math.nan, math.nan)

    rate, mean_score = float(labels.mean()), float(scores.mean())
    return Slice(
        by=by,
        slice=name,
        task=task,
        rows=len(labels),
        positives=int(labels.sum()),
        ne=normalised_entropy(logits, labels),
        auc=auc(logits, labels),
        mean_score=mean_score,
        calibration=mean_score / rate if rate > 0 else math.nan,
    )


def as_table(lines: Sequence[Slice]) -> dict[str, Any]:
    """Columns and rows, the form in which MLflow shows a table."""
    columns = list(Slice.__slots__)
    data = []
    for line in lines:
        data.append(list(asdict(line).values()))
    return {"columns": columns, "data": data}


def write_slices(path: Path, table: Mapping[str, Any]) -> None:
    write_atomically(path, json_text(table))


def read_slices(model_dir: Path) -> dict[str, list[Slice]]:
    """The lines of each split that the model was evaluated on; nothing before that."""
    path = model_dir / SLICES
    if not path.exists():
        return {}

    found = {}
    for split, table in json.loads(path.read_text()).items():
        lines = []
        for row in table["data"]:
            values: list[Any] = [math.nan if value is None else value for value in row]
            lines.append(Slice(**dict(zip(table["columns"], values, strict=True))))
        found[split] = lines
    return found
