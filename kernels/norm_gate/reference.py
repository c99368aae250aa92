"""Norm(A) * SiLU(U) with dropout, in plain PyTorch (ULTRA-HSTU, arXiv:2602.16986, eq. 4, before its
linear layer).
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def dropout_mask(seed: int, num_rows: int, width: int, p: float, device: torch.device) -> Tensor:
    """bool [num_rows, width], False with probability p: a hash of (seed, row, column), alike on
    every device.
    """
    by_row = _mix(torch.arange(num_rows, device=device) ^ seed)
    draw = _mix(by_row[:, None] ^ _mix(torch.arange(width, device=device))[None, :]) >> 8

    return draw >= dropout_threshold(p)


def dropout_threshold(p: float) -> int:
    """Draws of 24 bits below it are dropped."""
    return round(p * 2**24)


def _mix(x: Tensor) -> Tensor:
    """lowbias32 on the low 32 bits; the products wrap in int64, whose low 32 bits are those of
    uint32.
    """
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF

    return x ^ (x >> 16)


def norm_gate_reference(
    a_TE: Tensor, u_TE: Tensor, weight: Tensor, bias: Tensor, *, eps: float,
    concat_ua: bool = False, p: float = 0.0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Norm(A) * SiLU(U) [T, E], or concat[SiLU(U), A, Norm(A) * SiLU(U)] [T, 3 E]; dropped out with
    probability p.
    """
    gate = F.silu(u_TE)

    y = (
        F.layer_norm(a_TE, weight.shape, weight.to(a_TE.dtype), bias.to(a_TE.dtype), eps).to(
            u_TE.dtype
        )
        * gate
    )
    if concat_ua:
        y = torch.cat([gate, a_TE.to(u_TE.dtype), y], dim=1)
    if p == 0:
        return y

    return y * dropout_mask(seed, y.shape[0], y.shape[1], p, y.device) / (1 - p)
