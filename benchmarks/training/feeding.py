"""How much of a training step is spent waiting for data, with one CPU core for the loader.

    python -m benchmarks.training.feeding          # about 5 minutes; writes its section of
    benchmarks/RESULTS.md

The training step is simulated: a consumer sleeps 50 ms for every batch of about 65,536 tokens. It
starts shortly
before the end of an epoch's first pool, so that changes of pools are in the figures. Everything
else is the real path: a store of Parquet buckets, `TrainLoader`, the counting of work and the
prefetching that `loop.train` does. The process is bound to one core. Users have 40 rows on average,
or Zipf lengths up to 4,096; with three rates on each candidate or without, in both layouts.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from benchmarks.machine import cpu_name
from benchmarks.report import RUNS, table, write_run, write_section
from benchmarks.training.collate import bench_config, make_maps, make_sequences, with_rates
from benchmarks.training.load_balance import zipf_lengths
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import StepPlan, pool_memory, pool_order, step_plan
from pipeline.config import RunConfig
from pipeline.figures import Figures
from pipeline.model.work import count_work
from pipeline.sequences import store
from pipeline.train.meter import count_batches, prefetch_batches

STEP_SECONDS = 0.05
STEP_TOKENS = 65_536
NUM_BUCKETS = 12
MARGIN = 50  # steps before a change of pools and after the next one


@dataclass(frozen=True, slots=True)
class Feeding:
    lengths: str
    layout: str
    rates: bool
    steps: int
    tokens: float  # of a step, mean
    sequences: float
    first_batch_ms: float  # from nothing: the first pool is read
    waiting: float  # share of the time after it
    worst_wait_ms: float
    cpu_ms: float  # processor time of a step
    memory_mb: float  # the most above what the process had before the loader
    bound_mb: float  # what `pool_memory` says


def publish(
    folder: Path, cfg: RunConfig, lengths: np.ndarray, num_buckets: int = NUM_BUCKETS
) -> None:
    """Users of these lengths in so many buckets."""
    (folder / store.VERSIONS).mkdir(parents=True)
    sequences = make_sequences(lengths, cfg, rows_before=int(lengths.max()))
    buckets = []
    for number, rows in enumerate(np.array_split(np.arange(len(lengths)), num_buckets)):
        part, name = sequences.slice(rows[0], len(rows)), f"bucket-{number:05d}.parquet"
        pq.write_table(part, folder / name)
        num_rows = int(lengths[rows].sum())
        buckets.append(
            store.Bucket(name, len(rows), num_rows, (folder / name).stat().st_size, str(number))
        )
    num_rows = int(lengths.sum())
    manifest = store.Manifest(
        digest=f"{len(lengths)} users, {num_rows} rows",
        num_users=len(lengths),
        num_rows=num_rows,
        rows_in=num_rows,
        rows_merged=0,
        rows_capped=0,
        users_capped=0,
        quarantined={},
        counts={},
        first_event_ms=0,
        last_event_ms=0,
        actions=cfg.source.actions,
        request_columns=cfg.source.request_columns,
        num_buckets=num_buckets,
        buckets=tuple(buckets),
        side_tables={},
        quarantine=(),
        parts=(),
        records=(),
        config={},
        inputs="",
    )
    store.write_manifest(folder, manifest)


def measure(
    cfg: RunConfig, maps: FeatureMaps, plan: StepPlan, lengths: str, most_steps: int
) -> Feeding:
    """One run of the simulated training over a change of pools."""
    order = pool_order(len(plan.pools), 0, cfg.seed)
    begin = max(plan.steps[order[0]] - MARGIN, 0)
    num_steps = min(most_steps, plan.steps_per_epoch - begin)
    before, most = resident_bytes(), 0
    asked = time.perf_counter()
    loader = TrainLoader(cfg, maps, plan)
    counted = count_batches(loader.batches(0, begin), partial(count_work, cfg=cfg))
    batches = prefetch_batches(counted)
    batch, _ = next(batches)
    first, cpu, started = time.perf_counter() - asked, time.process_time(), time.perf_counter()
    waits, tokens, sequences = [], batch.num_tokens, batch.num_sequences
    for _ in range(num_steps - 1):
        time.sleep(STEP_SECONDS)
        asked = time.perf_counter()
        batch, _ = next(batches)
        waits.append(time.perf_counter() - asked)
        tokens, sequences = tokens + batch.num_tokens, sequences + batch.num_sequences
        most = max(most, resident_bytes())
    return Feeding(
        lengths=lengths,
        layout=cfg.train.layout,
        rates=bool(cfg.features.dense),
        steps=num_steps,
        tokens=tokens / num_steps,
        sequences=sequences / num_steps,
        first_batch_ms=1000 * first,
        waiting=sum(waits) / (time.perf_counter() - started),
        worst_wait_ms=1000 * max(waits),
        cpu_ms=1000 * (time.process_time() - cpu) / num_steps,
        memory_mb=(most - before) / 2**20,
        bound_mb=pool_memory(cfg.sequence_dir, cfg.train, plan) / 2**20,
    )


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def median(runs: list[Feeding]) -> Feeding:
    names = ("first_batch_ms", "waiting", "worst_wait_ms", "cpu_ms", "memory_mb")
    return replace(
        runs[0], **{name: statistics.median(getattr(run, name) for run in runs) for name in names}
    )


def section(run: Figures) -> str:
    """The section of RESULTS.md from what `as_run` gave."""
    machine = run["environment"]
    found = [Feeding(**figures) for figures in run["feeding"].values()]
    rows = []
    for each in found:
        row = [
            each.lengths,
            "one pass per user" if each.layout == "user" else "one sequence per request",
            "three" if each.rates else "none",
            f"{each.sequences:,.0f}",
            f"{each.cpu_ms:.1f}",
            f"**{each.waiting:.1%}**",
            f"{each.worst_wait_ms:.1f}",
            f"{each.first_batch_ms:,.0f}",
            f"{each.memory_mb:,.0f} / {each.bound_mb:,.0f}",
        ]
        rows.append(row)

    header = [
        "lengths",
        "layout",
        "rates",
        "sequences",
        "processor ms",
        "waiting",
        "longest wait, ms",
        "first batch, ms",
        "memory, MB / stated",
    ]
    return f"""## Feeding

