"""Several GPUs of one host: the same losses however tables lie, then what sharded ones cost, and 1
rank against all.

    # measure, on GPUs if there are any → JSON; within ten minutes on a bare machine
    torchrun --nproc-per-node 2 -m benchmarks.training.sharding --table-gb 20 --events 262144

    # a try without GPUs
    torchrun --nproc-per-node 2 -m benchmarks.training.sharding --tiny --out /tmp/tiny.json

    # → the section of RESULTS.md
    python -m benchmarks.training.sharding --report FILE …

Random events; item ids are drawn evenly over the logarithm of their rank, as in Zipf's law, so that
a batch holds many rare ones. Every rank has a batch of the same size: twice the ranks train on
twice the events. What is measured for one rank runs on rank 0, while the others wait. The cases
named "loader" train from a store of sequences through `TrainLoader`, whose lengths differ; all
others from batches made before. It needs neither Ray nor MLflow.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.machine import environment
from benchmarks.report import table, write_run, write_section
from benchmarks.training.collate import NUM_ITEMS, bench_config, make_maps
from benchmarks.training.cpu_step import StopAfter
from benchmarks.training.feeding import publish
from benchmarks.training.model import SEMI_LOCAL, model_config, random_batch, vocabulary
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import RunConfig
from pipeline.train import loop
from pipeline.train.checkpoint import CheckpointFolder
from pipeline.train.placement import place_tables
from pipeline.train.sharding import ShardedEmbedding
from pipeline.train.trainee import Trainee

ROOT = Path(__file__).parents[1]
ITEM_DIM = 128
SHARDED = {"item_id": "sharded"}
ALL_SHARDED = {"default": "sharded"}


class Ranks:
    """This process among the others of torchrun; alone without it."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = (
            f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu"
        )
        if self.device != "cpu":
            torch.cuda.set_device(self.device)
        # multicast over NVLink needs a driver that not every machine of several GPUs has set up
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        if self.size > 1:
            own = None if self.device == "cpu" else torch.device(self.device)
            backend = "gloo" if own is None else "nccl"
            dist.init_process_group(backend, timeout=timedelta(minutes=30), device_id=own)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def alone(self, call: Callable[[], Any]) -> Any:
        """`call()` on rank 0, None on the others, which wait."""
        found = call() if self.rank == 0 else None
        self.wait()
        return found

    def all(self, true: bool) -> bool:
        if self.size == 1:
            return true
        flag = torch.tensor(int(true), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MIN)
        return bool(flag)


class RandomLoader:
    """`steps` steps over a few batches of `events` events in all, of which this rank has its share
    of the users.
    """

    def __init__(
        self, cfg: RunConfig, sizes: dict[str, int], maps: FeatureMaps, rank: int, world_size: int
    ) -> None:
        self.steps_per_epoch = sizes["steps"]
        made = (zipf_batch(cfg, sizes, maps.vocab_sizes["item_id"], seed) for seed in range(4))
        self.made = [share(batch, rank, world_size) for batch in made]

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        for step in range(first_step, self.steps_per_epoch):
            yield self.made[step % len(self.made)]


def zipf_batch(cfg: RunConfig, sizes: dict[str, int], num_items: int, seed: int) -> SequenceBatch:
    batch = random_batch(cfg, sizes["events"], sizes["length"], sizes["candidates"], seed)
    generator = torch.Generator().manual_seed(seed)
    rank = num_items ** torch.rand(batch.num_tokens, generator=generator, dtype=torch.float64)
    # Codes are in the order of item ids, not of popularity: else one block of rows would get most
    # of the requests.
    items = (rank.long() * 2_654_435_761 % num_items).int()
    return replace(batch, item_codes=torch.stack([items, batch.item_codes[:, 1]], dim=1))


