"""Prequential evaluation: every request of a split once, alone in its sequence, its history all
that lay before it.

model folder + sequences → metrics.json (beside the weights too), predictions/<split>.parquet, plots
"""

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.batches.examples import request_examples, user_events
from pipeline.batches.loader import evaluation_batches, split_bounds
from pipeline.config import RunConfig, UserError
from pipeline.evaluate import plots
from pipeline.evaluate.metrics import TaskMetrics
from pipeline.files import staged_file, write_atomically
from pipeline.model.artifact import LoadedModel, load_model
from pipeline.model.flops import Flops, count_work
from pipeline.model.inference.quantize import quantize_tables
from pipeline.sequences import store

logger = logging.getLogger(__name__)


def evaluate(
    cfg: RunConfig, model_dir: Path, splits: Sequence[str] = ("val", "test")
) -> dict[str, float]:
    """Metrics keyed `val/ne/is_click`, and the shares of pairs and tokens that mask and truncation
    took away.

    Sequences, splits and batch size come from `cfg`, the model and its features from `model_dir`.

    Raises:
        UserError: no whole model at `model_dir`, a split without a request, or CUDA asked for where
        there is none.
    """
    loaded = load_model(model_dir, device(cfg))
    if cfg.evaluate.int4_tables:
        quantize_tables(loaded.model)
    folder = cfg.run_dir / "evaluation"
    (folder / "predictions").mkdir(parents=True, exist_ok=True)
    metrics: dict[str, float] = {}
    work = Flops()
    for split in splits:
        begin = time.perf_counter()
        predictions = predict(cfg, loaded, split, work)
        with staged_file(folder / "predictions" / f"{split}.parquet") as stage:
            pq.write_table(predictions, stage)
        metrics |= summarise(predictions, loaded.cfg.tasks, split)
        scored = {task: known_rows(predictions, task, "score")[:2] for task in loaded.cfg.tasks}
        plots.calibration(
            scored, cfg.evaluate.calibration_bins, folder / f"calibration_{split}.png"
        )
        plots.roc(scored, folder / f"roc_{split}.png")
        logger.info("%s: %d rows in %.1f s", split, len(predictions), time.perf_counter() - begin)
    metrics |= shares(work)
    text = json.dumps(metrics, indent=2)
    write_atomically(folder / "metrics.json", text)
    write_atomically(model_dir / "metrics.json", text)
    return metrics


def device(cfg: RunConfig) -> str:
    """Raises UserError where `evaluate.device` is cuda and this process has no such device."""
    if cfg.evaluate.device == "cuda" and not torch.cuda.is_available():
        raise UserError("evaluate.device is cuda, but no CUDA device is visible here")
    return cfg.evaluate.device


def shares(work: Flops) -> dict[str, float]:
    """What mask, truncation and filters took away, and what was left to compute."""
    return {
        "masked_pair_share": work.masked_pair_share,
        "truncated_token_share": work.truncated_token_share,
        "filtered_token_share": work.filtered_token_share,
        "forward_gflop_per_candidate": work.flops / max(work.candidates, 1) / 1e9,
    }


@torch.no_grad()
def predict(cfg: RunConfig, loaded: LoadedModel, split: str, work: Flops) -> pa.Table:
    """One row per candidate: user_id, item_id, event_time; per task label (null where unknown),
    score, its logit.

    On the device that the model is on, in `evaluate.precision`.
    """
    where = next(loaded.model.parameters()).device
    half = torch.autocast(where.type, torch.bfloat16, enabled=cfg.evaluate.precision == "bf16")
    parts = []
    for part in evaluation_batches(cfg, loaded.maps, split):
        # before the batch leaves the CPU: counting reads values
        work.add(count_work(part.batch, loaded.cfg))
        with half:
            logits = loaded.model(part.batch.to(where)).cpu()
        scores = logits.sigmoid()
        columns = {"user_id": part.user_id, "item_id": part.item_id, "event_time": part.event_time}
        table = pa.table({name: pa.array(values) for name, values in columns.items()})
        for i, task in enumerate(loaded.cfg.tasks):
            label = pa.array(part.labels[:, i].astype(np.int8), mask=~part.known[:, i])
            table = table.append_column(f"label.{task}", label)
            table = table.append_column(f"score.{task}", pa.array(scores[:, i].numpy()))
            table = table.append_column(f"logit.{task}", pa.array(logits[:, i].numpy()))
        parts.append(table)
    if not parts:
        raise UserError(f"split.t_{split}: the {split} period holds no request")
    return pa.concat_tables(parts)


def known_rows(
    predictions: pa.Table, task: str, column: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The task's `column`, labels and users of the rows whose label is known."""
    rows = predictions.filter(predictions[f"label.{task}"].is_valid())
    return (
        rows[f"{column}.{task}"].to_numpy(),
        rows[f"label.{task}"].to_numpy(),
        rows["user_id"].to_numpy(),
    )


def summarise(predictions: pa.Table, tasks: Sequence[str], split: str) -> dict[str, float]:
    metrics = {}
    for task in tasks:
        counted = TaskMetrics()
        counted.add(*known_rows(predictions, task, "logit"))
        metrics |= {f"{split}/{name}/{task}": value for name, value in counted.result().items()}
    return metrics


def plan(cfg: RunConfig) -> dict[str, object]:
    """What evaluation would read, for `--dry-run`."""
    manifest = store.read_manifest(cfg.sequence_dir)
    counts = {}
    for split in ("val", "test"):
        bounds = split_bounds(cfg.split, split)
        buckets = (
            store.read_bucket(cfg.sequence_dir, manifest, i) for i in range(len(manifest.buckets))
        )
        examples = [request_examples(user_events(table, cfg), *bounds) for table in buckets]
        rows = sum(int((e.target_end - e.target_begin).sum()) for e in examples)
        counts[split] = {
            "requests": sum(len(e) for e in examples),
            "rows": rows,
            "tokens": sum(int(e.num_tokens.sum()) for e in examples),
        }
    return {"model": str(cfg.model_dir), "sequences": str(cfg.sequence_dir), **counts}
