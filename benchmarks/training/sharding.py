"""Sharded embedding tables: the same losses as whole ones, then what they cost, and 1 rank against
all.

    torchrun --nproc-per-node 2 -m benchmarks.training.sharding --table-gb 20      measure, on GPUs
    if there are any → JSON python -m benchmarks.training.sharding --report FILE …
    → the section of RESULTS.md

Random events; item ids are drawn evenly over the logarithm of their rank, as in Zipf's law, so that
a batch holds many rare ones. Every rank has a batch of the same size: twice the ranks train on
twice the events. What is measured for one rank runs on rank 0, while the others wait.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.machine import environment
from benchmarks.report import table, write_run, write_section
from benchmarks.training.model import SEMI_LOCAL, model_config, random_batch, vocabulary
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
    folder = Path(tempfile.gettempdir()) / f"sharding-{os.environ.get('MASTER_PORT', 'alone')}"
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


class Traffic:
    """Bytes that this rank sends to others, counted where `torch.distributed` is called."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.sent = dict.fromkeys(("all_to_all_single", "all_gather", "all_reduce"), 0)

    def __enter__(self) -> "Traffic":
        self.kept = {name: getattr(dist, name) for name in self.sent}
        for name in self.sent:
            setattr(
                dist, name, lambda *args, name=name, **options: self._call(name, *args, **options)
            )
        return self

    def __exit__(self, *_: object) -> None:
        for name, call in self.kept.items():
            setattr(dist, name, call)

    def _call(self, name: str, *args: Any, **options: Any) -> Any:
        others = self.ranks.size - 1
        if name == "all_to_all_single":
            _, tensor, _, split = args
            self.sent[name] += (tensor.numel() - split[self.ranks.rank]) * tensor.element_size()
        elif name == "all_gather":
            self.sent[name] += args[1].nbytes * others
        else:  # as a ring does it
            self.sent[name] += 2 * args[0].nbytes * others // self.ranks.size
        return self.kept[name](*args, **options)


