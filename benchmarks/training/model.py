"""Whole-model speed on one GPU: conventional HSTU, merged HSTU, semi-local attention and ULTRA-HSTU
side by side.

    python -m benchmarks.training.model [--only NAME …] [--lengths N …]     measure →
    runs/model_h200.json
    python -m benchmarks.training.model --report FILE …                     → the section of
    RESULTS.md

Random weights and events. Every model reads the same batches of a constant number of events,
`events / length` users and a few candidates each; a training step is the trainer's own: forward,
loss, backward, both optimizers.
"""

import argparse
import json
import math
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import environment
from benchmarks.report import table, write_run, write_section
from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.batches.filling import BatchFiller
from pipeline.config import RunConfig
from pipeline.model.inference.graphed_model import GraphedModel
from pipeline.model.work import count_work
from pipeline.train.trainee import Trainee

ROOT = Path(__file__).parents[1]
NUM_ITEMS = 100_000
CAUSAL = {"window": None}
SEMI_LOCAL = {"window": 256, "full_rows": 256}
ULTRA = {"attention": SEMI_LOCAL, "truncate_after_layer": 4, "truncate_to": 1024}
MODELS: dict[str, dict[str, Any]] = {
    "HSTU, interleaved": {"encoder": "hstu", "attention": CAUSAL},
    "HSTU, merged": {"encoder": "hstu_merged", "attention": CAUSAL},
    "HSTU, merged, relative bias": {
        "encoder": "hstu_merged",
        "attention": CAUSAL,
        "relative_bias": True,
    },
    "semi-local only": {"attention": SEMI_LOCAL},
    "ULTRA-HSTU": ULTRA,
    "ULTRA-HSTU, FP8": {**ULTRA, "fp8": True},
}
LAUNCHED = """ Where the trainer does so, a step is replayed from a CUDA graph, on a batch that was
filled up (`train.cuda_graphs`); "launched": one by one, whose kernels are those counted; "busy":
what the device does in a replayed one, filling and copies with it."""
REPLAYED = " Inference is replayed too (`GraphedModel`, `serve.cuda_graphs`)."
# On a GPU a series of calls lasts at least so long: the host's start is no part of a call among
# others.
SERIES_MS = 200
BIASED = "HSTU, merged, relative bias"
# events per second of ULTRA-HSTU, or of semi-local attention alone, over another model, at 16,384
# events
GOALS = {
    ("ULTRA-HSTU", "HSTU, interleaved"): {"train": 30, "infer": 30},
    ("ULTRA-HSTU", "HSTU, merged"): {"train": 9, "infer": 9},
    ("ULTRA-HSTU, FP8", "HSTU, interleaved"): {"train": 30, "infer": 30},
    ("ULTRA-HSTU, FP8", "HSTU, merged"): {"train": 9, "infer": 9},
    ("semi-local only", "HSTU, merged"): {"train": 3.5, "infer": 3},
}


def model_config(settings: dict[str, Any], layers: int, heads: int, width: int) -> RunConfig:
    """12 layers, 4 heads of 128 unless said otherwise; 8 actions, item id, a tag and a request
    column.
    """
    attention = {"scaling_seq_len": 256} | settings["attention"]
    size = {
        "num_layers": layers,
        "num_heads": heads,
        "d_model": heads * width,
        "d_qk": width,
        "d_v": width,
    }
    return config.from_dict(
        {
            "source": {
                "actions": [f"action_{i}" for i in range(8)],
                "request_columns": ["tab"],
                "kind": "synthetic",
            },
            "tasks": ["action_0", "action_1", "action_2", "action_3"],
            "features": {
                "item_id_dim": 64,
                "item": {"tag": {"dim": 16}},
                "user": {"age": {"dim": 16}},
                "user_tokens": {"who": ["age"]},
                "request": {"tab": {"dim": 8}},
            },
            "model": {"dropout": 0.0, **size, **settings, "attention": attention},
            "train": {
                "precision": "bf16",
                "lr": 1e-4,
                "embedding_lr": 1e-4,
                "graph_sizes": 64,  # all batches are of one size
            },
        }
    )


def vocabulary(cfg: RunConfig) -> FeatureMaps:
    """Sizes of the tables and base rates; no ids, as no batch is made from rows."""
    none = np.zeros(0, np.int64)
    sizes = {"item_id": NUM_ITEMS, "item.tag": 100, "user.age": 20, "request.tab": 20}
    return FeatureMaps(
        item_ids=none,
        item_codes=np.zeros((1, 2), np.int32),
        item_count=np.zeros(1, np.int64),
        user_ids=none,
        user_codes=np.zeros((1, 1), np.int32),
        request_values={},
        vocab_sizes=sizes,
        base_rates=dict.fromkeys(cfg.tasks, 0.2),
    )


