"""The training loop of one rank: runs by a plain call, under `torch.distributed`, and inside Ray
Train.

    loader → batches → `Trainee.step` → what `Cadence` says is due: report, validation, checkpoint
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import torch

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.batches.filling import BatchFiller
from pipeline.config import RunConfig, TrainConfig, UserError
from pipeline.model.flops import Flops
from pipeline.model.ranker import RankingModel
from pipeline.model.work import count_work
from pipeline.train.checkpoint import (
    CheckpointFolder,
    Saved,
    TrainState,
    check_identity,
    run_identity,
)
from pipeline.train.interruption import Wishes
from pipeline.train.loader_process import Counted, LoaderProcess, MakeBatches
from pipeline.train.meter import count_batches, fill_batches, pin_batches, prefetch_batches
from pipeline.train.milestones import Milestones, Report
from pipeline.train.profile import StepProfiler
from pipeline.train.progress import Log, Progress, Validate
from pipeline.train.trainee import Trainee


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
    """Train to the end of the last epoch, or to an early stop, from `resume` on where it is given.

    Args:
        checkpoints: get one every `train.checkpoint_every` steps, at every validation better than
            all before, and at the end.
        validate: is called every `train.validate_every` steps.
        log: gets values that are the same on all ranks, every `train.log_every` steps and after a
            validation.
        report: gets the newest of them with each checkpoint and each validation, on every rank.
        profile_dir: where rank 0 leaves its trace of `train.profile_steps`.
        wishes: may ask for a checkpoint at once, or for one and the end: then the run is not
            finished, and goes on from there another time. On a CPU that takes a step, on a GPU up
            to `train.log_every`, since looking for it makes the host wait for the device.
        begin_with: sets other weights than the random ones, where there is no `resume`.

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

    make_batches = _batch_maker(cfg, maps, loader, trainee.filler)
    with open_batches(make_batches, state, cfg.train) as batches:
        steps = take_steps(trainee, batches, progress, profiler, wishes)
        _train_on(steps, trainee, cadence, progress, milestones, validate, wishes)
    return trainee.model


def _batch_maker(
    cfg: RunConfig, maps: FeatureMaps, loader: Loader, filler: BatchFiller | None
) -> MakeBatches:
    """`remaining_batches` of this run, which a process for batches can be sent."""
    num_items = maps.vocab_sizes["item_id"] - 1  # what a next item is told apart from
    count = partial(count_work, cfg=cfg, num_items=num_items)
    return partial(remaining_batches, loader, cfg.train.epochs, count, filler=filler)


def take_steps(
    trainee: Trainee,
    batches: Iterator[Counted],
    progress: Progress,
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
    progress: Progress,
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

        # the last checkpoint is that of the run's end
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
    epochs: int,
    count: Callable[[SequenceBatch], Flops],
    first_epoch: int,
    first_step: int,
    *,
    filler: BatchFiller | None = None,
) -> Iterator[Counted]:
    """What is left of a run of `epochs` from a step of an epoch on.

    `count` says the work of a batch. `filler`: of the batches that go into CUDA graphs.
    """
    for epoch in range(first_epoch, epochs):
        batches = loader.batches(epoch, first_step if epoch == first_epoch else 0)
        yield from fill_batches(count_batches(batches, count), filler)


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
