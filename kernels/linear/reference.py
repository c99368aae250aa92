"""The linear layer and its FP8 form, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.layer_norm.reference import through_fp8


class Fp8Linear(torch.autograd.Function):
    """x wᵀ + bias with x and w as row-wise FP8 holds them; backward as if they had not been
    rounded.
    """

    @staticmethod
    def forward(ctx, x_TK: Tensor, w_NK: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x_TK, w_NK)
        return F.linear(through_fp8(x_TK), through_fp8(w_NK), bias)

    @staticmethod
    def backward(ctx, *grads: Tensor):
        (grad,) = grads
        # under autocast forward ran in a smaller type
        x_TK, w_NK = (t.to(grad.dtype) for t in ctx.saved_tensors)

        return grad @ w_NK, grad.T @ x_TK, grad.sum(0)


def linear_reference(
    x_TK: Tensor, w_NK: Tensor, bias: Tensor, *, silu_from: int | None = None,
    residual: Tensor | None = None, fp8: bool = False,
) -> Tensor:  # fmt: skip
    """x wᵀ + bias, SiLU on the outputs from `silu_from` on, or + residual."""
    out = Fp8Linear.apply(x_TK, w_NK, bias) if fp8 else F.linear(x_TK, w_NK, bias)
    if silu_from is not None:
        out = torch.cat([out[:, :silu_from], F.silu(out[:, silu_from:])], dim=1)

    return out if residual is None else residual + out
