"""From the published sequences to batches, in an order that depends on the seed and the epoch
alone.

A step is a place in that order, so a run resumes by its epoch and step, with as many workers as it
likes. The store is never in memory whole: a pool of a few buckets is, and the next one while it is
being read in the background. Within a pool the examples are shuffled, cut into steps (steps.py),
and each step is shared out to the ranks.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.examples import (
    Examples,
    UserEvents,
    candidate_labels,
    cut_histories,
    example_batch,
    example_candidates,
    request_examples,
    user_events,
)
from pipeline.batches.features import FeatureMaps
from pipeline.batches.steps import (
    StepPlan,
    cut_steps,
    load_plan,
    pool_order,
    pool_rng,
    read_pool,
    token_counts,
)
from pipeline.batches.stochastic_length import LoadPlan
from pipeline.config import RunConfig, SplitConfig
from pipeline.sequences import store

AHEAD = 4  # batches: enough to bridge the time in which a pool is read on the same core

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Pool:
    """The examples of some buckets, shuffled and cut into steps."""

    number: int  # in the plan
    epoch: int
    users: UserEvents
    examples: Examples  # whole
    loads: LoadPlan
    steps: list[np.ndarray]  # the examples of each step
    seed: list[int]


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a step."""

    users: UserEvents
    examples: Examples
    idle: bool  # no example was left for this rank: it takes the step's first, with weights of 0
    epoch: int = 0


class TrainLoader:
    """Batches of one rank. All ranks take the same number of steps.

    Args:
        maps: of the training period.
        plan: of the sequences and `cfg`, `steps.step_plan`; the same on every rank.
        rank, world_size: this rank's share of every step.
    """

    def __init__(
        self, cfg: RunConfig, maps: FeatureMaps, plan: StepPlan, rank: int = 0, world_size: int = 1
    ) -> None:
        self.cfg = cfg
        self.maps = maps
        self.plan = plan
        self.rank = rank
        self.world_size = world_size
        self.manifest = store.read_manifest(cfg.sequence_dir)
        self.steps_per_epoch = plan.steps_per_epoch
        self._reader = ThreadPoolExecutor(1, "pool-reader")
        # the pool after the one in use, by its epoch and place
        self._coming: tuple[tuple[int, int], Future[Pool]] | None = None

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        """The steps of `epoch` from `first_step` on."""
        shares = self.epoch_shares(epoch, first_step)
        return made_ahead(self._batch, shares, self.cfg.train.loader_threads)

    def epoch_shares(self, epoch: int, first_step: int = 0) -> Iterator[Share]:
        """This rank's part of each step, of which the batches are made."""
        done = 0  # steps of the pools before
        for place, number in enumerate(self._order(epoch)):
            num_steps = self.plan.steps[number]

            # a run that goes on does not read the pools it has done
            if done + num_steps > first_step:
                pool = self._pool(epoch, place)
                for step in range(max(first_step - done, 0), num_steps):
                    yield self._share(pool, step)

            done += num_steps

    def _share(self, pool: Pool, number: int) -> Share:
        step = pool.steps[number]
        balance = self.cfg.train.stochastic_length.balance
        target = pool.loads.drawn_loads.sum() / len(pool.steps)
        seed = [*pool.seed, number]
        shares, cut = pool.loads.share_step(step, self.world_size, target, balance, seed)

        mine = shares[self.rank]
        idle = len(mine) == 0
        if idle:
            mine = np.zeros(1, np.int64)

        examples = cut_histories(pool.examples[step[mine]], cut[mine], self.cfg.train)
        return Share(pool.users, examples, idle, pool.epoch)

    def _batch(self, share: Share) -> SequenceBatch:
        batch = example_batch(
            share.users, share.examples, self.maps, self.cfg, training=True, epoch=share.epoch
        )

        if share.idle:
            assert batch.label_weight is not None
            batch = replace(batch, label_weight=batch.label_weight.zero_())
            if batch.next_weight is not None:
                batch = replace(batch, next_weight=batch.next_weight.zero_())
        return batch

    def _pool(self, epoch: int, place: int) -> Pool:
        """The pool at `place` of `epoch`; the one after it is prefetched in the background."""
        if self._coming is not None and self._coming[0] == (epoch, place):
            pool = self._coming[1].result()
        else:
            pool = self._read(epoch, place, None)

        following = (epoch, place + 1)
        if place + 1 == len(self.plan.pools):
            following = (epoch + 1, 0)

        self._coming = None
        if following[0] < self.cfg.train.epochs:
            self._coming = following, self._reader.submit(self._read, *following, pool)
        return pool

    def _read(self, epoch: int, place: int, held: Pool | None) -> Pool:
        number = self._order(epoch)[place]
        if held is not None and held.number == number:
            # the last of an epoch is the first of the next
            users, examples = held.users, held.examples
        else:
            users, examples = read_pool(self.cfg, self.manifest, self.plan.pools[number])

        # the generator's order: cuts, then the order of examples, then the seed of the steps
        rng = pool_rng(epoch, place, self.cfg.seed)
        loads = load_plan(examples, self.cfg.train, rng)
        order = rng.permutation(len(examples))
        seed = rng.integers(2**32, size=4).tolist()

        whole, short = token_counts(examples, self.cfg.train)
        tokens = np.where(loads.cut, short, whole)
        steps = cut_steps(order, tokens, self.plan.steps[number], self.cfg.train)
        return Pool(number, epoch, users, examples, loads, steps, seed)

    def _order(self, epoch: int) -> list[int]:
        return pool_order(len(self.plan.pools), epoch, self.cfg.seed)