def speed(
    cfg: RunConfig, sizes: dict[str, int], ranks: Ranks, alone: bool = False
) -> dict[str, Any]:
    """Median over the lines of a run but the first two (compilation, the allocator's growth)."""
    world_size = 1 if alone else ranks.size
    cuda = ranks.device != "cpu"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with Traffic(ranks) as traffic:
        sizes = sizes | {"events": sizes["events"] * world_size}
        lines, _ = run(cfg, sizes, ranks, alone)
    lines = lines[2:]
    return {
        "step_ms": statistics.median(line["train/step_ms"] for line in lines),
        "tokens_per_s": statistics.median(line["train/tokens_per_s"] for line in lines),
        "data_wait_share": statistics.median(line["train/data_wait_share"] for line in lines),
        "mb_sent_a_step": {
            name: sent / sizes["steps"] / 2**20 for name, sent in traffic.sent.items()
        },
        "peak_gb": torch.cuda.max_memory_allocated() / 2**30 if cuda else None,
        "tables": {name: _placed(place) for name, place in _plan(cfg, sizes, world_size).items()},
    }


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
    """Name and numbers, one case after another; on all ranks in the same order."""
    sizes = {name: getattr(options, name) for name in ("events", "length", "candidates", "steps")}
    cut = {"truncate_after_layer": max(options.layers // 3, 1), "truncate_to": 1024}
    cfg = model_config(
        {"attention": SEMI_LOCAL, **cut}, options.layers, options.heads, options.width
    )
    cfg = replace(cfg, features=replace(cfg.features, item_id_dim=ITEM_DIM))
    precision = "fp32" if ranks.device == "cpu" else "bf16"
    log_every = max(options.steps // 10, 1)
    cfg = with_train(cfg, precision=precision, log_every=log_every, epochs=1, shard_above_mb=2**30)
    small = sizes | {"items": 100_000}
    large = sizes | {"items": int(options.table_gb * 2**30 / (4 * ITEM_DIM))}
    half = {"bf16_tables": ("item_id",), "host_state_tables": ("item_id",)}
    one = "1 rank"
    yield f"{one}, small table", ranks.alone(lambda: speed(cfg, small, ranks, alone=True)) or {}
    if ranks.size > 1:
        yield "all ranks, small table replicated", speed(cfg, small, ranks)
        yield "all ranks, small table sharded", speed(with_train(cfg, tables=SHARDED), small, ranks)
    yield f"{one}, large table", ranks.alone(lambda: speed(cfg, large, ranks, alone=True)) or {}
    if ranks.size > 1:
        yield "all ranks, large table sharded", speed(with_train(cfg, tables=SHARDED), large, ranks)
        yield (
            "all ranks, large table sharded, bf16 rows, moments on the host",
            speed(with_train(cfg, tables=SHARDED, **half), large, ranks),
        )
        yield "messages alone, large table", exchange(with_train(cfg, tables=SHARDED), large, ranks)


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


def scaling(cases: dict[str, dict[str, Any]], size: str, placement: str) -> float | None:
    """Tokens/s of all ranks over one rank's; None where either is missing."""
    one, many = (
        cases.get(f"1 rank, {size} table"),
        cases.get(f"all ranks, {size} table {placement}"),
    )
    return many["tokens_per_s"] / one["tokens_per_s"] if one and many else None


def summary(found: dict[str, Any]) -> str:
    rows = []
    for name, case in found["cases"].items():
        if "step_ms" not in case:
            continue
        sent = sum(case["mb_sent_a_step"].values())
        peak = "–" if case["peak_gb"] is None else f"{case['peak_gb']:.1f}"
        tables = sum(place["weight_bytes"] for place in case["tables"].values()) / 2**30
        cells = (
            f"{case['step_ms']:.1f}",
            f"{case['tokens_per_s']:,.0f}",
            f"{sent:.1f}",
            f"{tables:.2f}",
            peak,
        )
        rows.append([name, *cells])
    header = [
        "",
        "ms a step",
        "tokens/s",
        "MB sent a rank and step",
        "GB of tables a rank",
        "peak GB",
    ]
    return table(header, rows)


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
    kinds = ("small", "replicated"), ("small", "sharded"), ("large", "sharded")
    ratios = {kind: scaling(cases, *kind) for kind in kinds}
    ends = [f"{size} table {how} {ratio:.2f}x" for (size, how), ratio in ratios.items() if ratio]
    if ends:
        yield f"All ranks over one, tokens/s: {', '.join(ends)}."
    messages = cases.get("messages alone, large table")
    if messages:
        yield (
            f"The messages by themselves: {messages['fetch_ms']:.2f} ms to fetch "
            f"{messages['distinct_rows']:,} rows, "
            f"{messages['gradients_ms']:.2f} ms to send their gradients."
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--table-gb", type=float, default=1.0, help="float32 rows of the large table"
    )
    parser.add_argument("--events", type=int, default=65536, help="of a rank's batch")
    parser.add_argument("--length", type=int, default=4096, help="events a user")
    parser.add_argument("--candidates", type=int, default=16, help="a user")
    parser.add_argument("--steps", type=int, default=60, help="of a run")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument(
        "--resume-gb", type=float, default=0.01, help="of the table in the runs that are resumed"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["parity", "resume", "speed"],
        default=["parity", "resume", "speed"],
    )
    parser.add_argument(
        "--out", type=Path, help="JSON; sharding.json in $OUT, or under benchmarks/runs"
    )
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="write RESULTS.md from them and end"
    )
    options = parser.parse_args()
    if options.report:
        write_section(
            "sharding", section([json.loads(file.read_text()) for file in options.report])
        )
        return
    out = options.out or Path(os.environ.get("OUT", ROOT / "runs")) / "sharding.json"
    ranks = Ranks()
    sizes = ("events", "length", "candidates", "steps", "layers", "heads", "width", "table_gb")
    found: dict[str, Any] = {
        "command": f"torchrun --nproc-per-node {ranks.size} -m benchmarks.training.sharding "
        f"--table-gb {options.table_gb:g}",
        "environment": environment(ranks.device.split(":")[0]),
        "ranks": ranks.size,
        "sizes": {name: getattr(options, name) for name in sizes},
        "cases": {},
    }

    def keep() -> None:
        if ranks.rank == 0:
            out.parent.mkdir(parents=True, exist_ok=True)
            # what is measured stays, whatever comes after
            write_run(out, found)

    for name, check in (
        ("parity", parity),
        ("resume", lambda ranks: resume(ranks, options.resume_gb)),
    ):
        if name in options.only:
            found[name] = check(ranks)
            keep()
            if ranks.rank == 0:
                print(name, json.dumps(found[name]), flush=True)
    for name, numbers in measure(options, ranks) if "speed" in options.only else ():
        found["cases"][name] = numbers
        keep()
        if ranks.rank == 0:
            print(name, json.dumps(numbers), flush=True)
    if ranks.rank == 0:
        print(summary(found), flush=True)
    if ranks.size > 1:
        dist.destroy_process_group()
    raise SystemExit(ranks.rank == 0 and not right(found))


if __name__ == "__main__":
    main()