def random_batch(
    cfg: RunConfig, events: int, length: int, candidates: int, seed: int
) -> SequenceBatch:
    """`events / length` users of `length` events and `candidates` candidates each, labelled."""
    users = events // length
    generator = torch.Generator().manual_seed(seed)

    def draw(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, shape, generator=generator, dtype=torch.int32)

    row = torch.arange(length + candidates)
    is_target = (row >= length).repeat(users)
    num_tokens = len(is_target)
    shown = torch.stack([draw(NUM_ITEMS, num_tokens), draw(100, num_tokens)], dim=1)
    return SequenceBatch(
        seq_offsets=torch.arange(users + 1) * (length + candidates),
        num_targets=torch.full((users,), candidates, dtype=torch.int32),
        item_codes=shown,
        request_codes=draw(20, num_tokens, 1),
        action_mask=draw(256, num_tokens).masked_fill(is_target, 0),
        known_mask=torch.full((num_tokens,), 255, dtype=torch.int32).masked_fill(is_target, 0),
        position=row.clamp(max=length).repeat(users),
        gap_ms=draw(10**8, num_tokens).long(),
        user_codes=draw(20, users, 1),
        max_seq_len=length + candidates,
        labels=draw(2, users * candidates, len(cfg.tasks)).float(),
        label_weight=torch.ones(users * candidates, len(cfg.tasks)),
    )


def median_ms(call: Callable[[int], object], device: str, repeats: int) -> float:
    """A call among others of its kind, as in training: the host may run ahead of the device.

    Median of 3 series, of `repeats` calls each or, on a GPU, of as many as take `SERIES_MS`.
    """
    for i in range(2):  # compiles kernels, fills the allocator
        call(i)
    alone = series_ms(call, device, 1)
    if device == "cuda":
        repeats = max(repeats, math.ceil(SERIES_MS / alone))
    return statistics.median(series_ms(call, device, repeats) for _ in range(3))


