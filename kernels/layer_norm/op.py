"""LayerNorm in its input's type, plain and as a gate of its own input, the ops: checks and the
choice of backend.

x [T, E] + weight and bias [E] → `layer_norm`, `swish_layer_norm` → [T, E]
"""

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend, require
from kernels.layer_norm.reference import layer_norm_reference, swish_layer_norm_reference

FLOATS = torch.float16, torch.bfloat16, torch.float32


def layer_norm(
    x_TE: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, backend: Backend = "auto"
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias by row [T, E], in x's type, under autocast
    too.

    Two runs agree bit for bit, in the gradients of weight and bias too.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    if not _is_triton(x_TE, weight, bias, backend):
        return layer_norm_reference(x_TE, weight, bias, eps)

    from kernels.layer_norm.triton_launch import LayerNorm

    return LayerNorm.apply(x_TE.contiguous(), weight, bias, eps)


def swish_layer_norm(
    x_TE: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5, backend: Backend = "auto"
) -> Tensor:
    """x * sigmoid(`layer_norm(x)`) [T, E], in x's type; with Triton in one pass, and backward in
    another.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    if not _is_triton(x_TE, weight, bias, backend):
        return swish_layer_norm_reference(x_TE, weight, bias, eps)

    from kernels.layer_norm.triton_launch import SwishLayerNorm

    return SwishLayerNorm.apply(x_TE.contiguous(), weight, bias, eps)


def _is_triton(x_TE: Tensor, weight: Tensor, bias: Tensor, backend: Backend) -> bool:
    fits = x_TE.dim() == 2 and weight.shape == bias.shape == x_TE.shape[1:]
    shown = f"{tuple(x_TE.shape)}, {tuple(weight.shape)} and {tuple(bias.shape)}"
    require(fits, f"x must be [T, E], weight and bias [E], got {shown}")

    triton = choose_backend(backend, x_TE) == "triton"
    if triton:
        require(
            x_TE.dtype in FLOATS,
            f"the triton backend takes float16, bfloat16 and float32, got {x_TE.dtype}",
        )

    return triton
