"""The training loop of one rank: runs by a plain call, under `torch.distributed`, and inside Ray
Train.

    loader → batches → `Trainee.step` → what `Cadence` says is due: report, validation, checkpoint
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kernels.backend import choose_backend
from kernels.compilations import count_compilations
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.batches.filling import BatchFiller
from pipeline.config import ModelConfig, RunConfig, TrainConfig, UserError
from pipeline.model.ranker import RankingModel, attention_variance
from pipeline.train.checkpoint import (
    CheckpointFolder,
    Saved,
    TrainState,
    check_identity,
    run_identity,
)
from pipeline.train.guards import improved, silent_attention, watch_divergence
from pipeline.train.interruption import Wishes
from pipeline.train.loader_process import Counted, LoaderProcess, MakeBatches
from pipeline.train.meter import (
    Meter,
    count_batches,
    fill_batches,
    pin_batches,
    prefetch_batches,
)
from pipeline.train.milestones import Milestones, Report
from pipeline.train.optim import learning_rate_factor, resolve_warmup
from pipeline.train.profile import StepProfiler
from pipeline.train.trainee import Trainee

logger = logging.getLogger(__name__)

Validate = Callable[[RankingModel], dict[str, float]]
Log = Callable[[int, dict[str, float]], None]


class Loader(Protocol):
    """Batches of one rank; every rank takes `steps_per_epoch` steps, and the same call gives the
    same batches.
    """

    steps_per_epoch: int

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]: ...


def train(
    cfg: RunConfig,
    maps: FeatureMaps,
    loader: Loader,
    data_digest: str,
    *,
    rank: int = 0,
    world_size: int = 1,
    device: torch.device | str = "cpu",
    resume: Saved | None = None,
    checkpoints: CheckpointFolder | None = None,
    validate: Validate | None = None,
    log: Log | None = None,
    profile_dir: Path | None = None,
    wishes: Wishes | None = None,
    begin_with: Callable[[Trainee], None] | None = None,
    report: Report | None = None,
) -> RankingModel:
    """Train to the last step of the last epoch, or to an early stop, from `resume` on where it is
    given.

    `checkpoints` get one every `train.checkpoint_every` steps, at every validation better than all
    before, and at the end; `validate` is called every `train.validate_every` steps; `log` gets
    values that are the same on all ranks, every `train.log_every` steps and after a validation, and
    `report` the newest of them with each checkpoint and each validation, on every rank.
    Rank 0 leaves its trace of `train.profile_steps` in `profile_dir`. `wishes` may ask for a
    checkpoint at once, or for one and the end: then the run is not finished, and goes on from there
    another time. On a CPU that takes a step, on a GPU up to `train.log_every`, since looking for it
    makes the host wait for the device. Without `resume`, `begin_with` may set other weights than
    the random ones.

    Raises:
        UserError: `resume` is of a run with other settings or data.
        TrainingStopped: too many steps were not finite, or the loss diverged.
    """
    torch.manual_seed(cfg.seed)
    trainee = Trainee(cfg, maps, device, rank, world_size)
    if begin_with is not None and resume is None:
        begin_with(trainee)
        trainee.keep_start()
    identity = run_identity(cfg, data_digest)
    state = _first_state(trainee, loader, resume, identity, cfg.name)
    if state.finished:
        return trainee.model

    total_steps = loader.steps_per_epoch * cfg.train.epochs
    cadence = Cadence(cfg.train, total_steps, validates=validate is not None)
    progress = Progress(trainee, state, total_steps, log)
    progress.tell_device()
    milestones = Milestones(trainee, state, identity, checkpoints, report)
    profiler = StepProfiler(cfg.train.profile_steps if rank == 0 else None, profile_dir, device)

    num_items = maps.vocab_sizes["item_id"] - 1
    make_batches = partial(remaining_batches, loader, cfg, num_items, filler=trainee.filler)
    with open_batches(make_batches, state, cfg.train) as batches:
        steps = take_steps(trainee, batches, progress, profiler, wishes)
        _train_on(steps, trainee, cadence, progress, milestones, validate, wishes)
    return trainee.model


def take_steps(
    trainee: Trainee,
    batches: Iterator[Counted],
    progress: "Progress",
    profiler: StepProfiler,
    wishes: Wishes | None,
) -> Iterator[None]:
    """One step for each batch; the run's state moves on."""
    state, total_steps = progress.state, progress.total_steps
    device = trainee.loss_weights.device
    moved = move_batches(progress.meter.wait_for_batches(batches), device)
    for (batch, work), following in with_following(moved, known=trainee.looks_ahead):
        progress.meter.count_step(batch, work)
        if state.step == 0:
            progress.tell_attention(batch, trainee.model_cfg)
        wished = (False, False) if wishes is None else wishes.take_wishes()
        after = None if following is None else following[0]
        with profiler.step(state.step + 1):
            sums = trainee.step(batch, state.step, total_steps, wished, after)
            progress.add_losses(*sums)
        state.advance()
        trainee.update_average(state.step, total_steps)
        yield


