"""Evaluation of retrieval: where the items that users took in a period stand among all items.

    model folder + sequences → `val/hr_10`, `val/ndcg_10`, …; the same of two baselines,
                               `val/popularity/hr_10` and `val/item_knn/hr_10`

Two protocols (`evaluate.retrieval_protocol`). global_time: the history is all that lies before the
period, and every item taken in the period is asked for. leave_one_out: the last item of each user
in the period is asked for, its history is all that lies before its request. Taken are the events
that `retrieval.positives` names; an item that the model does not know counts as missed.

Users without a history get the list of popular items, as the server answers them.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pipeline.batches.example_batches import history_batch
from pipeline.batches.examples import Examples, UserEvents
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import split_bounds, token_batches
from pipeline.batches.stored import StoredUsers
from pipeline.config import EvaluateConfig, SplitConfig
from pipeline.evaluate.asked import Asked, asked_items, seen_items
from pipeline.evaluate.item_knn import ItemKNN
from pipeline.evaluate.kept_baselines import baseline_facts, keep_baselines, read_baselines
from pipeline.evaluate.parts import EvaluationJob, UserVectors, load_for
from pipeline.evaluate.retrieval_metrics import (
    RetrievalMetrics,
    positive_ranks,
    remove_seen,
    top_items,
)
from pipeline.model.artifact import LoadedModel
from pipeline.sequences import store

MOST_SCORES = 2**26  # numbers in memory at once

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AskedRows:
    """The sequences whose users are asked about, and by which protocol."""

    sequence_dir: Path
    periods: SplitConfig
    settings: EvaluateConfig


@dataclass(frozen=True, slots=True)
class RetrievalPart:
    """The users of one bucket, to be ranked for in one split."""

    split: str
    bucket: int
    rows: int  # of the store
    with_baselines: bool


@dataclass(frozen=True, slots=True)
class ItemScorers:
    """What scores all N items, made once: vectors of the model's, on its device, and a baseline
    where a part asks for it.
    """

    items: Tensor  # [N, d]
    knn: ItemKNN | None
    users: Mapping[str, UserVectors]  # by split, of those splits whose users were encoded before


BASELINES = ("popularity/", "item_knn/")
# Metrics of the model, under "", and of the baselines that were asked for.
PartMetrics = dict[str, RetrievalMetrics]
RankParts = Callable[[ItemScorers, Sequence[RetrievalPart]], Iterable[PartMetrics]]


def evaluate_retrieval(
    rows: AskedRows,
    loaded: LoadedModel,
    splits: Sequence[str],
    device: str,
    rank_parts: RankParts | None = None,
    users: Mapping[str, UserVectors] | None = None,
) -> dict[str, float]:
    """Metrics by split, of the model and of both baselines; a period in which nobody took an item
    has none.

    Sequences, periods and protocol are those of `rows`, all else comes from the model's own
    configuration.

    Args:
        rank_parts: gives the metrics of each part, in order; by default they are found here.
        users: vectors by split, where the scoring of candidates has made them.
    """
    maps, model = loaded.maps, loaded.model.to(device)
    assert model.retrieval is not None
    with torch.no_grad():
        items = model.retrieval.item_vectors(torch.from_numpy(maps.item_codes[1:]).to(device))

    # the baselines, where an earlier evaluation has not made them
    folder, settings = rows.sequence_dir, rows.settings
    manifest = store.read_manifest(folder)
    facts = baseline_facts(manifest.digest, rows.periods, settings, loaded)
    kept = {split: read_baselines(folder, split, facts) for split in splits}
    knn = None
    if not all(kept.values()):
        trained = loaded.cfg
        stored = StoredUsers(folder, trained.source, trained.features)
        knn = ItemKNN.fit(stored, trained.positive_bits, trained.split.train_end_ms, maps)

    parts = _plan_parts(manifest, kept)
    scorers = ItemScorers(items, knn, users or {})
    if rank_parts is None:
        ranked = (rank_part(rows, loaded, scorers, part) for part in parts)
    else:
        ranked = rank_parts(scorers, parts)

    totals: dict[str, PartMetrics] = {}
    for part, metrics in zip(parts, ranked, strict=True):
        whole = totals.setdefault(part.split, _new_metrics(settings.cutoffs, maps, metrics))
        for name, values in metrics.items():
            whole[name].merge(values)

    found: dict[str, float] = {}
    for split, metrics in totals.items():
        own, baselines = metrics[""], kept[split]
        if own.num_users == 0:
            logger.warning("%s: no user took an item; there are no retrieval metrics", split)
            continue
        if not baselines:
            baselines = _baseline_results(metrics)
            keep_baselines(folder, split, facts, baselines)
        values = own.result() | baselines
        found |= {f"{split}/{key}": value for key, value in values.items()}
    return found


def _plan_parts(
    manifest: store.Manifest, kept: Mapping[str, dict[str, float]]
) -> list[RetrievalPart]:
    """Every bucket in each split; with the baselines where none of theirs are `kept`."""
    parts = []
    for split, baselines in kept.items():
        for bucket, entry in enumerate(manifest.buckets):
            parts.append(RetrievalPart(split, bucket, entry.rows, with_baselines=not baselines))
    return parts


def _baseline_results(metrics: PartMetrics) -> dict[str, float]:
    """`popularity/hr_10` and so on."""
    found = {}
    for name in BASELINES:
        found |= {f"{name}{key}": value for key, value in metrics[name].result().items()}
    return found


def rank_part(
    rows: AskedRows, loaded: LoadedModel, scorers: ItemScorers, part: RetrievalPart
) -> PartMetrics:
    """The metrics of a part's users."""
    settings, maps = rows.settings, loaded.maps
    names = ("", *BASELINES) if part.with_baselines else ("",)
    metrics = _new_metrics(settings.cutoffs, maps, names)

    users, asked = asked_users(rows, loaded, part.split, part.bucket)
    vectors = scorers.users.get(part.split)
    for some in _user_chunks(asked, len(maps.item_ids), settings.batch_tokens):
        seen = seen_items(users, some.examples, maps)
        popularity = torch.from_numpy(maps.next_count[1:]).float()
        if vectors is None:
            chosen = _encode_users(loaded, users, some.examples, scorers.items.device)
        else:
            chosen = vectors.find(users.user_id[some.examples.user])
        scores = (chosen.to(scorers.items) @ scorers.items.T).cpu()

        # a user without a history has the list of popular items
        unknown = torch.from_numpy(some.examples.num_history == 0)
        lists = {"": torch.where(unknown[:, None], popularity, scores)}
        if part.with_baselines:
            assert scorers.knn is not None
            lists["popularity/"] = popularity.expand(len(some.examples), -1)
            lists["item_knn/"] = scorers.knn.scores(users, some.examples, maps)

        for name, ranked in lists.items():
            add_lists(metrics[name], ranked, some, seen, settings.remove_seen)
    return metrics


