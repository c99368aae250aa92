"""Which steps an epoch has: pools of buckets, and into how many steps each is cut. Counted once,
before any worker.

A step is of the whole run, over all ranks: what it holds depends on the seed, the epoch and the
data, never on the number of workers.
"""

import hashlib
import json
import os
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
from pipeline.config import RunConfig, to_dict
from pipeline.sequences import store

# what decides how many examples and draws there are
SETTINGS = ("seed", "source", "split", "tasks", "train")
ROW_BYTES = 65  # of `UserEvents`, request columns left out: seven int64, two int32 and a bool
EXAMPLE_BYTES = 65  # of `Examples`, `LoadPlan` and the order


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
    """What the pool at `place` in the order of `epoch` draws from: first its stochastic cuts, then
    its order.
    """
    return np.random.default_rng([seed, 1, epoch, place])


def read_pool(
    cfg: RunConfig, manifest: store.Manifest, buckets: tuple[int, ...]
) -> tuple[UserEvents, Examples]:
    """The users of these buckets and their training examples, each with its whole history."""
    tables = [store.read_bucket(cfg.sequence_dir, manifest, i) for i in buckets]
    users = user_events(pa.concat_tables(tables), cfg)
    return users, whole_examples(users, cfg)


def load_plan(examples: Examples, cfg: RunConfig, rng: np.random.Generator) -> LoadPlan:
    """What stochastic length draws for these whole examples, and what each of them weighs."""
    lengths = cfg.train.stochastic_length
    cut = stochastic_cuts(examples.num_history, lengths, rng)
    whole, short = token_counts(examples, cfg)
    return LoadPlan(cut, whole**lengths.load_exponent, short**lengths.load_exponent)


def token_counts(examples: Examples, cfg: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of each of these whole examples as it is and with its history cut, float64 [n]."""
    everywhere = cut_histories(examples, np.ones(len(examples), bool), cfg)
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
    plan = _counted(cfg, manifest)
    if cache is not None:
        staged = cache.with_name(f".{cache.name}.staged")
        staged.write_text(json.dumps({"key": key, "pools": plan.pools, "steps": plan.steps}))
        os.replace(staged, cache)
    return plan


def pool_memory(cfg: RunConfig, plan: StepPlan) -> int:
    """About the most bytes of sequences in one worker: two pools, and one more while Arrow columns
    are decoded.
    """
    manifest = store.read_manifest(cfg.sequence_dir)
    most_rows = max(sum(manifest.buckets[i].rows for i in pool) for pool in plan.pools)
    # there up to one a row, else one in many rows
    examples = EXAMPLE_BYTES if cfg.train.layout == "request" else 0
    return 3 * most_rows * (ROW_BYTES + 4 * len(manifest.request_columns) + examples)


def _counted(cfg: RunConfig, manifest: store.Manifest) -> StepPlan:
    num_buckets = len(manifest.buckets)
    num_pools = -(-num_buckets // cfg.train.pool_buckets)
    pools = tuple(
        tuple(group.tolist()) for group in np.array_split(np.arange(num_buckets), num_pools)
    )
    orders = [pool_order(num_pools, epoch, cfg.seed) for epoch in range(cfg.train.epochs)]
    steps = []
    for number, buckets in enumerate(pools):
        _, examples = read_pool(cfg, manifest, buckets)
        places = [order.index(number) for order in orders]
        steps.append(
            num_steps(
                examples, [pool_rng(e, place, cfg.seed) for e, place in enumerate(places)], cfg
            )
        )
    return StepPlan(pools, tuple(steps))


def num_steps(examples: Examples, rngs: list[np.random.Generator], cfg: RunConfig) -> int:
    """Steps of a pool of these whole examples, given what each epoch draws its cuts from.

    Nearest to `train.batch_users` examples a step; or as few as keep the mean step within
    `train.batch_tokens` in the epoch that draws the most tokens.
    """
    if len(examples) == 0:
        return 0
    if cfg.train.batch_users is not None:
        return max(1, round(len(examples) / cfg.train.batch_users))
    assert cfg.train.batch_tokens is not None
    whole, short = token_counts(examples, cfg)
    cuts = (stochastic_cuts(examples.num_history, cfg.train.stochastic_length, rng) for rng in rngs)
    tokens = max(float(np.where(cut, short, whole).sum()) for cut in cuts)
    return min(max(1, -int(-tokens // cfg.train.batch_tokens)), len(examples))


def cut_steps(
    order: np.ndarray, tokens: np.ndarray, num_steps: int, cfg: RunConfig
) -> list[np.ndarray]:
    """The examples of a pool, in this `order`, as steps of nearly equal size; `tokens`: of each
    example by number.
    """
    if num_steps == 0:
        return []
    if cfg.train.batch_users is not None:
        return np.array_split(order, num_steps)
    return np.split(order, step_bounds(tokens[order], num_steps)[1:-1])


def step_bounds(tokens: np.ndarray, num_steps: int) -> np.ndarray:
    """Where to cut examples of these `tokens`, in their order, into steps of nearly equal tokens,
    int64 [steps + 1].

    A step has one example at least, and at most the mean of all steps plus its longest example.
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
