"""LayerNorm with row-wise FP8, in plain PyTorch: the truth the kernels are held against, and FP8 where it is emulated.

Row-wise e4m3: a row's scale is its largest magnitude / 448, 1 for a row of zeros; the row is stored over its scale.
"""

import torch
from torch import Tensor

FP8_MAX = 448.0


def quantize_rows_reference(x_TE: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn [T, E] and float32 [T]: x is about the one times the other."""
    wide = x_TE.float()
    largest = wide.abs().amax(1)
    scale = torch.where(largest > 0, largest / FP8_MAX, 1.0)
    return (wide / scale[:, None]).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn), scale


def through_fp8(x_TE: Tensor) -> Tensor:
    """x as FP8 holds it, in x's type."""
    codes, scale = quantize_rows_reference(x_TE)
    return (codes.float() * scale[:, None]).to(x_TE.dtype)
