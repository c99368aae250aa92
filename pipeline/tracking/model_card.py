"""The README of a registered model version, generated from its configuration, its data and its
measured numbers.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.config import (
    ChannelConfig,
    ModelConfig,
    RetrievalConfig,
    RunConfig,
    SplitConfig,
)
from pipeline.evaluate import slices
from pipeline.sequences import store

METRICS = ("ne", "baseline_ne", "auc", "baseline_auc", "gauc")
NAMES = {"baseline_ne": "NE of the item's rate", "baseline_auc": "AUC of the item's rate"}
SPLITS = ("val", "test")


def _encoder_words(encoder: str) -> str:
    """The encoder's name, with its paper or as a baseline."""
    if encoder == "ultra_hstu":
        return "ULTRA-HSTU (arXiv:2602.16986)"
    return f"The encoder `{encoder}`, one that ULTRA-HSTU is held against"


def _answer_words(tasks: Sequence[str], retrieval: RetrievalConfig) -> str:
    """What the model answers with."""
    answers = []
    if tasks:
        answers.append("a probability per action")
    if retrieval.enabled:
        answers.append("vectors of users and items, whose product finds the next item")
    return " and ".join(answers)


def _transducer_words(model: ModelConfig) -> tuple[str, str, str]:
    """Layers, mask and truncation; of a mixture those of each channel, by its name."""
    if not model.channels:
        return _stack_words(model)

    # three columns with a line a channel: "clicks: 2; long: 3"
    named = []
    for name, channel in model.channels.items():
        named.append([f"{name}: {text}" for text in _stack_words(channel)])
    layers, window, truncation = zip(*named, strict=True)
    return "; ".join(layers), "; ".join(window), "; ".join(truncation)


def _stack_words(stack: ModelConfig | ChannelConfig) -> tuple[str, str, str]:
    """Layers, mask and truncation of one transducer."""
    attention = stack.attention
    window = "causal"
    if attention.window is not None:
        window = f"window {attention.window}, full rows {attention.full_rows}"

    truncation = "none"
    if stack.truncate_after_layer is not None:
        truncation = (
            f"after layer {stack.truncate_after_layer} to the newest {stack.truncate_to} events"
        )
    return str(stack.num_layers), window, truncation


def render_card(cfg: RunConfig, model_dir: Path, metrics: Mapping[str, float], run_id: str) -> str:
    """Markdown; `metrics` as PROTOCOL's keys `split/metric/task`."""
    data = store.read_manifest(cfg.sequence_dir)

    # the model in words
    layers, window, truncation = _transducer_words(cfg.model)
    heads = f"{cfg.model.num_heads} (query-key {cfg.model.d_qk}, value {cfg.model.d_v})"
    num_bytes = sum(path.stat().st_size for path in model_dir.iterdir())
    rows = f"{data.num_rows:,} rows of {data.num_users:,} users, from {cfg.source.kind}"

    # up to when it was trained
    period, end = "validation start", cfg.split.t_val
    if cfg.split.refit:
        period, end = "test start", cfg.split.t_test
    return f"""# {cfg.model_name}, trained as `{cfg.name}`

{_encoder_words(cfg.model.encoder)}: one user's history and the items to rank in one \
sequence, {_answer_words(cfg.tasks, cfg.retrieval)}.

| | |
|---|---|
| tasks | {", ".join(cfg.tasks) or "none: next items alone"} |
| layers, width, heads | {layers}, {cfg.model.d_model}, {heads} |
| attention | {window} |
| truncation | {truncation} |
| files | {num_bytes / 1e6:.1f} MB, safetensors and JSON; their sha256 are tags of this version |
| MLflow run | {run_id} |
| sequences | digest {data.digest}: {rows} |
| training period | rows before {end} ({period}), seed {cfg.seed}, {cfg.train.epochs} epochs |

## Measured
Prequential: the history of a request holds every strictly earlier row. NE below 1 is \
better than the tasks' base rates.

{_drawn_note(cfg.examples.negatives)}{_metric_table(cfg.tasks, cfg.split, metrics)}

## By slice
{_slice_table(cfg.tasks, slices.read_slices(model_dir))}

## Limits
- Items and users not seen in the training period share one embedding row each; their scores rest \
on the history alone.
- Probabilities follow the logging policy of the training period and say nothing of items \
that it never showed.
- Loaded by this project's code from the files above; nothing in this version is executed.
"""


def _drawn_note(negatives: int) -> str:
    """What the negatives are, where the logs have none."""
    if negatives == 0:
        return ""
    return (
        f"**Drawn negatives.** Beside each positive {negatives} items that the user "
        "has no row of up to then, drawn by popularity (`examples.negatives`), in training and in "
        "these figures. They tell what was chosen from what was drawn, not from what was shown.\n\n"
    )


def _metric_table(
    tasks: tuple[str, ...], periods: SplitConfig, metrics: Mapping[str, float]
) -> str:
    """A line for each split and metric that was measured, a column for each task."""
    rows = ["| | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for split in SPLITS:
        learned = " (rows it was trained on)" if split == "val" and periods.refit else ""

        for metric in METRICS:
            values = [metrics.get(f"{split}/{metric}/{task}", math.nan) for task in tasks]
            if all(math.isnan(value) for value in values):
                continue

            cells = [_number(value, 4) for value in values]
            name = NAMES.get(metric, metric.upper())
            rows.append(f"| {split} {name}{learned} | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _slice_table(tasks: tuple[str, ...], by_split: Mapping[str, Sequence[slices.Slice]]) -> str:
    """AUC and calibration of the last split that was scored, by new and known users, length of the
    history and popularity of the item. Hours are in the evaluation's own table.
    """
    found = [(split, by_split[split]) for split in SPLITS if by_split.get(split)]
    if not found:
        return "Not measured."
    split, lines = found[-1]

    titles = []
    for task in tasks:
        titles += [f"{task} rows", "AUC", "calibration"]
    table = [f"| {split} | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]

    # the lines of all tasks together: (kind, name of the slice) -> task -> line
    by_slice: dict[tuple[str, str], dict[str, slices.Slice]] = {}
    for line in lines:
        if line.by != "hour":
            by_slice.setdefault((line.by, line.slice), {})[line.task] = line

    for (by, name), of_tasks in by_slice.items():
        cells = []
        for task in tasks:
            line = of_tasks[task]
            cells += [f"{line.rows:,}", _number(line.auc, 4), _number(line.calibration, 2)]
        table.append(f"| {by} {name} | " + " | ".join(cells) + " |")
    return "\n".join(table)


def _number(value: float, digits: int) -> str:
    return "–" if math.isnan(value) else f"{value:.{digits}f}"
