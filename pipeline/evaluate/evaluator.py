"""Prequential evaluation: every request of a split once, alone in its sequence, its history all
that lay before it.

model folder + sequences → metrics.json (beside the weights too), predictions/<split>.parquet, plots
"""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.batches.examples import request_examples, user_events
from pipeline.batches.loader import evaluation_batches, split_bounds
from pipeline.config import EvaluateConfig, RunConfig, UserError
from pipeline.evaluate import plots
from pipeline.files import staged_file, write_atomically
from pipeline.model.artifact import LoadedModel, load_model
from pipeline.model.flops import Flops
from pipeline.model.heads import HeadMetrics
from pipeline.model.inference.quantize import quantize_tables
from pipeline.model.work import count_work
from pipeline.sequences import store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SplitScores:
    """The scored candidates of one split.

    `predictions` has a row per candidate: user_id, item_id, event_time, and what the model's head
    says of it (`RankingHead.prediction_columns`).
    """

    predictions: pa.Table
    metrics: HeadMetrics

    def named_metrics(self, split: str) -> dict[str, float]:
        """`val/ne/is_click` and so on."""
        return {f"{split}/{name}": value for name, value in self.metrics.result().items()}


def evaluate_model(
    cfg: RunConfig, model_dir: Path, splits: Sequence[str] = ("val", "test")
) -> dict[str, float]:
    """Metrics keyed `val/ne/is_click`, and the shares of pairs and tokens that mask and truncation
    took away.

    Sequences, splits and batch size come from `cfg`, the model and its features from `model_dir`.

    Raises:
        UserError: no whole model at `model_dir`, a split without a request, or CUDA asked for where
        there is none.
    """
    loaded = load_model(model_dir, evaluation_device(cfg.evaluate))
    if cfg.evaluate.int4_tables:
        quantize_tables(loaded.model)
    folder = cfg.run_dir / "evaluation"
    (folder / "predictions").mkdir(parents=True, exist_ok=True)

    metrics: dict[str, float] = {}
    work = Flops()
    for split in splits:
        begin = time.perf_counter()
        scores = score_split(cfg, loaded, split, work)
        metrics |= scores.named_metrics(split)
        _write_split(scores.predictions, loaded.cfg.tasks, split, folder, cfg.evaluate)
        seconds = time.perf_counter() - begin
        logger.info("%s: %d rows in %.1f s", split, len(scores.predictions), seconds)

    metrics |= work_shares(work)
    text = json.dumps(metrics, indent=2)
    write_atomically(folder / "metrics.json", text)
    write_atomically(model_dir / "metrics.json", text)
    return metrics


def _write_split(
    predictions: pa.Table, tasks: Sequence[str], split: str, folder: Path, cfg: EvaluateConfig
) -> None:
    """The predictions of a split as Parquet, and their plots."""
    with staged_file(folder / "predictions" / f"{split}.parquet") as stage:
        pq.write_table(predictions, stage)

    scored = {}
    for task in tasks:
        known = predictions.filter(predictions[f"label.{task}"].is_valid())
        scored[task] = known[f"score.{task}"].to_numpy(), known[f"label.{task}"].to_numpy()

    calibration = folder / f"calibration_{split}.png"
    plots.plot_calibration(scored, cfg.calibration_bins, calibration)
    plots.plot_roc(scored, folder / f"roc_{split}.png")


def evaluation_device(cfg: EvaluateConfig) -> str:
    """Raises UserError where `evaluate.device` is cuda and this process has no such device."""
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("evaluate.device is cuda, but no CUDA device is visible here")
    return cfg.device


def work_shares(work: Flops) -> dict[str, float]:
    """What mask, truncation and filters took away, and what was left to compute."""
    return {
        "masked_pair_share": work.masked_pair_share,
        "truncated_token_share": work.truncated_token_share,
        "filtered_token_share": work.filtered_token_share,
        "forward_gflop_per_candidate": work.flops / max(work.candidates, 1) / 1e9,
    }


@torch.no_grad()
def score_split(cfg: RunConfig, loaded: LoadedModel, split: str, work: Flops) -> SplitScores:
    """Score every candidate of a split once; the work of it is added to `work`.

    On the device that the model is on, in `evaluate.precision`.

    Raises:
        UserError: the split holds no request.
    """
    model, head = loaded.model, loaded.model.heads
    where = next(model.parameters()).device
    bf16 = cfg.evaluate.precision == "bf16"
    half = torch.autocast(where.type, torch.bfloat16, enabled=bf16)

    parts, metrics = [], head.new_metrics()
    for part in evaluation_batches(cfg, loaded.maps, split):
        # before the batch leaves the CPU: counting reads values
        work.add(count_work(part.batch, loaded.cfg))
        with half:
            outputs = model(part.batch.to(where)).cpu()
        metrics.add(outputs.numpy(), part)

        columns = {
            "user_id": pa.array(part.user_id),
            "item_id": pa.array(part.item_id),
            "event_time": pa.array(part.event_time),
        }
        parts.append(pa.table(columns | head.prediction_columns(outputs, part)))

    if not parts:
        raise UserError(f"split.t_{split}: the {split} period holds no request")
    return SplitScores(pa.concat_tables(parts), metrics)


def plan_evaluation(cfg: RunConfig) -> dict[str, object]:
    """What evaluation would read, for `--dry-run`."""
    counts = {split: _count_split(cfg, split) for split in ("val", "test")}
    return {"model": str(cfg.model_dir), "sequences": str(cfg.sequence_dir), **counts}


def _count_split(cfg: RunConfig, split: str) -> dict[str, int]:
    manifest = store.read_manifest(cfg.sequence_dir)
    requests = rows = tokens = 0
    for index in range(len(manifest.buckets)):
        users = user_events(
            store.read_bucket(cfg.sequence_dir, manifest, index), cfg.source, cfg.features
        )
        examples = request_examples(users, *split_bounds(cfg.split, split))
        requests += len(examples)
        rows += int((examples.target_end - examples.target_begin).sum())
        tokens += int(examples.num_tokens.sum())
    return {"requests": requests, "rows": rows, "tokens": tokens}
