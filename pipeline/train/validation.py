"""Validation while training: the same few requests of the validation period each time, shared by
the ranks.

Exact metrics, not averages of parts: the ranks exchange their scores. Their number changes which of
them scores a request, never which requests are scored.
"""

import itertools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.distributed as dist

from pipeline.batches.examples import Examples, UserEvents, request_examples, user_events
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import EvaluationBatch, evaluation_batch, split_bounds, token_batches
from pipeline.config import RunConfig, UserError
from pipeline.model.heads import HeadMetrics
from pipeline.model.ranker import RankingModel
from pipeline.sequences import store


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
        bf16 = self.cfg.train.precision == "bf16"
        half = torch.autocast(device.type, torch.bfloat16, enabled=bf16)

        metrics = model.heads.new_metrics()
        for part, ours in self._shared_parts():
            with half:
                outputs = model(part.batch.to(device)).float().cpu().numpy()
            if ours:
                metrics.add(outputs, part)
        whole = merge_ranks(metrics, self.world_size)
        return summarise_sample(whole.result(), whole.names)

    def _shared_parts(self) -> Iterator[tuple[EvaluationBatch, bool]]:
        """Parts in turn to the ranks, and whether a part is this rank's own.

        A rank for which the last round has none scores another's: a forward pass over sharded
        tables needs all ranks.

            parts     0 1 2 3 4      two ranks
            rank 0    0   2   4
            rank 1      1   3   4    the last one not its own
        """
        parts = self._sampled_parts()
        while turn := list(itertools.islice(parts, self.world_size)):
            ours = self.rank < len(turn)
            users, part = turn[self.rank if ours else 0]
            yield evaluation_batch(users, part, self.maps, self.cfg), ours

    def _sampled_parts(self) -> Iterator[tuple[UserEvents, Examples]]:
        """`train.validate_requests` requests of the validation period in parts of
        `evaluate.batch_tokens`.

        Users fall to buckets by a hash, so all requests of some buckets are a sample of them all,
        and the others need not be read.
        """
        cfg = self.cfg
        manifest = store.read_manifest(cfg.sequence_dir)
        rng = np.random.default_rng([cfg.seed, 3])
        left = cfg.train.validate_requests
        for bucket in rng.permutation(len(manifest.buckets)).tolist():
            sequences = store.read_bucket(cfg.sequence_dir, manifest, bucket)
            users = user_events(sequences, cfg.source, cfg.features)
            bounds = split_bounds(cfg.split, "val")
            examples = request_examples(users, *bounds, cfg.examples.max_history)
            chosen = np.sort(rng.permutation(len(examples))[:left])
            for part in token_batches(examples[chosen], cfg.evaluate.batch_tokens):
                yield users, part

            left -= len(chosen)
            if left == 0:
                return

        if left == cfg.train.validate_requests:
            raise UserError(
                "split.t_val: the val period holds no request, so train.validate_every has nothing "
                "to score"
            )


def merge_ranks(metrics: HeadMetrics, world_size: int) -> HeadMetrics:
    """The metrics of all ranks' rows, in the order of the ranks."""
    if world_size == 1:
        return metrics

    parts: list[HeadMetrics] = [metrics] * world_size
    dist.all_gather_object(parts, metrics)
    first, *others = parts
    for other in others:
        first.merge(other)
    return first


def summarise_sample(found: dict[str, float], names: Sequence[str]) -> dict[str, float]:
    """`val_sample/ne/<task>` and so on for the metrics `names`, and the mean of each over the tasks
    whose sample has both classes (NaN where none has).

        found     ne/is_click 0.8, ne/is_like NaN
        result    val_sample/ne/is_click 0.8, val_sample/ne/is_like NaN, val_sample/ne 0.8
    """
    values: dict[str, float] = {}
    defined: dict[str, list[float]] = {name: [] for name in names}
    for key, value in found.items():
        name, _ = key.split("/", 1)
        if name in defined:
            values[f"val_sample/{key}"] = value
            if not math.isnan(value):
                defined[name].append(value)

    for name, of_tasks in defined.items():
        values[f"val_sample/{name}"] = float(np.mean(of_tasks)) if of_tasks else math.nan
    return values
