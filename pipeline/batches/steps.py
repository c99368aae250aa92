"""The steps of an epoch: pools of buckets, and into how many steps each is cut. Counted once,
before any worker.

A step is of the whole run, over all ranks: what it holds depends on the seed, the epoch and the
data, never on the number of workers.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.batches.examples import (
    Examples,
    UserEvents,
    cut_histories,
    user_events,
    whole_examples,
)
from pipeline.batches.stochastic_length import LoadPlan, stochastic_cuts
from pipeline.config import RunConfig, TrainConfig, to_dict
from pipeline.files import write_atomically
from pipeline.sequences import store

# what decides how many examples and draws there are
SETTINGS = ("seed", "source", "split", "tasks", "train")
# a row of `UserEvents`, request columns left out: seven int64, two int32 and a bool
ROW_BYTES = 65
EXAMPLE_BYTES = 65  # a row of `Examples`, of `LoadPlan` and of the order


@dataclass(frozen=True, slots=True)
class StepPlan:
    """Every epoch takes all pools, in an order of its own."""

    pools: tuple[tuple[int, ...], ...]  # numbers of buckets
    steps: tuple[int, ...]  # of each pool, the same in every epoch

    @property
    def steps_per_epoch(self) -> int:
        return sum(self.steps)


def pool_order(num_pools: int, epoch: int, seed: int) -> list[int]:
    """The pools of `epoch`, first to last."""
    return np.random.default_rng([seed, 2, epoch]).permutation(num_pools).tolist()


def pool_rng(epoch: int, place: int, seed: int) -> np.random.Generator:
    """The generator of the pool at `place` in the order of `epoch`: it draws first the stochastic
    cuts, then the order.
    """
    return np.random.default_rng([seed, 1, epoch, place])


def read_pool(
    cfg: RunConfig, manifest: store.Manifest, buckets: tuple[int, ...]
) -> tuple[UserEvents, Examples]:
    """The users of these buckets and their training examples, each with its whole history."""
    tables = [store.read_bucket(cfg.sequence_dir, manifest, i) for i in buckets]
    users = user_events(pa.concat_tables(tables), cfg.source, cfg.features)
    return users, whole_examples(users, cfg.split, cfg.train)


def load_plan(examples: Examples, train: TrainConfig, rng: np.random.Generator) -> LoadPlan:
    """The draws of stochastic length for these whole examples, and the load of each of them."""
    lengths = train.stochastic_length
    cut = stochastic_cuts(examples.num_history, lengths, rng)
    whole, short = token_counts(examples, train)
    return LoadPlan(cut, whole**lengths.load_exponent, short**lengths.load_exponent)


def token_counts(examples: Examples, train: TrainConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each of these whole examples as it is and with its history cut, float64 [n]."""
    everywhere = cut_histories(examples, np.ones(len(examples), bool), train)
    return examples.num_tokens.astype(np.float64), everywhere.num_tokens.astype(np.float64)


def step_plan(cfg: RunConfig, cache: Path | None = None) -> StepPlan:
    """The plan for the published sequences: one pass over the store, unless `cache` holds it for
    them and `cfg`.
    """
    manifest = store.read_manifest(cfg.sequence_dir)
    settings = to_dict(cfg)
    facts = [manifest.digest, {name: settings[name] for name in SETTINGS}]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    if cache is not None and cache.exists():
        saved = json.loads(cache.read_text())
        if saved["key"] == key:
            return StepPlan(tuple(map(tuple, saved["pools"])), tuple(saved["steps"]))

    plan = _count_steps(cfg, manifest)
    if cache is not None:
        content = {"key": key, "pools": plan.pools, "steps": plan.steps}
        write_atomically(cache, json.dumps(content))
    return plan


def pool_memory(sequence_dir: Path, train: TrainConfig, plan: StepPlan) -> int:
    """About the most bytes of sequences in one worker: two pools, and one more while Arrow columns
    are decoded.
    """
    manifest = store.read_manifest(sequence_dir)
    most_rows = 0
    for pool in plan.pools:
        rows = sum(manifest.buckets[i].rows for i in pool)
        most_rows = max(most_rows, rows)

    row_bytes = ROW_BYTES + 4 * len(manifest.request_columns)
    if train.layout == "request":  # up to one example a row, else one in many rows
        row_bytes += EXAMPLE_BYTES
    return 3 * most_rows * row_bytes


def _count_steps(cfg: RunConfig, manifest: store.Manifest) -> StepPlan:
    # the buckets in order, as pools of nearly equal numbers
    num_buckets = len(manifest.buckets)
    num_pools = -(-num_buckets // cfg.train.pool_buckets)
    groups = np.array_split(np.arange(num_buckets), num_pools)
    pools = tuple(tuple(group.tolist()) for group in groups)

    orders = [pool_order(num_pools, epoch, cfg.seed) for epoch in range(cfg.train.epochs)]

    steps = []
    for number, buckets in enumerate(pools):
        _, examples = read_pool(cfg, manifest, buckets)
        rngs = []
        for epoch, order in enumerate(orders):
            rngs.append(pool_rng(epoch, order.index(number), cfg.seed))
        steps.append(num_steps(examples, rngs, cfg.train))
    return StepPlan(pools, tuple(steps))


def num_steps(examples: Examples, rngs: list[np.random.Generator], train: TrainConfig) -> int:
    """Steps of a pool of these whole examples, given what each epoch draws its cuts from.

    Nearest to `train.batch_users` examples a step; or as few as keep the mean step within
    `train.batch_tokens` in the epoch that draws the most tokens.
    """
    if len(examples) == 0:
        return 0
    if train.batch_users is not None:
        return max(1, round(len(examples) / train.batch_users))
    assert train.batch_tokens is not None

    whole, short = token_counts(examples, train)
    most_tokens = 0.0
    for rng in rngs:
        cut = stochastic_cuts(examples.num_history, train.stochastic_length, rng)
        most_tokens = max(most_tokens, float(np.where(cut, short, whole).sum()))

    fewest = -int(-most_tokens // train.batch_tokens)
    return min(max(1, fewest), len(examples))


def cut_steps(
    order: np.ndarray, tokens: np.ndarray, num_steps: int, train: TrainConfig
) -> list[np.ndarray]:
    """The examples of a pool, in this `order`, as steps of nearly equal size; `tokens`: of each
    example by number.
    """
    if num_steps == 0:
        return []
    if train.batch_users is not None:
        return np.array_split(order, num_steps)
    return np.split(order, step_bounds(tokens[order], num_steps)[1:-1])


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
