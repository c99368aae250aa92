"""Training by the real loop with the real loader on one GPU: a step by the clock, from a store of
Parquet files to the optimizers, beside the time of its kernels alone.

    python -m benchmarks.training.real_loop [--tokens N …]     measure → runs/real_loop.json
    python -m benchmarks.training.real_loop --report           → its section of RESULTS.md

A few users of 16,384 events each, trained on in passes of at most 64 targets, so that lengths are
spread evenly up to that. The model is ULTRA-HSTU of the whole-model benchmark. Batches are made in
a process of their own. The clock's time is `train/step_ms` of the lines of the run's second half.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.machine import environment
from benchmarks.report import RUNS, table, write_run, write_section
from benchmarks.training.collate import NUM_ITEMS, bench_config
from benchmarks.training.feeding import publish
from benchmarks.training.model import ULTRA, device_ms
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import RunConfig
from pipeline.figures import Figures
from pipeline.train import loop
from pipeline.train.trainee import Trainee

LOG_EVERY = 10
BUCKETS = 2  # files of the store
FORMS = {"bf16": {}, "FP8": {"fp8": True}}
WAYS = {"graphs": "auto", "launched": "off"}  # train.cuda_graphs


def loop_config(folder: str, tokens: int, settings: dict[str, Any], **train: Any) -> RunConfig:
    """12 layers, 4 heads of 128, dropout as it is by default."""
    size = {"num_layers": 12, "num_heads": 4, "d_model": 512, "d_qk": 128, "d_v": 128}
    model = {**size, **ULTRA, **settings}
    model["attention"] = {"scaling_seq_len": 256} | model["attention"]
    of_train = {
        "batch_users": None,
        "batch_tokens": tokens,
        "precision": "bf16",
        "log_every": LOG_EVERY,
        "loader_threads": 2,
        "readers": 1,
    }
    return bench_config(
        name=f"loop-{tokens}", runs_dir=folder, model=model, train={**of_train, **train}
    )


def plain_maps(cfg: RunConfig) -> FeatureMaps:
    """Items without columns, users without any."""
    return FeatureMaps(
        item_ids=np.arange(NUM_ITEMS),
        item_codes=np.arange(NUM_ITEMS + 1, dtype=np.int32)[:, None],
        item_count=np.ones(NUM_ITEMS + 1, np.int64),
        user_ids=np.zeros(0, np.int64),
        user_codes=np.zeros((1, 0), np.int32),
        request_values={"tab": np.arange(8), "hour": np.arange(24)},
        vocab_sizes={"item_id": NUM_ITEMS + 1, "request.tab": 9, "request.hour": 25},
        base_rates=dict.fromkeys(cfg.tasks, 0.3),
    )


def run_loop(cfg: RunConfig, loader: TrainLoader, device: str) -> dict[str, float]:
    """Medians of the second half of a run's lines."""
    lines: list[dict[str, float]] = []
    loop.train(
        cfg,
        plain_maps(cfg),
        loader,
        "benchmark",
        device=device,
        log=lambda _, values: lines.append(values),
    )
    late = lines[len(lines) // 2 :]
    found = {}
    for name in ("train/step_ms", "train/data_wait_share", "train/tokens_per_s"):
        found[name.removeprefix("train/")] = statistics.median(line[name] for line in late)

    captured = [line.get("train/graphs_captured", 0) for line in lines]
    found["graphs"] = captured[-1]
    found["graphs_late"] = captured[-1] - captured[len(lines) // 2]
    return found


def kernel_ms(cfg: RunConfig, loader: TrainLoader, device: str, steps: int = 6) -> float:
    """What the kernels of a step take, on batches that are already on the device."""
    batches = list(itertools.islice(loader.batches(0), 2 * steps))[::2]
    batches = [batch.to(device) for batch in batches]
    trainee = Trainee(cfg, plain_maps(cfg), device, rank=0, world_size=1)

    def train_all(_: int) -> None:
        for number, batch in enumerate(batches):
            trainee.step(batch, number, 1000)

    train_all(0)
    return device_ms(train_all, device) / len(batches)


def measure(tokens: int, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        plain = loop_config(folder, tokens, options.model)
        publish(plain.sequence_dir, plain, np.full(options.users, options.length), BUCKETS)
        for form in options.forms:
            cfg = loop_config(
                folder,
                tokens,
                {**FORMS[form], **options.model},
                use_gpu=options.device == "cuda",
                loader_process=True,
            )
            loader = TrainLoader(cfg, plain_maps(cfg), step_plan(cfg))
            kernels = kernel_ms(cfg, loader, options.device)
            epochs = -(-options.steps // loader.steps_per_epoch)
            for way in options.ways:
                train = replace(cfg.train, epochs=epochs, cuda_graphs=WAYS[way])
                numbers = run_loop(replace(cfg, train=train), loader, options.device)
                numbers["kernels_ms"] = kernels
                found[f"{tokens}, {form}, {way}"] = numbers
                print(tokens, form, way, json.dumps(numbers), flush=True)
    return found


def section(run: Figures) -> str:
    machine = run["environment"]
    rows = []
    for key, found in run["loop"].items():
        tokens, form, way = key.split(", ")
        ratio = found["step_ms"] / found["kernels_ms"]
        rows.append(
            [
                f"{int(tokens):,}",
                form,
                way,
                f"{found['step_ms']:.1f}",
                f"{found['kernels_ms']:.1f}",
                f"**{ratio:.2f}**",
                f"{found['tokens_per_s'] / 1e6:.2f}M",
                f"{found['data_wait_share']:.1%}",
                f"{found['graphs']:.0f}",
            ]
        )
    header = ["tokens of a step", "form", "steps", "ms", "kernels, ms", "ratio", "tokens/s"]
    header += ["waiting for data", "graphs"]
    return f"""## Training by the loop

`{run["command"]}`, one {machine["device"]}, torch {machine["torch"]}, triton {machine["triton"]}:
`loop.train` with the loader in a process of its own, ULTRA-HSTU of 12 layers, d = 512, users of
{run["length"]:,} events in passes of at most 64 targets. ms: a step by the clock, median over the
lines of the second half of {run["steps"]} steps; kernels: their time alone, in steps launched one
by one over batches on the device that were not filled up; graphs: CUDA graphs that were recorded.

{table(header, rows)}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[65_536, 196_608])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=["bf16"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--length", type=int, default=16_384, help="events of a user")
    parser.add_argument("--steps", type=int, default=240, help="of a run, at least")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", type=json.loads, default={}, help="settings, to try it on a CPU")
    parser.add_argument("--out", type=Path, default=RUNS / "real_loop.json")
    parser.add_argument("--report", action="store_true", help="write RESULTS.md from --out and end")
    options = parser.parse_args()
    if options.report:
        write_section("real_loop", section(json.loads(options.out.read_text())))
        return

    torch.set_num_threads(1)
    found: dict[str, dict[str, float]] = {}
    run = {
        "command": "python -m benchmarks.training.real_loop",
        "environment": environment(options.device),
        "length": options.length,
        "steps": options.steps,
        "loop": found,
    }
    for tokens in options.tokens:
        found |= measure(tokens, options)
        write_run(options.out, run)


if __name__ == "__main__":
    main()
