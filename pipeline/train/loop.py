"""The training loop of one rank: runs by a plain call, under `torch.distributed`, and inside Ray
Train.

Sums, not means, cross ranks: the gradient of the summed loss and the sum of label weights are added
over ranks and divided afterwards, so that the step does not depend on how rows fell to ranks.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from kernels.backend import choose
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.config import RunConfig, UserError
from pipeline.model.flops import Flops, count_work
from pipeline.model.heads import task_losses
from pipeline.model.ranker import RankingModel, attention_variance
from pipeline.train.average import WeightAverage
from pipeline.train.checkpoint import (
    Block,
    CheckpointFolder,
    Saved,
    TrainState,
    check_identity,
    read_tensors,
    run_identity,
)
from pipeline.train.guards import FiniteGuard, improved, watch_divergence
from pipeline.train.optim import RowwiseAdamW, learning_rate_factor
from pipeline.train.placement import place_tables
from pipeline.train.profile import StepProfiler
from pipeline.train.sharding import ShardedTables, TableMaker, gather_rows

logger = logging.getLogger(__name__)

T = TypeVar("T")


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
    validate: Callable[[RankingModel], dict[str, float]] | None = None,
    log: Callable[[int, dict[str, float]], None] | None = None,
    profile_dir: Path | None = None,
) -> RankingModel:
    """Train to the last step of the last epoch, or to an early stop, from `resume` on where it is
    given.

    `checkpoints` get one every `train.checkpoint_every` steps, at every validation better than all
    before, and at the end; `validate` is called every `train.validate_every` steps; `log` gets
    values that are the same on all ranks, every `train.log_every` steps and after a validation.
    Rank 0 leaves its trace of `train.profile_steps` in `profile_dir`.

    Raises:
        UserError: `resume` is of a run with other settings or data.
        TrainingStopped: too many steps were not finite, or the loss diverged.
    """
    torch.manual_seed(cfg.seed)
    trainee = Trainee(cfg, maps, device, rank, world_size)
    identity = run_identity(cfg, data_digest)
    state = _begin(trainee, loader, resume, identity)
    if state.finished:
        return trainee.model
    if rank == 0:
        where = torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else "CPU"
        logger.info("%d x %s, %s kernels", world_size, where, choose("auto", trainee.task_weights))
    total_steps = loader.steps_per_epoch * cfg.train.epochs
    meter = Meter(world_size)
    profiler = StepProfiler(cfg.train.profile_steps if rank == 0 else None, profile_dir, device)
    # Summed where they arise: reading a loss each step would make the host wait for the device.
    sums = torch.tensor([state.loss_sum, state.weight_sum], dtype=torch.float64, device=device)

    for batch, work in meter.waited(coming(loader, state, cfg)):
        meter.count(batch, work)
        batch = batch.to(device)
        if state.step == 0:  # on every rank: sharded tables bring their rows together
            variances = ", ".join(f"{v:.1e}" for v in attention_variance(trainee.model, batch))
            if variances and rank == 0:
                logger.info(
                    "Var(A) by layer at the start: %s; norm_eps %.0e", variances, cfg.model.norm_eps
                )
        with profiler.step(state.step + 1):
            sums += torch.stack(trainee.step(batch, state.step, total_steps))
        state.step += 1
        state.epoch, state.epoch_step = divmod(state.step, loader.steps_per_epoch)
        last = state.step == total_steps
        if trainee.average is not None:
            trainee.average.add(state.step, total_steps)
            if last:
                trainee.average.publish()
        logs = state.step % cfg.train.log_every == 0 or last
        validator = (
            validate if last or (validate and state.step % cfg.train.validate_every == 0) else None
        )
        saves = state.step % cfg.train.checkpoint_every == 0
        if not (logs or validator or saves):
            continue
        state.loss_sum, state.weight_sum = sums.tolist()
        state.bad_steps += trainee.guard.take(state.step, cfg.train.max_bad_steps)
        values = {}
        if logs:
            sums.zero_()
            values = _take_losses(state, cfg.tasks, trainee.task_weights.tolist()) | meter.take(
                state
            )
            values |= {
                "train/bad_steps": state.bad_steps,
                "train/grad_norm": float(trainee.grad_norm),
            }
            if rank == 0:
                logger.info(progress_line(state, total_steps, values))
        if validator:
            with meter.paused(state):
                found = validator(trainee.model)
            values |= found
            saves |= improved(state, found[f"val_sample/{cfg.train.best_metric}"], cfg.train)
            if rank == 0:
                logger.info(validation_line(state, found, cfg))
        if log is not None and values:
            log(state.step, values)
        if logs:
            watch_divergence(state, values["train/loss"], cfg.train)
        if cfg.train.patience is not None and state.not_better >= cfg.train.patience:
            logger.info("stopping early at step %d: best at step %s", state.step, state.best_step)
            break
        if checkpoints is not None and saves and not last:
            checkpoints.save(trainee.tensors(), state, identity)
    state.finished = True
    if checkpoints is not None:
        checkpoints.save(trainee.tensors(), state, identity)
    return trainee.model


def _begin(trainee: "Trainee", loader: Loader, resume: Saved | None, identity: dict) -> TrainState:
    """Where the run begins, the trainee set to it."""
    num_tasks = len(trainee.cfg.tasks)
    if resume is None:
        zeros = [0.0] * num_tasks
        return TrainState(
            steps_per_epoch=loader.steps_per_epoch, loss_sum=zeros, weight_sum=[*zeros]
        )
    check_identity(resume.identity, identity, trainee.cfg.name)
    if resume.state.steps_per_epoch != loader.steps_per_epoch:
        raise UserError(
            f"run {trainee.cfg.name!r} began with {resume.state.steps_per_epoch} steps an epoch "
            "and would go on with "
            f"{loader.steps_per_epoch} (train.num_workers {trainee.world_size}): --restart trains "
            "it anew"
        )
    trainee.load(resume)
    return resume.state


def coming(
    loader: Loader, state: TrainState, cfg: RunConfig
) -> Iterator[tuple[SequenceBatch, Flops]]:
    """What is left of the run from `state` on, each batch made while the one before it is used."""
    first_epoch, first_step = state.epoch, state.epoch_step
    for epoch in range(first_epoch, cfg.train.epochs):
        yield from prefetched(
            counted(loader.batches(epoch, first_step if epoch == first_epoch else 0), cfg)
        )


class Trainee:
    """A model with its optimizers, on one rank."""

    def __init__(
        self,
        cfg: RunConfig,
        maps: FeatureMaps,
        device: torch.device | str,
        rank: int,
        world_size: int,
    ) -> None:
        self.cfg, self.rank, self.world_size = cfg, rank, world_size
        plan = place_tables(cfg, maps.vocab_sizes, world_size)
        maker = TableMaker(plan, rank, device, cfg.seed)
        self.model = model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates, maker).to(device)
        maker.check(model)
        self.task_weights = torch.tensor(
            [cfg.train.task_weights.get(task, 1.0) for task in cfg.tasks], device=device
        )
        paths = {module: f"{path}.weight" for path, module in model.named_modules()}
        self.table_paths = {name: paths[module] for name, module in maker.modules.items()}
        self.tables = {
            paths[module]: model.get_parameter(paths[module]) for module in maker.modules.values()
        }
        self.dense = {name: p for name, p in model.named_parameters() if name not in self.tables}
        self.blocks = {self.table_paths[name]: module for name, module in maker.sharded.items()}
        self.sharded = sharded = ShardedTables(maker.sharded, world_size) if maker.sharded else None
        if sharded is not None:
            model.encoder.register_forward_pre_hook(
                lambda _, inputs: sharded.fetch(model.encoder.codes(*inputs))
            )
        decay = cfg.train.weight_decay
        on_host = [self.table_paths[name] for name, place in plan.items() if place.host_state]
        first_rows = {path: module.first_row for path, module in self.blocks.items()}
        self.rowwise = RowwiseAdamW(
            self.tables, weight_decay=decay, on_host=on_host, first_rows=first_rows
        )
        self.adamw = torch.optim.AdamW(
            self.dense.values(), lr=cfg.train.lr, weight_decay=decay, fused=True
        )
        # as AdamW would in its first step: a checkpoint is read into these
        for p in self.dense.values():
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.adamw.state[p] = {"step": torch.zeros((), device=p.device)} | moments
        self.average = None if cfg.train.average_from is None else WeightAverage(model, cfg.train)
        watched = [f"the loss of {task}" for task in cfg.tasks]
        watched += [f"the gradient of {name}" for name in (*self.dense, *self.tables)]
        self.guard = FiniteGuard(watched, device)
        # of the dense gradients in the last step, before clipping
        self.grad_norm = torch.zeros((), device=device)

    def step(self, batch: SequenceBatch, step: int, total_steps: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; per task the summed loss and the summed weights over all ranks, on
        the device.

        A step whose loss or gradient is not finite changes nothing, and its sums are 0. Embedding
        gradients are not clipped: row-wise AdamW divides each row's by the root of its own mean
        square.
        """
        cfg = self.cfg.train
        assert batch.labels is not None
        assert batch.label_weight is not None
        # Dropout depends on where the run stands, not on how it got there: a resumed run draws the
        # same masks.
        torch.manual_seed(
            int(np.random.SeedSequence([self.cfg.seed, step, self.rank]).generate_state(1)[0])
        )
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(
            batch.labels.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"
        ):
            logits = self.model(batch)
        loss, weight = task_losses(logits, batch.labels, batch.label_weight)
        (loss * self.task_weights).sum().backward()
        broken_tables = self._broken_tables()
        losses, weights, broken_tables = self._reduce_dense(loss.detach(), weight, broken_tables)
        total = (weights * self.task_weights).sum().clamp(min=1e-12)
        grads = self._reduce_sparse()
        dense_grads = [
            parameter.grad for parameter in self.dense.values() if parameter.grad is not None
        ]
        assert len(dense_grads) == len(self.dense)
        torch._foreach_div_(dense_grads, total)  # pyright: ignore[reportPrivateImportUsage]  # one launch for all
        norms = torch.stack(torch._foreach_norm(dense_grads))  # pyright: ignore[reportPrivateImportUsage]
        self.grad_norm = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_(self.dense.values(), cfg.grad_clip, self.grad_norm)
        skip = self.guard.check(
            torch.cat([losses.isfinite(), norms.isfinite(), broken_tables == 0])
        )
        factor = learning_rate_factor(step, cfg.warmup_steps, total_steps)
        for group in self.adamw.param_groups:
            group["lr"] = cfg.lr * factor
        self.adamw.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]  # as GradScaler leaves it out
        self.adamw.step()
        self.rowwise.step(grads, cfg.embedding_lr * factor, torch.where(skip, torch.inf, total))
        return torch.where(skip, 0.0, losses), torch.where(skip, 0.0, weights)

    def _broken_tables(self) -> Tensor:
        """float32 [tables], 1 where a gradient of this rank's is not finite."""
        if not self.tables:
            return torch.zeros(0, device=self.task_weights.device)
        values = [self._table_gradient(name) for name in self.tables]
        norms = torch.stack(torch._foreach_norm(values))  # pyright: ignore[reportPrivateImportUsage]
        return (~norms.isfinite()).float()

    def _table_gradient(self, name: str) -> Tensor:
        """[n, d], of this rank's batch."""
        block = self.blocks.get(name)
        leaf = self.tables[name] if block is None else block.rows
        assert leaf is not None
        assert leaf.grad is not None
        return leaf.grad._values() if block is None else leaf.grad

    def _reduce_dense(self, *sums: Tensor) -> list[Tensor]:
        """Add dense gradients, in place, and the vectors `sums` over ranks, all in one message."""
        if self.world_size == 1:
            return list(sums)
        grads = [p.grad for p in self.dense.values() if p.grad is not None]
        assert len(grads) == len(self.dense)
        flat = torch.cat([*(grad.flatten() for grad in grads), *sums])
        dist.all_reduce(flat)
        parts = flat.split([*(grad.numel() for grad in grads), *map(len, sums)])
        for grad, total in zip(grads, parts, strict=False):  # the vectors come after
            grad.copy_(total.view_as(grad))
        return list(parts[len(grads) :])

    def _reduce_sparse(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per table the rows touched by any rank, with repeats, and their gradients; of a sharded
        one its block's.
        """
        local = {}
        for name, weight in self.tables.items():
            if name not in self.blocks:
                assert weight.grad is not None
                local[name] = weight.grad._indices()[0], weight.grad._values()
        if self.world_size > 1:
            local = gather_rows(local, self.world_size)
        if self.sharded is not None:
            local |= {
                self.table_paths[name]: touched
                for name, touched in self.sharded.gradients().items()
            }
        return local

    def tensors(self) -> dict[str, Tensor | Block]:
        """What a checkpoint holds, as views of the live tensors; of sharded tables the block."""
        found = {
            f"model.{name}": self._block(name, tensor)
            for name, tensor in self.model.state_dict().items()
        }
        for name, tensor in self.rowwise.state_dict().items():
            found[f"rowwise.{name}"] = self._block(name[2:], tensor)  # after "m." or "v."
        for name, parameter in self.dense.items():
            found |= {
                f"adamw.{key}.{name}": tensor for key, tensor in self.adamw.state[parameter].items()
            }
        if self.average is not None:
            found |= {
                f"average.{name}": self._block(name, tensor)
                for name, tensor in self.average.tensors.items()
            }
        return found

    def _block(self, name: str, tensor: Tensor) -> Tensor | Block:
        table = self.blocks.get(name)
        return tensor if table is None else Block(tensor, table.first_row, table.num_embeddings)

    def load(self, saved: Saved) -> None:
        """Raises UserError where the checkpoint holds another model."""
        read_tensors(saved.folder, self.tensors())
        self.rowwise.step_count = saved.state.step


def counted(
    batches: Iterator[SequenceBatch], cfg: RunConfig
) -> Iterator[tuple[SequenceBatch, Flops]]:
    """Each batch with the work of one forward pass over it, counted before it leaves the CPU."""
    for batch in batches:
        yield batch, count_work(batch, cfg)


def prefetched(batches: Iterator[T]) -> Iterator[T]:
    """The same batches, the next one made in the background while the present one is used."""
    with ThreadPoolExecutor(1, "prefetch") as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


class Meter:
    """Speed since the last `take`, rank 0's own times, its counts multiplied by the number of
    ranks.
    """

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._reset()

    def _reset(self) -> None:
        self.begin = time.perf_counter()
        self.wait = 0.0
        self.steps = 0
        self.tokens = 0
        self.work = Flops()

    def waited(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, the time until each arrives counted as waiting for data."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def count(self, batch: SequenceBatch, work: Flops) -> None:
        self.steps += 1
        self.tokens += batch.num_tokens
        self.work.add(work)

    @contextmanager
    def paused(self, state: TrainState) -> Iterator[None]:
        """Time that counts for the run and not for the speed of its steps."""
        asked = time.perf_counter()
        yield
        spent = time.perf_counter() - asked
        self.begin += spent
        state.seconds += spent

    def take(self, state: TrainState) -> dict[str, float]:
        seconds = time.perf_counter() - self.begin
        state.seconds += seconds
        values = {
            "train/examples_per_s": self.work.candidates * self.world_size / seconds,
            "train/tokens_per_s": self.tokens * self.world_size / seconds,
            # Backward costs twice the forward products; lengths are those that stochastic length
            # drew.
            "train/gflop_per_example": 3 * self.work.flops / max(self.work.candidates, 1) / 1e9,
            "train/data_wait_share": self.wait / seconds,
            "train/step_ms": 1000 * seconds / max(self.steps, 1),
        }
        self._reset()
        return values


def progress_line(state: TrainState, total_steps: int, values: dict[str, float]) -> str:
    left = (total_steps - state.step) * values["train/step_ms"] / 1000
    epoch = (state.step - 1) // state.steps_per_epoch + 1
    return (
        f"step {state.step}/{total_steps} epoch {epoch} | loss {values['train/loss']:.4f} | "
        f"{values['train/examples_per_s']:,.0f} examples/s, {values['train/tokens_per_s']:,.0f} "
        "tokens/s | "
        f"waiting for data {values['train/data_wait_share']:.1%} | {left:.0f} s left"
    )


def validation_line(state: TrainState, found: dict[str, float], cfg: RunConfig) -> str:
    metric = cfg.train.best_metric
    here = f"step {state.step} | validation {metric} {found[f'val_sample/{metric}']:.4f}"
    return (
        here if state.best is None else f"{here}, best {state.best:.4f} at step {state.best_step}"
    )


def _take_losses(
    state: TrainState, tasks: tuple[str, ...], task_weights: list[float]
) -> dict[str, float]:
    """Mean losses since the last line, `train/loss` the one that is minimised; the sums start anew."""
    loss = sum(factor * total for factor, total in zip(task_weights, state.loss_sum, strict=True))
    weight = sum(
        factor * total for factor, total in zip(task_weights, state.weight_sum, strict=True)
    )
    values = {"train/loss": loss / max(weight, 1e-12)}
    for task, loss, weight in zip(tasks, state.loss_sum, state.weight_sum, strict=True):
        values[f"train/loss/{task}"] = loss / max(weight, 1e-12)
    state.loss_sum, state.weight_sum = [0.0] * len(tasks), [0.0] * len(tasks)
    return values
