"""The steps of an epoch: pools of buckets, and into how many steps each is cut. Counted once,
before any worker.

    pool     a few buckets, which are in memory together
    deck     the users of a pool that one reader reads, shuffled and cut by itself; a pool has as
             many decks as the plan has readers
    step     the next part of every deck

A step is of the whole run, over all ranks: what it holds depends on the seed, the epoch, the data
and the number of readers, never on the number of workers. A rank reads its own decks and no others
(`rank_decks`).
"""

import hashlib
import itertools
import json
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.batches.events import offsets_of
from pipeline.batches.examples import (
    Examples,
    UserEvents,
    cut_histories,
    user_events,
    whole_examples,
)
from pipeline.batches.passes import run_here
from pipeline.batches.stochastic_length import (
    LoadPlan,
    deal_examples,
    example_loads,
    stochastic_cuts,
)
from pipeline.batches.stored import StoredUsers
from pipeline.config import RunConfig, SplitConfig, TrainConfig, to_dict
from pipeline.files import write_atomically
from pipeline.sequences import store

if typing.TYPE_CHECKING:  # it imports Ray
    from pipeline.sequences.workers import Workers

# what decides how many examples and draws there are
SETTINGS = ("seed", "source", "split", "tasks", "examples", "train")
# a row of `UserEvents`, request columns left out: seven int64, two int32 and a bool
ROW_BYTES = 65
DEALT_STEPS = 16
EXAMPLE_BYTES = 65  # a row of `Examples`, of `LoadPlan` and of the order


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Every epoch takes all pools, in an order of its own."""

    pools: tuple[tuple[int, ...], ...]  # numbers of buckets
    steps: tuple[int, ...]  # of each pool, the same in every epoch
    readers: int = 1  # decks of every pool

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.steps)


def pool_order(num_pools: int, epoch: int, seed: int) -> list[int]:
    """The pools of `epoch`, first to last."""
    return np.random.default_rng([seed, 2, epoch]).permutation(num_pools).tolist()


def deck_rng(epoch: int, place: int, deck: int, seed: int) -> np.random.Generator:
    """The generator of a deck of the pool at `place` in the order of `epoch`: it draws first the
    stochastic cuts, then the order.
    """
    of_deck = [deck] if deck else []
    return np.random.default_rng([seed, 1, epoch, place, *of_deck])


@dataclass(frozen=True, slots=True)
class DeckShare:
    """The decks of one rank, and its turn among the ranks that have the same ones."""

    decks: tuple[int, ...]
    turn: int
    sharers: int


def rank_decks(readers: int, rank: int, world_size: int) -> DeckShare:
    """Whole decks for each rank; where there are more ranks than decks, several share one.

    readers = 4, two ranks      decks 0 2 | 1 3
    readers = 2, four ranks     deck 0 | 1 | 0 | 1, each with two sharers
    """
    if world_size <= readers:
        return DeckShare(tuple(range(rank, readers, world_size)), 0, 1)
    deck = rank % readers
    return DeckShare((deck,), rank // readers, len(range(deck, world_size, readers)))


def deck_slices(num_buckets: int, readers: int, deck: int) -> list[tuple[int, float, float]]:
    """What a deck takes of the buckets of a pool: their places, and from and to which part of their
    users.

        3 buckets, 2 readers    deck 0: all of the first, (1, 0.0, 0.5)
                                deck 1: (1, 0.5, 1.0), all of the last
    """
    begin, end = deck * num_buckets / readers, (deck + 1) * num_buckets / readers
    slices = []
    for place in range(num_buckets):
        first, last = max(begin - place, 0.0), min(end - place, 1.0)
        if first < last:
            slices.append((place, first, last))
    return slices


@dataclass(frozen=True, slots=True)
class DeckReader:
    """Makes the training examples of decks; picklable.

    Args:
        stored: the published sequences.
        max_history: rows of a history at most, None for all.
    """

    stored: StoredUsers
    split: SplitConfig
    train: TrainConfig
    max_history: int | None

    def read_decks(
        self,
        manifest: store.Manifest,
        buckets: tuple[int, ...],
        decks: Sequence[int],
        readers: int,
    ) -> tuple[UserEvents, Examples, list[np.ndarray]]:
        """The users of these decks of the pool of `buckets`, their training examples, each with its
        whole history, and for each deck the numbers of its examples.
        """
        tables, num_users = [], []
        for deck in decks:
            own = _deck_table(self.stored.folder, manifest, buckets, deck, readers)
            tables.append(own)
            num_users.append(len(own))
        users = user_events(pa.concat_tables(tables), self.stored.source, self.stored.features)
        examples = whole_examples(users, self.split, self.train, self.max_history)

        numbers = []
        user_bounds = offsets_of(np.array(num_users))
        for first, last in itertools.pairwise(user_bounds):
            inside = (first <= examples.user) & (examples.user < last)
            numbers.append(np.flatnonzero(inside))
        return users, examples, numbers


def deck_reader(cfg: RunConfig) -> DeckReader:
    """The reader of a run's training."""
    stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
    return DeckReader(stored, cfg.split, cfg.train, cfg.examples.max_history)


