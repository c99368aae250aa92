"""Row-wise AdamW on distinct rows, in plain PyTorch."""

import torch
from torch import Tensor

from kernels.rowwise_adamw.types import Hyper


def rowwise_adamw_reference(
    weight: Tensor,
    m: Tensor | None,
    v: Tensor,
    rows: Tensor,
    grad: Tensor,
    hyper: Hyper,
    first_row: int = 0,
) -> None:
    """In place: weight [R, d], m [R, d] or None for β1 = 0, v [R]; `rows` [n] distinct, `grad` [n,
    d].

    HSTU, arXiv:2402.17152, names it without a formula. For row r with gradient g at global step t:
    `m ← β1·m + (1−β1)·g`, `v ← β2·v + (1−β2)·mean(g²)`,
    `w ← w − lr·(m̂ / (sqrt(v̂) + eps) + weight_decay·w)`.

    Rows may be bfloat16 with moments in float32: two bytes a number where the table is large.
    """
    beta1, beta2 = hyper.betas
    correct1, correct2 = hyper.corrections
    grad = grad.to(v.dtype)

    new_m = grad
    if m is not None:
        new_m = m[rows].lerp(grad, 1 - beta1)
        m[rows] = new_m
    new_v = v[rows].lerp(grad.square().mean(1), 1 - beta2)
    v[rows] = new_v
    update = (new_m / correct1) / ((new_v / correct2).sqrt() + hyper.eps)[:, None]
    old = weight[rows].to(v.dtype)
    new = old - hyper.lr * (update + hyper.weight_decay * old)

    if weight.dtype == torch.bfloat16:
        at = (rows[:, None] + first_row) * weight.shape[1] + torch.arange(
            weight.shape[1], device=rows.device
        )
        new = round_by_chance(new, at, hyper.step)
    weight[rows] = new.to(weight.dtype)


def round_by_chance(x: Tensor, at: Tensor, step: int) -> Tensor:
    """float32 numbers that bfloat16 holds, the next above or below `x` with chances that make `x`
    the mean.

    Rounding to the nearest would lose every step smaller than half the last of eight bits. Chance
    is a hash of `step` and the number's place `at` in the table (the finaliser of MurmurHash3), so
    that two runs agree.
    """
    bits = (at ^ (step * 0x9E3779B9)) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 16)) * 0x85EBCA6B) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 13)) * 0xC2B2AE35) & 0xFFFFFFFF
    bits = (bits ^ (bits >> 16)) & 0xFFFF
    return ((x.view(torch.int32) + bits.int()) & -0x10000).view(torch.float32)


def rows_and_sums(index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct rows, ascending, and the sum of each one's values in the order given: two runs agree
    bit for bit.
    """
    index, order = torch.sort(index, stable=True)
    rows, counts = torch.unique_consecutive(index, return_counts=True)
    return rows, torch.segment_reduce(values[order], "sum", lengths=counts, unsafe=True)
