"""Validation while training: the same few requests of the validation period each time, shared by
the ranks.

Exact metrics, not averages of parts: the ranks exchange their scores. Their number changes which of
them scores a request, never which requests are scored.
"""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.distributed as dist

from pipeline.batches.examples import Examples, UserEvents, request_examples, user_events
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import EvaluationBatch, evaluation_batch, split_bounds, token_batches
from pipeline.config import RunConfig, UserError
from pipeline.evaluate.metrics import TaskMetrics
from pipeline.model.ranker import RankingModel
from pipeline.sequences import store

METRICS = ("ne", "auc", "gauc")


class Validator:
    """Calling it with a model gives `val_sample/ne/<task>` and so on, and `val_sample/ne`, the mean
    over tasks.

    Every rank calls it at the same step, and all get the same numbers.
    """

    def __init__(
        self,
        cfg: RunConfig,
        maps: FeatureMaps,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.cfg, self.maps, self.device = cfg, maps, device
        self.rank, self.world_size = rank, world_size

    @torch.no_grad()
    def __call__(self, model: RankingModel) -> dict[str, float]:
        """Raises UserError where the validation period holds no request."""
        model.eval()
        device = torch.device(self.device)
        half = torch.autocast(
            device.type, torch.bfloat16, enabled=self.cfg.train.precision == "bf16"
        )
        counted = [TaskMetrics() for _ in self.cfg.tasks]
        for part, ours in _shared(
            _sampled(self.cfg), self.maps, self.cfg, self.rank, self.world_size
        ):
            with half:
                logits = model(part.batch.to(device)).float().cpu().numpy()
            if ours:
                for i, task in enumerate(counted):
                    known = part.known[:, i]
                    task.add(logits[known, i], part.labels[known, i], part.user_id[known])
        return summary(dict(zip(self.cfg.tasks, merged(counted, self.world_size), strict=True)))


def merged(counted: list[TaskMetrics], world_size: int) -> list[TaskMetrics]:
    """The rows of all ranks, task by task, in the order of the ranks."""
    if world_size == 1:
        return counted
    parts: list[list[TaskMetrics]] = [[] for _ in range(world_size)]
    dist.all_gather_object(parts, counted)
    for task, *others in zip(*parts, strict=True):
        for other in others:
            task.merge(other)
    return parts[0]


def summary(counted: dict[str, TaskMetrics]) -> dict[str, float]:
    """Per task, and over the tasks whose sample has both classes (NaN where none has)."""
    results = {task: metrics.result() for task, metrics in counted.items()}
    values = {
        f"val_sample/{name}/{task}": found[name]
        for task, found in results.items()
        for name in METRICS
    }
    for name in METRICS:
        defined = [found[name] for found in results.values() if not math.isnan(found[name])]
        values[f"val_sample/{name}"] = float(np.mean(defined)) if defined else math.nan
    return values


def _sampled(cfg: RunConfig) -> Iterator[tuple[UserEvents, Examples]]:
    """`train.validate_requests` requests of the validation period in parts of
    `evaluate.batch_tokens`.

    Users fall to buckets by a hash, so all requests of some buckets are a sample of them all, and
    the others need not be read.
    """
    manifest = store.read_manifest(cfg.sequence_dir)
    rng = np.random.default_rng([cfg.seed, 3])
    left = cfg.train.validate_requests
    for bucket in rng.permutation(len(manifest.buckets)).tolist():
        users = user_events(store.read_bucket(cfg.sequence_dir, manifest, bucket), cfg)
        examples = request_examples(users, *split_bounds(cfg.split, "val"))
        chosen = np.sort(rng.permutation(len(examples))[:left])
        for part in token_batches(examples[chosen], cfg.evaluate.batch_tokens):
            yield users, part
        left -= len(chosen)
        if left == 0:
            return
    if left == cfg.train.validate_requests:
        raise UserError(
            "split.t_val: the val period holds no request, so train.validate_every has nothing to "
            "score"
        )


def _shared(
    parts: Iterator[tuple[UserEvents, Examples]],
    maps: FeatureMaps,
    cfg: RunConfig,
    rank: int,
    world_size: int,
) -> Iterator[tuple[EvaluationBatch, bool]]:
    """Parts in turn to the ranks, and whether a part is this rank's own.

    A rank for which the last round has none scores another's: a forward pass over sharded tables
    needs all ranks.
    """
    while turn := list(itertools.islice(parts, world_size)):
        ours = rank < len(turn)
        users, part = turn[rank if ours else 0]
        yield evaluation_batch(users, part, maps, cfg), ours
