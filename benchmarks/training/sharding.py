"""Several GPUs of one host: the same losses however tables lie, then what sharded ones cost, and 1
rank against all.

    # measure, on GPUs if there are any → JSON; within ten minutes on a bare machine
    torchrun --nproc-per-node 2 -m benchmarks.training.sharding --table-gb 20 100 --events 262144

    # a try without GPUs
    torchrun --nproc-per-node 2 -m benchmarks.training.sharding --tiny --out /tmp/tiny.json

    # → the section of RESULTS.md
    python -m benchmarks.training.sharding --report FILE …

Random events; item ids are drawn evenly over the logarithm of their rank, as in Zipf's law, so that
a batch holds many rare ones. Every rank has a batch of the same size: twice the ranks train on
twice the events. What is measured for one rank runs on rank 0, while the others wait. "Each for
itself" is all ranks at once without a message between them: what the machine allows. Steps of one
rank are CUDA graphs unless it says otherwise, those of several only where it says so. The cases of
the loader and of loads train from a store of sequences (loader_ranks.py), all others from batches
made before. A rank that dies is `benchmarks.training.killed_rank`. It needs neither Ray nor MLflow.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.machine import environment
from benchmarks.report import write_run, write_section
from benchmarks.training.loader_ranks import Case, load_cases, loader_cases
from benchmarks.training.model import SEMI_LOCAL, model_config, random_batch, vocabulary
from benchmarks.training.ranks import Ranks, free_memory, temporary_folder, timed_run
from benchmarks.training.sharding_report import right, section, summary, verdict
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.config import RunConfig
from pipeline.train import loop
from pipeline.train.checkpoint import CheckpointFolder
from pipeline.train.placement import place_tables
from pipeline.train.sharding import ShardedEmbedding
from pipeline.train.trainee import Trainee

ROOT = Path(__file__).parents[1]
ITEM_DIM = 128
SMALL_ITEMS = 100_000
SHARDED = {"item_id": "sharded"}
ALL_SHARDED = {"default": "sharded"}


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


def graphs_apart(ranks: Ranks) -> dict[str, Any]:
    """All ranks, their steps CUDA graphs, against steps launched kernel by kernel."""
    cfg, sizes = small_run(ranks, items=997)
    losses = []
    for setting in ("off", "on"):
        lines, _ = run(with_train(cfg, cuda_graphs=setting), sizes, ranks)
        losses.append([line["train/loss"] for line in lines])
    return {"furthest": max(abs(a - b) for a, b in zip(*losses, strict=True))}


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


# Times and bytes


def speed(
    cfg: RunConfig, sizes: dict[str, int], ranks: Ranks, alone: bool = False
) -> dict[str, Any]:
    """A run over batches that were made before."""
    world_size = 1 if alone else ranks.size
    sizes = sizes | {"events": sizes["events"] * world_size}
    found = timed_run(lambda: (run(cfg, sizes, ranks, alone)[0], sizes["steps"]), ranks)
    placed = {name: _placed(place) for name, place in _plan(cfg, sizes, world_size).items()}
    return found | {"tables": placed}


def speed_apart(cfg: RunConfig, sizes: dict[str, int], ranks: Ranks) -> dict[str, Any]:
    """Runs of all ranks at once that know nothing of each other: as slow as the slowest."""
    ranks.wait()
    found = speed(cfg, sizes, ranks, alone=True)
    slowest = ranks.largest(found["step_ms"])
    together = ranks.size * found["tokens_per_s"] * found["step_ms"] / slowest
    return found | {"step_ms": slowest, "tokens_per_s": together}


def _plan(cfg: RunConfig, sizes: dict[str, int], world_size: int) -> dict[str, Any]:
    vocab_sizes = vocabulary(cfg).vocab_sizes | {"item_id": sizes["items"]}
    return place_tables(cfg.features, cfg.model, cfg.train, vocab_sizes, world_size)


def _placed(place: Any) -> dict[str, Any]:
    return {
        "sharded": place.sharded,
        "weight_bytes": place.weight_bytes,
        "state_bytes": place.state_bytes,
    }


def exchange(cfg: RunConfig, sizes: dict[str, int], ranks: Ranks) -> dict[str, float]:
    """The messages of one step by themselves, medians of 20, ms."""
    free_memory(ranks)
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
        begin = time.monotonic()
        numbers = call() or {}
        yield name, numbers | {"seconds": time.monotonic() - begin}


def cases(options: argparse.Namespace, ranks: Ranks) -> Iterator[Case]:
    """What matters most comes first: a machine is lent for so long."""
    if "speed" in options.only:
        yield from small_cases(options, ranks)
    if "loader" in options.only:
        yield from loader_cases(options, ranks)
    with_tables = "speed" in options.only or "tables" in options.only
    table_sizes = sorted(options.table_gb) if with_tables else []
    for table_gb in table_sizes:
        if table_gb <= options.most_gb:
            yield from table_cases(options, table_gb, ranks)
    if "loads" in options.only:
        yield from load_cases(options, ranks)
    for table_gb in table_sizes:
        if table_gb > options.most_gb:  # the most likely to find no room, which ends everything
            yield from table_cases(options, table_gb, ranks)
    if "host" in options.only and ranks.size > 1:
        yield from host_cases(options, ranks)
    if "graphs" in options.only and ranks.size > 1 and ranks.device != "cpu":
        cfg = with_train(made_config(options, ranks), cuda_graphs="on")
        sizes = made_sizes(options, SMALL_ITEMS)
        name = "all ranks, small table replicated, CUDA graphs"
        yield name, lambda: speed(cfg, sizes, ranks)


def made_config(options: argparse.Namespace, ranks: Ranks) -> RunConfig:
    """The model that trains on batches made before, its tables whole on every rank."""
    cut = {"truncate_after_layer": max(options.layers // 3, 1), "truncate_to": 1024}
    settings = {"attention": SEMI_LOCAL, **cut}
    cfg = model_config(settings, options.layers, options.heads, options.width)
    cfg = replace(cfg, features=replace(cfg.features, item_id_dim=ITEM_DIM))
    precision = "fp32" if ranks.device == "cpu" else "bf16"
    log_every = max(options.steps // 10, 1)
    return with_train(cfg, precision=precision, log_every=log_every, epochs=1, shard_above_mb=2**30)


def made_sizes(options: argparse.Namespace, num_items: int) -> dict[str, int]:
    names = "events", "length", "candidates", "steps"
    return {name: getattr(options, name) for name in names} | {"items": num_items}


def items_of(table_gb: float) -> int:
    """Rows of an item table of so many GiB in float32."""
    return int(table_gb * 2**30 / (4 * ITEM_DIM))


def small_cases(options: argparse.Namespace, ranks: Ranks) -> Iterator[Case]:
    cfg, sizes = made_config(options, ranks), made_sizes(options, SMALL_ITEMS)
    sharded, launched = with_train(cfg, tables=SHARDED), with_train(cfg, cuda_graphs="off")
    if ranks.device != "cpu":
        yield (
            "1 rank, small table, no CUDA graph",
            lambda: ranks.alone(lambda: speed(launched, sizes, ranks, alone=True)),
        )
    yield "1 rank, small table", lambda: ranks.alone(lambda: speed(cfg, sizes, ranks, alone=True))
    if ranks.size > 1:
        yield "all ranks, small table, each for itself", lambda: speed_apart(cfg, sizes, ranks)
        yield "all ranks, small table replicated", lambda: speed(cfg, sizes, ranks)
        yield "all ranks, small table sharded", lambda: speed(sharded, sizes, ranks)


def table_cases(options: argparse.Namespace, table_gb: float, ranks: Ranks) -> Iterator[Case]:
    """A table of its own size: whole on one rank if it fits there, and sharded."""
    cfg, sizes = made_config(options, ranks), made_sizes(options, items_of(table_gb))
    sharded, table = with_train(cfg, tables=SHARDED), f"table of {table_gb:g} GB"
    if table_gb <= options.most_gb:
        yield f"1 rank, {table}", lambda: ranks.alone(lambda: speed(cfg, sizes, ranks, alone=True))
    if ranks.size > 1:
        yield f"all ranks, {table} sharded", lambda: speed(sharded, sizes, ranks)
        yield f"messages alone, {table}", lambda: exchange(sharded, sizes, ranks)


def host_cases(options: argparse.Namespace, ranks: Ranks) -> Iterator[Case]:
    """The first table with its moments where there is more memory."""
    table_gb, half = options.table_gb[0], {"bf16_tables": ("item_id",)}
    sizes = made_sizes(options, items_of(table_gb))
    cfg = with_train(made_config(options, ranks), tables=SHARDED, **half)
    cfg = with_train(cfg, host_state_tables=("item_id",))
    name = f"all ranks, table of {table_gb:g} GB sharded, bf16 rows, moments on the host"
    yield name, lambda: speed(cfg, sizes, ranks)


# "tables" is the part of "speed" with tables of --table-gb
PARTS = ["parity", "resume", "loader", "loads", "speed", "tables", "host", "graphs"]
TINY = {
    "events": 2048,
    "length": 64,
    "candidates": 4,
    "steps": 10,
    "layers": 2,
    "heads": 2,
    "width": 16,
    "table_gb": [0.01],
    "resume_gb": 0.001,
}


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--table-gb", type=float, nargs="+", default=[1.0], help="float32 rows of large tables")
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
    arguments = " ".join(sys.argv[1:]).replace(f"--out {options.out}", "")
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
    if ranks.size > 1 and ranks.device != "cpu":
        checks["graphs"] = graphs_apart
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
