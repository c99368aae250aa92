"""What a training says of itself: losses, speed and validations, to a log and on the console.

a step's sums ─┐
the meter ─────┴→ `Progress` → values of a line → `Log`, the console, the watch for divergence
"""

import logging
import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.backend import choose_backend
from kernels.compilations import count_compilations
from pipeline.batches.collate import SequenceBatch
from pipeline.config import ModelConfig
from pipeline.model.ranker import RankingModel, attention_variance
from pipeline.train.checkpoint import TrainState
from pipeline.train.guards import improved, silent_attention, watch_divergence
from pipeline.train.meter import Meter
from pipeline.train.optim import learning_rate_factor, resolve_warmup
from pipeline.train.trainee import Trainee

logger = logging.getLogger(__name__)

Validate = Callable[[RankingModel], dict[str, float]]
Log = Callable[[int, dict[str, float]], None]  # a step and its values


class Progress:
    """The values of a run's lines, to `log` and on rank 0 to the console.

    `values` are those of the present step, `newest` the newest of each name, and `is_best` says
    whether its validation beat all before.
    """

    def __init__(
        self, trainee: Trainee, state: TrainState, total_steps: int, log: Log | None
    ) -> None:
        self.trainee, self.state, self.total_steps, self.log = trainee, state, total_steps, log
        self.cfg = trainee.cfg
        self.meter = Meter(trainee.world_size)

        # Summed where they arise: reading a loss each step would make the host wait for the device.
        device = trainee.loss_weights.device
        sums = [state.loss_sum, state.weight_sum]
        self.sums = torch.tensor(sums, dtype=torch.float64, device=device)
        self.values: dict[str, float] = {}
        self.newest: dict[str, float] = {}
        self.is_best = False

    def tell_device(self) -> None:
        weights = self.trainee.loss_weights
        where = torch.cuda.get_device_name(weights.device) if weights.is_cuda else "CPU"
        kernels = choose_backend("auto", weights)
        self._say("%d x %s, %s kernels", self.trainee.world_size, where, kernels)

    def tell_attention(self, batch: SequenceBatch, cfg: ModelConfig) -> None:
        """Var(A) of each layer before the first step; all ranks call it, since sharded tables bring
        their rows together.
        """
        variances = attention_variance(self.trainee.model, batch)
        if variances:
            text = ", ".join(f"{variance:.1e}" for variance in variances)
            self._say("Var(A) by layer at the start: %s; norm_eps %.0e", text, cfg.norm_eps)
        warning = silent_attention(variances, cfg)
        if warning is not None and self.trainee.rank == 0:
            logger.warning(warning)

    def add_losses(self, losses: Tensor, weights: Tensor) -> None:
        """Add a step's sums, on the device."""
        self.sums += torch.stack([losses, weights])

    def read_device(self) -> None:
        """Take sums and bad steps from the device, which is waited for.

        Raises:
            TrainingStopped: too many steps in a row were not finite.
        """
        self.values, self.is_best = {}, False
        self.state.loss_sum, self.state.weight_sum = self.sums.tolist()
        guard = self.trainee.guard
        self.state.bad_steps += guard.take_bad_steps(self.state.step, self.cfg.max_bad_steps)

    def report(self) -> None:
        """Mean losses and speed since the last report."""
        self.sums.zero_()
        values = take_losses(self.state, self.trainee)
        values |= self.meter.take_speed(self.state, self.trainee.clock.take_seconds())
        values["train/bad_steps"] = self.state.bad_steps

        values["train/kernels_compiled"] = count_compilations()
        if self.trainee.graphs is not None:
            graphs = self.trainee.graphs.of_batches
            values["train/graphs_captured"] = graphs.captured
            values["train/steps_replayed"] = graphs.replayed

        values["train/grad_norm"] = float(self.trainee.grad_norm)
        warmup = resolve_warmup(self.cfg.warmup_steps, self.total_steps)
        factor = learning_rate_factor(self.state.step - 1, warmup, self.total_steps)
        values["train/lr"] = self.cfg.lr * factor

        self.values |= values
        self._say("%s", progress_line(self.state, self.total_steps, self.values))

    def validate(self, validate: Validate) -> None:
        with self.meter.pause_clock(self.state):
            found = validate(self.trainee.model)
        self.values |= found
        metric = self.cfg.best_metric
        self.is_best = improved(self.state, found[f"val_sample/{metric}"], self.cfg)
        self._say("%s", validation_line(self.state, found, metric))

    def log_values(self) -> None:
        """Hand this step's values on.

        Raises:
            TrainingStopped: the loss diverged.
        """
        if self.log is not None and self.values:
            self.log(self.state.step, self.values)
        self.newest |= self.values
        if "train/loss" in self.values:
            watch_divergence(self.state, self.values["train/loss"], self.cfg)

    def stops_early(self) -> bool:
        """True after `train.patience` validations without a better one."""
        patience = math.inf if self.cfg.patience is None else self.cfg.patience
        if self.state.not_better < patience:
            return False
        step, best = self.state.step, self.state.best_step
        logger.info("stopping early at step %d: best at step %s", step, best)
        return True

    def _say(self, message: str, *values: object) -> None:
        if self.trainee.rank == 0:
            logger.info(message, *values)


def progress_line(state: TrainState, total_steps: int, values: dict[str, float]) -> str:
    """`step 20/40 epoch 1 | loss 0.5123 | 812 examples/s, …`"""
    left_s = (total_steps - state.step) * values["train/step_ms"] / 1000
    epoch = (state.step - 1) // state.steps_per_epoch + 1
    examples, tokens = values["train/examples_per_s"], values["train/tokens_per_s"]
    loss = f"{values['train/loss']:.4f}" if "train/loss" in values else "undefined"
    return (
        f"step {state.step}/{total_steps} epoch {epoch} | loss {loss} | "
        f"{examples:,.0f} examples/s, {tokens:,.0f} tokens/s | "
        f"waiting for data {values['train/data_wait_share']:.1%} | {left_s:.0f} s left"
    )


def validation_line(state: TrainState, found: dict[str, float], metric: str) -> str:
    """`step 20 | validation ne 0.8123, best 0.8101 at step 10`"""
    here = f"step {state.step} | validation {metric} {found[f'val_sample/{metric}']:.4f}"
    if state.best is None:
        return here
    return f"{here}, best {state.best:.4f} at step {state.best_step}"


def take_losses(state: TrainState, trainee: Trainee) -> dict[str, float]:
    """Mean losses since the last line, `train/loss` the one that is minimised; sums start anew.

    A part without a known label since then has no mean and is left out, `train/loss` too where no
    part has one: a 0 would be the best loss of all.
    """
    factors = trainee.loss_weights.tolist()
    loss, weight = 0, 0
    of_parts: dict[str, float] = {}
    sums = zip(trainee.loss_names, factors, state.loss_sum, state.weight_sum, strict=True)
    for name, factor, part_loss, part_weight in sums:
        loss += factor * part_loss
        weight += factor * part_weight
        if part_weight > 0:
            of_parts[f"train/loss/{name}"] = part_loss / part_weight

    zeros = [0.0] * len(factors)
    state.loss_sum, state.weight_sum = zeros, [*zeros]
    return {"train/loss": loss / weight, **of_parts} if weight > 0 else {}
