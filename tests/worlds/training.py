"""A loader of random batches, and the losses of a short training on it."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from pipeline.batches.collate import SequenceBatch
from pipeline.config import RunConfig
from pipeline.train import loop
from pipeline.train.trainee import Trainee
from tests.worlds.model import joined, labelled_batch, make_config, make_maps

STEPS = 6


class Loader:
    """Random batches; rank r of two gets the odd or even sequences of the same step."""

    steps_per_epoch = STEPS

    def __init__(self, rank: int = 0, world_size: int = 1) -> None:
        self.rank, self.world_size = rank, world_size

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        for step in range(first_step, STEPS):
            parts = [labelled_batch(100 * epoch + 10 * step + part) for part in range(2)]
            yield joined(parts) if self.world_size == 1 else parts[self.rank]


def train_config(**train: object) -> RunConfig:
    cfg = make_config(dropout=0.3)
    settings = {"epochs": 2, "log_every": 2, "checkpoint_every": 4, "warmup_steps": 2, "lr": 0.01}
    return replace(cfg, train=replace(cfg.train, **settings | train))  # pyright: ignore[reportArgumentType]


def run(
    cfg: RunConfig, loader: Loader | None = None, **options: Any
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """The lines of losses, and the weights at the end."""
    lines = []
    model = loop.train(
        cfg,
        make_maps(),
        loader or Loader(),
        "data",
        log=lambda step, values: lines.append({"step": step, **losses_of(values)}),
        **options,
    )
    return lines, model.state_dict()


def losses_of(values: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in values.items() if key.startswith("train/loss")}


def rows_told_and_found(
    trainee: Trainee, batch: SequenceBatch
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of replicated tables that one rank of several would tell the others of, and those that
    get a gradient, both sorted and numbered through.
    """
    assert trainee.touched is not None
    trainee.model.train()
    loss, _ = trainee._losses(batch)
    loss.sum().backward()

    found = []
    for store, (rows, _) in trainee._replicated_gradients().items():
        found.append(rows + trainee.touched.first_flags[store])
    return torch.cat(trainee.touched.looked_up).unique(), torch.cat(found).unique()
