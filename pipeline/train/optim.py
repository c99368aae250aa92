"""Row-wise AdamW for embedding tables, AdamW for everything else, and the schedule of their
learning rates.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from kernels.rowwise_adamw.op import rowwise_adamw
from kernels.rowwise_adamw.types import Hyper
from pipeline.config import UserError
from pipeline.train.gradients import GradientBuffer

# Tables up to this size share their memory with others of their width: one update for all.
FUSED_BYTES = 16 * 2**20


class RowwiseAdamW:
    """AdamW that keeps one second moment per row and touches only the rows of the batch
    (kernels/rowwise_adamw).

    Small tables of one width become parts of one store, which is updated as one table; large ones,
    blocks of sharded ones and those with moments on the host are stores by themselves. The moments
    of the tables in `on_host` lie in the host's memory, pinned where the table is on a GPU: the
    kernel reads and writes them there, the touched rows and nothing else. `first_rows`: of tables
    that are blocks of larger ones, where they begin there.

        table      store        rows of the store
        age   5x8  width 8      0 .. 4
        tag   9x8  width 8      5 .. 13
        item  32   item         its own
    """

    def __init__(
        self,
        tables: Mapping[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        on_host: Collection[str] = (),
        first_rows: Mapping[str, int] | None = None,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.step_count, self.first_rows = 0, first_rows or {}
        alone = {*on_host, *self.first_rows}
        self.stores, self.parts = make_stores(tables, alone)
        self.tables = tables

        def zeros(name: str, shape: torch.Size) -> Tensor:
            weight = self.stores[name]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            if name in on_host:
                return torch.zeros(shape, dtype=dtype, pin_memory=weight.is_cuda)
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        # by store, and by table as views of these; the first moment where beta is above 0
        self._m: dict[str, Tensor] = {}
        self._v: dict[str, Tensor] = {}
        for name, weight in self.stores.items():
            self._v[name] = zeros(name, weight.shape[:1])
            if betas[0]:
                self._m[name] = zeros(name, weight.shape)

        self.m: dict[str, Tensor] = {}
        self.v: dict[str, Tensor] = {}
        for name in tables:
            self.v[name] = self._part(self._v, name)
            if betas[0]:
                self.m[name] = self._part(self._m, name)

    def _part(self, moments: dict[str, Tensor], table: str) -> Tensor:
        store, first = self.parts[table]
        return moments[store][first : first + len(self.tables[table])]

    def join_rows(
        self, grads: Mapping[str, tuple[Tensor, Tensor]]
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Rows and gradients by store, from those by table: rows count through the store."""
        rows_of: dict[str, list[Tensor]] = {}
        grads_of: dict[str, list[Tensor]] = {}
        for table, (rows, grad) in grads.items():
            store, first = self.parts[table]
            rows_of.setdefault(store, []).append(rows + first if first else rows)
            grads_of.setdefault(store, []).append(grad)

        joined = {}
        for store, rows in rows_of.items():
            values = grads_of[store]
            if len(rows) == 1:
                joined[store] = rows[0], values[0]
            else:
                joined[store] = torch.cat(rows), torch.cat(values)
        return joined

    @torch.no_grad()
    def step(
        self, grads: dict[str, tuple[Tensor, Tensor]], lr: float, grad_scale: Tensor | None = None
    ) -> None:
        """`grads`: per store (`join_rows`) rows [n], which may repeat, and their gradients [n, d].

        `grad_scale`, one number, divides the gradients of a row after they were added; infinity
        leaves the step out.
        """
        self.step_count += 1
        hyper = Hyper(self.step_count, lr, self.betas, self.eps, self.weight_decay)
        for name, (rows, grad) in grads.items():
            moments = self._m.get(name), self._v[name]
            options = {"grad_scale": grad_scale, "first_row": self.first_rows.get(name, 0)}
            rowwise_adamw(self.stores[name], *moments, rows, grad, hyper, **options)

    def state_dict(self) -> dict[str, Tensor]:
        """The moments themselves by table, not copies; `step_count` is the caller's to keep."""
        if any(weight.is_cuda for weight in self.tables.values()):
            # moments on the host are read there, where a kernel may still be writing
            torch.cuda.synchronize()
        first = {f"m.{name}": moment for name, moment in self.m.items()}
        second = {f"v.{name}": moment for name, moment in self.v.items()}
        return first | second


