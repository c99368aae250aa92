"""The training loop of one rank: runs by a plain call, under `torch.distributed`, and inside Ray Train.

Sums, not means, cross ranks: the gradient of the summed loss and the sum of label weights are added over ranks and
divided afterwards, so that the step does not depend on how rows fell to ranks.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Protocol, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.config import RunConfig
from pipeline.data.batch import SequenceBatch
from pipeline.data.features import FeatureMaps
from pipeline.model.flops import Work, count_work
from pipeline.model.losses import task_losses
from pipeline.model.ultra_hstu import UltraHSTU, attention_variance
from pipeline.train.checkpoint import Checkpoint, TrainState, check_identity, copied, run_identity
from pipeline.train.optim import RowwiseAdamW, learning_rate_factor
from pipeline.train.placement import place_tables
from pipeline.train.sharding import ShardedEmbedding, ShardedTables, TableMaker, gather_rows, gathered

logger = logging.getLogger(__name__)

T = TypeVar("T")


class Loader(Protocol):
    """Batches of one rank; every rank takes `steps_per_epoch` steps, and the same call gives the same batches."""

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
    resume: Checkpoint | None = None,
    save: Callable[[Checkpoint], None] | None = None,
    log: Callable[[int, dict[str, float]], None] | None = None,
) -> UltraHSTU:
    """Train to the last step of the last epoch, from `resume` on where it is given.

    `save` is called by every rank at the same steps, every `train.checkpoint_every` and at the end; `log` every
    `train.log_every` steps with values that are the same on all ranks.

    Raises:
        UserError: `resume` is of a run with other settings, data or world size.
    """
    torch.manual_seed(cfg.seed)
    trainee = Trainee(cfg, maps, device, rank, world_size)
    identity = run_identity(cfg, data_digest, world_size)
    state = TrainState(loss_sum=[0.0] * len(cfg.tasks), weight_sum=[0.0] * len(cfg.tasks))
    if resume is not None:
        check_identity(resume.identity, identity, cfg.name)
        trainee.load(resume)
        state = resume.state
    total_steps = loader.steps_per_epoch * cfg.train.epochs
    meter = Meter(world_size)
    # Summed where they arise: reading a loss each step would make the host wait for the device.
    sums = torch.tensor([state.loss_sum, state.weight_sum], dtype=torch.float64, device=device)

    for epoch in range(state.epoch, cfg.train.epochs):
        state.epoch = epoch
        for batch, work in meter.waited(prefetched(counted(loader.batches(epoch, state.epoch_step), cfg))):
            meter.count(batch, work)
            batch = batch.to(device)
            if state.step == 0:  # on every rank: sharded tables bring their rows together
                variances = ", ".join(f"{v:.1e}" for v in attention_variance(trainee.model, batch))
                if variances and rank == 0:
                    logger.info("Var(A) by layer at the start: %s; norm_eps %.0e", variances, cfg.model.norm_eps)
            sums += torch.stack(trainee.step(batch, state.step, total_steps))
            state.step, state.epoch_step = state.step + 1, state.epoch_step + 1
            logs = state.step % cfg.train.log_every == 0 or state.step == total_steps
            saves = save is not None and state.step % cfg.train.checkpoint_every == 0 and state.step < total_steps
            if logs or saves:
                state.loss_sum, state.weight_sum = sums.tolist()
            if logs:
                sums.zero_()
                values = _take_losses(state, cfg.tasks, trainee.task_weights.tolist()) | meter.take(state)
                if log is not None:
                    log(state.step, values)
                if rank == 0:
                    logger.info(progress_line(state, total_steps, values))
            if save is not None and saves:
                save(trainee.checkpoint(state, identity))
        state.epoch_step = 0
    state.epoch = cfg.train.epochs
    if save is not None:
        save(trainee.checkpoint(state, identity))
    return trainee.model


class Trainee:
    """A model with its optimizers, on one rank."""

    def __init__(
        self, cfg: RunConfig, maps: FeatureMaps, device: torch.device | str, rank: int, world_size: int
    ) -> None:
        self.cfg, self.rank, self.world_size = cfg, rank, world_size
        plan = place_tables(cfg, maps.vocab_sizes, world_size)
        maker = TableMaker(plan, rank, device, cfg.seed)
        self.model = model = UltraHSTU(cfg, maps.vocab_sizes, maps.base_rates, maker).to(device)
        maker.check(model)
        self.task_weights = torch.tensor([cfg.train.task_weights.get(task, 1.0) for task in cfg.tasks], device=device)
        paths = {module: f"{path}.weight" for path, module in model.named_modules()}
        self.table_paths = {name: paths[module] for name, module in maker.modules.items()}
        self.tables = {paths[module]: model.get_parameter(paths[module]) for module in maker.modules.values()}
        self.dense = {name: p for name, p in model.named_parameters() if name not in self.tables}
        self.blocks = {self.table_paths[name]: module for name, module in maker.sharded.items()}
        self.sharded = sharded = ShardedTables(maker.sharded, world_size) if maker.sharded else None
        if sharded is not None:
            model.encoder.register_forward_pre_hook(lambda _, inputs: sharded.fetch(model.encoder.codes(*inputs)))
        decay = cfg.train.weight_decay
        on_host = [self.table_paths[name] for name, place in plan.items() if place.host_state]
        self.rowwise = RowwiseAdamW(self.tables, weight_decay=decay, on_host=on_host)
        self.adamw = torch.optim.AdamW(self.dense.values(), lr=cfg.train.lr, weight_decay=decay, fused=True)

    def step(self, batch: SequenceBatch, step: int, total_steps: int) -> tuple[Tensor, Tensor]:
        """One optimizer step; per task the summed loss and the summed weights over all ranks, on the device."""
        cfg = self.cfg.train
        assert batch.labels is not None
        assert batch.label_weight is not None
        # Dropout depends on where the run stands, not on how it got there: a resumed run draws the same masks.
        torch.manual_seed(int(np.random.SeedSequence([self.cfg.seed, step, self.rank]).generate_state(1)[0]))
        self.model.train()
        self.model.zero_grad(set_to_none=True)
        with torch.autocast(batch.labels.device.type, torch.bfloat16, enabled=cfg.precision == "bf16"):
            logits = self.model(batch)
        loss, weight = task_losses(logits, batch.labels, batch.label_weight)
        (loss * self.task_weights).sum().backward()
        losses, weights = self._reduce_dense(loss.detach(), weight)
        total = (weights * self.task_weights).sum().clamp(min=1e-12)
        grads = self._reduce_sparse()
        dense_grads = [parameter.grad for parameter in self.dense.values() if parameter.grad is not None]
        assert len(dense_grads) == len(self.dense)
        torch._foreach_div_(dense_grads, total)  # pyright: ignore[reportPrivateImportUsage]  # one launch for all
        nn.utils.clip_grad_norm_(self.dense.values(), cfg.grad_clip)
        factor = learning_rate_factor(step, cfg.warmup_steps, total_steps)
        for group in self.adamw.param_groups:
            group["lr"] = cfg.lr * factor
        self.adamw.step()
        self.rowwise.step(grads, cfg.embedding_lr * factor, total)
        return losses, weights

    def _reduce_dense(self, loss: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Add dense gradients, losses and weights over ranks, all in one message."""
        if self.world_size == 1:
            return loss, weight
        grads = [p.grad for p in self.dense.values() if p.grad is not None]
        assert len(grads) == len(self.dense)
        flat = torch.cat([*(grad.flatten() for grad in grads), loss, weight])
        dist.all_reduce(flat)
        *summed, loss, weight = flat.split([*(grad.numel() for grad in grads), len(loss), len(weight)])
        for grad, total in zip(grads, summed, strict=True):
            grad.copy_(total.view_as(grad))
        return loss, weight

    def _reduce_sparse(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per table the rows touched by any rank, with repeats, and their gradients; of a sharded one its block's."""
        local = {}
        for name, weight in self.tables.items():
            if name not in self.blocks:
                assert weight.grad is not None
                local[name] = weight.grad._indices()[0], weight.grad._values()
        if self.world_size > 1:
            local = gather_rows(local, self.world_size)
        if self.sharded is not None:
            local |= {self.table_paths[name]: touched for name, touched in self.sharded.gradients().items()}
        return local

    def checkpoint(self, state: TrainState, identity: dict) -> Checkpoint:
        optimizer = {f"rowwise.{name}": tensor for name, tensor in self._whole(self.rowwise.state_dict()).items()}
        for name, parameter in self.dense.items():
            for key, tensor in self.adamw.state[parameter].items():
                optimizer[f"adamw.{key}.{name}"] = tensor
        return Checkpoint(replace(state), copied(self._whole(self.model.state_dict())), copied(optimizer), identity)

    def _whole(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same with blocks of sharded tables, and of their moments, joined; all ranks call it together."""
        return {name: gathered(t, b, self.world_size) if (b := self._block(name)) else t for name, t in tensors.items()}

    def _own(self, name: str, whole: Tensor) -> Tensor:
        block = self._block(name)
        return whole if block is None else whole[block.first_row : block.first_row + len(block.weight)]

    def _block(self, name: str) -> ShardedEmbedding | None:
        """The sharded table whose weights, or whose moments in the row-wise optimizer, `name` are."""
        return self.blocks.get(name.removeprefix("m.").removeprefix("v."))

    def load(self, checkpoint: Checkpoint) -> None:
        saved = checkpoint.optimizer
        self.model.load_state_dict({name: self._own(name, tensor) for name, tensor in checkpoint.model.items()})
        rowwise = {name.removeprefix("rowwise."): t for name, t in saved.items() if name.startswith("rowwise.")}
        self.rowwise.load_state_dict({name: self._own(name, tensor) for name, tensor in rowwise.items()})
        for name, parameter in self.dense.items():
            keys = ("step", "exp_avg", "exp_avg_sq")
            moments = {key: saved[f"adamw.{key}.{name}"].to(parameter.device) for key in keys}
            self.adamw.state[parameter] = moments


def counted(batches: Iterator[SequenceBatch], cfg: RunConfig) -> Iterator[tuple[SequenceBatch, Work]]:
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
    """Speed since the last `take`, rank 0's own times, its counts multiplied by the number of ranks."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._reset()

    def _reset(self) -> None:
        self.begin, self.wait, self.steps, self.tokens, self.work = time.perf_counter(), 0.0, 0, 0, Work()

    def waited(self, batches: Iterator[T]) -> Iterator[T]:
        """The same batches, the time until each arrives counted as waiting for data."""
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            self.wait += time.perf_counter() - asked
            if batch is None:
                return
            yield batch

    def count(self, batch: SequenceBatch, work: Work) -> None:
        self.steps += 1
        self.tokens += batch.num_tokens
        self.work.add(work)

    def take(self, state: TrainState) -> dict[str, float]:
        seconds = time.perf_counter() - self.begin
        state.seconds += seconds
        values = {
            "train/examples_per_s": self.work.candidates * self.world_size / seconds,
            "train/tokens_per_s": self.tokens * self.world_size / seconds,
            # Backward costs twice the forward products; lengths are those that stochastic length drew.
            "train/gflop_per_example": 3 * self.work.flops / max(self.work.candidates, 1) / 1e9,
            "train/data_wait_share": self.wait / seconds,
            "train/step_ms": 1000 * seconds / max(self.steps, 1),
        }
        self._reset()
        return values


def progress_line(state: TrainState, total_steps: int, values: dict[str, float]) -> str:
    left = (total_steps - state.step) * values["train/step_ms"] / 1000
    return (
        f"step {state.step}/{total_steps} epoch {state.epoch + 1} | loss {values['train/loss']:.4f} | "
        f"{values['train/examples_per_s']:,.0f} examples/s, {values['train/tokens_per_s']:,.0f} tokens/s | "
        f"waiting for data {values['train/data_wait_share']:.1%} | {left:.0f} s left"
    )


def _take_losses(state: TrainState, tasks: tuple[str, ...], task_weights: list[float]) -> dict[str, float]:
    """Mean losses since the last line, `train/loss` the one that is minimised; the sums start anew."""
    loss = sum(factor * total for factor, total in zip(task_weights, state.loss_sum, strict=True))
    weight = sum(factor * total for factor, total in zip(task_weights, state.weight_sum, strict=True))
    values = {"train/loss": loss / max(weight, 1e-12)}
    for task, loss, weight in zip(tasks, state.loss_sum, state.weight_sum, strict=True):
        values[f"train/loss/{task}"] = loss / max(weight, 1e-12)
    state.loss_sum, state.weight_sum = [0.0] * len(tasks), [0.0] * len(tasks)
    return values
