"""One STU layer in plain PyTorch (ULTRA-HSTU, arXiv:2602.16986, eq. 1-5): the truth, and the path
of CPUs.

X = Norm(Z);  U, Q, K, V = SiLU(f1(X));  A = (SiLU(Q Kᵀ) ⊙ M) V;  Y = f2(Norm(A) ⊙ U);  Z' = Y + Z
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.linear.reference import linear_reference
from kernels.norm_gate.reference import dropout_mask


class STUWeights(NamedTuple):
    """Linear weights are [outputs, inputs], as `nn.Linear` holds them; f1's outputs are U, Q, K, V."""

    norm_weight: Tensor
    norm_bias: Tensor
    uvqk_weight: Tensor
    uvqk_bias: Tensor
    norm_attn_weight: Tensor
    norm_attn_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class STUShape:
    """What a layer is, beside its weights."""

    num_heads: int
    d_qk: int
    d_v: int
    norm_eps: float
    attn_alpha: float
    scaling_seq_len: int
    window: int | None
    full_rows: int
    prefix: int
    silu_qkv: bool = True  # False: Q, K and V stay linear, the authors' production form
    concat_ua: bool = False  # f2 reads concat[U, A, Norm(A) ⊙ U], their other difference
    fp8: bool = False  # f1 and f2 on row-wise e4m3, backward as if nothing had been rounded
    # of "normed_x", "uvqk", "y": made again in backward instead of kept
    recompute: tuple[str, ...] = ()

    @property
    def split(self) -> list[int]:
        return [self.num_heads * width for width in (self.d_v, self.d_qk, self.d_qk, self.d_v)]


def project_reference(
    x_TE: Tensor, weights: STUWeights, shape: STUShape
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U [T, H V], Q and K [T, H, D], V [T, H, V]."""
    x = F.layer_norm(x_TE, x_TE.shape[1:], weights.norm_weight, weights.norm_bias, shape.norm_eps)
    uvqk = linear_reference(x, weights.uvqk_weight, weights.uvqk_bias, fp8=shape.fp8)
    if shape.silu_qkv:
        u, *qkv = F.silu(uvqk).split(shape.split, dim=1)
    else:
        u, *qkv = uvqk.split(shape.split, dim=1)
        u = F.silu(u)
    q, k, v = (z.unflatten(1, (shape.num_heads, -1)) for z in qkv)
    return u, q, k, v


def output_reference(
    x_TE: Tensor, u_TE: Tensor, a_THV: Tensor, weights: STUWeights, shape: STUShape, p: float = 0.0,
    seed: int | None = None,
) -> Tensor:  # fmt: skip
    """Z' [T, E]. Dropout p on what f2 reads; a seed gives the mask of the kernels, None PyTorch's
    own.
    """
    a = a_THV.flatten(1)
    gated = F.layer_norm(
        a, a.shape[1:], weights.norm_attn_weight, weights.norm_attn_bias, shape.norm_eps
    )
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
