"""One STU layer in plain PyTorch (ULTRA-HSTU, arXiv:2602.16986, eq. 1-5): the truth, and the path
of CPUs.

X = Norm(Z);  U, Q, K, V = SiLU(f1(X));  A = (SiLU(Q Kᵀ) ⊙ M) V;  Y = f2(Norm(A) ⊙ U);  Z' = Y + Z
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear.reference import linear_reference
from kernels.norm_gate.reference import dropout_mask
from kernels.stu.types import STUShape, STUWeights


def project_reference(
    x_TE: Tensor, weights: STUWeights, shape: STUShape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U [T, H V], Q and K [T, H, D], V [T, H, V]."""
    x = F.layer_norm(x_TE, x_TE.shape[1:], weights.norm_weight, weights.norm_bias, shape.norm_eps)
    uvqk = linear_reference(x, weights.uvqk_weight, weights.uvqk_bias, fp8=shape.fp8)

    if shape.silu_qkv:
        u, *qkv = F.silu(uvqk).split(shape.uvqk_widths, dim=1)
    else:
        u, *qkv = uvqk.split(shape.uvqk_widths, dim=1)
        u = F.silu(u)
    q, k, v = (z.unflatten(1, (shape.num_heads, -1)) for z in qkv)
    return u, q, k, v


def project_rows_reference(
    x_TE: Tensor, weights: STUWeights, shape: STUShape, index: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U [R, H V] and Q [R, H, D] of the rows `index`, int64 [R], K [T, H, D] and V [T, H, V] of
    all.
    """
    x = F.layer_norm(x_TE, x_TE.shape[1:], weights.norm_weight, weights.norm_bias, shape.norm_eps)
    widths = shape.uvqk_widths
    of_rows = widths[0] + widths[1]
    weight, bias = weights.uvqk_weight, weights.uvqk_bias
    uq = linear_reference(x.index_select(0, index), weight[:of_rows], bias[:of_rows], fp8=shape.fp8)
    kv = linear_reference(x, weight[of_rows:], bias[of_rows:], fp8=shape.fp8)

    if shape.silu_qkv:
        u, q = F.silu(uq).split(widths[:2], dim=1)
        k, v = F.silu(kv).split(widths[2:], dim=1)
    else:
        u, q = uq.split(widths[:2], dim=1)
        k, v = kv.split(widths[2:], dim=1)
        u = F.silu(u)
    heads = shape.num_heads, -1
    return u, q.unflatten(1, heads), k.unflatten(1, heads), v.unflatten(1, heads)


def output_reference(
    x_TE: Tensor, u_TE: Tensor, a_THV: Tensor, weights: STUWeights, shape: STUShape, p: float = 0.0,
    seed: int | None = None,
) -> Tensor:  # fmt: skip
    """Z' [T, E]. Dropout p on what f2 reads; a seed gives the mask of the kernels, None PyTorch's
    own.
    """
    a = a_THV.flatten(1)
    norm_weight, norm_bias = weights.norm_attn_weight, weights.norm_attn_bias
    if shape.norm_a_fp32:
        norm_weight, norm_bias = norm_weight.to(a.dtype), norm_bias.to(a.dtype)
    gated = F.layer_norm(a, a.shape[1:], norm_weight, norm_bias, shape.norm_eps)
    gated = gated.to(u_TE.dtype) * u_TE  # autocast runs the norm itself in float32
    if shape.concat_ua:
        gated = torch.cat([u_TE, a.to(u_TE.dtype), gated], dim=1)

    if seed is None:
        gated = F.dropout(gated, p, training=p > 0)
    else:
        gated = (
            gated * dropout_mask(seed, gated.shape[0], gated.shape[1], p, gated.device) / (1 - p)
        )

    return linear_reference(
        gated, weights.out_weight, weights.out_bias, residual=x_TE, fp8=shape.fp8
    )