def _deck_table(
    folder: Path, manifest: store.Manifest, buckets: tuple[int, ...], deck: int, readers: int
) -> pa.Table:
    tables = []
    for place, first, last in deck_slices(len(buckets), readers, deck):
        table = store.read_bucket(folder, manifest, buckets[place])
        begin, end = round(first * len(table)), round(last * len(table))
        tables.append(table.slice(begin, end - begin))
    return pa.concat_tables(tables)


def load_plan(
    users: UserEvents, examples: Examples, train: TrainConfig, rng: np.random.Generator
) -> LoadPlan:
    """The draws of stochastic length for these whole examples, and the load of each of them."""
    lengths = train.stochastic_length
    cut = stochastic_cuts(examples.num_history, lengths, rng)
    whole, short = token_counts(users, examples, train)
    return LoadPlan(cut, example_loads(whole, lengths), example_loads(short, lengths))


def token_counts(
    users: UserEvents, examples: Examples, train: TrainConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each of these whole examples as it is and with its history cut, float64 [n]."""
    everywhere = cut_histories(users, examples, np.ones(len(examples), bool), train)
    return examples.num_tokens.astype(np.float64), everywhere.num_tokens.astype(np.float64)


def step_plan(cfg: RunConfig, cache: Path | None = None, run: "Workers" = run_here) -> StepPlan:
    """The plan for the published sequences: one pass over the store, a deck a task of `run`, unless
    `cache` holds it for them and `cfg`.
    """
    manifest = store.read_manifest(cfg.sequence_dir)
    settings = to_dict(cfg)
    facts = [manifest.digest, {name: settings[name] for name in SETTINGS}]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    if cache is not None and cache.exists():
        saved = json.loads(cache.read_text())
        if saved["key"] == key:
            pools = tuple(map(tuple, saved["pools"]))
            return StepPlan(pools, tuple(saved["steps"]), saved["readers"])

    plan = _count_steps(deck_reader(cfg), cfg.seed, manifest, run)
    if cache is not None:
        content = {"key": key, **asdict(plan)}
        write_atomically(cache, json.dumps(content))
    return plan


def pool_memory(sequence_dir: Path, train: TrainConfig, plan: StepPlan) -> int:
    """About the most bytes of sequences in one worker: its decks of two pools, and of one more
    while Arrow columns are decoded.
    """
    manifest = store.read_manifest(sequence_dir)
    most_rows = 0
    for pool in plan.pools:
        rows = sum(manifest.buckets[i].rows for i in pool)
        most_rows = max(most_rows, rows)

    own = rank_decks(plan.readers, 0, train.num_workers)
    most_rows = most_rows * len(own.decks) // plan.readers

    row_bytes = ROW_BYTES + 4 * len(manifest.request_columns)
    if train.layout == "request":  # up to one example a row, else one in many rows
        row_bytes += EXAMPLE_BYTES
    return 3 * most_rows * row_bytes


@dataclass(frozen=True, slots=True)
class DeckWork:
    """A deck to be counted."""

    pool: int
    deck: int
    rows: int  # about


def _count_steps(
    reader: DeckReader, seed: int, manifest: store.Manifest, run: "Workers"
) -> StepPlan:
    # the buckets in order, as pools of nearly equal numbers
    train = reader.train
    readers = train.readers or 1
    num_buckets = len(manifest.buckets)
    num_pools = -(-num_buckets // (readers * train.pool_buckets))
    groups = np.array_split(np.arange(num_buckets), num_pools)
    pools = tuple(tuple(group.tolist()) for group in groups)

    work = []
    for number, buckets in enumerate(pools):
        rows = sum(manifest.buckets[i].rows for i in buckets)
        work += [DeckWork(number, deck, rows // readers) for deck in range(readers)]
    most_rows = max(task.rows for task in work)

    count = partial(count_deck, reader=reader, seed=seed, manifest=manifest, pools=pools)
    found = dict(run("counting steps", count, work, 3 * most_rows * ROW_BYTES))

    steps = []
    for number in range(num_pools):
        sizes = [found[task] for task in work if task.pool == number]
        steps.append(num_steps(sizes, train))
    return StepPlan(pools, tuple(steps), readers)


def count_deck(
    work: DeckWork,
    reader: DeckReader,
    seed: int,
    manifest: store.Manifest,
    pools: tuple[tuple[int, ...], ...],
) -> "tuple[DeckWork, DeckSize]":
    """The size of one deck, with the draws of every epoch."""
    train = reader.train
    readers = train.readers or 1
    users, examples, _ = reader.read_decks(manifest, pools[work.pool], [work.deck], readers)

    rngs = []
    for epoch in range(train.epochs):
        place = pool_order(len(pools), epoch, seed).index(work.pool)
        rngs.append(deck_rng(epoch, place, work.deck, seed))
    return work, deck_size(users, examples, rngs, train)


@dataclass(frozen=True, slots=True)
class DeckSize:
    """What the number of steps is counted from."""

    examples: int
    tokens: tuple[float, ...]  # by epoch, as its cuts are drawn; none where nobody asks


def deck_size(
    users: UserEvents, examples: Examples, rngs: list[np.random.Generator], train: TrainConfig
) -> DeckSize:
    """The size of a deck of these whole examples, given what each epoch draws its cuts from."""
    if train.batch_tokens is None:
        return DeckSize(len(examples), ())

    whole, short = token_counts(users, examples, train)
    tokens = []
    for rng in rngs:
        cut = stochastic_cuts(examples.num_history, train.stochastic_length, rng)
        tokens.append(float(np.where(cut, short, whole).sum()))
    return DeckSize(len(examples), tuple(tokens))


def num_steps(decks: list[DeckSize], train: TrainConfig) -> int:
    """Steps of a pool of these decks.

    Nearest to `train.batch_users` examples a step; or as few as keep the mean step within
    `train.batch_tokens` in the epoch that draws the most tokens. At most as many as the largest
    deck has examples, so that none is empty.
    """
    num_examples = sum(deck.examples for deck in decks)
    if num_examples == 0:
        return 0

    if train.batch_users is not None:
        wanted = round(num_examples / train.batch_users)
    else:
        assert train.batch_tokens is not None
        tokens = np.array([deck.tokens for deck in decks]).sum(axis=0)
        wanted = -int(-tokens.max() // train.batch_tokens)

    largest = max(deck.examples for deck in decks)
    return min(max(1, wanted), largest)


def cut_steps(order: np.ndarray, sizes: np.ndarray | None, num_steps: int) -> list[np.ndarray]:
    """The examples of a deck, in this `order`, as steps of nearly equal size.

    `sizes`, of each example by its number, are what is to be equal; None for the number of
    examples. A deck of fewer examples than steps has none left for the last ones.
    """
    if num_steps == 0:
        return []
    if sizes is None or len(order) < num_steps:
        return np.array_split(order, num_steps)
    return np.split(order, step_bounds(sizes[order], num_steps)[1:-1])


def deal_steps(order: np.ndarray, sizes: np.ndarray, num_steps: int) -> list[np.ndarray]:
    """As `cut_steps`, and evener: up to `DEALT_STEPS` steps in a row share out what they have
    together, the heaviest first.

    A rank that reads alone has no other to make up for its heavy examples in the same step, and
    steps of equal tokens take CUDA graphs of few sizes.
    """
    if num_steps == 0 or len(order) < num_steps:
        return cut_steps(order, None, num_steps)
    bounds = step_bounds(sizes[order], num_steps)

    # groups of nearly equal size: one left for the end would have nobody to share with
    num_groups = -(-num_steps // DEALT_STEPS)
    ends = np.arange(num_groups + 1) * num_steps // num_groups

    steps = []
    for first, last in itertools.pairwise(ends.tolist()):
        together = order[bounds[first] : bounds[last]]
        for dealt in deal_examples(sizes[together], last - first):
            steps.append(together[dealt])
    return steps


def step_bounds(tokens: np.ndarray, num_steps: int) -> np.ndarray:
    """The places to cut examples of these `tokens`, in their order, into steps of nearly equal
    tokens, int64 [steps + 1].

    A step has one example at least, and at most the mean of all steps plus its longest example.

        tokens          4   2   6   3   5       num_steps = 2
        ends            4   6   12  15  20      ideal = 10: nearest is 12
        steps           [4  2   6] [3   5]      bounds 0, 3, 5
    """
    assert len(tokens) >= num_steps
    ends = np.cumsum(tokens)
    ideal = ends[-1] * np.arange(1, num_steps) / num_steps
    # the nearest end of an example: its middle decides
    inner = np.searchsorted(ends - tokens / 2, ideal)

    # An example longer than a step would leave empty ones behind it: they take one example each.
    number = np.arange(num_steps + 1)
    bounds = np.concatenate([[0], inner, [len(tokens)]])
    bounds = np.maximum.accumulate(bounds - number) + number
    return np.minimum(bounds, len(tokens) - num_steps + number)
