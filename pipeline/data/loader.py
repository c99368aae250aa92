"""From the published sequences to batches, in an order that depends on the seed and the epoch alone.

A step is a place in that order, so a run resumes by its step number. Buckets are read a few at a time, never the whole
store; within such a pool the examples are shuffled, cut into steps of nearly equal size, and each step is dealt out to
the ranks.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.config import RunConfig
from pipeline.data import store
from pipeline.data.batch import SequenceBatch
from pipeline.data.events import ranges
from pipeline.data.examples import (
    Examples,
    UserEvents,
    cut_histories,
    example_batch,
    request_examples,
    target_labels,
    user_events,
    whole_examples,
)
from pipeline.data.features import FeatureMaps
from pipeline.data.sampling import LoadPlan, stochastic_cuts

POOL_BUCKETS = 4  # buckets in memory at once: more shuffle better, fewer need less memory


class TrainLoader:
    """Batches of one rank. All ranks take the same number of steps.

    Args:
        cfg: `train.batch_users` sequences a rank and step.
        maps: of the training period.
        rank, world_size: this rank's share of every step.
    """

    def __init__(self, cfg: RunConfig, maps: FeatureMaps, rank: int = 0, world_size: int = 1) -> None:
        self.cfg, self.maps, self.rank, self.world_size = cfg, maps, rank, world_size
        self.manifest = store.read_manifest(cfg.sequence_dir)
        # Stochastic length moves no example, so an epoch has these steps whatever is drawn.
        buckets = range(len(self.manifest.buckets))
        self.bucket_examples = [len(whole_examples(self._read([i]), cfg)) for i in buckets]
        self.steps_per_epoch = sum(self._num_steps(pool) for pool in self._pools(0))

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        """The steps of `epoch` from `first_step` on."""
        done = 0
        for number, pool in enumerate(self._pools(epoch)):
            num_steps = self._num_steps(pool)
            if done + num_steps > first_step:
                yield from self._pool_batches(pool, num_steps, self._rng(epoch, number), max(first_step - done, 0))
            done += num_steps

    def _pool_batches(
        self, pool: list[int], num_steps: int, rng: np.random.Generator, first_step: int
    ) -> Iterator[SequenceBatch]:
        users = self._read(pool)
        examples = whole_examples(users, self.cfg)
        plan = load_plan(examples, self.cfg, rng)
        steps = np.array_split(rng.permutation(len(examples)), num_steps)
        target = plan.drawn.sum() / (num_steps * self.world_size)
        balance, seed = self.cfg.train.stochastic_length.balance, [*rng.integers(2**32, size=4).tolist(), self.rank]
        for number in range(first_step, num_steps):
            chosen, cut = plan.share(steps[number], self.rank, self.world_size, target, balance, [*seed, number])
            part = cut_histories(examples[chosen], cut, self.cfg)
            yield example_batch(users, part, self.maps, self.cfg, training=True)

    def _read(self, buckets: list[int]) -> UserEvents:
        tables = [store.read_bucket(self.cfg.sequence_dir, self.manifest, i) for i in buckets]
        return user_events(pa.concat_tables(tables), self.cfg)

    def _rng(self, epoch: int, pool: int) -> np.random.Generator:
        return np.random.default_rng([self.cfg.seed, 1, epoch, pool])

    def _pools(self, epoch: int) -> list[list[int]]:
        """Buckets in groups of nearly equal size; epochs differ in the order of the groups, not in their members."""
        num_buckets = len(self.manifest.buckets)
        groups = np.array_split(np.arange(num_buckets), -(-num_buckets // POOL_BUCKETS))
        order = np.random.default_rng([self.cfg.seed, 2, epoch]).permutation(len(groups))
        return [groups[i].tolist() for i in order]

    def _num_steps(self, pool: list[int]) -> int:
        """At least one example a rank and step; a pool too small for that is left out."""
        num_examples = sum(self.bucket_examples[i] for i in pool)
        step_size = self.world_size * self.cfg.train.batch_users
        return min(max(1, round(num_examples / step_size)), num_examples // self.world_size)


def load_plan(examples: Examples, cfg: RunConfig, rng: np.random.Generator) -> LoadPlan:
    """What stochastic length draws for these whole examples, and what each of them weighs."""
    lengths = cfg.train.stochastic_length
    cut = stochastic_cuts(examples.num_history, lengths, rng)
    everywhere = cut_histories(examples, np.ones(len(examples), bool), cfg)
    whole, short = (part.num_tokens.astype(np.float64) ** lengths.load_exponent for part in (examples, everywhere))
    return LoadPlan(cut, whole, short)


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """One request per sequence, and what its candidates are, row by row [C]."""

    batch: SequenceBatch
    user_id: np.ndarray  # int64 [C]
    item_id: np.ndarray  # int64 [C]
    event_time: np.ndarray  # int64 [C], the request's, ms UTC
    labels: np.ndarray  # float32 [C, tasks]
    known: np.ndarray  # bool [C, tasks]


def split_bounds(cfg: RunConfig, split: str) -> tuple[int, int]:
    """[from, to) of a split in ms UTC."""
    bounds = {"val": (cfg.split.val_ms, cfg.split.test_ms), "test": (cfg.split.test_ms, cfg.split.end_ms)}
    return bounds[split]


def evaluation_batches(cfg: RunConfig, maps: FeatureMaps, split: str) -> Iterator[EvaluationBatch]:
    """All requests of "val" or "test", prequential: the history holds every earlier row with its labels."""
    manifest = store.read_manifest(cfg.sequence_dir)
    for index in range(len(manifest.buckets)):
        users = user_events(store.read_bucket(cfg.sequence_dir, manifest, index), cfg)
        examples = request_examples(users, *split_bounds(cfg, split))
        for part in _token_batches(examples, cfg.evaluate.batch_tokens):
            yield evaluation_batch(users, part, maps, cfg)


def evaluation_batch(users: UserEvents, examples: Examples, maps: FeatureMaps, cfg: RunConfig) -> EvaluationBatch:
    rows, offsets = ranges(examples.target_begin, examples.target_end)
    labels, weight = target_labels(users.events, rows, cfg)
    lengths = np.diff(offsets)
    return EvaluationBatch(
        batch=example_batch(users, examples, maps, cfg, training=False),
        user_id=np.repeat(users.user_id[examples.user], lengths),
        item_id=users.events.item_id[rows],
        event_time=users.events.event_time[users.request_begin[rows]],
        labels=labels,
        known=weight > 0,
    )


def _token_batches(examples: Examples, batch_tokens: int) -> Iterator[Examples]:
    """Runs of examples of at most `batch_tokens` tokens, one example at least; similar lengths together."""
    order = np.argsort(examples.num_tokens, kind="stable")
    total = np.cumsum(examples.num_tokens[order])
    begin = 0
    while begin < len(order):
        used = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, used + batch_tokens, side="right")))
        yield examples[order[begin:end]]
        begin = end
