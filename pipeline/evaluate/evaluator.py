"""Prequential evaluation: every request of a split once, its history all that lay before it.

model folder + sequences → metrics.json (beside the weights too), predictions/<split>.parquet,
                           slices and plots
"""

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.batches.examples import request_examples
from pipeline.batches.loader import split_bounds
from pipeline.batches.stored import StoredUsers
from pipeline.config import EvaluateConfig, ModelConfig, RunConfig, SplitConfig, UserError
from pipeline.evaluate import agreement, plots, slices
from pipeline.evaluate.item_rates import ItemCounts, baseline_metrics, merge_counts
from pipeline.evaluate.parts import (
    EvaluationJob,
    PartScores,
    SplitScores,
    UserVectors,
    join_vectors,
    plan_parts,
    score_users,
)
from pipeline.evaluate.retrieval import AskedRows, evaluate_retrieval
from pipeline.evaluate.spread import (
    cluster_has_gpu,
    is_worth_workers,
    rank_parts,
    score_parts,
)
from pipeline.files import json_text, sha256_of, staged_file, write_atomically
from pipeline.model.artifact import INDEX, LoadedModel, load_model
from pipeline.model.flops import Flops
from pipeline.model.inference.shared_scoring import shares_history_rows
from pipeline.sequences import store
from pipeline.sequences.dictionary import name_rows

logger = logging.getLogger(__name__)

SPLITS = ("val", "test")


@dataclass(frozen=True, slots=True)
class StoreScores:
    """The scored candidates of a whole store, by split."""

    splits: dict[str, SplitScores]
    work: dict[str, Flops]
    item_counts: ItemCounts
    vectors: dict[str, UserVectors]  # by split, where retrieval is asked for and they were at hand


def evaluate_model(
    cfg: RunConfig, model_dir: Path, splits: Sequence[str] = SPLITS, name: str | None = None
) -> dict[str, float]:
    """Metrics keyed `val/ne/is_click`, those of the item's smoothed rate, `val/baseline_ne/…`, and
    the shares of pairs and tokens that mask and truncation took away.

    Sequences, split and batch size come from `cfg`; the model, its features, tasks and actions from
    `model_dir`. A large store is spread over the workers of the Ray cluster that this process is
    connected to, any other over threads. A split without a request is told, and has no metrics.
    With `evaluate.sample` the metrics are of those users alone, under `evaluation/sample`, and say
    so: `sample_share`.

    Args:
        name: scores other rows, or under other settings, than the model's own evaluation; the files
            lie in `evaluation/<name>`, and the model's metrics.json stays.

    Raises:
        UserError: no whole model at `model_dir`, labels of other tasks, rows or settings that are
        not those of the model's own metrics and no `name`, no request in any split, or CUDA asked
        for where there is none.
    """
    loaded = load_model(model_dir)
    manifest = store.read_manifest(cfg.sequence_dir)
    agreement.refuse_other_labels(loaded, cfg.tasks, cfg.source.actions, manifest)
    loaded.maps.refuse_other_ids(manifest.events, cfg.sequence_dir)
    given = agreement.rows_and_settings(cfg.split, cfg.evaluate, manifest.digest)
    is_whole = name is None and cfg.evaluate.sample is None
    if is_whole:
        _refuse_other_rows(given, loaded, model_dir)
    tell_empty_splits(cfg.split, manifest, splits)

    begin = time.perf_counter()
    job = _evaluation_job(cfg, loaded.cfg, model_dir, splits, manifest)
    scores = _score_store(job, manifest)
    found = _splits_with_requests(scores)

    folder = evaluation_folder(cfg.run_dir, cfg.evaluate, name)
    tasks, offset = loaded.cfg.tasks, loaded.cfg.features.hour_utc_offset
    report = _SplitReport(folder, cfg.sequence_dir, manifest, cfg.evaluate, tasks, offset)
    # files and plots are made here while retrieval is measured, by workers or a second core
    with ThreadPoolExecutor(max_workers=1) as beside:
        of_found = replace(job, splits=tuple(found))
        retrieval = beside.submit(_retrieval_metrics, of_found, loaded, scores.vectors)
        metrics, sliced = report.write_splits(found, scores)
        metrics |= retrieval.result()

    metrics |= _candidate_facts(cfg.evaluate.sample, loaded.cfg.examples.negatives)
    _log_seconds(scores, time.perf_counter() - begin)

    work = {split: scores.work[split] for split in found}
    if is_whole:
        _publish_slices(sliced, model_dir)
        return _publish_whole(metrics, work, given, model_dir, folder)
    metrics |= work_shares(total_work(work))
    write_metrics(folder / "metrics.json", metrics)
    return metrics


