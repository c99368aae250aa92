"""Next-item retrieval on MovieLens-1M: our encoders under one loss and budget, over all items.

    python -m benchmarks.quality.retrieval_ml1m --data ../shared/data/ml-1m --split val \
        --names sasrec hstu --seeds 0 1 2 --processes 10 --out runs.jsonl

The data (README there) has no times: each user's films in the order of the first copy, stable. The
last film of each user is the test item; with `--split val` the last two are kept from training and
the second-to-last is asked for. All 3,706 films are ranked, those that the user has rated before
are left out, and films of equal score stand in the order of their ids. A film's token tells if its
rating, where known, was 3 or more.

A user's rows are cut into windows of `length` rows, each trained with its own history only;
evaluation encodes the newest `length` rows. Training is the pipeline's own step (`Trainee`) without
Ray. Several models train side by side on one GPU, each in a process of its own.
"""

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.quality.side_by_side import run_side_by_side
from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.events import Events, offsets_of
from pipeline.batches.example_batches import example_batch, history_batch
from pipeline.batches.examples import Examples, UserEvents
from pipeline.batches.features import FeatureMaps
from pipeline.config import RunConfig
from pipeline.evaluate.retrieval_metrics import (
    RetrievalMetrics,
    positive_ranks,
    remove_seen,
    top_items,
)
from pipeline.model.work import count_work
from pipeline.train.meter import prefetch_batches
from pipeline.train.trainee import Trainee

ACTION = "rating_ge3"
CUTOFFS = (10, 50, 200)
WIDE = {"num_layers": 8, "num_heads": 4, "d_model": 128, "d_qk": 32, "d_v": 32, "ffn_dim": 128}
SHALLOW = {**WIDE, "num_layers": 2}
CAUSAL = {"window": None, "scaling_seq_len": 200}
SEMI_LOCAL = {"window": 200, "full_rows": 200, "scaling_seq_len": 200}
BIASED = {"encoder": "hstu_merged", "relative_bias": True}
LARES = {"encoder": "lares", **SHALLOW, "loop": {"pre_layers": 2, "steps": 4}}
ULTRA = {"encoder": "ultra_hstu", **WIDE, "attention": SEMI_LOCAL}
SAMPLED = {"loss": "uniform"}

# Settings of a run: the model, and beside it whatever it changes of `BASE`.
RUNS: dict[str, dict] = {
    "sasrec": {"model": {"encoder": "sasrec", **SHALLOW}},
    "hstu": {"model": {**BIASED, **SHALLOW}},
    "hstu_large": {"model": {**BIASED, **WIDE}},
    "hstu_wide": {
        "model": {**BIASED, **WIDE, "d_model": 256, "num_heads": 8, "dropout": 0.5},
        "epochs": 30,
    },
    "fuxi_alpha": {"model": {"encoder": "fuxi_alpha", **WIDE}},
    "fuxi_beta": {"model": {"encoder": "fuxi_beta", **WIDE, "ffn_dim": 384}},
    "lares": {"model": LARES},
    "lares_aligned": {
        "model": LARES,
        "retrieval": {"align_trajectories": 0.1, "align_steps": 0.1},
    },
    "ultra_200": {"model": ULTRA},
    "ultra_2000": {"model": ULTRA, "length": 2000, "train": {"batch_users": 96}},
    "sampled_128": {"model": {**BIASED, **WIDE}, "retrieval": {**SAMPLED, "negatives": 128}},
    "sampled_512": {"model": {**BIASED, **WIDE}, "retrieval": {**SAMPLED, "negatives": 512}},
}
MEMORIES = {"4k": 4096, "64k": 65_536}
MEMORY_BATCHES = (64, 512)
MEMORY_STEPS = 1200