def share(batch: SequenceBatch, rank: int, world_size: int) -> SequenceBatch:
    """The rank's users of a batch in which all users have as many events and candidates."""
    users = batch.num_sequences // world_size

    def of(tensor: Tensor) -> Tensor:
        return tensor.unflatten(0, (batch.num_sequences, -1))[
            rank * users : (rank + 1) * users
        ].flatten(0, 1)

    names = (
        "num_targets",
        "item_codes",
        "request_codes",
        "action_mask",
        "known_mask",
        "position",
        "gap_ms",
    )
    tensors = {
        name: of(getattr(batch, name)) for name in (*names, "user_codes", "labels", "label_weight")
    }
    return replace(batch, seq_offsets=batch.seq_offsets[: users + 1], **tensors)


def with_train(cfg: RunConfig, **train: Any) -> RunConfig:
    return replace(cfg, train=replace(cfg.train, **train))


def run(
    cfg: RunConfig,
    sizes: dict[str, int],
    ranks: Ranks,
    alone: bool = False,
    folder: Path | None = None,
    resume_at: int = 0,
) -> tuple[list[dict], Any]:
    """The values that the training loop logs, and the model; with `folder`, from and to the
    checkpoints in it.
    """
    maps = vocabulary(cfg)
    maps.vocab_sizes["item_id"] = sizes["items"]
    rank, world_size = (0, 1) if alone else (ranks.rank, ranks.size)
    lines: list[dict] = []
    checkpoints = CheckpointFolder(folder, 100, rank, world_size) if folder else None
    model = loop.train(
        cfg,
        maps,
        RandomLoader(cfg, sizes, maps, rank, world_size),
        "random",
        rank=rank,
        world_size=world_size,
        device=ranks.device,
        resume=checkpoints.read(checkpoints.at(resume_at)) if checkpoints and resume_at else None,
        checkpoints=checkpoints,
        log=lambda step, values: lines.append(values),
    )
    return lines, model


# Parity


def small_run(ranks: Ranks, items: int) -> tuple[RunConfig, dict[str, int]]:
    """50 steps of a small model in float32."""
    sizes = {"events": 256 * ranks.size, "length": 64, "candidates": 4, "steps": 50, "items": items}
    settings = {"attention": SEMI_LOCAL, "position_buckets": 256}
    cfg = model_config(settings, layers=2, heads=2, width=16)
    return with_train(
        cfg, precision="fp32", lr=1e-3, embedding_lr=1e-3, log_every=1, warmup_steps=5, epochs=1
    ), sizes


def parity(ranks: Ranks) -> dict[str, Any]:
    """Every placement, all ranks together; the sharded tables also against one rank alone."""
    cfg, sizes = small_run(ranks, items=997)

    def losses(**train: Any) -> list[float]:
        return [line["train/loss"] for line in run(with_train(cfg, **train), sizes, ranks)[0]]

    def furthest(a: list[float], b: list[float]) -> float:
        return max(abs(x - y) for x, y in zip(a, b, strict=True))

    whole, sharded, again = losses(), losses(tables=ALL_SHARDED), losses(tables=ALL_SHARDED)
    half = losses(tables=ALL_SHARDED, bf16_tables=("item_id",))
    one = ranks.alone(
        lambda: [line["train/loss"] for line in run(cfg, sizes, ranks, alone=True)[0]]
    )
    tables = [
        run(with_train(cfg, tables=ALL_SHARDED, host_state_tables=names), sizes, ranks)[1]
        for names in HOST
    ]
    blocks = [
        [m.weight for m in model.modules() if isinstance(m, ShardedEmbedding)] for model in tables
    ]
    return {
        "sharded_from_whole": furthest(sharded, whole),
        "sharded_from_one_rank": furthest(sharded, one) if ranks.rank == 0 else None,
        "two_runs_equal": sharded == again,
        "host_state_equal": ranks.all(all(torch.equal(a, b) for a, b in zip(*blocks, strict=True))),
        "bf16_rows_from_float32": furthest(half, sharded),
        "loss": [sharded[0], sharded[-1]],
    }


HOST = ((), ("item_id", "item.tag", "user.age", "request.tab"))