def make_stores(
    tables: Mapping[str, Tensor], alone: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, tuple[str, int]]]:
    """The memory that is updated, and of each table its store's name and its first row there.

    Small tables of one width, type and device are moved into one store, which they are then views
    of; none of `alone` is.
    """
    alike: dict[tuple, list[str]] = {}
    for name, table in tables.items():
        own = name in alone or table.nbytes > FUSED_BYTES
        key = (name,) if own else (table.shape[1], table.dtype, table.device)
        alike.setdefault(key, []).append(name)

    stores: dict[str, Tensor] = {}
    parts: dict[str, tuple[str, int]] = {}
    for names in alike.values():
        store, first = names[0], 0
        if len(names) == 1:
            stores[store], parts[store] = tables[store].detach(), (store, 0)
            continue

        store = f"width {tables[names[0]].shape[1]}"
        whole = torch.cat([tables[name].detach() for name in names])
        stores[store] = whole
        for name in names:
            rows = len(tables[name])
            tables[name].data = whole[first : first + rows]
            parts[name] = store, first
            first += rows
    return stores, parts


class DenseAdamW:
    """AdamW of all weights that are no tables, whose weights, gradients and moments are views of
    flat buffers: one launch for each thing that is done to all of them.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, lr: float, weight_decay: float
    ) -> None:
        self.buffer = GradientBuffer(parameters)
        like = next(iter(parameters.values()))
        weights = torch.zeros(self.buffer.size, dtype=like.dtype, device=like.device)
        # as AdamW would in its first step: a checkpoint is read into these
        moments = {"exp_avg": torch.zeros_like(weights), "exp_avg_sq": torch.zeros_like(weights)}
        self.step_count = torch.zeros((), device=like.device)

        self.parameters = parameters
        self.state: dict[str, dict[str, Tensor]] = {}
        for name, parameter in parameters.items():
            assert parameter.dtype == like.dtype, "one buffer holds one type"
            place = self.buffer.places[name]
            parameter.data = weights[place].view_as(parameter).copy_(parameter.detach())
            parts = {key: moment[place].view_as(parameter) for key, moment in moments.items()}
            self.state[name] = parts

        self.flat = nn.Parameter(weights)
        self.adamw = torch.optim.AdamW([self.flat], lr=lr, weight_decay=weight_decay, fused=True)
        self.adamw.state[self.flat] = {"step": self.step_count, **moments}

    def divide_and_clip(self, total: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
        """Divide the gradients by `total` and clip them; [parameters] their norms before clipping,
        and the norm of all.
        """
        self.flat.grad = self.buffer.flat
        self.flat.grad.div_(total)
        norms = torch.stack(torch._foreach_norm(self.buffer.views))  # pyright: ignore[reportPrivateImportUsage]
        whole = torch.linalg.vector_norm(norms)
        nn.utils.clip_grads_with_norm_([self.flat], max_norm, whole)
        return norms, whole

    def step(self, lr: float, skip: Tensor) -> None:
        """One step, unless `skip`, bool [], is true."""
        self.adamw.param_groups[0]["lr"] = lr
        self.adamw.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]  # as GradScaler leaves it out
        self.adamw.step()

    def state_dict(self) -> dict[str, Tensor]:
        """The moments themselves by parameter, `exp_avg.layers.0.weight`, and `step`; no copies."""
        found = {"step": self.step_count}
        for name, parts in self.state.items():
            for key, tensor in parts.items():
                found[f"{key}.{name}"] = tensor
        return found


WARMUP_STEPS = 100  # where the configuration names no number


def resolve_warmup(warmup_steps: int | None, total_steps: int) -> int:
    """Steps of warm-up of a run of so many steps: those of `train.warmup_steps`, or our own, within
    the same bound.
    """
    if warmup_steps is not None:
        return warmup_steps
    return min(WARMUP_STEPS, longest_warmup(total_steps))


def longest_warmup(total_steps: int) -> int:
    """Steps of the longest warm-up that leaves a run enough steps to train in."""
    return total_steps // 10


def refuse_long_warmup(warmup_steps: int | None, total_steps: int) -> None:
    """Go on only if a warm-up that somebody set leaves most of the run to train in: one that is
    longer than a tenth was chosen for a longer run.

    Raises:
        UserError: it is longer than a tenth of the steps.
    """
    longest = longest_warmup(total_steps)
    if warmup_steps is not None and warmup_steps > longest:
        raise UserError(
            f"train.warmup_steps is {warmup_steps}, more than a tenth of the {total_steps} steps "
            f"of this run: set it to {longest} or less, to null, or train longer (train.epochs)"
        )


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to 1, then a cosine to 0 at `total_steps`; `step` counts from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