def memory_runs() -> dict[str, dict]:
    """The ablation of the cross-batch memory: a step has one next item of each of 64 or 512
    windows, told apart from the step's other next items and from those in memory.
    """
    small = {**SHALLOW, "num_heads": 2, "d_model": 64, "ffn_dim": 64, "encoder": "sasrec"}
    runs = {}
    for batch in MEMORY_BATCHES:
        own = {
            "model": small,
            "length": 50,
            "targets": 1,
            "epochs": 1,
            "steps": MEMORY_STEPS,
            "train": {"batch_users": batch},
        }
        runs[f"memory_none_{batch}"] = {**own, "retrieval": {"loss": "in_batch"}}
        # what a memory of all items that does not drift would come to
        runs[f"memory_full_{batch}"] = {**own, "retrieval": {"loss": "full"}}
        for kind, (label, size) in itertools.product(("xbm", "xbn", "axbn"), MEMORIES.items()):
            memory = {"loss": "in_batch", "memory": kind, "memory_size": size}
            memory["memory_warmup"] = MEMORY_STEPS // 4
            runs[f"memory_{kind}_{label}_{batch}"] = {**own, "retrieval": memory}
    return runs


RUNS |= memory_runs()
BASE: dict = {
    "length": 200,
    "targets": None,
    "epochs": 25,
    "steps": None,
    "model": {"dropout": 0.3, "attention": CAUSAL, "position_buckets": 200, "time_buckets": 2},
    "train": {
        "batch_users": 128,
        "lr": 2e-3,
        "embedding_lr": 8e-3,
        "warmup_steps": 200,
        "precision": "bf16",
    },
    "retrieval": {},
}


@dataclass(frozen=True, slots=True)
class Run:
    """A model with its training."""

    cfg: RunConfig
    length: int  # history rows of a window
    targets: int  # next items of a window, the newest rows
    epochs: int
    steps: int | None  # of an epoch; None for all windows


def make_run(name: str, seed: int, changes: dict) -> Run:
    """The run `name` of `RUNS`, with `changes` over it."""
    run = {key: value for key, value in BASE.items() if not isinstance(value, dict)}
    run |= {key: {**BASE[key]} for key in ("model", "train", "retrieval")}
    for part in (RUNS[name], changes):
        for key, value in part.items():
            run[key] = {**run[key], **value} if isinstance(value, dict) else value

    length = run["length"]
    targets = length if run["targets"] is None else run["targets"]
    width = run["model"]["d_model"]
    cfg = config.from_dict(
        {
            "seed": seed,
            "source": {"kind": "synthetic", "actions": [ACTION]},
            "tasks": [],
            "features": {"item_id_dim": width},
            "model": run["model"],
            "train": {**run["train"], "epochs": run["epochs"], "history_label_weight": 1.0,
                      "max_targets_per_sequence": targets},
            "retrieval": {"enabled": True, "dim": width, **run["retrieval"]},
        }
    )  # fmt: skip
    return Run(cfg, length, targets, run["epochs"], run["steps"])


class Ratings:
    """All users' films in order, and the maps that training reads them by."""

    def __init__(self, folder: Path) -> None:
        table = pq.read_table(folder / "interactions.parquet")
        order = np.lexsort((table["position"].to_numpy(), table["user_id"].to_numpy()))
        user, item, liked = (
            table[name].to_numpy()[order] for name in ("user_id", "item_id", "rating_ge3")
        )
        self.user_id, counts = np.unique(user, return_counts=True)
        self.offsets = offsets_of(counts)
        self.item_ids = np.unique(item)
        self.number = np.searchsorted(self.item_ids, item)
        rows = np.arange(len(item))
        self.events = Events(
            offsets=self.offsets,
            item_id=item,
            event_time=rows,
            order_only=np.ones(len(item), bool),
            action_mask=(liked == 1).astype(np.int32),
            known_mask=(liked >= 0).astype(np.int32),
            position=rows,
            gap_ms=np.full(len(item), -1),
            request={},
            outcomes={},
        )
        self.users = UserEvents(self.events, self.user_id, np.zeros_like(self.user_id), rows, rows)

    def maps(self, held_out: int) -> FeatureMaps:
        """Of the rows before each user's last `held_out`."""
        training = np.ones(len(self.number), bool)
        for back in range(1, held_out + 1):
            training[self.offsets[1:] - back] = False
        counts = np.bincount(self.number[training], minlength=len(self.item_ids))
        codes = np.arange(len(self.item_ids) + 1, dtype=np.int32)[:, None]
        return FeatureMaps(
            item_ids=self.item_ids,
            item_codes=codes,
            item_count=np.concatenate([[0], counts]),
            user_ids=self.user_id,
            user_codes=np.zeros((len(self.user_id) + 1, 0), np.int32),
            request_values={},
            vocab_sizes={"item_id": len(codes)},
            base_rates={},
            next_count=np.concatenate([[0], counts]),
        )

    def windows(self, held_out: int, length: int, targets: int) -> Examples:
        """Each user's training rows in windows of at most `targets` targets and `length` rows of
        history, the newest one full.

        rows of a user   0 1 2 3 4 5 6      the last one held out, length 3
        3 targets          [1 2] [3 4 5]    each from its window's rows before it
        their histories  [0 1]  [2 3 4]
        1 target           [1][2][3][4][5]
        their histories  [0] [0 1] [0 1 2] [1 2 3] [2 3 4]
        """
        parts = []
        for user, (begin, end) in enumerate(
            zip(self.offsets[:-1].tolist(), (self.offsets[1:] - held_out).tolist(), strict=True)
        ):
            for stop in range(end, begin + 1, -targets):
                start = max(stop - targets, begin + 1)
                oldest = max(stop - 1 - length, begin)
                parts.append((user, oldest, stop - 1, start, stop))
        columns = np.array(parts).T
        return Examples(*columns)

    def newest(self, held_out: int, length: int) -> Examples:
        """Each user's newest `length` rows before the item that is asked for."""
        end = self.offsets[1:] - held_out
        begin = np.maximum(end - length, self.offsets[:-1])
        users = np.arange(len(self.user_id))
        return Examples(users, begin, end, end, end)


