"""Several ranks that train from a store of sequences through `TrainLoader`: cases of
`benchmarks.training.sharding`.

- "loader": users of one length, steps of as many tokens.
- "loads": users of Zipf lengths under stochastic length, steps of as many examples, which the ranks
  share as `train.stochastic_length.balance` says. A step waits for the rank with the most tokens.
"""

import argparse
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from benchmarks.training.collate import NUM_ITEMS, bench_config, make_maps
from benchmarks.training.cpu_step import StopAfter
from benchmarks.training.example_time import fit_times, some_examples, time_batches
from benchmarks.training.feeding import publish
from benchmarks.training.load_balance import zipf_lengths
from benchmarks.training.model import SEMI_LOCAL, model_config
from benchmarks.training.ranks import Ranks, temporary_folder, timed_run
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import StepPlan, step_plan
from pipeline.config import RunConfig, StochasticLengthConfig
from pipeline.train import loop

Case = tuple[str, Callable[[], dict[str, Any] | None]]
MAX_TARGETS = 64  # of a pass
BALANCES = "none", "dealing", "sampling"
BY_TIME = "loads: dealing by measured time"
TIMED_ROUNDS = 1  # of batches of all kinds
ALPHA = 1.6  # of stochastic length
EPOCH_STEPS = 20  # about
BALANCE_STEPS = 200  # over which the imbalance is counted, without training