def resume(ranks: Ranks, table_gb: float) -> dict[str, Any]:
    """A run resumed twice at another number of ranks, against the unbroken run of one rank."""
    cfg, sizes = small_run(ranks, items=int(table_gb * 2**30 / (4 * 64)))
    cfg = with_train(cfg, tables=SHARDED, checkpoint_every=10)
    folder = temporary_folder("resume")
    ranks.alone(lambda: shutil.rmtree(folder, ignore_errors=True))
    one = ranks.alone(lambda: run(cfg, sizes, ranks, alone=True, folder=folder / "one")[0])
    begin = time.perf_counter()
    many = run(cfg, sizes, ranks, folder=folder / "one", resume_at=10)[0]
    again = ranks.alone(
        lambda: run(cfg, sizes, ranks, alone=True, folder=folder / "one", resume_at=30)[0]
    )
    found = {"seconds": time.perf_counter() - begin, "table_gb": table_gb}
    if ranks.rank == 0:
        unbroken = [line["train/loss"] for line in one]
        for key, lines, first in (("one_to_all", many, 10), ("one_to_all_to_one", again, 30)):
            pairs = zip([line["train/loss"] for line in lines], unbroken[first:], strict=True)
            found[key] = max(abs(a - b) / abs(b) for a, b in pairs)
    ranks.alone(lambda: shutil.rmtree(folder))
    return found


def temporary_folder(name: str) -> Path:
    """The same on all ranks."""
    return Path(tempfile.gettempdir()) / f"{name}-{os.environ.get('MASTER_PORT', 'alone')}"


# Times and bytes


