"""Events per second through the data path of training and evaluation, on one core.

    python -m benchmarks.training.collate

Synthetic users with a mean of 40 rows in SEQUENCE's Arrow columns; the maps know 20,000 items with
two item columns and two request columns. Timed: Arrow lists → flat columns (`user_events`, once per
pool of buckets), and flat columns → `SequenceBatch` (`example_batch`, once per step), without and
with three dense features on the candidates.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.machine import environment
from benchmarks.report import RUNS, table, write_run, write_section
from pipeline import config
from pipeline.batches.counts import LabelCounts
from pipeline.batches.example_batches import example_batch
from pipeline.batches.examples import request_examples, training_examples, user_events
from pipeline.batches.features import FeatureMaps
from pipeline.figures import Figures

NUM_ITEMS = 20_000
DAY_MS = 86_400_000


STAGES = {  # what was timed → what RESULTS.md calls it
    "user_events": "Arrow lists → flat columns with position, gap and request bounds "
    "(`user_events`)",
    "example_batch, one pass per user": "→ `SequenceBatch`, one pass per user, every row also a "
    "target with its visible length and labels",
    "example_batch, one pass per user, dense features": "the same, each target with rates of its "
    "item, its tab and its user",
    "example_batch, one sequence per request": "→ `SequenceBatch`, one sequence per request",
    "example_batch, one sequence per request, dense features": "the same, with the three rates",
}


def bench_config(**sections: Any) -> config.RunConfig:
    return config.from_dict(
        {
            "source": {
                "kind": "synthetic",
                "actions": ["click", "like", "share", "follow"],
                "request_columns": ["tab"],
            },
            "tasks": ["click", "like"],
            "features": {"request": {"tab": {"dim": 4}, "hour": {"dim": 4}}},
        }
        | sections
    )


def with_rates(cfg: config.RunConfig) -> config.RunConfig:
    """The same with three dense features on the candidates."""
    by = {"item": ("item_id",), "tab": ("tab",), "user": ("user",)}
    dense = {name: config.DenseFeature(by=columns) for name, columns in by.items()}
    return replace(cfg, features=replace(cfg.features, dense=dense))


def make_sequences(lengths: np.ndarray, cfg: config.RunConfig, rows_before: int) -> pa.Table:
    """Users with so many rows, each a request of its own; the first `rows_before` of them in the
    training period.
    """
    rng, num_users = np.random.default_rng(0), len(lengths)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    num_rows = int(offsets[-1])
    start = np.repeat(offsets[:-1], lengths)
    columns = {
        "item_id": rng.integers(0, NUM_ITEMS, num_rows),
        "event_time": cfg.split.val_ms
        - DAY_MS
        + (np.arange(num_rows) - start) * (DAY_MS // rows_before),
        "action_mask": rng.integers(0, 16, num_rows).astype(np.int32),
        "known_mask": np.full(num_rows, 15, np.int32),
        "watch_ms": rng.integers(0, 60_000, num_rows),
        "request_index": (np.arange(num_rows) - start).astype(np.int32),
        "order_only": np.zeros(num_rows, bool),
        "tab": rng.integers(0, 8, num_rows).astype(np.int32),
    }
    lists = [
        pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(column))
        for column in columns.values()
    ]
    scalars = [
        pa.array(np.arange(num_users)),
        pa.array(np.zeros(num_users, np.int32)),
        pa.array(np.zeros(num_users, np.int64)),
    ]
    return pa.Table.from_arrays([*scalars, *lists], schema=cfg.source.events.sequence_schema())


def make_maps() -> FeatureMaps:
    rng = np.random.default_rng(1)
    codes = np.column_stack(
        [np.arange(NUM_ITEMS + 1), rng.integers(0, 500, (NUM_ITEMS + 1, 2))]
    ).astype(np.int32)
    known = rng.random((10**6, 2)) < 0.9
    labels = np.concatenate([known, known & (rng.random((10**6, 2)) < 0.3)], axis=1)
    return FeatureMaps(
        item_ids=np.arange(NUM_ITEMS),
        item_codes=codes,
        item_count=np.ones(NUM_ITEMS + 1, np.int64),
        user_ids=np.zeros(0, np.int64),
        user_codes=np.zeros((1, 0), np.int32),
        request_values={"tab": np.arange(8), "hour": np.arange(24)},
        vocab_sizes={"request.tab": 9},
        base_rates={},
        row_rates={"timed": [0.3, 0.02]},
        counts={
            "item": LabelCounts.from_rows(
                rng.integers(1, NUM_ITEMS, 10**6), np.arange(10**6) // 5000, labels
            ),
            "tab": LabelCounts.from_rows(
                rng.integers(1, 9, 10**6), np.arange(10**6) // 5000, labels
            ),
        },
    )


def median_seconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=256, help="sequences per batch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dry-run", action="store_true", help="print the table, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cfg = bench_config()
    dense = with_rates(cfg)
    lengths = np.random.default_rng(0).poisson(40, options.users)
    sequences, maps = make_sequences(lengths, cfg, rows_before=30), make_maps()
    users = user_events(sequences, cfg.source, cfg.features)
    num_rows = int(users.events.offsets[-1])
    rates = {
        "user_events": num_rows
        / median_seconds(lambda: user_events(sequences, cfg.source, cfg.features), options.repeats)
    }
    layouts = {
        "example_batch, one pass per user": (
            training_examples(users, cfg.split, cfg.train, np.random.default_rng(0)),
            True,
        ),
        "example_batch, one sequence per request": (
            request_examples(users, cfg.split.val_ms, 2**62),
            False,
        ),
    }
    for name, (examples, training) in layouts.items():
        parts = [
            examples[i : i + options.batch]
            for i in range(0, min(len(examples), 40 * options.batch), options.batch)
        ]
        tokens = sum(int(part.num_tokens.sum()) for part in parts)
        for which, settings in ((name, cfg), (f"{name}, dense features", dense)):
            work = lambda parts=parts, training=training, settings=settings: [
                example_batch(users, part, maps, settings, training=training) for part in parts
            ]
            rates[which] = tokens / median_seconds(work, options.repeats)
    run = {
        "command": "python -m benchmarks.training.collate",
        "environment": environment("cpu"),
        "users": options.users,
        "repeats": options.repeats,
        "events_per_s": {name: round(rate) for name, rate in rates.items()},
    }
    print(section(run))
    if not options.dry_run:
        write_run(RUNS / "collate.json", run)
        write_section("data path", section(run))


def section(run: Figures) -> str:
    """The section of RESULTS.md from what `main` measured."""
    machine = run["environment"]
    rows = []
    for name, what in STAGES.items():
        rows.append([what, f"{run['events_per_s'][name] / 1e6:.1f}M"])

    return f"""## Data path

`{run["command"]}`, one of {machine["cores"]} cores ({machine["device"]}), medians of
{run["repeats"]} runs: {run["users"]:,} synthetic users with a mean of 40 rows.

{table(["", "events/s"], rows)}"""


if __name__ == "__main__":
    main()