def series_ms(call: Callable[[int], object], device: str, repeats: int) -> float:
    """Milliseconds of one of `repeats` calls, the last of which has ended."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for i in range(repeats):
        call(i)
    if device == "cuda":
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - begin) / repeats


def device_ms(call: Callable[[int], object], device: str, shown: int = 0) -> float:
    """What the kernels of a call take, one after another: near the call's time, or the host is the
    slower side. The `shown` longest are printed.
    """
    if device != "cuda":
        return math.nan
    calls = 2
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for i in range(calls):
            call(i)
        torch.cuda.synchronize()

    kernels = sorted(profile.key_averages(), key=lambda kernel: -kernel.self_device_time_total)
    for kernel in kernels[:shown]:
        total = kernel.self_device_time_total / 1e3 / calls
        print(f"{total:9.3f} ms {kernel.count / calls:6.1f} x  {kernel.key[:100]}", flush=True)
    return sum(kernel.self_device_time_total for kernel in kernels) / 1e3 / calls


def measure(settings: dict[str, Any], length: int, options: argparse.Namespace) -> dict[str, float]:
    cfg = model_config(settings, options.layers, options.heads, options.width)
    device, cuda = options.device, options.device == "cuda"
    batches = [
        random_batch(cfg, options.events, length, options.candidates, seed) for seed in range(2)
    ]
    work = count_work(batches[0], cfg)
    on_host = [batch.pack(pin_memory=cuda) for batch in batches]
    filler = BatchFiller.of_run(cfg)
    filled = [filler.fill(batch).pack(pin_memory=cuda) for batch in batches]
    batches = [batch.to(device) for batch in batches]
    torch.manual_seed(0)
    found = {"forward_tflop": work.flops / 1e12, "masked_pair_share": work.masked_pair_share}
    found["truncated_token_share"] = work.truncated_token_share

    def peak_gb() -> float:
        return torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan

    trainee = Trainee(cfg, vocabulary(cfg), device, rank=0, world_size=1)
    if cuda:
        torch.cuda.reset_peak_memory_stats()

    def train(i: int) -> object:
        return trainee.step(batches[i % 2], i, 1000)

    # as the trainer takes a step: replayed where it can be, and launched one by one
    def train_graphed(i: int) -> object:
        return trainee.step(filled[i % 2].to(device), i, 1000)

    launched = found["train_ms"] = median_ms(train, device, options.repeats)
    if length == max(options.lengths):  # the profiler takes longer than what it looks at
        found["train_device_ms"] = device_ms(train, device, options.kernels)
    if trainee.graphs is not None:
        found["train_launched_ms"] = launched
        found["train_ms"] = median_ms(train_graphed, device, options.repeats)
        if length == max(options.lengths):
            found["train_busy_ms"] = device_ms(train_graphed, device)
    found["train_peak_gb"] = peak_gb()
    trainee.graphs = None  # gives their memory back

    # the same step with its batch still on the host: one pinned buffer, as the loop sends it, and
    # each column from memory that is not pinned
    def train_from_buffer(i: int) -> object:
        return trainee.step(on_host[i % 2].to(device), i, 1000)

    def train_from_columns(i: int) -> object:
        columns = on_host[i % 2].tensors
        moved = {name: x.clone().to(device, non_blocking=True) for name, x in columns.items()}
        return trainee.step(replace(batches[i % 2], **moved), i, 1000)

    if options.transfers and length == max(options.lengths):
        found["train_from_buffer_ms"] = median_ms(train_from_buffer, device, options.repeats)
        found["train_from_columns_ms"] = median_ms(train_from_columns, device, options.repeats)
    # as the server holds it: frozen, so that weights are cast once
    model = trainee.model.eval().requires_grad_(False)
    model.zero_grad(set_to_none=True)

    @torch.no_grad()
    def infer(i: int) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return model(batches[i % 2])

    if cuda:
        torch.cuda.reset_peak_memory_stats()
    launched = found["infer_ms"] = median_ms(infer, device, options.repeats)
    found["infer_peak_gb"] = peak_gb()
    if length == max(options.lengths):
        found["infer_device_ms"] = device_ms(infer, device, options.kernels)
    if cuda and GraphedModel.fits(cfg.model):
        graphed = GraphedModel(model, cfg, cfg.train.graph_sizes)
        found["infer_launched_ms"] = launched
        num_targets = int(batches[0].num_targets.sum())
        infer_graphed = graphed_pass(graphed, filled, num_targets, device)
        found["infer_ms"] = median_ms(infer_graphed, device, options.repeats)
        if length == max(options.lengths):
            found["infer_busy_ms"] = device_ms(infer_graphed, device)
    return found


def graphed_pass(
    graphed: GraphedModel, filled: list[SequenceBatch], num_targets: int, device: str
) -> Callable[[int], torch.Tensor]:
    """Inference, replayed for batches that were filled up before and come from the host."""

    @torch.no_grad()
    def infer(i: int) -> torch.Tensor:
        with torch.autocast(device, torch.bfloat16):
            return graphed.score_filled(filled[i % 2].to(device), num_targets)

    return infer


def ratio(numbers: dict[str, dict[str, float]], faster: str, slower: str, key: str) -> float:
    """Events per second of the one over those of the other: the batches are the same."""
    return numbers[slower][key] / numbers[faster][key]


def kernels_of(numbers: dict[str, float], way: str) -> str:
    """`36.6 of 39.9`: what kernels take, and the clock; of a graph also what the device does in a
    replay, and the launched step.
    """
    shown = f"{numbers[f'{way}_device_ms']:.1f} of {numbers[f'{way}_ms']:.1f}"
    busy, launched = numbers.get(f"{way}_busy_ms"), numbers.get(f"{way}_launched_ms")
    if busy is not None:
        shown += f", busy {busy:.1f}"
    return shown if launched is None else f"{shown}, launched {launched:.1f}"


def slope(by_length: dict[str, dict[str, float]], way: str) -> float:
    """Log-log, of the time per user over the length, from the shortest to the longest."""
    lengths = sorted(int(length) for length in by_length)
    short, long = lengths[0], lengths[-1]
    per_user = [by_length[str(n)][f"{way}_ms"] * n for n in (short, long)]
    return math.log(per_user[1] / per_user[0]) / math.log(long / short)


def section(*runs: dict[str, Any]) -> str:
    """Of the newest run first; they may be of other machines and of earlier code."""
    return "\n\n".join(["## Whole model", *(part(run) for run in runs)])


def part(run: dict[str, Any]) -> str:
    found, sizes = run["models"], run["sizes"]
    lengths = sorted({int(length) for by_length in found.values() for length in by_length})
    machine = run["environment"]
    longer = ""
    if "series_ms" in run:
        longer = f", or of as many as take {run['series_ms'] / 1000:g} s"
    parts = [
        f"`{run['command']}`, one {machine['device']}, torch {machine['torch']}, triton "
        f"{machine['triton']}: "
        f"{sizes['layers']} layers, d = {sizes['heads'] * sizes['width']}, {sizes['heads']} heads "
        f"of {sizes['width']}, "
        f"{sizes['events']:,} events a batch and {sizes['candidates']} candidates a user, bf16 "
        "autocast, medians of "
        f"3 series of {sizes['repeats']} calls{longer}. A training step is the trainer's: "
        "forward, loss, backward, both optimizers. ULTRA-HSTU keeps 1,024 events after 4 of 12 "
        "layers; window 256, full rows 256. "
        + run.get("note", ""),  # what is to be known of a run, written into its file by hand
    ]
    for way, title in (("train", "Training"), ("infer", "Inference")):
        rows = []
        for name, by_length in found.items():
            cells = [by_length.get(str(n)) for n in lengths]
            shown = [
                "–"
                if c is None
                else f"{c[f'{way}_ms']:.1f} ms, {sizes['events'] / c[f'{way}_ms'] / 1e3:.2f}M/s, "
                f"{c[f'{way}_peak_gb']:.1f} GB"
                for c in cells
            ]
            complete = all(cells) and len(lengths) > 1
            rows.append([name, *shown, f"{slope(by_length, way):.2f}" if complete else "–"])
        header = [
            f"{title}: ms a batch, events/s, peak memory",
            *(f"{n:,}" for n in lengths),
            "slope per user",
        ]
        parts.append(table(header, rows))
    longest = str(lengths[-1])
    at_longest = {
        name: by_length[longest] for name, by_length in found.items() if longest in by_length
    }
    timed = {name: numbers for name, numbers in at_longest.items() if "train_device_ms" in numbers}
    if any("train_launched_ms" in numbers for numbers in timed.values()):
        parts[0] += LAUNCHED
    if any("infer_launched_ms" in numbers for numbers in timed.values()):
        parts[0] += REPLAYED
    rows = [
        [name, kernels_of(numbers, "train"), kernels_of(numbers, "infer")]
        for name, numbers in timed.items()
    ]
    parts.append(
        table([f"ms that kernels take, at {lengths[-1]:,}", "training", "inference"], rows)
    )
    rows = []
    for (faster, slower), goals in GOALS.items():
        if faster in timed and slower in timed:
            cells = [
                f"{ratio(timed, faster, slower, f'{way}_ms'):.1f}x, kernels "
                f"{ratio(timed, faster, slower, f'{way}_device_ms'):.1f}x (goal {goals[way]}x)"
                for way in goals
            ]
            rows.append(
                [
                    f"{faster} over {slower}",
                    *cells,
                    f"{ratio(timed, faster, slower, 'forward_tflop'):.1f}x",
                ]
            )
    parts.append(table([f"events/s at {lengths[-1]:,}", "training", "inference", "FLOP"], rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").split("\n\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(MODELS), default=list(MODELS), metavar="NAME"
    )
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[2048, 4096, 8192, 16384], help="events a user"
    )
    parser.add_argument("--events", type=int, default=65536, help="of a batch")
    parser.add_argument("--candidates", type=int, default=16, help="a user")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=128, help="of a head")
    parser.add_argument("--repeats", type=int, default=3, help="calls of a series, of which 3")
    parser.add_argument(
        "--transfers", action="store_true", help="also steps whose batch is still on the host"
    )
    parser.add_argument(
        "--kernels", type=int, default=0, help="print so many of the longest kernels of each pass"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "model_h200.json")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="write RESULTS.md from these and end"
    )
    options = parser.parse_args()
    if options.report:
        runs = [json.loads(path.read_text()) for path in options.report]
        measured = {
            name: run["models"][name] for name in MODELS for run in runs if name in run["models"]
        }
        write_section("model", section(runs[0] | {"models": measured}))
        return
    sizes = {
        name: getattr(options, name)
        for name in ("events", "candidates", "layers", "heads", "width", "repeats")
    }
    other = [f"--{name} {size}" for name, size in sizes.items() if size != parser.get_default(name)]
    if options.lengths != parser.get_default("lengths"):
        other.append(" ".join(["--lengths", *map(str, options.lengths)]))
    found: dict[str, dict[str, dict[str, float]]] = {}
    run = {
        "command": " ".join(["python -m benchmarks.training.model", *other]),
        "environment": environment(options.device),
        "sizes": sizes,
        "series_ms": SERIES_MS,
        "models": found,
    }
    failed = 0
    for name in options.only:
        for length in options.lengths:
            try:
                numbers = measure(MODELS[name], length, options)
            except Exception:  # an out of memory, say, must not take the other rows along
                traceback.print_exc()
                failed += 1
                continue
            found.setdefault(name, {})[str(length)] = numbers
            print(
                f"{name:30}{length:7} " + " ".join(f"{k} {v:.4g}" for k, v in numbers.items()),
                flush=True,
            )
            options.out.parent.mkdir(parents=True, exist_ok=True)
            # what is measured stays, whatever comes after
            write_run(options.out, run)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