def made_ahead(make: Callable[[T], U], items: Iterable[T], num_threads: int) -> Iterator[U]:
    """`make` of each item, in order, `AHEAD` of them made or being made while one is in use."""
    with ThreadPoolExecutor(num_threads, "batches") as pool:
        coming: deque[Future[U]] = deque()

        for item in items:
            coming.append(pool.submit(make, item))
            if len(coming) > max(AHEAD, num_threads):
                yield coming.popleft().result()

        while coming:
            yield coming.popleft().result()


@dataclass(frozen=True, slots=True)
class EvaluationBatch:
    """Sequences to score, and their candidates' ids, times and labels, row by row [C]."""

    batch: SequenceBatch
    rows: np.ndarray  # int64 [C], of the users' events; of a drawn item the row it stands beside
    user_id: np.ndarray  # int64 [C]
    item_id: np.ndarray  # int64 [C]
    event_time: np.ndarray  # int64 [C], the request's, ms UTC
    labels: np.ndarray  # float32 [C, tasks]
    known: np.ndarray  # bool [C, tasks]
    drawn: np.ndarray  # bool [C], items that were not observed: `examples.negatives`


def split_bounds(cfg: SplitConfig, split: str) -> tuple[int, int]:
    """[from, to) of the split "val" or "test" in ms UTC."""
    bounds = {
        "val": (cfg.val_ms, cfg.test_ms),
        "test": (cfg.test_ms, cfg.end_ms),
    }
    return bounds[split]


def evaluation_batches(cfg: RunConfig, maps: FeatureMaps, split: str) -> Iterator[EvaluationBatch]:
    """All requests of "val" or "test", prequential: the history holds every earlier row with its
    labels.
    """
    manifest = store.read_manifest(cfg.sequence_dir)
    begin, end = split_bounds(cfg.split, split)

    for index in range(len(manifest.buckets)):
        sequences = store.read_bucket(cfg.sequence_dir, manifest, index)
        users = user_events(sequences, cfg.source, cfg.features)
        examples = request_examples(users, begin, end)
        for part in token_batches(examples, cfg.evaluate.batch_tokens):
            yield evaluation_batch(users, part, maps, cfg)


def evaluation_batch(
    users: UserEvents,
    examples: Examples,
    maps: FeatureMaps,
    cfg: RunConfig,
    *,
    shared: bool = False,
) -> EvaluationBatch:
    """The candidates of these examples; `shared` where one example holds several requests."""
    candidates = example_candidates(users, examples, maps, cfg)
    labels, weight = candidate_labels(users.events, candidates, cfg)
    batch = example_batch(
        users, examples, maps, cfg, training=False, shared=shared, candidates=candidates
    )

    rows = candidates.rows
    return EvaluationBatch(
        batch=batch,
        rows=rows,
        user_id=np.repeat(users.user_id[examples.user], np.diff(candidates.offsets)),
        item_id=candidates.item_id,
        event_time=users.events.event_time[users.request_begin[rows]],
        labels=labels,
        known=weight > 0,
        drawn=candidates.drawn,
    )


def token_batches(examples: Examples, batch_tokens: int) -> Iterator[Examples]:
    """Runs of examples of at most `batch_tokens` tokens, one example at least; similar lengths
    together.

        tokens by length    2   3   3   5   9       batch_tokens = 8
        batches             [2  3   3] [5] [9]
    """
    order = np.argsort(examples.num_tokens, kind="stable")
    total = np.cumsum(examples.num_tokens[order])

    begin = 0
    while begin < len(order):
        used = total[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(total, used + batch_tokens, side="right")))
        yield examples[order[begin:end]]
        begin = end