def move_batches(batches: Iterator[Counted], device: torch.device) -> Iterator[Counted]:
    """The same on the device."""
    for batch, work in batches:
        yield batch.to(device), work


def with_following(
    batches: Iterator[Counted], *, known: bool
) -> Iterator[tuple[Counted, Counted | None]]:
    """Each batch with the one after it, of the last one None; of all where it is not to be `known`,
    and then none is taken before its time.
    """
    if not known:
        for batch in batches:
            yield batch, None
        return

    before = next(batches, None)
    while before is not None:
        following = next(batches, None)
        yield before, following
        before = following


def _train_on(
    steps: Iterator[None],
    trainee: Trainee,
    cadence: "Cadence",
    progress: "Progress",
    milestones: Milestones,
    validate: Validate | None,
    wishes: Wishes | None,
) -> None:
    """Go through the steps, with what is due after each, to the end of the run or to where it is
    stopped.
    """
    state = progress.state
    for _ in steps:
        due = cadence.due_after(state.step)
        save, stop = agreed_wishes(trainee, due) if wishes is not None else (False, False)
        if not (due.anything or save or stop):
            continue
        progress.read_device()
        if due.report:
            progress.report()
        if due.validation and validate is not None:
            progress.validate(validate)
        progress.log_values()
        if progress.stops_early():
            break
        save = save or stop or due.checkpoint or progress.is_best
        if (save or due.validation) and not due.end:
            milestones.pass_one(progress.newest, save=save)
        if stop and wishes is not None and not due.end:
            wishes.tell_stopped(state.step)
            return

    state.finished = True
    milestones.pass_one(progress.newest, save=True)


@dataclass(frozen=True, slots=True)
class Due:
    """What a step is followed by."""

    report: bool
    validation: bool
    checkpoint: bool
    end: bool  # it was the last step

    @property
    def anything(self) -> bool:
        return self.report or self.validation or self.checkpoint


def agreed_wishes(trainee: Trainee, due: Due) -> tuple[bool, bool]:
    """(save, stop), the same on all ranks: after each step of a CPU, with the reports of a GPU."""
    if due.report or trainee.wishes.device.type == "cpu":
        return trainee.take_wishes()
    return False, False


class Cadence:
    """When a run reports, validates and saves.

    The last step is reported and, with `validates`, validated. Its checkpoint is the run's last,
    which the loop saves when it ends.
    """

    def __init__(self, cfg: TrainConfig, total_steps: int, *, validates: bool) -> None:
        self.cfg, self.total_steps, self.validates = cfg, total_steps, validates

    def due_after(self, step: int) -> Due:
        """What is due once `step` steps are done; 12 steps, log_every 5, checkpoint_every 4:

        step          1 2 3 4 5 6 7 8 9 10 11 12
        report                R         R      R
        checkpoint          C       C          C
        """
        end = step == self.total_steps
        return Due(
            report=end or step % self.cfg.log_every == 0,
            validation=self.validates and (end or step % self.cfg.validate_every == 0),
            checkpoint=step % self.cfg.checkpoint_every == 0,
            end=end,
        )


