"""A model with its optimizers on one rank: one step, and what a checkpoint holds.

Sums, not means, cross ranks: the gradient of the summed loss and the sum of label weights are added
over ranks and divided afterwards, so that the step does not depend on how rows fell to ranks.
"""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.batches.filling import BatchFiller
from pipeline.config import RunConfig, TrainConfig, UserError
from pipeline.model.heads import Head
from pipeline.model.ranker import RankingModel
from pipeline.train.average import WeightAverage
from pipeline.train.checkpoint import Block, Saved, read_tensors
from pipeline.train.generators import generator_states, seed_generators, set_generators
from pipeline.train.graphs import StepGraphs, uses_graphs
from pipeline.train.guards import FiniteGuard
from pipeline.train.next_item import LOSS_NAME, NextItemLoss
from pipeline.train.optim import DenseAdamW, RowwiseAdamW, learning_rate_factor, resolve_warmup
from pipeline.train.placement import place_tables
from pipeline.train.reinforcement import Reinforcement
from pipeline.train.sharding import ShardedEmbedding, ShardedTables, TableMaker, Wanted
from pipeline.train.touched import TouchedRows
from pipeline.train.waiting import HostNumbers, MessageClock


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """A batch as the model reads it in one step."""

    given: SequenceBatch
    read: SequenceBatch  # some item ids left out
    wanted: Wanted | None  # of the sharded tables


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
        self.cfg, self.seed, self.model_cfg = cfg.train, cfg.seed, cfg.model
        self.rank, self.world_size = rank, world_size

        plan = place_tables(cfg.features, cfg.model, cfg.train, maps.vocab_sizes, world_size)
        maker = TableMaker(plan, rank, device, cfg.seed)
        model = RankingModel(cfg, maps.vocab_sizes, maps.base_rates, maker).to(device)
        maker.check_tables(model)
        self.model = model
        self.head: Head = model.heads
        self._add_losses(cfg, maps, maker.sharded)

        # what the host is told of the device, and the rows that ranks tell each other
        self.clock = MessageClock(device)
        self.numbers = HostNumbers(device, self.clock)
        self._find_parameters(maker)
        self.sharded, self.fetched = None, False
        # the next step's batch, and where the random generators stand after its draws
        self.coming: tuple[ReadBatch, list[Tensor]] | None = None
        if maker.sharded:
            self.sharded = ShardedTables(maker.sharded, world_size, self.numbers)
            model.encoder.register_forward_pre_hook(self._fetch_rows)

        host_state = [self.table_paths[name] for name, place in plan.items() if place.host_state]
        self._make_optimizers(host_state)
        self.average = None
        if cfg.train.average_from is not None:
            self.average = WeightAverage(model, cfg.train)

        # forward and backward as CUDA graphs, and what fills batches up to their sizes
        self.graphs: StepGraphs | None = None
        self.filler: BatchFiller | None = None
        sharded, retrieval = bool(maker.sharded), cfg.retrieval.enabled
        if uses_graphs(
            cfg.model, cfg.train, device, world_size, retrieval=retrieval, sharded=sharded
        ):
            self.graphs = StepGraphs(self._captured, self.tables, cfg.train.max_cuda_graphs)
            self.filler = BatchFiller.of_run(cfg)

        watched = [f"the loss of {name}" for name in self.loss_names]
        watched += [f"the gradient of {name}" for name in (*self.dense, *self.tables)]
        self.guard = FiniteGuard(watched, device)
        # of the dense gradients in the last step, before clipping
        self.grad_norm = torch.zeros((), device=device)
        # ranks that asked to [save, stop] since the last look
        self.wishes = torch.zeros(2, device=device)

    def _add_losses(self, cfg: RunConfig, maps: FeatureMaps, sharded: Collection[str]) -> None:
        """The parts of the loss, their names and weights."""
        device = next(self.model.parameters()).device
        self.loss_names = self.head.loss_names
        weights = head_weights(self.head, cfg.train)
        self.next_item, self.reinforcement = None, None

        if cfg.retrieval.enabled:
            _refuse_sharded_items(sharded)
            dropout, precision = cfg.features.item_id_dropout, cfg.train.precision
            self.next_item = NextItemLoss(
                cfg.retrieval, maps, device, id_dropout=dropout, precision=precision
            )
            self.loss_names = (*self.loss_names, LOSS_NAME)
            weights.append(cfg.retrieval.weight)
        if cfg.retrieval.enabled and cfg.retrieval.reinforce != "none":
            _refuse_second_model(sharded)
            # held near the present weights until `keep_start` says others
            start = RankingModel(cfg, maps.vocab_sizes, maps.base_rates).to(device)
            self.reinforcement = Reinforcement(cfg.retrieval, start)
            self.reinforcement.keep_start(self.model)
        self.loss_weights = torch.tensor(weights, device=device)

    def keep_start(self) -> None:
        """Note the weights that a run begins with, where its loss holds the model near them."""
        if self.reinforcement is not None:
            self.reinforcement.keep_start(self.model)

    def _find_parameters(self, maker: TableMaker) -> None:
        """The weights of tables, the blocks among them, and all others, by their paths."""
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
        self.adamw = DenseAdamW(self.dense, lr=self.cfg.lr, weight_decay=decay)
        self.gradients = self.adamw.buffer
        self.touched = None
        if self.world_size > 1:
            self.gradients.send_in_parts(self.cfg.gradient_part_mb * 2**20)
            self.touched = self._watch_tables()

    def _watch_tables(self) -> TouchedRows:
        """What notes which rows of the replicated tables a step looks up."""
        modules = {f"{path}.weight": module for path, module in self.model.named_modules()}
        replicated = {path: modules[path] for path in self.tables if path not in self.blocks}
        touched = TouchedRows(replicated, self.rowwise, self.numbers)  # pyright: ignore[reportArgumentType]
        position, time = self.table_paths["position"], self.table_paths["time"]
        touched.watch_places(self.model.encoder, position, time, self.rowwise)
        return touched

    @property
    def looks_ahead(self) -> bool:
        """True where `step` can use the batch after its own."""
        return self.sharded is not None and self.world_size > 1

    def _fetch_rows(self, _: nn.Module, inputs: tuple[SequenceBatch]) -> None:
        """Bring the rows that the token encoder looks up from the ranks that hold them, unless a
        step has.
        """
        assert self.sharded is not None
        if not self.fetched:
            self.sharded.fetch_rows(self.model.encoder.table_codes(*inputs))

    def step(
        self,
        batch: SequenceBatch,
        step: int,
        total_steps: int,
        wishes: tuple[bool, bool] = (False, False),
        following: SequenceBatch | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One optimizer step; per part of the loss (a task) the summed loss and the summed weights
        over all ranks, on the device.

        `wishes` of this rank, (save, stop), reach all ranks with the step's sums. `following` is
        the batch of the next step, on all ranks or on none: what its sharded rows need of the ranks
        is asked for while this step runs.

        A step whose loss or gradient is not finite changes nothing, and its sums are 0. Embedding
        gradients are not clipped: row-wise AdamW divides each row's by the root of its own mean
        square.
        """
        found = self._replay(batch, step)
        if found is None:
            found = self._backward(self._read_batch(batch, step), step, following)
        loss, weight = found

        sums = loss, weight, self._broken_tables(), self._wishes_here(wishes)
        (losses, weights, broken, wished), table_grads = self._add_over_ranks(sums)
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

    def _wishes_here(self, wishes: tuple[bool, bool]) -> Tensor:
        """float32 [2] on the device. It is set there: the host would wait for a copy of its own."""
        wished = torch.zeros_like(self.wishes)
        for number, wish in enumerate(wishes):
            if wish:
                wished[number].fill_(1)
        return wished

    def take_wishes(self) -> tuple[bool, bool]:
        """(save, stop) that any rank has wished since the last call; waits for the device."""
        save, stop = (self.wishes > 0).tolist()
        self.wishes = torch.zeros_like(self.wishes)
        return save, stop

    def _read_batch(self, batch: SequenceBatch, step: int) -> ReadBatch:
        """The batch of a step as its forward pass reads it: drawn before, or now."""
        self._set_training()
        coming, self.coming = self.coming, None
        if coming is not None and coming[0].given is batch:
            set_generators(coming[1])
            return coming[0]
        self._seed_step(step)
        return self._draw_ids(batch)

    def _set_training(self) -> None:
        if not self.model.training:  # each of some hundred modules is told
            self.model.train()

    def _seed_step(self, step: int) -> None:
        """Dropout depends on where the run stands, not on how it got there: a resumed run draws the
        same masks.
        """
        seed = np.random.SeedSequence([self.seed, step, self.rank]).generate_state(1)[0]
        seed_generators(int(seed))

    def _draw_ids(self, batch: SequenceBatch) -> ReadBatch:
        read, wanted = self.model.leave_ids_out(batch), None
        if self.sharded is not None:
            wanted = self.sharded.ask_counts(self.model.encoder.table_codes(read))
        return ReadBatch(batch, read, wanted)

    def _look_ahead(self, batch: SequenceBatch, step: int) -> None:
        """Draw the batch of a later step, the generators left as they are."""
        states = generator_states()
        self._seed_step(step)
        self.coming = self._draw_ids(batch), generator_states()
        set_generators(states)

    def _backward(
        self, batch: ReadBatch, step: int, following: SequenceBatch | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of this rank's summed loss; the loss and the weights of its parts, [L] each.

        What the other ranks must know before the gradients is sent as soon as forward is done.
        """
        self._clear_gradients()
        if batch.wanted is not None:
            assert self.sharded is not None
            self.sharded.bring_rows(batch.wanted)
            self.fetched = True
        if self.touched is not None:
            self.touched.forget()
            self.gradients.begin_step()

        loss, weight = self._losses(batch.read)
        if self.touched is not None:
            self.touched.send()
        if following is not None and self.looks_ahead:
            self._look_ahead(following, step + 1)
        (loss * self.loss_weights).sum().backward()
        self.gradients.collect()
        return loss.detach(), weight

    def _clear_gradients(self) -> None:
        self.gradients.clear()
        for table in self.tables.values():
            table.grad = None

    def _replay(self, batch: SequenceBatch, step: int) -> tuple[Tensor, Tensor] | None:
        """As `_backward`, by a CUDA graph, of a batch that was filled for one; else None."""
        if self.graphs is None:
            return None
        self._set_training()
        graph = self.graphs.find(batch)
        if graph is None:
            return None
        self._seed_step(step)  # after a recording, which draws too
        read = self.model.leave_ids_out(batch)
        if self.touched is not None:
            self._tell_rows(read, self.touched)
        return self.graphs.replay(graph, read)

    def _tell_rows(self, batch: SequenceBatch, touched: TouchedRows) -> None:
        """Send which rows a replay will look up; its gradients go over the ranks after it."""
        encoder = self.model.encoder
        codes = encoder.table_codes(batch)
        codes["position"], codes["time"] = encoder.place_codes(batch)
        touched.note_tables({self.table_paths[name]: rows for name, rows in codes.items()})
        touched.send()
        self.gradients.begin_step()

    def _captured(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """What a graph holds of a step: gradients of the summed loss, and no message."""
        self._clear_gradients()
        self.gradients.hold_parts()
        loss, weight = self._losses(batch)
        (loss * self.loss_weights).sum().backward()
        self.gradients.collect()
        if self.touched is not None:
            self.touched.forget()  # what was noted lies in the graph
        return loss.detach(), weight

    def _losses(self, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
        """Summed losses and weights of the parts, of a batch with its ids left out."""
        bf16 = self.cfg.precision == "bf16"
        passes = None
        with torch.autocast(self.loss_weights.device.type, torch.bfloat16, enabled=bf16):
            if self.reinforcement is not None:
                passes = self.reinforcement.read_passes(self.model, batch)
                encoded = passes[0].encoded
            else:
                encoded = self.model.encode_codes(batch)
            outputs = self.model.score_rows(encoded.candidate_rows, batch)
        loss, weight = self.head.loss(outputs, batch)
        if self.next_item is None:
            return loss, weight

        # the loss of next items, which may need passes of its own
        if self.reinforcement is not None and passes is not None:
            codes = self.next_item.read_codes()
            next_loss, next_weight = self.reinforcement(self.model, passes, batch, codes)
            return torch.cat([loss, next_loss]), torch.cat([weight, next_weight])

        with torch.autocast(self.loss_weights.device.type, torch.bfloat16, enabled=bf16):
            again = self.model.encode(batch) if self.next_item.needs_second_pass else None
        next_loss, next_weight = self.next_item(self.model, encoded, batch, again)
        return torch.cat([loss, next_loss]), torch.cat([weight, next_weight])

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

    def _add_over_ranks(
        self, sums: tuple[Tensor, ...]
    ) -> tuple[tuple[Tensor, ...], dict[str, tuple[Tensor, Tensor]]]:
        """The vectors `sums` added over the ranks, the dense gradients too, in place; and per store
        of `rowwise` the rows that any rank touched and their gradients, of a sharded table its
        block's and with repeats.
        """
        local = self._replicated_gradients()
        if self.touched is None:
            return sums, local | self._sharded_gradients()

        # each message on its way while the next is made
        self.gradients.send_rest()
        self.touched.finish()
        parts = [*sums, *self.touched.sums(local)]
        added = torch.cat([part.flatten() for part in parts])
        work = dist.all_reduce(added, async_op=True)
        sharded = self._sharded_gradients()

        self.gradients.finish(self.clock)
        self.clock.wait(work)
        lengths = list(map(len, sums))
        tables = self.touched.split(added[sum(lengths) :])
        return added[: sum(lengths)].split(lengths), tables | sharded

    def _replicated_gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per store of `rowwise` this rank's rows, with repeats, and their gradients."""
        grads = {}
        for name, weight in self.tables.items():
            if name not in self.blocks:
                assert weight.grad is not None
                grads[name] = weight.grad._indices()[0], weight.grad._values()
        return self.rowwise.join_rows(grads)

    def _sharded_gradients(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Per block of this rank the rows that any rank used, and their gradients."""
        grads = {}
        if self.sharded is not None:
            self.fetched = False
            for name, rows_and_grads in self.sharded.take_gradients().items():
                grads[self.table_paths[name]] = rows_and_grads
        return grads

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
        if self.reinforcement is not None:
            for name, tensor in self.reinforcement.tensors().items():
                found[f"start.{name}"] = tensor
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


def _refuse_second_model(sharded: Collection[str]) -> None:
    """LARES's second stage keeps the weights it began with, whole on each worker."""
    for name in sharded:
        raise UserError(
            f"train.tables: {name} is sharded over the workers by its size "
            "(train.shard_above_mb), and retrieval.reinforce keeps a second model, whole on "
            f"each: train.tables.{name}: replicated"
        )
