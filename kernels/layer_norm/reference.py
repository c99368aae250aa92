"""LayerNorm and what is fused with it, in plain PyTorch: the truth of the kernels, and FP8 where it
is emulated.

Row-wise e4m3: a row's scale is its largest magnitude / 448, 1 for a row of zeros; the row is stored
over its scale.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FP8_MAX = 448.0


def layer_norm_reference(x_TE: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) in x's type.

    Autocast would make it float32; the statistics are float32 either way.
    """
    weight, bias, device = weight.to(x_TE.dtype), bias.to(x_TE.dtype), x_TE.device.type
    if not torch.is_autocast_enabled(device):  # entering the block takes as long as a small norm
        return F.layer_norm(x_TE, weight.shape, weight, bias, eps)
    with torch.autocast(device, enabled=False):
        return F.layer_norm(x_TE, weight.shape, weight, bias, eps)


def swish_layer_norm_reference(x_TE: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x * sigmoid(LayerNorm(x)), as HSTU's authors have it between the linear maps of their token
    encoder.
    """
    return x_TE * torch.sigmoid(layer_norm_reference(x_TE, weight, bias, eps))


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