def _candidate_facts(sample: float | None, negatives: int) -> dict[str, float]:
    """What must be known of the candidates to compare metrics: the share of users, where it is not
    all, and how many items were drawn beside each positive.
    """
    facts = {}
    if sample is not None:
        facts["sample_share"] = sample
    if negatives:
        facts["drawn_negatives"] = float(negatives)
    return facts


def _splits_with_requests(scores: StoreScores) -> list[str]:
    """The splits of which a request was scored; none is a mistake."""
    found = []
    for split, scored in scores.splits.items():
        if len(scored.predictions):
            found.append(split)

    if not found:
        names = list(scores.splits)
        keys = ", ".join(f"split.t_{split}" for split in names)
        raise UserError(f"{keys}: the {' and '.join(names)} period holds no request")
    return found


def row_tags(sequence_dir: Path, split: SplitConfig) -> dict[str, str]:
    """Which validation rows `split` of these sequences stands for, in the tags of a registered
    version; no sequences, and they are none.
    """
    manifest = sequence_dir / store.MANIFEST
    digest = store.read_manifest(sequence_dir).digest if manifest.exists() else ""
    return {
        "manifest": digest,
        "split.t_val": str(split.t_val),
        "split.t_test": str(split.t_test),
    }


def score_model(cfg: RunConfig, model_dir: Path) -> dict[str, float]:
    """NE of a model by task on the validation rows of `cfg`, whatever rows it was validated on: for
    the gate. Nothing is written.

    Raises:
        UserError: the model reads other actions than the sequences hold.
    """
    model = load_model(model_dir).cfg
    manifest = store.read_manifest(cfg.sequence_dir)
    if tuple(model.source.actions) != tuple(manifest.actions):
        raise UserError(
            f"source.actions: the model reads {list(model.source.actions)}, the sequences hold "
            f"{list(manifest.actions)}"
        )

    whole = replace(cfg, evaluate=replace(cfg.evaluate, sample=None))
    job = _evaluation_job(whole, model, model_dir, ["val"], manifest)
    scores = _score_store(replace(job, with_vectors=False), manifest)
    found = scores.splits["val"].metrics.result()
    return {task: found[f"ne/{task}"] for task in model.tasks}


def _refuse_other_rows(given: Mapping[str, Any], loaded: LoadedModel, model_dir: Path) -> None:
    differences = agreement.find_differences(given, loaded, model_dir)
    if differences:
        raise UserError(
            f"{differences}: the metrics of {model_dir} are of the former and are not overwritten; "
            "--as NAME scores these rows under a name of their own"
        )


def tell_empty_splits(
    periods: SplitConfig, manifest: store.Manifest, splits: Sequence[str] = SPLITS
) -> list[str]:
    """The splits whose period lies outside of the data, each said in the log: known without reading
    a row, so before anything is trained or scored.
    """
    empty = []
    for split in splits:
        begin, end = split_bounds(periods, split)
        if begin > manifest.last_event_ms or end <= manifest.first_event_ms:
            empty.append(split)
            logger.warning(
                "split.t_%s: the %s period holds no request, the sequences are of %s to %s; there "
                "will be no %s metrics",
                split,
                split,
                _iso_time(manifest.first_event_ms),
                _iso_time(manifest.last_event_ms),
                split,
            )
    return empty


