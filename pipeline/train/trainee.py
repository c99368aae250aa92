"""A model with its optimizers on one rank: one step, and what a checkpoint holds.

Sums, not means, cross ranks: the gradient of the summed loss and the sum of label weights are added
over ranks and divided afterwards, so that the step does not depend on how rows fell to ranks.
"""

from collections.abc import Callable, Collection

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.config import RunConfig, TrainConfig, UserError
from pipeline.model.heads import Head
from pipeline.model.ranker import RankingModel
from pipeline.train.average import WeightAverage
from pipeline.train.checkpoint import Block, Saved, read_tensors
from pipeline.train.guards import FiniteGuard
from pipeline.train.next_item import LOSS_NAME, NextItemLoss
from pipeline.train.optim import DenseAdamW, RowwiseAdamW, learning_rate_factor, resolve_warmup
from pipeline.train.placement import place_tables
from pipeline.train.sharding import ShardedEmbedding, ShardedTables, TableMaker, gather_rows


class Trainee:
    """A model with its optimizers, on one rank.

    `tables` are the weights of its embedding tables and `dense` all others, by their path in the
    model; `blocks` those tables of which this rank holds some rows alone.
    """

    def __init__(
        self,
        cfg: RunConfig,
        maps: FeatureMaps,
        device: torch.device | str,
        rank: int,
        world_size: int,
    ) -> None:
        self.cfg, self.seed, self.norm_eps = cfg.train, cfg.seed, cfg.model.norm_eps
        self.rank, self.world_size = rank, world_size

        plan = place_tables(cfg, maps.vocab_sizes, world_size)
        maker = TableMaker(plan, rank, device, cfg.seed)
        self.model = model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates, maker).to(device)
        maker.check_tables(model)
        self.head: Head = model.heads
        self.loss_names = self.head.loss_names
        weights = head_weights(self.head, cfg.train)
        self.next_item = None
        if cfg.retrieval.enabled:
            _refuse_sharded_items(maker.sharded)
            self.next_item = NextItemLoss(cfg, maps, device)
            self.loss_names = (*self.loss_names, LOSS_NAME)
            weights.append(cfg.retrieval.weight)
        self.loss_weights = torch.tensor(weights, device=device)

        self._find_parameters(maker)
        self.sharded = None
        if maker.sharded:
            self.sharded = ShardedTables(maker.sharded, world_size)
            model.encoder.register_forward_pre_hook(self._fetch_rows)

        host_state = [self.table_paths[name] for name, place in plan.items() if place.host_state]
        self._make_optimizers(host_state)
        self.average = None
        if cfg.train.average_from is not None:
            self.average = WeightAverage(model, cfg.train)

        watched = [f"the loss of {name}" for name in self.loss_names]
        watched += [f"the gradient of {name}" for name in (*self.dense, *self.tables)]
        self.guard = FiniteGuard(watched, device)
        # of the dense gradients in the last step, before clipping
        self.grad_norm = torch.zeros((), device=device)
        # ranks that asked to [save, stop] since the last look
        self.wishes = torch.zeros(2, device=device)

    def _find_parameters(self, maker: TableMaker) -> None:
        paths = {module: f"{path}.weight" for path, module in self.model.named_modules()}
        self.table_paths: dict[str, str] = {}
        self.tables: dict[str, nn.Parameter] = {}
        self.blocks: dict[str, ShardedEmbedding] = {}
        for name, module in maker.modules.items():
            path = self.table_paths[name] = paths[module]
            self.tables[path] = self.model.get_parameter(path)
            if name in maker.sharded:
                self.blocks[path] = maker.sharded[name]

        self.dense: dict[str, nn.Parameter] = {}
        for path, parameter in self.model.named_parameters():
            if path not in self.tables:
                self.dense[path] = parameter

    def _make_optimizers(self, host_state: list[str]) -> None:
        decay = self.cfg.weight_decay
        first_rows = {path: module.first_row for path, module in self.blocks.items()}
        self.rowwise = RowwiseAdamW(
            self.tables, weight_decay=decay, on_host=host_state, first_rows=first_rows
        )
        # losses and weights, broken tables and wishes
        num_sums = 2 * len(self.loss_weights) + len(self.tables) + 2
        self.adamw = DenseAdamW(self.dense, lr=self.cfg.lr, weight_decay=decay, num_sums=num_sums)

    def _fetch_rows(self, _: nn.Module, inputs: tuple[SequenceBatch]) -> None:
        """Bring the rows that the token encoder looks up from the ranks that hold them."""
        assert self.sharded is not None
        self.sharded.fetch_rows(self.model.encoder.table_codes(*inputs))

    def step(
        self,
        batch: SequenceBatch,
        step: int,
        total_steps: int,
        wishes: tuple[bool, bool] = (False, False),
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step; per part of the loss (a task) the summed loss and the summed weights
        over all ranks, on the device.

        `wishes` of this rank, (save, stop), reach all ranks with the step's sums.

        A step whose loss or gradient is not finite changes nothing, and its sums are 0. Embedding
        gradients are not clipped: row-wise AdamW divides each row's by the root of its own mean
        square.
        """
        loss, weight = self._backward(batch, step)

        # over the ranks: the dense gradients are on their way while rows are counted
        wished = torch.tensor(wishes, dtype=torch.float32, device=loss.device)
        finish = self._send_dense(loss, weight, self._broken_tables(), wished)
        table_grads = self._reduce_sparse()
        losses, weights, broken, wished = finish()
        self.wishes += wished
        total = (weights * self.loss_weights).sum().clamp(min=1e-12)

        norms, self.grad_norm = self.adamw.divide_and_clip(total, self.cfg.grad_clip)
        skip = self.guard.check(torch.cat([losses.isfinite(), norms.isfinite(), broken == 0]))

        warmup = resolve_warmup(self.cfg.warmup_steps, total_steps)
        factor = learning_rate_factor(step, warmup, total_steps)
        self.adamw.step(self.cfg.lr * factor, skip)
        # dividing by infinity leaves the step out
        scale = torch.where(skip, torch.inf, total)
        self.rowwise.step(table_grads, self.cfg.embedding_lr * factor, scale)
        return torch.where(skip, 0.0, losses), torch.where(skip, 0.0, weights)

    def take_wishes(self) -> tuple[bool, bool]:
        """(save, stop) that any rank has wished since the last call; waits for the device."""
        save, stop = (self.wishes > 0).tolist()
        self.wishes = torch.zeros_like(self.wishes)
        return save, stop

    def _backward(self, batch: SequenceBatch, step: int) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's summed loss; the loss and the weights of its parts, [L] each."""
        # Dropout depends on where the run stands, not on how it got there: a resumed run draws the
        # same masks.
        seed = np.random.SeedSequence([self.seed, step, self.rank]).generate_state(1)[0]
        seed_generators(int(seed))
        if not self.model.training:  # each of some hundred modules is told
            self.model.train()
        self.adamw.zero_gradients()
        for table in self.tables.values():
            table.grad = None

        bf16 = self.cfg.precision == "bf16"
        with torch.autocast(self.loss_weights.device.type, torch.bfloat16, enabled=bf16):
            encoded = self.model.encode(batch)
            outputs = self.model.score_rows(encoded.candidate_rows, batch)
        loss, weight = self.head.loss(outputs, batch)
        if self.next_item is not None:
            with torch.autocast(self.loss_weights.device.type, torch.bfloat16, enabled=bf16):
                again = self.model.encode(batch) if self.next_item.needs_second_pass else None
            next_loss, next_weight = self.next_item(self.model, encoded, batch, again)
            loss, weight = torch.cat([loss, next_loss]), torch.cat([weight, next_weight])
        (loss * self.loss_weights).sum().backward()
        return loss.detach(), weight

    def _broken_tables(self) -> Tensor:
        """float32 [tables], 1 where a gradient of this rank's is not finite."""
        if not self.tables:
            return torch.zeros(0, device=self.loss_weights.device)
        values = list(map(self._table_gradient, self.tables))
        norms = torch.stack(torch._foreach_norm(values))  # pyright: ignore[reportPrivateImportUsage]
        return (~norms.isfinite()).float()

    def _table_gradient(self, name: str) -> Tensor:
        """[n, d], of this rank's batch."""
        block = self.blocks.get(name)
        leaf = self.tables[name] if block is None else block.rows
        assert leaf is not None
        assert leaf.grad is not None
        return leaf.grad._values() if block is None else leaf.grad

    def _send_dense(self, *sums: Tensor) -> Callable[[], tuple[Tensor, ...]]:
        """Add dense gradients, in place, and the vectors `sums` over ranks, all in one message; the
        result waits for it and gives the sums.
        """
        if self.world_size == 1:
            return lambda: sums
        torch.cat(sums, out=self.adamw.sums)
        work = dist.all_reduce(self.adamw.message, async_op=True)

        def finish() -> tuple[Tensor, ...]:
            assert work is not None
            work.wait()
            # the buffer is zeroed before the next step
            return self.adamw.sums.clone().split(list(map(len, sums)))

        return finish

    def _reduce_sparse(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per store of `rowwise` the rows touched by any rank, with repeats, and their gradients;
        of a sharded table its block's.
        """
        touched = {}
        for name, weight in self.tables.items():
            if name not in self.blocks:
                assert weight.grad is not None
                touched[name] = weight.grad._indices()[0], weight.grad._values()
        touched = self.rowwise.join_rows(touched)
        if self.world_size > 1:
            touched = gather_rows(touched, self.world_size)

        if self.sharded is not None:
            for name, rows_and_grads in self.sharded.take_gradients().items():
                touched[self.table_paths[name]] = rows_and_grads
        return touched

    def update_average(self, step: int, total_steps: int) -> None:
        """Take the weights after `step` steps into their mean; the model ends with that mean."""
        if self.average is None:
            return
        self.average.add_snapshot(step, total_steps)
        if step == total_steps:
            self.average.publish_mean()

    def tensors(self) -> dict[str, Tensor | Block]:
        """What a checkpoint holds, as views of the live tensors; of sharded tables the block."""
        found: dict[str, Tensor | Block] = {}
        for name, tensor in self.model.state_dict().items():
            found[f"model.{name}"] = self._block(name, tensor)
        for name, tensor in self.rowwise.state_dict().items():
            found[f"rowwise.{name}"] = self._block(name[2:], tensor)  # after "m." or "v."
        for name, tensor in self.adamw.state_dict().items():
            found[f"adamw.{name}"] = tensor
        if self.average is not None:
            for name, tensor in self.average.tensors.items():
                found[f"average.{name}"] = self._block(name, tensor)
        return found

    def _block(self, name: str, tensor: Tensor) -> Tensor | Block:
        table = self.blocks.get(name)
        if table is None:
            return tensor
        return Block(tensor, table.first_row, table.num_embeddings)

    def load_checkpoint(self, saved: Saved) -> None:
        """Raises UserError where the checkpoint holds another model."""
        read_tensors(saved.folder, self.tensors())
        self.rowwise.step_count = saved.state.step


def seed_generators(seed: int) -> None:
    """As `torch.manual_seed`, which also writes down who called it: as long as a small layer."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def head_weights(head: Head, cfg: TrainConfig) -> list[float]:
    """The factor of each part of the head's loss, `train.task_weights` or 1."""
    return [cfg.task_weights.get(name, 1.0) for name in head.loss_names]


def _refuse_sharded_items(sharded: Collection[str]) -> None:
    """The retrieval head looks up every item in each step, not the batch's alone."""
    for name in sharded:
        if name == "item_id" or name.startswith("item."):
            raise UserError(
                f"train.tables: {name} is sharded over the workers by its size "
                "(train.shard_above_mb), and retrieval.enabled needs it whole on each: "
                f"train.tables.{name}: replicated, or fewer columns"
            )