`{run["command"]}`: a step is simulated by sleeping {1000 * STEP_SECONDS:.0f} ms and holds
about {STEP_TOKENS:,} tokens; the loader, with one thread for batches, has one core of an
{machine["cpu"]}.
Waiting: share of the time after the first batch, changes of pools included (goal: at most 5 %).
Processor ms: the loader's own per step. Memory: the most that was resident above what the process
held before the loader, and what `jobs.train --dry-run` states. Medians of {run["repeats"]} runs;
numpy {machine["numpy"]}, pyarrow {machine["pyarrow"]}, Python {machine["python"]}; load average of
the {machine["cores"]} cores before it began: {machine["load"]:.1f} (above 0 other work took
its part of them).

{table(header, rows)}"""


def as_run(found: list[Feeding], repeats: int, busy: float) -> Figures:
    named = {
        f"{each.lengths}, {each.layout}, {'rates' if each.rates else 'no rates'}": asdict(each)
        for each in found
    }
    environment = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "load": busy,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "pyarrow": pa.__version__,
    }
    return {
        "command": "python -m benchmarks.training.feeding",
        "environment": environment,
        "repeats": repeats,
        "feeding": named,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, default=3_000_000)
    parser.add_argument("--steps", type=int, default=160, help="of a run, at most")
    parser.add_argument("--threads", type=int, default=1, help="train.loader_threads")
    parser.add_argument("--cores", type=int, default=1, help="that the process is bound to")
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    busy = os.getloadavg()[0]
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    lengths = {
        "40 on average": rng.poisson(40, options.rows // 40),
        "n^-1.2 from 64 to 4,096": zipf_lengths(options.rows // 350, 1.2, 64, 4096, rng),
    }
    maps, found = make_maps(), []
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, rows) in enumerate(lengths.items()):
            base = bench_config(name=f"store{number}", runs_dir=folder)
            publish(base.sequence_dir, base, rows)
            for layout in ("user", "request"):
                train = replace(
                    base.train,
                    layout=layout,
                    batch_users=None,
                    batch_tokens=STEP_TOKENS,
                    loader_threads=options.threads,
                )
                cfg = replace(base, train=train)
                plan = step_plan(cfg)
                for each in (cfg, with_rates(cfg)):
                    runs = [
                        measure(each, maps, plan, name, options.steps)
                        for _ in range(options.repeats)
                    ]
                    found.append(median(runs))
                    print(json.dumps(asdict(found[-1])), flush=True)
    run = as_run(found, options.repeats, busy)
    print(section(run))
    if not options.dry_run:
        write_run(RUNS / "feeding.json", run)
        write_section("feeding", section(run))


if __name__ == "__main__":
    main()