def _iso_time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")


def _evaluation_job(
    cfg: RunConfig,
    model: RunConfig,
    model_dir: Path,
    splits: Sequence[str],
    manifest: store.Manifest,
) -> EvaluationJob:
    """What all parts of an evaluation have in common, here or on the workers of the cluster."""
    spread = is_worth_workers(cfg.evaluate.device, plan_parts(manifest))
    wants_vectors = model.retrieval.enabled and makes_vectors(
        cfg.evaluate, model.model, model.examples.max_history
    )
    return EvaluationJob(
        cfg=scoring_config(cfg, model),
        model_dir=model_dir,
        digest=sha256_of(model_dir / INDEX),
        splits=tuple(splits),
        device=evaluation_device(cfg.evaluate, on_cluster=spread),
        spread=spread,
        # from many workers they would be much to send about
        with_vectors=wants_vectors and not spread,
    )


def _score_store(job: EvaluationJob, manifest: store.Manifest) -> StoreScores:
    """All parts of the store, here or on the workers of the cluster."""
    return _merged(score_parts(job, plan_parts(manifest)), job.splits)


def makes_vectors(cfg: EvaluateConfig, model: ModelConfig, max_history: int | None) -> bool:
    """True where scoring can give retrieval the vectors of its users: a history encoded once for
    both. Retrieval is measured in float32, whatever the layers that score have.
    """
    in_float32 = cfg.precision == "fp32"
    of_whole_histories = cfg.sample is None and max_history is None
    return in_float32 and of_whole_histories and shares_history_rows(model)


def _retrieval_metrics(
    job: EvaluationJob, loaded: LoadedModel, users: Mapping[str, UserVectors]
) -> dict[str, float]:
    """Those of `evaluate_retrieval`, here or by the workers of the cluster; none of a model that
    only ranks, or of a sample.
    """
    if not loaded.cfg.retrieval.enabled or job.cfg.evaluate.sample is not None:
        return {}
    here = "cpu" if job.spread else job.device  # what the workers have, this process may lack
    rank = partial(rank_parts, job)
    rows = AskedRows(job.cfg.sequence_dir, job.cfg.split, job.cfg.evaluate)
    return evaluate_retrieval(rows, loaded, job.splits, here, rank, users)


def scoring_config(cfg: RunConfig, model: RunConfig) -> RunConfig:
    """The settings of a scoring: labels, order and features of the model, all else of `cfg`."""
    return replace(
        model,
        name=cfg.name,
        runs_dir=cfg.runs_dir,
        seed=cfg.seed,
        sequences=cfg.sequences,
        split=cfg.split,
        evaluate=cfg.evaluate,
    )


def score_store(cfg: RunConfig, loaded: LoadedModel, splits: Sequence[str]) -> StoreScores:
    """Score the candidates of these splits once with a model at hand, in this process, on the
    device that the model is on.
    """
    parts = plan_parts(store.read_manifest(cfg.sequence_dir))
    scoring = scoring_config(cfg, loaded.cfg)
    return _merged((score_users(scoring, loaded, splits, part) for part in parts), splits)


def _merged(parts: Iterator[PartScores], splits: Sequence[str]) -> StoreScores:
    """The whole from its parts, in their order."""
    predictions: dict[str, list[pa.Table]] = {split: [] for split in splits}
    vectors: dict[str, list[UserVectors]] = {}
    metrics, counts = {}, []
    work = {split: Flops() for split in splits}

    for part in parts:
        counts.append(part.item_counts)
        for split, of_part in part.vectors.items():
            vectors.setdefault(split, []).append(of_part)
        for split, scores in part.splits.items():
            predictions[split].append(scores.predictions)
            work[split].add(part.work[split])
            if split in metrics:
                metrics[split].merge(scores.metrics)
            else:
                metrics[split] = scores.metrics

    found = {}
    for split in splits:
        found[split] = SplitScores(pa.concat_tables(predictions[split]), metrics[split])

    users = {}
    for split, parts_of in vectors.items():
        ids = np.concatenate([one.user_id for one in parts_of])
        users[split] = join_vectors(ids, torch.cat([one.vectors for one in parts_of]))
    return StoreScores(found, work, merge_counts(counts), users)