def from_window_start(batch: SequenceBatch) -> SequenceBatch:
    """Positions counted from the first row of each sequence."""
    first = torch.repeat_interleave(batch.seq_offsets[:-1], batch.seq_offsets.diff())
    return replace(batch, position=torch.arange(batch.num_tokens) - first)


def training_batches(
    ratings: Ratings, windows: Examples, maps: FeatureMaps, cfg: RunConfig, epoch: int
) -> Iterator[SequenceBatch]:
    """One epoch's windows, shuffled, `train.batch_users` at a time."""
    order = np.random.default_rng([cfg.seed, epoch]).permutation(len(windows))
    size = cfg.train.batch_users
    assert size is not None
    for begin in range(0, len(order), size):
        chosen = windows[order[begin : begin + size]]
        yield from_window_start(example_batch(ratings.users, chosen, maps, cfg, training=True))


class Evaluation:
    """The histories before each user's held-out item, and the items that are not asked for."""

    def __init__(
        self, ratings: Ratings, maps: FeatureMaps, cfg: RunConfig, held_out: int, length: int
    ) -> None:
        self.counts = maps.item_count[1:]
        self.parts = []
        newest = ratings.newest(held_out, length)
        for begin in range(0, len(newest), 512):
            part = newest[begin : begin + 512]
            batch = from_window_start(history_batch(ratings.users, part, maps, cfg.inputs))
            seen = [
                (row, number)
                for row, (first, end) in enumerate(
                    zip(ratings.offsets[part.user], part.history_end, strict=True)
                )
                for number in ratings.number[first:end]
            ]
            held = ratings.number[part.history_end]
            self.parts.append((batch, torch.tensor(seen).T, torch.from_numpy(held)))

    @torch.no_grad()
    def __call__(self, trainee: Trainee, device: str) -> dict[str, float]:
        model = trainee.model.eval()
        assert model.retrieval is not None and trainee.next_item is not None
        items = model.retrieval.item_vectors(trainee.next_item.item_codes)
        metrics = RetrievalMetrics(self.counts, CUTOFFS)
        for batch, (user, item), held in self.parts:
            encoded = model.encode(batch.to(device), last_history=True)
            assert encoded.last_history_row is not None
            scores = model.retrieval.user_vectors(encoded.last_history_row) @ items.T
            remove_seen(scores, user.to(device), item.to(device))
            rows = torch.arange(len(held), device=device)
            ranks = positive_ranks(scores, rows, held.to(device)).cpu().numpy()
            top = top_items(scores, max(CUTOFFS)).cpu().numpy()
            metrics.add(np.ones(len(held), np.int64), ranks, held.numpy(), top)
        return metrics.result()


