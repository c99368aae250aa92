"""Training by the real loop with the real loader on one GPU: a step by the clock, from a store of
Parquet files to the optimizers, beside the time of its kernels alone.

    python -m benchmarks.training.real_loop [--tokens N …]     measure → runs/real_loop.json
    python -m benchmarks.training.real_loop --report FILE …    → its section of RESULTS.md

A few users of 16,384 events each, trained on in passes of at most 64 targets, so that lengths are
spread evenly up to that. The model is ULTRA-HSTU of the whole-model benchmark. Batches are made in
a process of their own. The clock's time is `train/step_ms` of the lines of the run's second half.

Steps are dealt (`train.stochastic_length.balance`), so that their tokens are alike, or cut from the
shuffled examples as they come; replayed from CUDA graphs, or launched kernel by kernel.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_check import late_compilations
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

LOG_EVERY = 20
BUCKETS = 2  # files of the store
FORMS = {"bf16": {}, "FP8": {"fp8": True}}
# settings of `train`
WAYS: dict[str, dict[str, Any]] = {
    "dealt, graphs": {"balance": "dealing", "cuda_graphs": "auto", "graph_sizes": 32},
    "dealt, fine graphs": {"balance": "dealing", "cuda_graphs": "auto", "graph_sizes": 128},
    "dealt, launched": {"balance": "dealing", "cuda_graphs": "off"},
    "as they come, graphs": {"balance": "none", "cuda_graphs": "auto"},
    "as they come, launched": {"balance": "none", "cuda_graphs": "off"},
}
COUNTED_STEPS = 2000  # of the count of compilations


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
        log=lambda step, values: lines.append(values | {"step": step}),
    )
    middle = len(lines) // 2
    late = lines[middle:]
    found = {}
    for name in ("step_ms", "data_wait_share", "tokens_per_s", "filled_share"):
        found[name] = statistics.median(line.get(f"train/{name}", 0) for line in late)
    found["mean_step_ms"] = statistics.mean(line["train/step_ms"] for line in late)

    # so far, at the end and in the second half
    for name in ("graphs_captured", "steps_replayed", "kernels_compiled"):
        counts = [line.get(f"train/{name}", 0) for line in lines]
        found[name] = counts[-1]
        found[f"{name}_late"] = counts[-1] - counts[middle]
    found["steps"] = lines[-1]["step"]
    found["steps_late"] = lines[-1]["step"] - lines[middle]["step"]
    return found


def kernel_us(
    cfg: RunConfig, loader: TrainLoader, device: str, *, replayed: bool = False, steps: int = 6
) -> float:
    """What the kernels of a step take for each of its tokens, on batches that are already on the
    device: launched one by one and not filled up; or `replayed`, with what the graphs add.
    """
    own = list(itertools.islice(loader.batches(0), steps))
    num_tokens = sum(batch.num_tokens for batch in own)
    trainee = Trainee(cfg, plain_maps(cfg), device, rank=0, world_size=1)
    batches = []
    for batch in own:
        if replayed and trainee.filler is not None:
            batch = trainee.filler.fill(batch)
        batches.append(batch.to(device))

    def train_all(_: int) -> None:
        for number, batch in enumerate(batches):
            trainee.step(batch, number, 1000)

    for _ in range(3):  # launched, recorded, replayed
        train_all(0)
    return 1000 * device_ms(train_all, device) / num_tokens


def measure(tokens: int, options: argparse.Namespace) -> Iterator[tuple[str, dict[str, float]]]:
    """Name and figures of each run with steps of about so many tokens."""
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
            kernels = None
            for way in options.ways:
                launched = WAYS[way]["cuda_graphs"] == "off"
                steps = options.launched_steps if launched else options.steps
                cfg, loader = cut_steps(cfg, steps, **WAYS[way])
                if kernels is None:
                    kernels = kernel_us(cfg, loader, options.device)
                numbers = run_loop(cfg, loader, options.device)
                numbers["kernels_us"] = kernels
                if not launched:
                    numbers["busy_us"] = kernel_us(cfg, loader, options.device, replayed=True)
                print(tokens, form, way, json.dumps(numbers), flush=True)
                yield f"{tokens}, {form}, {way}", numbers


def cut_steps(
    cfg: RunConfig, steps: int, *, balance: str, **train: Any
) -> tuple[RunConfig, TrainLoader]:
    """The run of at least so many steps with these settings, and its loader."""
    lengths = replace(cfg.train.stochastic_length, balance=balance)
    cfg = replace(cfg, train=replace(cfg.train, stochastic_length=lengths, **train))

    epochs = -(-steps // step_plan(cfg).steps_per_epoch)
    cfg = replace(cfg, train=replace(cfg.train, epochs=epochs))
    return cfg, TrainLoader(cfg, plain_maps(cfg), step_plan(cfg))


def section(*runs: Figures) -> str:
    """Of runs over steps of different sizes, on one machine."""
    machine = runs[0]["environment"]
    commands = ", ".join(f"`{run['command']}`" for run in runs)
    loop: dict[str, dict[str, float]] = {}
    for run in runs:
        loop |= run["loop"]

    rows = []
    for key, found in loop.items():
        tokens, form, way = key.split(", ", maxsplit=2)
        step_tokens = found["tokens_per_s"] * found["step_ms"] / 1000
        kernels_ms = found["kernels_us"] * step_tokens / 1000
        rows.append(
            [
                f"{int(tokens):,}",
                form,
                way,
                f"{found['step_ms']:.1f}",
                f"{found['mean_step_ms']:.1f}",
                f"{kernels_ms:.1f}",
                f"**{found['step_ms'] / kernels_ms:.2f}**",
                f"{found['busy_us'] * step_tokens / 1000:.1f}" if "busy_us" in found else "–",
                f"{found['tokens_per_s'] / 1e6:.2f}M",
                f"{found['data_wait_share']:.1%}",
                f"{found['filled_share']:.1%}",
                *graph_cells(found),
                f"{found['steps']:.0f}",
            ]
        )
    header = ["tokens of a step", "form", "steps", "ms", "mean, ms", "kernels, ms", "ratio"]
    header += ["device busy, ms", "tokens/s"]
    header += ["waiting for data", "filling", "graphs", "steps replayed", "compiled late", "of"]
    return f"""## Training by the loop