def evaluation_name(cfg: EvaluateConfig, name: str | None = None) -> str | None:
    """The name under which an evaluation is kept; None for the model's own of all users."""
    parts = [] if name is None else [name]
    if cfg.sample is not None:
        parts.append("sample")
    return "/".join(parts) or None


def evaluation_folder(run_dir: Path, cfg: EvaluateConfig, name: str | None = None) -> Path:
    """Where the files of an evaluation go: one by name, and samples, have folders of their own."""
    return run_dir / "evaluation" / (evaluation_name(cfg, name) or "")


@dataclass(frozen=True, slots=True)
class _SplitReport:
    """The files of each split that was scored, below `folder`."""

    folder: Path
    sequence_dir: Path
    manifest: store.Manifest
    settings: EvaluateConfig
    tasks: tuple[str, ...]
    hour_utc_offset: float  # of the hours in slices

    def write_splits(
        self, splits: Sequence[str], scores: StoreScores
    ) -> tuple[dict[str, float], dict[str, list[slices.Slice]]]:
        """The metrics of all, and the slices by split; their files are written."""
        metrics: dict[str, float] = {}
        sliced: dict[str, list[slices.Slice]] = {}
        for split in splits:
            metrics |= self._write_split(split, scores)
            sliced[split] = self._write_slices(split, scores)
        return metrics, sliced

    def _write_split(self, split: str, scores: StoreScores) -> dict[str, float]:
        """Write predictions and plots of a split; returns its metrics."""
        found = scores.splits[split]
        with staged_file(self.folder / "predictions" / f"{split}.parquet") as stage:
            pq.write_table(name_rows(self.sequence_dir, self.manifest, found.predictions), stage)
        if not self.tasks:  # a model for retrieval alone
            return {}

        # score and label of each task, where the label is known
        scored = {}
        for task in self.tasks:
            known = found.predictions.filter(found.predictions[f"label.{task}"].is_valid())
            scored[task] = known[f"score.{task}"].to_numpy(), known[f"label.{task}"].to_numpy()
        bins = self.settings.calibration_bins
        plots.plot_calibration(scored, bins, self.folder / f"calibration_{split}.png")
        plots.plot_roc(scored, self.folder / f"roc_{split}.png")

        metrics = found.named_metrics(split)
        baseline = baseline_metrics(scores.item_counts, found.predictions, self.tasks)
        return metrics | {f"{split}/{key}": value for key, value in baseline.items()}

    def _write_slices(self, split: str, scores: StoreScores) -> list[slices.Slice]:
        """Write the slices of a split as a table and as a picture."""
        predictions = scores.splits[split].predictions
        lines = slices.slice_lines(
            predictions, scores.item_counts, self.tasks, self.hour_utc_offset
        )
        slices.write_slices(self.folder / f"slices_{split}.json", slices.as_table(lines))
        if lines:
            plots.plot_slices(lines, self.tasks, self.folder / f"slices_{split}.png")
        return lines


def _publish_slices(sliced: Mapping[str, Sequence[slices.Slice]], model_dir: Path) -> None:
    """Put the slices beside the weights; those of a split not scored this time stay."""
    whole = slices.read_slices(model_dir) | dict(sliced)
    tables = {split: slices.as_table(lines) for split, lines in whole.items()}
    slices.write_slices(model_dir / slices.SLICES, tables)


