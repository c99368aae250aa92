"""Row-wise AdamW for embedding tables, AdamW for everything else, and the schedule of their learning rates."""

import math

import torch
from torch import Tensor


def rows_and_sums(index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, ascending, and the sum of each one's values in the order given: two runs agree bit for bit."""
    index, order = torch.sort(index, stable=True)
    rows, counts = torch.unique_consecutive(index, return_counts=True)
    return rows, torch.segment_reduce(values[order], "sum", lengths=counts, unsafe=True)


class RowwiseAdamW:
    """AdamW that keeps one second moment per row and touches only the rows of the batch.

    HSTU, arXiv:2402.17152, names it without a formula. For row r with gradient g and global step t:
    `m ← β1·m + (1−β1)·g`, `v ← β2·v + (1−β2)·mean(g²)`,
    `w ← w − lr·(m̂ / (sqrt(v̂) + eps) + weight_decay·w)`. With β1 = 0 there is no m.
    """

    def __init__(
        self,
        tables: dict[str, Tensor],
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.tables, self.betas, self.eps, self.weight_decay = tables, betas, eps, weight_decay
        self.step_count = 0
        self.m = {name: torch.zeros_like(w) for name, w in tables.items()} if betas[0] else {}
        self.v = {name: w.new_zeros(w.shape[0]) for name, w in tables.items()}

    @torch.no_grad()
    def step(self, grads: dict[str, tuple[Tensor, Tensor]], lr: float) -> None:
        """`grads`: per table the distinct rows [n] and their gradients [n, d]."""
        self.step_count += 1
        beta1, beta2 = self.betas
        correct1, correct2 = 1 - beta1**self.step_count, 1 - beta2**self.step_count
        for name, (rows, grad) in grads.items():
            weight = self.tables[name]
            if beta1:
                m = self.m[name][rows].lerp(grad, 1 - beta1)
                self.m[name][rows] = m
            else:
                m = grad
            v = self.v[name][rows].lerp(grad.square().mean(1), 1 - beta2)
            self.v[name][rows] = v
            update = (m / correct1) / ((v / correct2).sqrt() + self.eps)[:, None]
            old = weight[rows]
            weight[rows] = old - lr * (update + self.weight_decay * old)

    def state_dict(self) -> dict[str, Tensor]:
        state = {f"m.{name}": m for name, m in self.m.items()} | {f"v.{name}": v for name, v in self.v.items()}
        return state | {"step": torch.tensor(self.step_count)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        self.step_count = int(state["step"])
        for part, tensors in (("m", self.m), ("v", self.v)):
            for name, tensor in tensors.items():
                tensor.copy_(state[f"{part}.{name}"])


def learning_rate_factor(step: int, warmup_steps: int, total_steps: int) -> float:
    """Linear warm-up to 1, then a cosine to 0 at `total_steps`; `step` counts from 0."""
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
    return 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