{commands}, one {machine["device"]}, torch {machine["torch"]}, triton {machine["triton"]}:
`loop.train` with the loader in a process of its own, ULTRA-HSTU of 12 layers, d = 512, users of
{runs[0]["length"]:,} events in passes of at most 64 targets. ms: a step by the clock, median over
the lines of the run's second half, of {LOG_EVERY} steps each, and their mean; kernels: their time
alone for as many tokens, in steps launched one by one over batches on the device that were not
filled up; device busy: the same of replayed steps, filled up. Steps are dealt
(`train.stochastic_length.balance`), with 32 sizes of batches to an octave (fine: 128), or come as
the shuffled examples do, with 16. Filling: share of the tokens that only fill batches up; graphs:
CUDA graphs that were recorded, in the second half; steps replayed: of those of the second half;
compiled late: Triton kernels in the second half; of: steps of the run.{counted_text(*runs)}

{table(header, rows)}"""


def graph_cells(found: dict[str, float]) -> list[str]:
    """Graphs, steps replayed and kernels compiled, as the table shows them."""
    graphs, late = found["graphs_captured"], found["graphs_captured_late"]
    replayed = found["steps_replayed_late"] / max(found["steps_late"], 1)
    return [f"{graphs:.0f}, {late:.0f}", f"{replayed:.0%}", f"{found['kernels_compiled_late']:.0f}"]


def counted_text(*runs: Figures) -> str:
    text = ""
    for run in runs:
        counted = run.get("compilations")
        if counted is not None:
            text = (
                f" {counted['steps']:,} training steps of a model of two layers over batches of "
                f"random sizes compiled {counted['compiled']} kernels after the first "
                f"{counted['warm_up']} steps."
            )
    return text


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=[65_536, 196_608])
    parser.add_argument("--forms", nargs="+", choices=list(FORMS), default=["bf16"])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--users", type=int, default=2)
    parser.add_argument("--length", type=int, default=16_384, help="events of a user")
    parser.add_argument("--steps", type=int, default=480, help="of a run with graphs, at least")
    parser.add_argument("--launched-steps", type=int, default=120, help="of one without")
    parser.add_argument(
        "--count", action="store_true", help="compilations over random batches as well"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--model", type=json.loads, default={}, help="settings, to try it on a CPU")
    parser.add_argument("--out", type=Path, default=RUNS / "real_loop.json")
    parser.add_argument(
        "--report", type=Path, nargs="+", metavar="FILE", help="write RESULTS.md from these and end"
    )
    options = parser.parse_args()
    if options.report:
        runs = [json.loads(path.read_text()) for path in options.report]
        write_section("real_loop", section(*runs))
        return

    torch.set_num_threads(1)
    settings = []
    for name in ("tokens", "steps", "launched_steps", "count"):
        value = getattr(options, name)
        if value != parser.get_default(name):
            numbers = value if isinstance(value, list) else [value] * (value is not True)
            settings.append(" ".join([f"--{name.replace('_', '-')}", *map(str, numbers)]))
    found: dict[str, dict[str, float]] = {}
    run = {
        "command": " ".join(["python -m benchmarks.training.real_loop", *settings]),
        "environment": environment(options.device),
        "length": options.length,
        "loop": found,
    }
    for tokens in options.tokens:
        for name, numbers in measure(tokens, options):
            found[name] = numbers
            write_run(options.out, run)

    if options.count:
        warm_up = 8
        compiled = late_compilations(warm_up, COUNTED_STEPS)
        total = sum(compiled.values())
        run["compilations"] = {"warm_up": warm_up, "steps": COUNTED_STEPS, "compiled": total}
        print(run["compilations"], compiled, flush=True)
        write_run(options.out, run)


if __name__ == "__main__":
    main()