@torch.no_grad()
def memory_facts(trainee: Trainee) -> dict[str, float]:
    """Mean cosine of the vectors in memory and those that the model would make of their items now,
    both less the mean of the latter; nothing where there is no memory.
    """
    head, loss = trainee.model.retrieval, trainee.next_item
    if head is None or loss is None or loss.memory is None or len(loss.memory.codes) == 0:
        return {}
    now = head.item_vectors(loss.item_codes[loss.memory.codes])
    mean = now.mean(0)
    cosine = torch.nn.functional.cosine_similarity(loss.memory.vectors - mean, now - mean, dim=1)
    return {"memory_vectors": len(cosine), "memory_cosine": cosine.mean().item()}


def train_one(options: argparse.Namespace, name: str, seed: int) -> None:
    """Train, evaluate every `--every` epochs and at the end; a line of JSON each time."""
    torch.set_num_threads(1)
    run = make_run(name, seed, json.loads(options.set))
    cfg, epochs = run.cfg, run.epochs
    held_out = {"val": 2, "test": 1}[options.split]
    ratings = Ratings(options.data)
    maps = ratings.maps(held_out)
    windows = ratings.windows(held_out, run.length, run.targets)
    evaluation = Evaluation(ratings, maps, cfg, held_out, run.length)

    torch.manual_seed(seed)
    trainee = Trainee(cfg, maps, options.device, 0, 1)
    steps = run.steps or -(-len(windows) // (cfg.train.batch_users or 1))
    total, step, flops, rows = steps * epochs, 0, 0, 0
    begin, sums = time.perf_counter(), None
    for epoch in range(epochs):
        batches = training_batches(ratings, windows, maps, cfg, epoch)
        for batch in prefetch_batches(itertools.islice(batches, steps)):
            if epoch == 0:
                flops += 3 * count_work(batch, cfg, len(ratings.item_ids)).flops
                rows += batch.num_tokens
            loss = torch.stack(trainee.step(batch.to(options.device), step, total))
            sums = loss if sums is None else sums + loss
            step += 1
            trainee.update_average(step, total)
        last = epoch + 1 == epochs
        if last or (options.every and (epoch + 1) % options.every == 0):
            assert sums is not None
            lost, weight = sums[:, 0].tolist()
            line = {
                "name": name, "set": json.loads(options.set), "seed": seed, "split": options.split,
                "epoch": epoch + 1, "end": last, "loss": lost / weight,
                "seconds": time.perf_counter() - begin,
                "train_tflop": flops * epochs / 1e12, "rows_per_epoch": rows,
                "parameters": sum(p.numel() for p in trainee.model.parameters()),
                **evaluation(trainee, options.device),
                **memory_facts(trainee),
            }  # fmt: skip
            sums = None
            print(json.dumps(line), flush=True)


def command_of(options: argparse.Namespace, name: str, changes: str, seed: int) -> list[str]:
    """One run in a process of its own, as what stands behind `python -m`."""
    command = ["benchmarks.quality.retrieval_ml1m", "--one", name]
    command += ["--seeds", str(seed), "--set", changes, "--data", str(options.data)]
    command += ["--split", options.split, "--device", options.device]
    return [*command, "--every", str(options.every)]


def parse_plan(text: str) -> tuple[str, str]:
    """`hstu` or `hstu:{"epochs": 60}`: a name of RUNS, and JSON of what it changes."""
    name, _, changes = text.partition(":")
    if name not in RUNS:
        raise argparse.ArgumentTypeError(f"no run {name!r}; there are {', '.join(RUNS)}")
    return name, changes or "{}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of ML-1M as Parquet")
    parser.add_argument("--split", choices=["val", "test"], default="val")
    parser.add_argument(
        "--names",
        dest="plan",
        nargs="+",
        type=parse_plan,
        default=[(name, "{}") for name in RUNS],
        metavar="NAME[:JSON]",
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--budget", type=float, default=3600, help="seconds")
    parser.add_argument("--every", type=int, default=0, help="epochs between two evaluations")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, help="file that the lines of JSON are added to")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--set", default="{}", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        train_one(options, options.one, options.seeds[0])
        return

    # seed by seed: what is cut off by the time are the last seeds of all
    commands = []
    for seed in options.seeds:
        for name, changes in options.plan:
            commands.append(command_of(options, name, changes, seed))
    run_side_by_side(commands, options.out, options.processes, options.budget)


if __name__ == "__main__":
    main()
