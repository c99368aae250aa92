"""What each rank reads of the store in an epoch, and how even the ranks' steps are.

    python -m benchmarks.training.reading          # about 3 minutes; writes its section of
    benchmarks/RESULTS.md

Nothing is trained: every rank's `TrainLoader` goes through an epoch, one after another, and the
bytes are those that the process has read (`/proc/self/io`). With `train.readers: 1` every rank
reads the whole store and takes its share of each step, as with one disk under all of them; with as
many readers as ranks each reads its own decks.
"""

import argparse
import os
import platform
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from benchmarks.machine import cpu_name
from benchmarks.report import RUNS, table, write_run, write_section
from benchmarks.training.collate import bench_config, make_maps
from benchmarks.training.feeding import publish
from benchmarks.training.load_balance import zipf_lengths
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import pool_memory, step_plan
from pipeline.config import RunConfig
from pipeline.figures import Figures
from pipeline.sequences import store

NUM_BUCKETS = 64
STEP_TOKENS = 65_536  # of a rank
RANKS = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class Reading:
    users: int  # of the store
    store_mb: float
    ranks: int
    readers: int
    read_mb: float  # of the rank that reads the most, in an epoch
    all_mb: float  # of all ranks together
    memory_mb: float  # of sequences in a rank, as `jobs.train --dry-run` states
    steps: int
    # mean over the steps of the heaviest rank's tokens by the mean rank's
    plain: float  # stochastic_length.balance none
    dealt: float  # dealing


def bytes_read() -> int:
    """Bytes that this process has read so far, from disk or from the page cache."""
    for line in Path("/proc/self/io").read_text().splitlines():
        name, value = line.split(": ")
        if name == "rchar":
            return int(value)
    raise OSError("/proc/self/io names no rchar")


def measure(cfg: RunConfig, maps: FeatureMaps, ranks: int, readers: int) -> Reading:
    """One epoch of all ranks."""
    train = replace(cfg.train, num_workers=ranks, readers=readers, batch_tokens=STEP_TOKENS * ranks)
    cfg = replace(cfg, train=train)
    plan = step_plan(cfg)

    evenness, read = {}, []
    for balance in ("none", "dealing"):
        lengths = replace(train.stochastic_length, balance=balance)
        this = replace(cfg, train=replace(train, stochastic_length=lengths))

        tokens = []
        for rank in range(ranks):
            before = bytes_read()
            shares = TrainLoader(this, maps, plan, rank, ranks).epoch_shares(0)
            tokens.append([int(share.examples.num_tokens.sum()) for share in shares])
            read.append(bytes_read() - before)

        each = np.array(tokens)  # [ranks, steps]
        evenness[balance] = float((each.max(0) / each.mean(0)).mean())

    files = cfg.sequence_dir.glob("bucket-*")
    return Reading(
        users=store.read_manifest(cfg.sequence_dir).num_users,
        store_mb=sum(file.stat().st_size for file in files) / 2**20,
        ranks=ranks,
        readers=readers,
        read_mb=max(read) / 2**20,
        all_mb=sum(read) / 2 / 2**20,  # read for either balance
        memory_mb=pool_memory(cfg.sequence_dir, cfg.train, plan) / 2**20,
        steps=plan.steps_per_epoch,
        plain=evenness["none"],
        dealt=evenness["dealing"],
    )


def section(run: Figures) -> str:
    """The section of RESULTS.md from what `as_run` gave."""
    machine = run["environment"]
    rows = []
    for figures in run["reading"]:
        each = Reading(**figures)
        row = [
            f"{each.users:,}",
            str(each.ranks),
            str(each.readers),
            f"**{each.read_mb:.1f}**",
            f"{each.read_mb / each.store_mb:.0%}",
            f"{each.all_mb:.1f}",
            f"{each.memory_mb:,.0f}",
            f"{each.plain:.2f}, {each.dealt:.2f}",
        ]
        rows.append(row)

    header = [
        "users",
        "ranks",
        "readers",
        "MB a rank reads",
        "share of the store",
        "MB all ranks read",
        "sequences in memory, MB",
        "heaviest rank / mean rank: balance none, dealing",
    ]
    return f"""## Reading by rank

`{run["command"]}`: users of 40 rows on average, and users of Zipf lengths from 64 to 4,096 rows,
each in {NUM_BUCKETS} buckets; an epoch of steps of {STEP_TOKENS:,} tokens a rank, pools of
{run["pool_buckets"]} buckets a reader. The bytes are those of the process, from disk or cache; the
last 64 kB of a file, where its index is, are read twice. With one reader every rank reads the whole
store; with as many readers as ranks each reads its share, and a step holds another sample of the
same users. The last column is what the ranks wait for each other, without stochastic length. One
reader can deal a step evenly; decks are as even as the users that the hash has given them, so a few
hundred users of very different lengths are better read by one. {machine["cpu"]}, pyarrow
{machine["pyarrow"]}, Python {machine["python"]}.

{table(header, rows)}"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()

    rng = np.random.default_rng(0)
    stores = {
        "short": rng.poisson(40, options.rows // 40),
        "zipf": zipf_lengths(options.rows // 350, 1.2, 64, 4096, rng),
    }
    found, maps = [], make_maps()
    with tempfile.TemporaryDirectory() as folder:
        for name, lengths in stores.items():
            cfg = bench_config(name=name, runs_dir=folder)
            publish(cfg.sequence_dir, cfg, lengths, NUM_BUCKETS)
            train = replace(cfg.train, epochs=1, batch_users=None, batch_tokens=STEP_TOKENS)
            cfg = replace(cfg, train=train)

            for ranks in RANKS:
                for readers in sorted({1, ranks}):
                    found.append(measure(cfg, maps, ranks, readers))
                    print(found[-1], flush=True)

    run = {
        "command": "python -m benchmarks.training.reading",
        "environment": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "pyarrow": pa.__version__,
        },
        "pool_buckets": cfg.train.pool_buckets,
        "reading": [asdict(each) for each in found],
    }
    print(section(run))
    if not options.dry_run:
        write_run(RUNS / "reading.json", run)
        write_section("reading", section(run))


if __name__ == "__main__":
    main()
