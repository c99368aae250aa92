"""The time of a training example by its tokens, for `train.stochastic_length.load_times`.

    python -m benchmarks.training.example_time --config configs/demo.yaml      # a minute on a CPU

The trainer's own steps are timed, forward to optimizers, over batches of examples of the run's
sequences: few and many, short ones and long ones together. A sum explains their times best:

    ms = step + once * examples + each * tokens + squared * tokens^2 summed over examples

`step` is every rank's and moves no load. Printed are the other three as a setting, how far the sum
is from the measured times, and how unequal in time the ranks of a step are where its examples are
dealt by their tokens and by these times. It needs published sequences (`jobs.build_sequences`) and
the device that will train, alone on it.
"""

import argparse
import time
from dataclasses import replace

import numpy as np
import torch

from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.example_batches import example_batch
from pipeline.batches.examples import Examples, UserEvents, cut_histories
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.steps import deck_reader, load_plan, step_plan
from pipeline.batches.stochastic_length import deal_examples, example_loads
from pipeline.config import RunConfig
from pipeline.sequences import store
from pipeline.train.trainee import Trainee

TAKES = 3  # of each batch, of which the shortest counts
MIXES = "short", "long", "any"
SHARES = 0.25, 0.5, 1.0, 1.5  # of the examples of a step


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--rounds", type=int, default=3, help="of all kinds of batches")
    parser.add_argument("--ranks", type=int, default=8, help="that the examples are dealt to")
    options = parser.parse_args()

    cfg = config.load(options.config, options.set)
    torch.set_num_threads(cfg.train.threads_per_worker)
    maps = fit_features(cfg)
    users, examples = some_examples(cfg)
    facts, times = time_batches(cfg, maps, users, examples, options.rounds)

    weights = fit_times(facts, times)
    off = np.abs(facts @ weights / times - 1)
    print(
        f"{len(times)} batches; the sum is off by {off.mean():.1%} on average, {off.max():.1%} most"
    )
    print(f"a step without examples: {weights[0]:.2f} ms")
    shown = ", ".join(f"{1000 * weight:.4g}" for weight in weights[1:])
    print(f"train.stochastic_length.load_times: [{shown}]  # microseconds")

    per_rank = max(round(step_size(cfg, examples) / cfg.train.num_workers), 1)
    by_tokens, by_time = unequal_times(examples, weights, options.ranks, per_rank)
    print(f"{options.ranks} ranks, {per_rank} examples each: a step's slowest over the mean")
    print(f"is {by_tokens:.3f} dealt by tokens, {by_time:.3f} dealt by these times")


def some_examples(cfg: RunConfig) -> tuple[UserEvents, Examples]:
    """Those of the first pool, with the cuts of stochastic length drawn."""
    manifest, plan = store.read_manifest(cfg.sequence_dir), step_plan(cfg)
    reader = deck_reader(cfg)
    users, examples, _ = reader.read_decks(manifest, plan.pools[0], [0], readers=1)
    cut = load_plan(users, examples, cfg.train, np.random.default_rng(cfg.seed)).cut
    return users, cut_histories(users, examples, cut, cfg.train)


def time_batches(
    cfg: RunConfig, maps: FeatureMaps, users: UserEvents, examples: Examples, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    """[batches, 4] what a batch has (1, examples, tokens, their squares), and its ms."""
    device = "cuda" if cfg.train.use_gpu else "cpu"
    trainee = Trainee(cfg, maps, device, 0, 1)
    rng = np.random.default_rng(cfg.seed)
    rank_examples = step_size(cfg, examples) / cfg.train.num_workers

    facts, times = [], []
    for number in range(-1, rounds):
        for mix in MIXES:
            for share in SHARES:
                size = max(round(share * rank_examples), 1)
                chosen = examples[choose(examples.num_tokens, mix, size, rng)]
                batch = example_batch(users, chosen, maps, cfg, training=True).to(device)
                spent = min(step_ms(trainee, batch) for _ in range(TAKES))
                if number < 0:  # kernels are compiled, memory grows
                    continue
                tokens = chosen.num_tokens.astype(np.float64)
                facts.append([1.0, len(chosen), tokens.sum(), (tokens**2).sum()])
                times.append(spent)
    return np.array(facts), np.array(times)


def step_size(cfg: RunConfig, examples: Examples) -> float:
    """Examples of a step over all ranks."""
    if cfg.train.batch_users is not None:
        return cfg.train.batch_users
    assert cfg.train.batch_tokens is not None
    return cfg.train.batch_tokens / examples.num_tokens.mean()


def choose(tokens: np.ndarray, mix: str, size: int, rng: np.random.Generator) -> np.ndarray:
    """`size` examples, of the shorter or the longer half or of all."""
    order = np.argsort(tokens, kind="stable")
    half = len(order) // 2
    of = {"short": order[:half], "long": order[half:], "any": order}[mix]
    return rng.choice(of, min(size, len(of)), replace=False)


def step_ms(trainee: Trainee, batch: SequenceBatch) -> float:
    """On a GPU by the clock; on one thread of a CPU its own time, whatever else runs there."""
    on_gpu = batch.seq_offsets.is_cuda
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    if on_gpu:
        torch.cuda.synchronize()
    begin = clock()
    trainee.step(batch, 0, 1)
    if on_gpu:
        torch.cuda.synchronize()
    return 1000 * (clock() - begin)


def fit_times(facts: np.ndarray, times: np.ndarray) -> np.ndarray:
    """[facts] the numbers of 0 or more whose sum explains the times best, each time as important
    as any other: what would come out below 0 is left out.
    """
    kept = np.ones(facts.shape[1], bool)
    while True:
        scaled = facts[:, kept] / times[:, None]
        found = np.linalg.lstsq(scaled, np.ones(len(times)), rcond=None)[0]
        if (found >= 0).all():
            weights = np.zeros(facts.shape[1])
            weights[kept] = found
            return weights
        kept[np.flatnonzero(kept)[found.argmin()]] = False


def unequal_times(
    examples: Examples, weights: np.ndarray, num_ranks: int, per_rank: int
) -> tuple[float, float]:
    """Time of a step's slowest rank over the mean, dealt by tokens and by times; mean over steps.

    `weights`: of a step, of an example, of a token and of a token times the tokens.
    """
    cfg = config.StochasticLengthConfig()
    by_time = replace(cfg, load_times=tuple(weights[1:].tolist()))
    tokens = examples.num_tokens
    size = num_ranks * per_rank
    found: list[list[float]] = [[], []]
    for first in range(0, max(len(tokens) - size, 1), size):
        step = tokens[first : first + size]
        cost = example_loads(step, by_time)
        for slowest, load in zip(found, (step.astype(np.float64), cost), strict=True):
            spent = []
            for rows in deal_examples(load, num_ranks):
                spent.append(weights[0] + cost[rows].sum())
            slowest.append(max(spent) / np.mean(spent))
    return float(np.mean(found[0])), float(np.mean(found[1]))


if __name__ == "__main__":
    main()
