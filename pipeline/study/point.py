"""One point of a study: its FLOP before it is run, its training, its scores.

work.json     GFLOP per item, counted from lengths and masks before a step is taken
train, model  as of any run
users.json    what its NE is made of, by user; beside it the predictions, as of jobs.evaluate
point.json    metrics and seconds
"""

import itertools
import json
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from pipeline.batches.examples import request_examples, user_events
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader, split_bounds
from pipeline.batches.steps import step_plan
from pipeline.config import RunConfig
from pipeline.evaluate import evaluator
from pipeline.evaluate.parts import count_requests
from pipeline.files import json_text, staged_file, write_atomically
from pipeline.model import work as model_work
from pipeline.model.artifact import load_model
from pipeline.model.flops import Flops
from pipeline.search.trial import FINISHED, read_outcome, train_trial
from pipeline.sequences import store
from pipeline.sequences.dictionary import name_rows
from pipeline.study.users import user_sums, write_users
from pipeline.train.metrics import METRICS, MetricsFile

logger = logging.getLogger(__name__)

WORK, POINT = "work.json", "point.json"
COUNTED_STEPS = 16  # of training: their lengths stand for all
COUNTED_ITEMS = 20_000  # of the split, or all there are
GIGA = 1e9
SPEED = "train/examples_per_s"


@dataclass(frozen=True, slots=True)
class PointWork:
    """GFLOP per item, by `pipeline.model.work`: products of matrices, no look-ups."""

    train_gflop: float  # three forward passes, shared by the targets of a pass
    infer_gflop: float  # a request alone with its history, shared by its candidates


@dataclass(frozen=True, slots=True)
class PointScores:
    """What a trained point came to, on one task of one split."""

    ne: float
    auc: float
    rows: int
    train_seconds: float
    train_ms_per_item: float
    score_seconds: float
    score_ms_per_item: float  # reading and batches included
    parameters: int


def count_work(cfg: RunConfig, split: str, shared_maps: Path | None) -> PointWork:
    """The work of a point, counted on some of its batches and requests; written beside it."""
    path = cfg.run_dir / WORK
    if path.exists():
        return PointWork(**json.loads(path.read_text()))

    torch.set_num_threads(cfg.train.threads_per_worker)
    maps = fit_features(cfg) if shared_maps is None else FeatureMaps.load(shared_maps)
    loader = TrainLoader(cfg, maps, step_plan(cfg))
    trained = Flops()
    for batch in itertools.islice(loader.batches(0), COUNTED_STEPS):
        trained.add(model_work.count_work(batch, cfg))

    scored = Flops()
    manifest = store.read_manifest(cfg.sequence_dir)
    for bucket in range(len(manifest.buckets)):
        sequences = store.read_bucket(cfg.sequence_dir, manifest, bucket)
        users = user_events(sequences, cfg.source, cfg.features)
        bounds = split_bounds(cfg.split, split)
        requests = request_examples(users, *bounds, cfg.examples.max_history)
        scored.add(count_requests(users, requests, cfg))
        if scored.candidates >= COUNTED_ITEMS:
            break

    found = PointWork(
        3 * trained.flops / max(trained.candidates, 1) / GIGA,
        scored.flops / max(scored.candidates, 1) / GIGA,
    )
    cfg.run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json_text(asdict(found)))
    return found


def run_point(
    cfg: RunConfig, settings: dict[str, Any], split: str, task: str, shared_maps: Path | None
) -> str:
    """Train and score a point, or what is left of it; returns "", or why it did not come to its
    end.
    """
    if (cfg.run_dir / POINT).exists():
        return ""

    train_trial(cfg, settings, lambda epochs, value: None, shared_maps)
    outcome = read_outcome(cfg.run_dir)
    assert outcome is not None, "train_trial writes it"
    if outcome["status"] != FINISHED:
        return f"{outcome['status']}: {outcome['why']}"

    scores = _score(cfg, split, task)
    values = {
        f"{split}/ne/{task}": scores.ne,
        f"{split}/auc/{task}": scores.auc,
        "study/score_ms_per_item": scores.score_ms_per_item,
        "study/train_ms_per_item": scores.train_ms_per_item,
    }
    work = asdict(PointWork(**json.loads((cfg.run_dir / WORK).read_text())))
    values |= {f"study/{name}": value for name, value in work.items()}

    # the tracker's feed reads the metrics from there
    steps = json.loads((cfg.model_dir / "artifact.json").read_text())["extra"]["steps"]
    MetricsFile(cfg.train_dir / METRICS, resumed_at=steps).append(steps + 1, values)
    write_atomically(cfg.run_dir / POINT, json_text(asdict(scores)))
    return ""


def _score(cfg: RunConfig, split: str, task: str) -> PointScores:
    """Score the split with the trained model, and leave the predictions."""
    device = "cuda" if cfg.train.use_gpu else "cpu"
    loaded = load_model(cfg.model_dir, device)
    begin = time.perf_counter()
    found = evaluator.score_store(cfg, loaded, [split]).splits[split]
    seconds = time.perf_counter() - begin

    manifest = store.read_manifest(cfg.sequence_dir)
    folder = evaluator.evaluation_folder(cfg.run_dir, cfg.evaluate)
    path = folder / "predictions" / f"{split}.parquet"
    with staged_file(path) as stage:
        pq.write_table(name_rows(cfg.sequence_dir, manifest, found.predictions), stage)

    write_users(cfg.run_dir, user_sums(found.predictions, task))

    metrics = found.named_metrics(split)
    extra = json.loads((cfg.model_dir / "artifact.json").read_text())["extra"]
    lines = [json.loads(line) for line in (cfg.train_dir / METRICS).read_text().splitlines()]
    each_ms = [1000 / line[SPEED] for line in lines if line.get(SPEED, 0) > 0]
    return PointScores(
        ne=metrics[f"{split}/ne/{task}"],
        auc=metrics[f"{split}/auc/{task}"],
        rows=len(found.predictions),
        train_seconds=extra["train_seconds"],
        train_ms_per_item=sum(each_ms) / max(len(each_ms), 1),
        score_seconds=seconds,
        score_ms_per_item=1000 * seconds / max(len(found.predictions), 1),
        parameters=sum(weight.numel() for weight in loaded.model.parameters()),
    )