class Progress:
    """What a run says of itself: losses, speed and validations, to `log` and on rank 0 to the
    console.

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
        self.values |= take_losses(self.state, self.trainee)
        self.values |= self.meter.take_speed(self.state, self.trainee.clock.take_seconds())
        self.values["train/bad_steps"] = self.state.bad_steps
        self.values["train/kernels_compiled"] = count_compilations()
        if self.trainee.graphs is not None:
            graphs = self.trainee.graphs.of_batches
            self.values["train/graphs_captured"] = graphs.captured
            self.values["train/steps_replayed"] = graphs.replayed
        self.values["train/grad_norm"] = float(self.trainee.grad_norm)
        warmup = resolve_warmup(self.cfg.warmup_steps, self.total_steps)
        factor = learning_rate_factor(self.state.step - 1, warmup, self.total_steps)
        self.values["train/lr"] = self.cfg.lr * factor
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


def _first_state(
    trainee: Trainee, loader: Loader, resume: Saved | None, identity: dict, run_name: str
) -> TrainState:
    """Where the run begins, the trainee set to it."""
    if resume is None:
        zeros = [0.0] * len(trainee.loss_weights)
        return TrainState(
            steps_per_epoch=loader.steps_per_epoch, loss_sum=zeros, weight_sum=[*zeros]
        )

    check_identity(resume.identity, identity, run_name)
    before, now = resume.state.steps_per_epoch, loader.steps_per_epoch
    if before != now:
        raise UserError(
            f"run {run_name!r} began with {before} steps an epoch and would go on with {now} "
            f"(train.num_workers {trainee.world_size}): --restart trains it anew"
        )
    trainee.load_checkpoint(resume)
    return resume.state


def remaining_batches(
    loader: Loader,
    cfg: RunConfig,
    num_items: int,
    first_epoch: int,
    first_step: int,
    *,
    filler: BatchFiller | None = None,
) -> Iterator[Counted]:
    """What is left of the run from a step of an epoch on.

    `num_items`: those of the training period, which a next item is told apart from. `filler`: of
    the batches that go into CUDA graphs.
    """
    for epoch in range(first_epoch, cfg.train.epochs):
        batches = loader.batches(epoch, first_step if epoch == first_epoch else 0)
        yield from fill_batches(count_batches(batches, cfg, num_items), filler)


@contextmanager
def open_batches(
    make_batches: MakeBatches, state: TrainState, train: TrainConfig
) -> Iterator[Iterator[Counted]]:
    """What is left of the run, each batch made while the one before it is used: in a thread, or
    with `train.loader_process` in a process that ends with the block.
    """
    place = state.epoch, state.epoch_step
    if not train.loader_process:
        batches = make_batches(*place)
        if train.use_gpu:
            batches = pin_batches(batches)
        yield prefetch_batches(batches)
        return
    with LoaderProcess(make_batches, *place, pin_memory=train.use_gpu) as process:
        yield prefetch_batches(process.batches())


def progress_line(state: TrainState, total_steps: int, values: dict[str, float]) -> str:
    """`step 20/40 epoch 1 | loss 0.5123 | 812 examples/s, …`"""
    left = (total_steps - state.step) * values["train/step_ms"] / 1000
    epoch = (state.step - 1) // state.steps_per_epoch + 1
    examples, tokens = values["train/examples_per_s"], values["train/tokens_per_s"]
    loss = f"{values['train/loss']:.4f}" if "train/loss" in values else "undefined"
    return (
        f"step {state.step}/{total_steps} epoch {epoch} | loss {loss} | "
        f"{examples:,.0f} examples/s, {tokens:,.0f} tokens/s | "
        f"waiting for data {values['train/data_wait_share']:.1%} | {left:.0f} s left"
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
