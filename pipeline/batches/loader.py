"""From the published sequences to batches, in an order that depends on the seed and the epoch
alone.

A step is a place in that order, so a run resumes by its epoch and step, with as many workers as it
likes. The store is never in memory whole: a rank's decks of one pool are, and those of the next one
while they are being read in the background. The examples of a deck are shuffled and cut into steps
(steps.py). A rank takes its decks' part of a step, or its share of that where several have the same
deck.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.example_batches import candidate_labels, example_batch, example_candidates
from pipeline.batches.examples import Examples, UserEvents, cut_histories, request_examples
from pipeline.batches.features import FeatureMaps
from pipeline.batches.steps import (
    StepPlan,
    cut_steps,
    deal_steps,
    deck_reader,
    deck_rng,
    load_plan,
    pool_order,
    rank_decks,
    token_counts,
)
from pipeline.batches.stochastic_length import LoadPlan
from pipeline.batches.stored import StoredUsers
from pipeline.config import RunConfig, SplitConfig
from pipeline.sequences import store

AHEAD = 4  # batches: enough to bridge the time in which a pool is read on the same core

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True, slots=True)
class Deck:
    """The examples of a pool that one reader reads, shuffled and cut into steps."""

    numbers: np.ndarray  # int64 [n], its examples among those of the pool
    loads: LoadPlan
    steps: list[np.ndarray]  # for each step the places of its examples in `numbers`
    seed: list[int]


@dataclass(frozen=True, slots=True)
class Pool:
    """One rank's decks of a pool."""

    number: int  # in the plan
    epoch: int
    users: UserEvents
    examples: Examples  # whole
    decks: list[Deck]


@dataclass(frozen=True, slots=True)
class Share:
    """One rank's part of a step."""

    users: UserEvents
    examples: Examples
    idle: bool  # no example was left for this rank: it takes another's, with weights of 0
    epoch: int = 0
    cut: np.ndarray | None = None  # bool [n]: histories cut by stochastic length; None: none


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
        self._made_of = cfg, maps, plan, rank, world_size
        self.cfg = cfg
        self.maps = maps
        self.plan = plan
        self.own = rank_decks(plan.readers, rank, world_size)
        self.manifest = store.read_manifest(cfg.sequence_dir)
        self.steps_per_epoch = plan.steps_per_epoch
        self._reader = ThreadPoolExecutor(1, "pool-reader")
        # the pool after the one in use, by its epoch and place
        self._coming: tuple[tuple[int, int], Future[Pool]] | None = None

    def __reduce__(self) -> tuple:
        """In another process it is a loader anew: threads and what they read stay here."""
        return TrainLoader, self._made_of

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        """The steps of `epoch` from `first_step` on."""
        shares = self.epoch_shares(epoch, first_step)
        return made_ahead(self.share_batch, shares, self.cfg.train.loader_threads)

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
        balance = self.cfg.train.stochastic_length.balance
        rows, cuts, others = [], [], []

        for deck in pool.decks:
            step = deck.steps[number]
            target = deck.loads.drawn_loads.sum() / len(deck.steps)
            seed = [*deck.seed, number]
            shares, cut = deck.loads.share_step(step, self.own.sharers, target, balance, seed)

            mine = shares[self.own.turn]
            rows.append(deck.numbers[step[mine]])
            cuts.append(cut[mine])
            others.append((deck.numbers[step[:1]], cut[:1]))

        idle = sum(map(len, rows)) == 0
        if idle:
            rows, cuts = _any_example(others)

        chosen = pool.examples[np.concatenate(rows)]
        cut = np.concatenate(cuts)
        examples = chosen
        if self.cfg.train.stochastic_length.rows == "newest":  # others go when the batch is made
            examples = cut_histories(pool.users, chosen, cut, self.cfg.train)
        return Share(pool.users, examples, idle, pool.epoch, cut)

    def share_batch(self, share: Share) -> SequenceBatch:
        """The batch of this rank's part of a step."""
        batch = example_batch(
            share.users,
            share.examples,
            self.maps,
            self.cfg,
            training=True,
            epoch=share.epoch,
            cut=share.cut,
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
            numbers = [deck.numbers for deck in held.decks]
        else:
            users, examples, numbers = self._read_decks(self.plan.pools[number])

        decks = []
        for deck, own in zip(self.own.decks, numbers, strict=True):
            rng = deck_rng(epoch, place, deck, self.cfg.seed)
            decks.append(self._shuffle(own, users, examples, self.plan.steps[number], rng))
        return Pool(number, epoch, users, examples, decks)

    def _read_decks(
        self, buckets: tuple[int, ...]
    ) -> tuple[UserEvents, Examples, list[np.ndarray]]:
        """Users and examples of this rank's decks, and the numbers of each deck's examples."""
        reader, readers = deck_reader(self.cfg), self.plan.readers
        found = reader.read_decks(self.manifest, buckets, self.own.decks, readers)
        users, examples, numbers = found

        if len(examples) == 0:
            # a step needs some example from every rank: one that is another's, with weights of 0
            users, examples, _ = reader.read_decks(self.manifest, buckets, [0], readers=1)
        return users, examples, numbers

    def _shuffle(
        self,
        numbers: np.ndarray,
        users: UserEvents,
        examples: Examples,
        num_steps: int,
        rng: np.random.Generator,
    ) -> Deck:
        train, own = self.cfg.train, examples[numbers]

        # the generator's order: cuts, then the order of examples, then the seed of the steps
        loads = load_plan(users, own, train, rng)
        order = rng.permutation(len(own))
        seed = rng.integers(2**32, size=4).tolist()

        sizes = None
        if train.batch_tokens is not None:
            whole, short = token_counts(users, own, train)
            sizes = np.where(loads.cut, short, whole)

        # by tokens one reader's steps too are made alike, else one of several alone
        dealing = train.stochastic_length.balance == "dealing"
        if dealing and (sizes is not None or self.plan.readers > 1):
            steps = deal_steps(order, loads.drawn_loads if sizes is None else sizes, num_steps)
        else:
            steps = cut_steps(order, sizes, num_steps)
        return Deck(numbers, loads, steps, seed)

    def _order(self, epoch: int) -> list[int]:
        return pool_order(len(self.plan.pools), epoch, self.cfg.seed)


def _any_example(
    others: list[tuple[np.ndarray, np.ndarray]],
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first example of a step, of another rank, and whether it is cut; one of another step
    where no deck of this rank has any.
    """
    for row, cut in others:
        if len(row):
            return [row], [cut]
    return [np.zeros(1, np.int64)], [np.zeros(1, bool)]


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

    def select(self, chosen: np.ndarray) -> "EvaluationBatch":
        """The columns of the candidates `chosen` alone, int64 [n]; the sequences as they are."""
        columns = {}
        for name in ("rows", "user_id", "item_id", "event_time", "labels", "known", "drawn"):
            columns[name] = getattr(self, name)[chosen]
        return replace(self, **columns)


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
    begin, end = split_bounds(cfg.split, split)
    stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)

    for users in stored.by_bucket():
        examples = request_examples(users, begin, end, cfg.examples.max_history)
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
    negatives, order_only_weight = cfg.examples.negatives, cfg.train.history_label_weight
    candidates = example_candidates(users, examples, maps, cfg.task_bits, negatives)
    labels, weight = candidate_labels(users.events, candidates, cfg.task_bits, order_only_weight)
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