@dataclass(frozen=True, slots=True)
class RankingJob:
    """What the parts have in common where workers rank them."""

    job: EvaluationJob
    scorers: ItemScorers  # on the CPU


def rank_for(ranking: RankingJob, part: RetrievalPart) -> PartMetrics:
    """`rank_part` in any process."""
    job, scorers = ranking.job, ranking.scorers
    there = replace(scorers, items=scorers.items.to(job.device))
    rows = AskedRows(job.cfg.sequence_dir, job.cfg.split, job.cfg.evaluate)
    return rank_part(rows, load_for(job), there, part)


def _new_metrics(cutoffs: Sequence[int], maps: FeatureMaps, names: Iterable[str]) -> PartMetrics:
    metrics = {}
    for name in names:
        metrics[name] = RetrievalMetrics(maps.next_count[1:], cutoffs)
    return metrics


def asked_users(
    rows: AskedRows, loaded: LoadedModel, split: str, bucket: int
) -> tuple[UserEvents, Asked]:
    """The users of a bucket of the store, and those of them who took an item in the period."""
    own = loaded.cfg
    stored = StoredUsers(rows.sequence_dir, own.source, own.features)
    users = stored.read_bucket(stored.read_manifest(), bucket)
    period = split_bounds(rows.periods, split)
    return users, asked_items(users, period, rows.settings, own.positive_bits, loaded.maps)


def _user_chunks(asked: Asked, num_items: int, batch_tokens: int) -> Iterator[Asked]:
    """Users of at most `batch_tokens` history rows together, and few enough for their scores."""
    most = max(MOST_SCORES // max(num_items, 1), 1)
    numbered = Examples(np.arange(len(asked.examples)), *_bounds(asked.examples))
    for part in token_batches(numbered, batch_tokens):
        for begin in range(0, len(part), most):
            yield asked[part.user[begin : begin + most]]


def _bounds(examples: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    return (
        examples.history_begin,
        examples.history_end,
        examples.target_begin,
        examples.target_end,
    )


@torch.no_grad()
def _encode_users(
    loaded: LoadedModel, users: UserEvents, examples: Examples, device: torch.device
) -> Tensor:
    """[U, d]: what the users' histories are as vectors."""
    model = loaded.model
    assert model.retrieval is not None
    batch = history_batch(users, examples, loaded.maps, loaded.cfg.inputs)
    encoded = model.encode(batch.to(device), last_history=True)
    assert encoded.last_history_row is not None
    return model.retrieval.user_vectors(encoded.last_history_row)


def add_lists(
    metrics: RetrievalMetrics,
    scores: Tensor,
    asked: Asked,
    seen: tuple[np.ndarray, np.ndarray],
    without_seen: bool,
) -> None:
    """Rank these users' items by `scores`, [U, N], and add them; `without_seen`, what a user had
    before is not recommended.
    """
    scores = scores.clone(memory_format=torch.contiguous_format)  # ItemKNN's lie item by item
    if without_seen:
        remove_seen(scores, *(torch.from_numpy(part) for part in seen))

    num_items = scores.shape[1]
    counts = np.diff(asked.offsets)
    owner = np.repeat(np.arange(len(counts)), counts)
    known = asked.item >= 0
    ranks = np.full(len(asked.item), num_items)  # behind all: what is not known is not found
    pairs = torch.from_numpy(owner[known]), torch.from_numpy(asked.item[known])
    ranks[known] = positive_ranks(scores, *pairs).numpy()
    top = top_items(scores, min(max(metrics.cutoffs), num_items)).numpy()
    metrics.add(counts, ranks, asked.item[known], top)
