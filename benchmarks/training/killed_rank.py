"""A rank that dies in the middle of a training: all are started again, and no loss changes.

    torchrun --nproc-per-node 2 -m benchmarks.training.killed_rank FOLDER      # ends with an error
    torchrun --nproc-per-node 2 -m benchmarks.training.killed_rank FOLDER --out FILE

The first command trains unbroken, then once more until the last rank kills itself (SIGKILL);
torchrun ends the others, which wait for its messages. The second goes on from the newest checkpoint
and compares; with another `--nproc-per-node` it goes on at another number of ranks, where losses
differ by rounding. It needs neither Ray nor MLflow; Ray Train, which starts workers again by
itself, has `benchmarks.training.train_job`.
"""

import argparse
import json
import os
import signal
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.machine import environment
from benchmarks.report import write_run
from benchmarks.training.model import vocabulary
from benchmarks.training.ranks import Ranks
from benchmarks.training.sharding import ALL_SHARDED, RandomLoader, small_run, with_train
from benchmarks.training.sharding_report import RESUMED
from pipeline.config import RunConfig
from pipeline.train import loop
from pipeline.train.checkpoint import CheckpointFolder

CHECKPOINT_EVERY = 10
KILLED_AT = 25
UNBROKEN = "unbroken.json"  # the unbroken run's ranks, sizes and losses


def train(
    cfg: RunConfig, sizes: dict[str, int], ranks: Ranks, folder: Path, dies_at: int | None = None
) -> tuple[int, list[float]]:
    """Train from the newest checkpoint in `folder` on; the step of that, and the losses after it.

    The last rank ends with `dies_at` steps done.
    """
    maps = vocabulary(cfg)
    maps.vocab_sizes["item_id"] = sizes["items"]
    checkpoints = CheckpointFolder(folder, 100, ranks.rank, ranks.size)
    resume = checkpoints.newest()
    first_step = resume.state.step if resume is not None else 0
    losses: list[float] = []

    def log(step: int, values: dict[str, float]) -> None:
        losses.append(values["train/loss"])
        if step == dies_at and ranks.rank == ranks.size - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    loop.train(
        cfg,
        maps,
        RandomLoader(cfg, sizes, maps, ranks.rank, ranks.size),
        "random",
        rank=ranks.rank,
        world_size=ranks.size,
        device=ranks.device,
        resume=resume,
        checkpoints=checkpoints,
        log=log,
    )
    return first_step, losses


def first_attempt(cfg: RunConfig, sizes: dict[str, int], ranks: Ranks, folder: Path) -> None:
    """The unbroken run, its losses kept; and the run that breaks off here."""
    _, unbroken = train(cfg, sizes, ranks, folder / "unbroken")
    if ranks.rank == 0:
        facts = {"ranks": ranks.size, "sizes": sizes, "losses": unbroken}
        (folder / UNBROKEN).write_text(json.dumps(facts))
    ranks.wait()
    train(cfg, sizes, ranks, folder / "broken", dies_at=KILLED_AT)


def second_attempt(cfg: RunConfig, ranks: Ranks, folder: Path) -> dict[str, Any]:
    """The run that goes on, against the unbroken one."""
    unbroken = json.loads((folder / UNBROKEN).read_text())
    resumed_at, losses = train(cfg, unbroken["sizes"], ranks, folder / "broken")

    expected = unbroken["losses"][resumed_at:]
    distances = [abs(a - b) / abs(b) for a, b in zip(losses, expected, strict=True)]
    return {
        "steps": unbroken["sizes"]["steps"],
        "killed_at": KILLED_AT,
        "resumed_at": resumed_at,
        "ranks": [unbroken["ranks"], ranks.size],
        "equal": losses == expected,
        "furthest": max(distances),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="of checkpoints; new for the first command")
    parser.add_argument("--out", type=Path, help="JSON of what the second command finds")
    options = parser.parse_args()

    ranks = Ranks()
    cfg, sizes = small_run(ranks, items=997)
    cfg = with_train(cfg, tables=ALL_SHARDED, checkpoint_every=CHECKPOINT_EVERY)
    if not (options.folder / UNBROKEN).exists():
        first_attempt(cfg, sizes, ranks, options.folder)
        raise AssertionError("the last rank kills itself")

    killed = second_attempt(cfg, ranks, options.folder)
    if ranks.rank == 0:
        print(json.dumps(killed), flush=True)
        if options.out:
            command = f"torchrun --nproc-per-node {ranks.size} -m benchmarks.training.killed_rank"
            found = {
                "command": f"{command} FOLDER",
                "environment": environment(ranks.device.split(":")[0]),
                "ranks": ranks.size,
                "killed": killed,
            }
            write_run(options.out, found)
    if ranks.size > 1:
        dist.destroy_process_group()
    same_ranks = len(set(killed["ranks"])) == 1
    raise SystemExit(not (killed["equal"] if same_ranks else killed["furthest"] <= RESUMED))


if __name__ == "__main__":
    main()