class Traffic:
    """Messages of this rank, and the bytes that it sends to others in them, counted where
    `torch.distributed` is called.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sent = dict.fromkeys(("all_to_all_single", "all_reduce"), 0)
        self.messages = 0

    def __enter__(self) -> "Traffic":
        self.kept = {name: getattr(dist, name) for name in self.sent}
        for name in self.sent:
            setattr(dist, name, partial(self._call, name))
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self.kept.items():
            setattr(dist, name, call)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        self.messages += 1
        others, size = self.ranks.size - 1, self.ranks.size
        if name == "all_to_all_single":
            tensor, splits = args[1], args[3] if len(args) > 3 else None
            own = tensor.numel() // size if splits is None else splits[self.ranks.rank]
            self.sent[name] += (tensor.numel() - own) * tensor.element_size()
        else:  # as a ring does it
            self.sent[name] += 2 * args[0].nbytes * others // size
        return self.kept[name](*args, **options)


def speed(
    cfg: RunConfig, sizes: dict[str, int], ranks: Ranks, alone: bool = False
) -> dict[str, Any]:
    """A run over batches that were made before."""
    world_size = 1 if alone else ranks.size
    sizes = sizes | {"events": sizes["events"] * world_size}
    found = timed_run(lambda: (run(cfg, sizes, ranks, alone)[0], sizes["steps"]), ranks)
    placed = {name: _placed(place) for name, place in _plan(cfg, sizes, world_size).items()}
    return found | {"tables": placed}


def timed_run(call: Callable[[], tuple[list[dict], int]], ranks: Ranks) -> dict[str, Any]:
    """Medians over the lines of a run but the first two (compilation, the allocator's growth).

    `call` gives the lines and the number of steps.
    """
    cuda = ranks.device != "cpu"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with Traffic(ranks) as traffic:
        lines, steps = call()
    lines = lines[2:]

    names = "step_ms", "tokens_per_s", "data_wait_share", "message_wait_share"
    found: dict[str, Any] = {}
    for name in names:
        found[name] = statistics.median(line[f"train/{name}"] for line in lines)
    found["mb_sent_a_step"] = {name: sent / steps / 2**20 for name, sent in traffic.sent.items()}
    found["messages_a_step"] = traffic.messages / steps
    found["peak_gb"] = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return found


def loader_config(options: argparse.Namespace, folder: Path, ranks: Ranks) -> RunConfig:
    """A store in `folder` and how it is trained on, of `options.events` tokens a step and rank."""
    cut = {"truncate_after_layer": max(options.layers // 3, 1), "truncate_to": 1024}
    like = model_config(
        {"attention": SEMI_LOCAL, **cut}, options.layers, options.heads, options.width
    )
    cfg = replace(bench_config(name="loader", runs_dir=str(folder)), model=like.model)
    log_every = max(options.steps // 10, 1)
    return with_train(
        cfg,
        precision="fp32" if ranks.device == "cpu" else "bf16",
        use_gpu=ranks.device != "cpu",
        lr=1e-4,
        embedding_lr=1e-4,
        warmup_steps=0,
        batch_users=None,
        batch_tokens=options.events,
        max_targets_per_sequence=64,
        epochs=1000,
        log_every=log_every,
        loader_process=True,
        loader_threads=2,
    )


def publish_users(cfg: RunConfig, options: argparse.Namespace, ranks: Ranks) -> None:
    """Users of `options.length` events, whose passes are enough for some ten steps of all ranks."""
    mean_pass = (options.length + cfg.train.max_targets_per_sequence) / 2
    passes = options.length / min(cfg.train.max_targets_per_sequence, options.length)
    users = max(round(12 * ranks.size * options.events / mean_pass / passes), 16 * ranks.size)
    publish(cfg.sequence_dir, cfg, np.full(users, options.length), num_buckets=4 * ranks.size)


def loader_speed(
    cfg: RunConfig, options: argparse.Namespace, ranks: Ranks, alone: bool = False
) -> dict[str, Any]:
    """A run from the store: the loop, loader and steps of a training."""
    rank, world_size = (0, 1) if alone else (ranks.rank, ranks.size)
    tokens = options.events * world_size
    cfg = with_train(cfg, batch_tokens=tokens, num_workers=world_size, readers=world_size)
    plan, lines = step_plan(cfg), []
    maps = replace(
        make_maps(),
        item_codes=np.arange(NUM_ITEMS + 1, dtype=np.int32)[:, None],
        vocab_sizes={"item_id": NUM_ITEMS + 1, "request.tab": 9, "request.hour": 25},
        base_rates=dict.fromkeys(cfg.tasks, 0.3),
        counts={},
    )

    def train() -> tuple[list[dict], int]:
        watch = StopAfter(options.steps)
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


def _plan(cfg: RunConfig, sizes: dict[str, int], world_size: int) -> dict[str, Any]:
    return place_tables(cfg, vocabulary(cfg).vocab_sizes | {"item_id": sizes["items"]}, world_size)


def _placed(place: Any) -> dict[str, Any]:
    return {
        "sharded": place.sharded,
        "weight_bytes": place.weight_bytes,
        "state_bytes": place.state_bytes,
    }


def exchange(cfg: RunConfig, sizes: dict[str, int], ranks: Ranks) -> dict[str, float]:
    """The messages of one step by themselves, medians of 20, ms."""
    maps = vocabulary(cfg)
    maps.vocab_sizes["item_id"] = sizes["items"]
    trainee = Trainee(cfg, maps, ranks.device, ranks.rank, ranks.size)
    sizes = sizes | {"events": sizes["events"] * ranks.size}
    batch = share(zipf_batch(cfg, sizes, sizes["items"], 0), ranks.rank, ranks.size).to(
        ranks.device
    )
    tables, codes = trainee.sharded, trainee.model.encoder.table_codes(batch)
    assert tables is not None

    def timed(call: Callable[[], object]) -> float:
        ranks.wait()
        if ranks.device != "cpu":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        if ranks.device != "cpu":
            torch.cuda.synchronize()
        return 1000 * (time.perf_counter() - begin)

    times: dict[str, list[float]] = {"fetch_ms": [], "gradients_ms": []}
    distinct = 0
    for _ in range(23):
        times["fetch_ms"].append(timed(lambda: tables.fetch_rows(codes)))
        rows = [module.rows for module in tables.tables.values() if module.rows is not None]
        distinct = sum(map(len, rows))
        for row in rows:
            row.grad = torch.ones_like(row)
        times["gradients_ms"].append(timed(tables.take_gradients))
    return {name: statistics.median(values[3:]) for name, values in times.items()} | {
        "distinct_rows": distinct
    }


def measure(options: argparse.Namespace, ranks: Ranks) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and numbers, one case after another; on all ranks in the same order.

    No case begins after `options.minutes`: a machine is lent for so long.
    """
    for name, call in cases(options, ranks):
        late = time.monotonic() > options.end
        if not ranks.all(not late):
            if ranks.rank == 0:
                print(f"left out, no time: {name}", flush=True)
            continue
        yield name, call() or {}


def cases(
    options: argparse.Namespace, ranks: Ranks
) -> Iterator[tuple[str, Callable[[], dict[str, Any] | None]]]:
    if "loader" in options.only:
        yield from loader_cases(options, ranks)
    if "speed" in options.only:
        yield from table_cases(options, ranks)


def loader_cases(
    options: argparse.Namespace, ranks: Ranks
) -> Iterator[tuple[str, Callable[[], dict[str, Any] | None]]]:
    folder = temporary_folder("loader")
    cfg = loader_config(options, folder, ranks)
    ranks.alone(lambda: shutil.rmtree(folder, ignore_errors=True))
    ranks.alone(lambda: publish_users(cfg, options, ranks))

    yield "1 rank, loader", lambda: ranks.alone(lambda: loader_speed(cfg, options, ranks, True))
    if ranks.size > 1:
        yield "all ranks, loader", lambda: loader_speed(cfg, options, ranks)
    ranks.alone(lambda: shutil.rmtree(folder))


def table_cases(
    options: argparse.Namespace, ranks: Ranks
) -> Iterator[tuple[str, Callable[[], dict[str, Any] | None]]]:
    sizes = {name: getattr(options, name) for name in ("events", "length", "candidates", "steps")}
    cut = {"truncate_after_layer": max(options.layers // 3, 1), "truncate_to": 1024}
    cfg = model_config(
        {"attention": SEMI_LOCAL, **cut}, options.layers, options.heads, options.width
    )
    cfg = replace(cfg, features=replace(cfg.features, item_id_dim=ITEM_DIM))
    precision = "fp32" if ranks.device == "cpu" else "bf16"
    log_every = max(options.steps // 10, 1)
    cfg = with_train(cfg, precision=precision, log_every=log_every, epochs=1, shard_above_mb=2**30)
    sharded = with_train(cfg, tables=SHARDED)
    half = {"bf16_tables": ("item_id",), "host_state_tables": ("item_id",)}
    small = sizes | {"items": 100_000}
    large = sizes | {"items": int(options.table_gb * 2**30 / (4 * ITEM_DIM))}

    def one(tables: dict[str, int]) -> dict[str, Any] | None:
        return ranks.alone(lambda: speed(cfg, tables, ranks, alone=True))

    several = ranks.size > 1
    yield "1 rank, small table", lambda: one(small)
    if several:
        yield "all ranks, small table replicated", lambda: speed(cfg, small, ranks)
        yield "all ranks, small table sharded", lambda: speed(sharded, small, ranks)
    if options.table_gb <= options.most_gb:
        yield "1 rank, large table", lambda: one(large)
    if several:
        yield "all ranks, large table sharded", lambda: speed(sharded, large, ranks)
        yield (
            "all ranks, large table sharded, bf16 rows, moments on the host",
            lambda: speed(with_train(sharded, **half), large, ranks),
        )
        yield "messages alone, large table", lambda: exchange(sharded, large, ranks)


def right(found: dict[str, Any]) -> bool:
    """What must hold held, of what was looked at."""
    equal, resumed = found.get("parity"), found.get("resume")
    same = not equal or (
        equal["sharded_from_whole"] <= 1e-5
        and equal["two_runs_equal"]
        and equal["host_state_equal"]
    )
    return same and (
        not resumed or max(resumed["one_to_all"], resumed["one_to_all_to_one"]) <= 1e-3
    )


def verdict(found: dict[str, Any]) -> str:
    """What was looked at before anything was timed, in a line."""
    said = []
    if equal := found.get("parity"):
        said.append(f"sharded from whole {equal['sharded_from_whole']:.1e}")
        said.append(f"two runs equal {equal['two_runs_equal']}")
    if resumed := found.get("resume"):
        said.append(f"resumed at {found['ranks']} ranks within {resumed['one_to_all']:.1e}")
        said.append(f"and again at 1 within {resumed['one_to_all_to_one']:.1e}")
    return f"{'right' if right(found) else 'WRONG'}: {', '.join(said) or 'not looked at'}"


def summary(found: dict[str, Any]) -> str:
    rows = []
    for name, case in found["cases"].items():
        if "step_ms" not in case:
            continue
        of_one = times_one_rank(found["cases"], name)
        sent = sum(case["mb_sent_a_step"].values())
        tables = sum(place["weight_bytes"] for place in case["tables"].values()) / 2**30
        cells = (
            f"{case['step_ms']:.1f}",
            f"{case['tokens_per_s']:,.0f}",
            "–" if of_one is None else f"**{of_one:.2f}x**",
            # runs from before they were counted
            _share(case.get("message_wait_share")),
            _share(case["data_wait_share"]),
            f"{sent:.1f}",
            "–" if "messages_a_step" not in case else f"{case['messages_a_step']:.1f}",
            "–" if not case["tables"] else f"{tables:.2f}",
            "–" if case["peak_gb"] is None else f"{case['peak_gb']:.1f}",
        )
        rows.append([name, *cells])
    header = [
        "",
        "ms a step",
        "tokens/s",
        "of one rank's",
        "waiting for messages",
        "for data",
        "MB sent a rank and step",
        "messages",
        "GB of tables a rank",
        "peak GB",
    ]
    return table(header, rows)


def _share(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"


def times_one_rank(cases: dict[str, dict[str, Any]], name: str) -> float | None:
    """Tokens/s over those of one rank with the same data; None where there is no such case."""
    kinds = [kind for kind in ("small table", "large table", "loader") if kind in name]
    one = cases.get(f"1 rank, {kinds[0]}")
    if not one or name.startswith("1 rank"):
        return None
    return cases[name]["tokens_per_s"] / one["tokens_per_s"]


def section(runs: list[dict[str, Any]]) -> str:
    """Of several runs on one machine: what was compared is of the first that did, and each has its
    table of times.
    """
    machine = runs[0]["environment"]
    commands = dict.fromkeys(found["command"] for found in runs)
    parts = [
        "## Sharded tables",
        f"{', '.join(f'`{command}`' for command in commands)}: "
        f"{machine['device']}, {runs[0]['ranks']} ranks, {machine['cores']} cores, torch "
        f"{machine['torch']}.",
    ]
    equal = next((found["parity"] for found in runs if "parity" in found), None)
    resumed = next((found["resume"] for found in runs if "resume" in found), None)
    if equal:
        parts.append(
            "Sharded tables against whole ones over 50 steps: losses differ by "
            f"{equal['sharded_from_whole']:.1e} at "
            f"most (by {equal['sharded_from_one_rank']:.1e} from one rank's); two runs equal: "
            f"{equal['two_runs_equal']}"
            "; moments on the host equal to the device's bit for bit: "
            f"{equal['host_state_equal']}; bfloat16 item rows "
            f"move a loss by {equal['bf16_rows_from_float32']:.1e}."
        )
    if resumed:
        parts.append(
            "One rank's run gone on by all ranks, and then by one again (a table of "
            f"{resumed['table_gb']:g} GB): "
            f"losses within {resumed['one_to_all']:.1e} and {resumed['one_to_all_to_one']:.1e} of "
            "the unbroken run's."
        )
    return "\n\n".join(parts + [part for found in runs if found["cases"] for part in times(found)])


def times(found: dict[str, Any]) -> Iterator[str]:
    """What the cases of one run took."""
    sizes, cases = found["sizes"], found["cases"]
    yield (
        f"**{sizes['events']:,} events a rank** in histories of {sizes['length']:,}, "
        f"{sizes['layers']} layers, "
        f"d = {sizes['heads'] * sizes['width']}, item rows of {ITEM_DIM}, medians of the lines of "
        f"{sizes['steps']} "
        "steps of the training loop:"
    )
    yield summary(found)
    messages = cases.get("messages alone, large table")
    if messages:
        yield (
            f"The messages by themselves: {messages['fetch_ms']:.2f} ms to fetch "
            f"{messages['distinct_rows']:,} rows, "
            f"{messages['gradients_ms']:.2f} ms to send their gradients."
        )


PARTS = ["parity", "resume", "loader", "speed"]
TINY = {
    "events": 2048,
    "length": 64,
    "candidates": 4,
    "steps": 10,
    "layers": 2,
    "heads": 2,
    "width": 16,
    "table_gb": 0.01,
    "resume_gb": 0.001,
}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--table-gb", type=float, default=1.0, help="float32 rows of the large table")
    add("--most-gb", type=float, default=40.0, help="of a table that one rank holds alone")
    add("--events", type=int, default=65536, help="of a rank's batch")
    add("--length", type=int, default=4096, help="events a user")
    add("--candidates", type=int, default=16, help="a user")
    add("--steps", type=int, default=60, help="of a run")
    add("--layers", type=int, default=12)
    add("--heads", type=int, default=4)
    add("--width", type=int, default=128, help="of a head")
    add("--resume-gb", type=float, default=0.01, help="of the table in the resumed runs")
    add("--tiny", action="store_true", help="the sizes of a try without GPUs")
    add("--only", nargs="+", choices=PARTS, default=PARTS)
    add("--minutes", type=float, default=8.0, help="after which no case begins")
    add("--out", type=Path, help="JSON; sharding.json in $OUT, or under benchmarks/runs")
    add("--report", type=Path, nargs="+", metavar="FILE", help="write RESULTS.md and end")
    options = parser.parse_args()
    if options.tiny:
        vars(options).update(TINY)
    options.end = time.monotonic() + 60 * options.minutes
    return options


def main() -> None:
    options = read_options()
    if options.report:
        runs = [json.loads(file.read_text()) for file in options.report]
        write_section("sharding", section(runs))
        return

    out = options.out or Path(os.environ.get("OUT", ROOT / "runs")) / "sharding.json"
    ranks = Ranks()
    arguments = " ".join(sys.argv[1:])
    sizes = ("events", "length", "candidates", "steps", "layers", "heads", "width", "table_gb")
    found: dict[str, Any] = {
        "command": f"torchrun --nproc-per-node {ranks.size} -m benchmarks.training.sharding "
        f"{arguments}".strip(),
        "environment": environment(ranks.device.split(":")[0]),
        "ranks": ranks.size,
        "sizes": {name: getattr(options, name) for name in sizes},
        "cases": {},
    }

    def keep(name: str, numbers: dict[str, Any]) -> None:
        """What is measured stays, whatever comes after."""
        if ranks.rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            write_run(out, found)
            print(name, json.dumps(numbers), flush=True)

    checks = {"parity": parity, "resume": lambda ranks: resume(ranks, options.resume_gb)}
    for name, check in checks.items():
        if name in options.only:
            found[name] = check(ranks)
            keep(name, found[name])
    for name, numbers in measure(options, ranks):
        found["cases"][name] = numbers
        keep(name, numbers)

    if ranks.rank == 0:
        print(f"\n{verdict(found)}\n\n{summary(found)}", flush=True)
    if ranks.size > 1:
        dist.destroy_process_group()
    raise SystemExit(ranks.rank == 0 and not right(found))


if __name__ == "__main__":
    main()