def loader_config(options: argparse.Namespace, folder: Path, ranks: Ranks) -> RunConfig:
    """A store in `folder`, and how all ranks train on it, `options.events` tokens each a step."""
    cut = {"truncate_after_layer": max(options.layers // 3, 1), "truncate_to": 1024}
    settings = {"attention": SEMI_LOCAL, **cut}
    like = model_config(settings, options.layers, options.heads, options.width)
    cfg = replace(bench_config(name="loader", runs_dir=str(folder)), model=like.model)
    on_cpu = ranks.device == "cpu"
    train = replace(
        cfg.train,
        precision="fp32" if on_cpu else "bf16",
        use_gpu=not on_cpu,
        lr=1e-4,
        embedding_lr=1e-4,
        warmup_steps=0,
        batch_users=None,
        batch_tokens=options.events * ranks.size,
        max_targets_per_sequence=MAX_TARGETS,
        epochs=1000,
        log_every=max(options.steps // 10, 1),
        loader_process=True,
        loader_threads=2,
        num_workers=ranks.size,
        readers=ranks.size,
    )
    return replace(cfg, train=train)


def loader_maps(cfg: RunConfig) -> FeatureMaps:
    """Of the items of `publish`, no columns of theirs."""
    return replace(
        make_maps(),
        item_codes=np.arange(NUM_ITEMS + 1, dtype=np.int32)[:, None],
        vocab_sizes={"item_id": NUM_ITEMS + 1, "request.tab": 9, "request.hour": 25},
        base_rates=dict.fromkeys(cfg.tasks, 0.3),
        counts={},
    )


def timed_training(
    cfg: RunConfig, plan: StepPlan, steps: int, ranks: Ranks, alone: bool = False
) -> dict[str, Any]:
    """A run from the store: the loop, loader and steps of a training."""
    rank, world_size = (0, 1) if alone else (ranks.rank, ranks.size)
    maps, lines = loader_maps(cfg), []

    def train() -> tuple[list[dict], int]:
        watch = StopAfter(steps)
        loop.train(
            cfg,
            maps,
            TrainLoader(cfg, maps, plan, rank, world_size),
            "random",
            rank=rank,
            world_size=world_size,
            device=ranks.device,
            log=lambda step, values: lines.append(values),
            wishes=watch,
        )
        return lines, len(watch.clock)

    return timed_run(train, ranks) | {"tables": {}}


def loader_cases(options: argparse.Namespace, ranks: Ranks) -> Iterator[Case]:
    """One rank and all of them, each with its own part of the store."""
    folder = temporary_folder("loader")
    cfg = loader_config(options, folder, ranks)
    mean_pass = (options.length + MAX_TARGETS) / 2
    lengths = np.full(num_users(options, ranks, options.length, mean_pass), options.length)
    publish_once(cfg, lengths, folder, ranks)

    def run_alone(cuda_graphs: Literal["auto", "off"]) -> dict[str, Any] | None:
        one = {"batch_tokens": options.events, "num_workers": 1, "readers": 1}
        cfg_one = replace(cfg, train=replace(cfg.train, **one, cuda_graphs=cuda_graphs))
        plan = step_plan(cfg_one)
        return ranks.alone(lambda: timed_training(cfg_one, plan, options.steps, ranks, alone=True))

    yield "1 rank, loader", lambda: run_alone("off")
    if ranks.device != "cpu":
        # most of so few steps have a size that has not come before
        yield "1 rank, loader, CUDA graphs as they are recorded", lambda: run_alone("auto")
    if ranks.size > 1:
        plan = step_plan(cfg)
        yield "all ranks, loader", lambda: timed_training(cfg, plan, options.steps, ranks)
    ranks.alone(lambda: shutil.rmtree(folder))


def load_cases(options: argparse.Namespace, ranks: Ranks) -> Iterator[Case]:
    """All ranks under stochastic length, their loads balanced in every way there is."""
    if ranks.size == 1:
        return
    folder = temporary_folder("loads")
    longest = 4 * options.length
    lengths_config = StochasticLengthConfig(alpha=ALPHA, max_len=longest)
    cfg = loader_config(options, folder, ranks)
    # one reader: a rank can only share out what it knows
    cfg = replace(cfg, train=replace(cfg.train, readers=1, stochastic_length=lengths_config))
    lengths = zipf_users(options, ranks, longest)
    publish_once(cfg, lengths, folder, ranks)

    # of as many examples, on average the tokens that are asked for
    num_examples = int(np.ceil(lengths / MAX_TARGETS).sum())
    users_a_step = max(round(num_examples / step_plan(cfg).steps_per_epoch), ranks.size)
    even = replace(cfg.train, batch_tokens=None, batch_users=users_a_step)

    for balance in BALANCES:
        balanced = replace(lengths_config, balance=balance)
        balanced_cfg = replace(cfg, train=replace(even, stochastic_length=balanced))
        yield f"loads: {balance}", lambda cfg=balanced_cfg: load_case(cfg, options.steps, ranks)

    dealt = replace(lengths_config, balance="dealing")
    dealt_cfg = replace(cfg, train=replace(even, stochastic_length=dealt))
    yield BY_TIME, lambda: measured_load_case(dealt_cfg, options.steps, ranks)
    ranks.alone(lambda: shutil.rmtree(folder))


def load_case(cfg: RunConfig, steps: int, ranks: Ranks) -> dict[str, Any]:
    """Times and imbalance of a run of all ranks."""
    plan = step_plan(cfg)
    imbalance = count_imbalance(cfg, plan, ranks)
    return timed_training(cfg, plan, steps, ranks) | imbalance


def measured_load_case(cfg: RunConfig, steps: int, ranks: Ranks) -> dict[str, Any]:
    """The same, with loads that are the times of examples as measured here first, µs."""
    times_us = measured_times(cfg, ranks)
    by_time = replace(cfg.train.stochastic_length, load_times=tuple(times_us))
    cfg = replace(cfg, train=replace(cfg.train, stochastic_length=by_time))
    return load_case(cfg, steps, ranks) | {"load_times_us": times_us}


def measured_times(cfg: RunConfig, ranks: Ranks) -> list[float]:
    """The times of an example, of a token and of a token times the tokens on rank 0, µs."""

    def measure() -> np.ndarray:
        facts, times_ms = time_batches(cfg, loader_maps(cfg), *some_examples(cfg), TIMED_ROUNDS)
        return 1000 * fit_times(facts, times_ms)[1:]

    found = ranks.alone(measure)
    shared = torch.zeros(3, dtype=torch.float64, device=ranks.device)
    if found is not None:
        shared += torch.from_numpy(found).to(ranks.device)
    dist.broadcast(shared, 0)
    return shared.tolist()


def count_imbalance(cfg: RunConfig, plan: StepPlan, ranks: Ranks) -> dict[str, float]:
    """Tokens of a step's heaviest rank over those of the mean rank: the mean over steps, and the
    most.
    """
    loader = TrainLoader(cfg, loader_maps(cfg), plan, ranks.rank, ranks.size)
    shares = (share for epoch in range(cfg.train.epochs) for share in loader.epoch_shares(epoch))
    tokens = [float(share.examples.num_tokens.sum()) for share in islice(shares, BALANCE_STEPS)]

    heaviest = torch.tensor(tokens, dtype=torch.float64, device=ranks.device)
    mean = heaviest.clone()
    dist.all_reduce(heaviest, dist.ReduceOp.MAX)
    dist.all_reduce(mean)
    ratio = heaviest / (mean / ranks.size)
    return {
        "imbalance": float(ratio.mean()),
        "worst_imbalance": float(ratio.max()),
        "tokens_a_step": float(mean.mean()),
    }


def zipf_users(options: argparse.Namespace, ranks: Ranks, longest: int) -> np.ndarray:
    """Lengths of users, n with a probability proportional to 1 / n, the longest 64 times as long as
    the shortest.
    """
    shortest = max(longest // 64, 1)
    mean = (longest - shortest) / np.log(longest / shortest)
    num = num_users(options, ranks, mean, mean / 2)
    return zipf_lengths(num, 1.0, shortest, longest, np.random.default_rng(0))


def num_users(
    options: argparse.Namespace, ranks: Ranks, mean_length: float, mean_pass: float
) -> int:
    """Users of `mean_length` rows whose passes, of `mean_pass` tokens, are an epoch."""
    passes = mean_length / min(MAX_TARGETS, mean_length)
    tokens = EPOCH_STEPS * ranks.size * options.events
    return max(round(tokens / mean_pass / passes), 16 * ranks.size)


def publish_once(cfg: RunConfig, lengths: np.ndarray, folder: Path, ranks: Ranks) -> None:
    """Users of these lengths as a store that all ranks read."""

    def write() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        publish(cfg.sequence_dir, cfg, lengths, num_buckets=4 * ranks.size)

    ranks.alone(write)
