"""Lists for all users of the published sequences, on Ray Data: a task and a file per bucket.

model with its index + sequences → recommendations/bucket-00003.parquet …, recommendations.json
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.batches.examples import user_events
from pipeline.config import FeatureConfig, RunConfig, ServeConfig, UserError, from_dict, to_dict
from pipeline.files import staged_folder
from pipeline.index.folder import load_indexed
from pipeline.index.histories import history_before
from pipeline.model.inference.quantize import as_served
from pipeline.recommend.filters import FilterError, refuse_empty_ranges
from pipeline.recommend.offline import Audience, OfflineRecommender
from pipeline.recommend.retriever import Wish
from pipeline.recommend.tables import lists_table
from pipeline.sequences import store
from pipeline.sequences.dictionary import own_ids
from pipeline.sequences.workers import workers

SUMMARY = "recommendations.json"


@dataclass(frozen=True, slots=True)
class SharedRequest:
    """What all users have in common."""

    wish: Wish
    task: str  # to order by
    time_ms: int
    features: dict[str, int] = field(default_factory=dict)  # request column -> value


@dataclass(frozen=True, slots=True)
class BucketTask:
    """One bucket of users."""

    number: int
    rows: int


@dataclass(frozen=True, slots=True)
class BucketResult:
    """How many lists and items were written of a bucket's users."""

    users: int = 0  # each has a list
    by_popularity: int = 0  # users without history at the time
    empty: int = 0  # lists of no item
    items: int = 0

    @classmethod
    def total(cls, results: Sequence["BucketResult"]) -> "BucketResult":
        """The sums over several buckets."""
        sums = {}
        for count in fields(cls):
            sums[count.name] = sum(getattr(result, count.name) for result in results)
        return cls(**sums)


def recommend_everybody(
    cfg: RunConfig, model_dir: Path, request: SharedRequest, out: Path
) -> dict[str, Any]:
    """Write a list for each user to the folder `out`; returns its summary.

    A task reads the users of a few buckets and writes a file for each:

        sequences/bucket-00003.parquet    users 3, 8, …
        out/bucket-00003.parquet          user_id 3 place 0, 3 place 1, …, 8 place 0, …
        out/recommendations.json          the summary, for all buckets

    The folder takes the place of an earlier one in one step.

    Raises:
        UserError: the model has no index, the wish cannot be answered, or `out` holds something
            else.
    """
    if out.exists() and not (out / SUMMARY).exists():
        raise UserError(f"--out: {out} holds no {SUMMARY}: it is not a folder of lists")
    recommender = load_recommender(cfg.serve, model_dir)
    check_request(recommender, request)

    manifest = store.read_manifest(cfg.sequence_dir)
    buckets = enumerate(manifest.buckets)
    tasks = [BucketTask(number, bucket.rows) for number, bucket in buckets]

    with staged_folder(out) as stage, workers(cfg.ray, cfg.runs_dir, floats=True) as run:
        write = partial(
            recommend_bucket,
            settings=to_dict(cfg),
            model_dir=model_dir.absolute(),
            request=request,
            folder=stage.absolute(),
        )
        results: list[BucketResult] = run("recommending", write, tasks)

        total = BucketResult.total(results)
        summary = {
            "index_version": recommender.index.version,
            "sequences": manifest.digest,
            "time_ms": request.time_ms,
            "ordered_by": request.task,
            "users": total.users,
            "items": total.items,
            "users_by_popularity": total.by_popularity,
            "empty_lists": total.empty,
        }
        (stage / SUMMARY).write_text(json.dumps(summary, indent=2))
    return summary


def check_request(recommender: OfflineRecommender, request: SharedRequest) -> None:
    """Tell a mistake before any worker starts.

    Raises:
        UserError: a task, a request column or an item column that the version does not have.
    """
    cfg = recommender.loaded.cfg
    check_settings(cfg.tasks, cfg.features, request)
    try:
        recommender.retriever.check_wish(request.wish)
    except ValueError as error:
        raise UserError(str(error) or "diversify.mmr: the index holds no item vectors") from None


def check_settings(tasks: Sequence[str], features: FeatureConfig, request: SharedRequest) -> None:
    """Tell a mistake that shows without the version's files.

    Raises:
        UserError: a task or a request column that there is not, or a filter's range that nothing
            lies in.
    """
    if request.task not in tasks:
        raise UserError(f"order_by must be one of the tasks {list(tasks)}, got {request.task!r}")

    known = [name for name in features.request if name != "hour"]
    for name in request.features:
        if name not in known:
            raise UserError(f"request_features must be of {known}, got {name!r}")
    try:
        refuse_empty_ranges(request.wish.conditions)
    except FilterError as error:
        raise UserError(str(error)) from None


def load_recommender(cfg: ServeConfig, model_dir: Path) -> OfflineRecommender:
    """The version at `model_dir` in the number formats that `cfg` gives it.

    Raises:
        UserError: no whole model, or no index in it.
    """
    loaded, index = load_indexed(model_dir)
    as_served(loaded.model, cfg)
    if index is None:
        raise UserError(
            f"the model at {model_dir} has no item index: register it with index.enabled"
        )
    return OfflineRecommender(loaded, index, cfg)


def recommend_bucket(
    task: BucketTask,
    settings: dict[str, Any],
    model_dir: Path,
    request: SharedRequest,
    folder: Path,
) -> BucketResult:
    """The lists of one bucket's users, written to a file of `folder`."""
    cfg = from_dict(settings)
    recommender = load_recommender(cfg.serve, model_dir)
    trained = recommender.loaded.cfg

    # the bucket's users, read by the model's settings
    manifest = store.read_manifest(cfg.sequence_dir)
    table = store.read_bucket(cfg.sequence_dir, manifest, task.number)
    users = user_events(table, trained.source, trained.features)

    # each asks the same, at the same time
    num_users = len(users.user_id)
    times = np.full(num_users, request.time_ms)
    past = history_before(users, times, trained.examples.read_rows(cfg.serve.max_history))
    features = {}
    for name, value in request.features.items():
        features[name] = np.full(num_users, value, np.int32)

    audience = Audience(users.user_id, times, past, features)
    lists = recommender.recommend(audience, request.wish, request.task)

    # a user's id as the logs have it
    own = own_ids(cfg.sequence_dir, manifest, "user_id", users.user_id)
    written = lists_table(own.to_numpy(zero_copy_only=False), lists)
    pq.write_table(written, folder / f"bucket-{task.number:05d}.parquet")

    by_popularity = sum(one.by_popularity for one in lists)
    empty = sum(len(one.item_id) == 0 for one in lists)
    return BucketResult(len(lists), by_popularity, empty, items=written.num_rows)
