"""Row-wise AdamW for embedding tables, AdamW for everything else, and the schedule of their
learning rates.
"""

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from kernels.rowwise_adamw.op import rowwise_adamw
from kernels.rowwise_adamw.types import Hyper
from pipeline.config import UserError


class RowwiseAdamW:
    """AdamW that keeps one second moment per row and touches only the rows of the batch
    (kernels/rowwise_adamw).

    The moments of the tables in `on_host` lie in the host's memory, pinned where the table is on a
    GPU: the kernel reads and writes them there, the touched rows and nothing else. `first_rows`: of
    tables that are blocks of larger ones, where they begin there.
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
        self.tables, self.betas, self.eps, self.weight_decay = tables, betas, eps, weight_decay
        self.step_count, self.first_rows = 0, first_rows or {}

        def zeros(name: str, shape: torch.Size) -> Tensor:
            weight = tables[name]
            dtype = torch.promote_types(weight.dtype, torch.float32)
            if name in on_host:
                return torch.zeros(shape, dtype=dtype, pin_memory=weight.is_cuda)
            return torch.zeros(shape, dtype=dtype, device=weight.device)

        self.m = {name: zeros(name, w.shape) for name, w in tables.items()} if betas[0] else {}
        self.v = {name: zeros(name, w.shape[:1]) for name, w in tables.items()}

    @torch.no_grad()
    def step(
        self, grads: dict[str, tuple[Tensor, Tensor]], lr: float, grad_scale: Tensor | None = None
    ) -> None:
        """`grads`: per table rows [n], which may repeat, and their gradients [n, d].

        `grad_scale`, one number, divides the gradients of a row after they were added; infinity
        leaves the step out."""
        self.step_count += 1
        hyper = Hyper(self.step_count, lr, self.betas, self.eps, self.weight_decay)
        for name, (rows, grad) in grads.items():
            moments = self.m.get(name), self.v[name]
            options = {"grad_scale": grad_scale, "first_row": self.first_rows.get(name, 0)}
            rowwise_adamw(self.tables[name].detach(), *moments, rows, grad, hyper, **options)

    def state_dict(self) -> dict[str, Tensor]:
        """The moments themselves, not copies; `step_count` is the caller's to keep."""
        if any(weight.is_cuda for weight in self.tables.values()):
            # moments on the host are read there, where a kernel may still be writing
            torch.cuda.synchronize()
        return {f"m.{name}": m for name, m in self.m.items()} | {
            f"v.{name}": v for name, v in self.v.items()
        }


WARMUP_STEPS = 100  # where the configuration names no number


def resolve_warmup(warmup_steps: int | None, total_steps: int) -> int:
    """Steps of warm-up of a run of so many steps: those of `train.warmup_steps`, or our own.

    Our own are up to a fifth of a short run: they are chosen for its length.
    """
    if warmup_steps is not None:
        return warmup_steps
    return min(WARMUP_STEPS, total_steps // 5)


def refuse_long_warmup(warmup_steps: int | None, total_steps: int) -> None:
    """Go on only if a warm-up that somebody set leaves most of the run to train in: one that is
    longer than a tenth was chosen for a longer run.

    Raises:
        UserError: it is longer than a tenth of the steps.
    """
    longest = total_steps // 10
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