def _log_seconds(scores: StoreScores, seconds: float) -> None:
    rows = []
    for split, found in scores.splits.items():
        rows.append(f"{len(found.predictions):,} {split}")
    logger.info("%s rows scored in %.1f s", " and ".join(rows), seconds)


def _publish_whole(
    metrics: dict[str, float],
    work: dict[str, Flops],
    given: Mapping[str, Any],
    model_dir: Path,
    folder: Path,
) -> dict[str, float]:
    """Put the metrics beside the weights, with the `given` rows and settings that they are of;
    those of a split that was not scored this time stay.
    """
    record = agreement.read_record(model_dir)
    earlier = read_metrics(model_dir) if record else {}
    kept = {}
    for key, value in earlier.items():
        split = key.partition("/")[0]
        if split in SPLITS and split not in work:
            kept[key] = value

    counts = dict(record.get("work", {})) | {split: asdict(found) for split, found in work.items()}
    whole = total_work({split: Flops(**found) for split, found in counts.items()})
    metrics = kept | metrics | work_shares(whole)

    noted = {"of": given, "work": counts}
    write_atomically(model_dir / agreement.RECORD, json.dumps(noted, indent=2))
    for path in (folder / "metrics.json", model_dir / "metrics.json"):
        write_metrics(path, metrics)
    return metrics


def write_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """As JSON, which has no NaN: an undefined metric is null."""
    write_atomically(path, json_text(dict(metrics)))


def read_metrics(model_dir: Path) -> dict[str, float]:
    """The metrics of a model's evaluation, NaN where one is not defined.

    Raises:
        UserError: it has not been evaluated.
    """
    try:
        found = json.loads((model_dir / "metrics.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(f"{model_dir} holds no metrics.json of an evaluation: {error}") from None
    return {key: math.nan if value is None else value for key, value in found.items()}


def evaluation_device(cfg: EvaluateConfig, *, on_cluster: bool = False) -> str:
    """The device that `evaluate.device` means, here or on the workers of the cluster.

    Raises:
        UserError: it is cuda, and there is no such device.
    """
    found = cluster_has_gpu() if on_cluster else torch.cuda.is_available()
    if cfg.device == "cuda" and not found:
        where = "in the Ray cluster" if on_cluster else "visible here"
        raise UserError(f"evaluate.device is cuda, but no CUDA device is {where}")
    if cfg.device == "auto":
        return "cuda" if found else "cpu"
    return cfg.device


def total_work(by_split: Mapping[str, Flops]) -> Flops:
    total = Flops()
    for work in by_split.values():
        total.add(work)
    return total


def work_shares(work: Flops) -> dict[str, float]:
    """What mask, truncation and filters took away, and what was left to compute."""
    return {
        "masked_pair_share": work.masked_pair_share,
        "truncated_token_share": work.truncated_token_share,
        "filtered_token_share": work.filtered_token_share,
        "forward_gflop_per_candidate": work.flops / max(work.candidates, 1) / 1e9,
    }


def plan_evaluation(
    stored: StoredUsers, periods: SplitConfig, max_history: int | None
) -> dict[str, dict[str, int]]:
    """Requests, rows and tokens that evaluation would score, by split, for `--dry-run`."""
    counts = {}
    for split in SPLITS:
        period = split_bounds(periods, split)
        counts[split] = _count_requests(stored, period, max_history)
    return counts


def _count_requests(
    stored: StoredUsers, period: tuple[int, int], max_history: int | None
) -> dict[str, int]:
    """Requests of a period, [from, to) in ms UTC, with their rows and tokens."""
    requests = rows = tokens = 0
    for users in stored.by_bucket():
        examples = request_examples(users, *period, max_history)
        requests += len(examples)
        rows += int((examples.target_end - examples.target_begin).sum())
        tokens += int(examples.num_tokens.sum())
    return {"requests": requests, "rows": rows, "tokens": tokens}
