"""The STU layer on CUDA: nine launches of fused kernels, and an autograd function that says what is
kept.

    x ─norm→ X ─f1, SiLU→ U, Q, K, V ─attention→ A ─norm, gate, dropout→ Y ─f2 + x→ out

A frozen layer makes no X: the norm is folded into f1, which needs the deviation of x's rows alone.

Kept for backward are x and A, and unless `recompute` names them X, U..V and Y. SiLU's derivative
does not follow from its result: U is activated only inside the gate kernels, and for Q, K, V f1
writes the derivative too where backward follows. Each kernel that makes a gradient applies it
before it stores, so that no pass over U..V is left.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.layer_norm.triton_launch import (
    launch_layer_norm,
    launch_layer_norm_backward,
    launch_row_scales,
)
from kernels.linear.triton_launch import launch_linear
from kernels.linear.weights import cast_weight, folded_linear, quantized_weight
from kernels.norm_gate.triton_launch import launch_norm_gate, launch_norm_gate_backward
from kernels.semi_local_attention import triton_launch as attention
from kernels.semi_local_attention.plan import TritonPlan
from kernels.stu.recompute import RECOMPUTABLE
from kernels.stu.types import STUShape, STUWeights


@dataclass(slots=True)
class Projected:
    """f1's output [T, U + Q + K + V], all activated but U, and SiLU's derivative [T, Q + K + V]."""

    uvqk: Tensor
    slope: Tensor | None
    shape: STUShape

    @property
    def u(self) -> Tensor:
        return self.uvqk[:, : self.shape.uvqk_widths[0]]

    def split_parts(self, of: Tensor) -> list[Tensor]:
        """U [T, H V] and Q, K, V [T, H, ·] of a tensor laid out like `uvqk`."""
        u, *qkv = of.split_with_sizes(self.shape.uvqk_widths, dim=1)
        return [u, *[self._heads(x) for x in qkv]]

    def head_slopes(self) -> list[Tensor] | list[None]:
        if self.slope is None:
            return [None, None, None]
        slopes = self.slope.split_with_sizes(self.shape.uvqk_widths[1:], dim=1)
        return [self._heads(x) for x in slopes]

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], self.shape.num_heads, -1)


def launch_project(
    x_TE: Tensor, weights: STUWeights, shape: STUShape, keep_slope: bool,
    normed: Tensor | None = None, keep_normed: bool = False,
) -> tuple[Projected, Tensor | None]:  # fmt: skip
    """f1 of the normalised x, and that if it is to be kept or was given."""
    dtype = x_TE.dtype
    silu_from = shape.uvqk_widths[0] if shape.silu_qkv else None
    options: dict[str, Any] = {"silu_from": silu_from, "keep_slope": keep_slope, "dtype": dtype}

    codes = scale = None
    if normed is None or shape.fp8:
        out = normed is None and (keep_normed or not shape.fp8)
        made, codes, scale = launch_layer_norm(
            x_TE,
            weights.norm_weight,
            weights.norm_bias,
            shape.norm_eps,
            dtype,
            out=out,
            fp8=shape.fp8,
        )
        normed = made if normed is None else normed

    if codes is not None and scale is not None:
        w, w_scale = quantized_weight(weights.uvqk_weight)
        uvqk, slope = launch_linear(codes, w, weights.uvqk_bias, scales=(scale, w_scale), **options)
    else:
        assert normed is not None
        w = cast_weight(weights.uvqk_weight, dtype)
        uvqk, slope = launch_linear(normed, w, weights.uvqk_bias, **options)
    return Projected(uvqk, slope, shape), normed


def launch_folded(
    x_TE: Tensor, weights: STUWeights, shape: STUShape, outputs: slice, silu_from: int | None
) -> Tensor | None:
    """Some of f1's outputs of the normalised x, where nothing is recorded. None of weights that are
    trained; and of FP8, for which a pass over x makes the codes anyway.
    """
    if shape.fp8:
        return None
    norm = weights.norm_weight, weights.norm_bias
    folded = folded_linear(weights.uvqk_weight, weights.uvqk_bias, *norm, x_TE.dtype)
    if folded is None:
        return None

    scale = launch_row_scales(x_TE, shape.norm_eps)
    w, bias = folded.weight[outputs], folded.bias[outputs]
    return launch_linear(x_TE, w, bias, silu_from=silu_from, scales=(scale, None))[0]


def launch_frozen_project(x_TE: Tensor, weights: STUWeights, shape: STUShape) -> Projected:
    """f1 of the normalised x, where nothing is recorded."""
    silu_from = shape.uvqk_widths[0] if shape.silu_qkv else None
    folded = launch_folded(x_TE, weights, shape, slice(None), silu_from)
    if folded is not None:
        return Projected(folded, None, shape)
    return launch_project(x_TE, weights, shape, keep_slope=False)[0]


def attention_problem(
    projected: Projected, plan: TritonPlan
) -> tuple[attention.AttentionProblem, tuple[Tensor, ...]]:
    """The attention problem of a layer and its operands q, k, v."""
    shape = projected.shape
    _, q, k, v = projected.split_parts(projected.uvqk)
    out_dtype = shape.attended_dtype(q.dtype)
    scale = shape.attn_alpha, shape.scaling_seq_len
    return attention.find_problem((q, k, v), plan, *scale, out_dtype=out_dtype)


def attention_rows(projected: Projected, plan: TritonPlan) -> Tensor:
    """A [T, H V]."""
    problem, operands = attention_problem(projected, plan)
    a = attention.launch_forward(plan, problem, operands)
    return a[..., : projected.shape.d_v].flatten(1)


def launch_output(
    x_TE: Tensor, a_TE: Tensor, u_TE: Tensor, weights: STUWeights, shape: STUShape, p: float,
    seed: Tensor | None, keep_y: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x + f2 of the gated A, and Y if it is to be kept."""
    y, codes, scale = launch_norm_gate(
        a_TE, u_TE, weights.norm_attn_weight, weights.norm_attn_bias, eps=shape.norm_eps,
        concat_ua=shape.concat_ua, p=p, seed=seed, out=keep_y or not shape.fp8, fp8=shape.fp8,
    )  # fmt: skip

    if codes is not None and scale is not None:
        w, w_scale = quantized_weight(weights.out_weight)
        scales = scale, w_scale
        out, _ = launch_linear(
            codes, w, weights.out_bias, residual=x_TE, scales=scales, dtype=x_TE.dtype
        )
    else:
        assert y is not None
        w = cast_weight(weights.out_weight, x_TE.dtype)
        out, _ = launch_linear(y, w, weights.out_bias, residual=x_TE)

    return out, y if keep_y else None


def launch_layer(
    x_TE: Tensor,
    weights: STUWeights,
    shape: STUShape,
    plan: TritonPlan,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """The layer where nothing is recorded."""
    projected = launch_frozen_project(x_TE, weights, shape)
    a = attention_rows(projected, plan)
    return launch_output(x_TE, a, projected.u, weights, shape, p, seed, keep_y=False)[0]


def attention_backward(
    projected: Projected, plan: TritonPlan, da: Tensor, d_qkv: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Fill the gradients of what made Q, K, V; return their sums over rows, Q's and K and V's."""
    shape = projected.shape
    problem, operands = attention_problem(projected, plan)
    d_heads = da.view(len(da), shape.num_heads, shape.d_v)
    if problem.d_v > shape.d_v:
        d_heads = F.pad(d_heads, (0, problem.d_v - shape.d_v))

    given = *operands, d_heads
    dq, dk, dv = d_qkv
    slope_q, slope_k, slope_v = projected.head_slopes()
    sum_q = attention.launch_backward_queries(
        plan, problem, given, dq, slope_q=slope_q, summed=True
    )
    sum_kv = attention.launch_backward_keys(
        plan, problem, given, dk, dv, slope_k=slope_k, slope_v=slope_v, summed=True
    )
    assert sum_q is not None and sum_kv is not None
    return sum_q, sum_kv


def weights_of_pass(weights: STUWeights, shape: STUShape, dtype: torch.dtype) -> STUWeights:
    """What a pass reads and keeps: backward finds the large weights cast already. FP8 is rounded
    from the weights themselves.
    """
    if shape.fp8:
        return weights
    return weights._replace(
        uvqk_weight=cast_weight(weights.uvqk_weight, dtype),
        out_weight=cast_weight(weights.out_weight, dtype),
    )


class FusedLayer(torch.autograd.Function):
    """As `reference`, project to output, of (x, *weights, shape, plan, dropout, seed)."""

    @staticmethod
    def forward(ctx, x_TE: Tensor, *arguments):
        *tensors, shape, plan, p, seed = arguments
        weights = weights_of_pass(STUWeights(*tensors), shape, x_TE.dtype)
        ctx.types = [w.dtype for w in tensors]

        keep = set(RECOMPUTABLE) - set(shape.recompute)
        projected, normed = launch_project(
            x_TE, weights, shape, shape.silu_qkv and "uvqk" in keep, keep_normed="normed_x" in keep
        )
        a = attention_rows(projected, plan)
        out, y = launch_output(x_TE, a, projected.u, weights, shape, p, seed, "y" in keep)

        kept = [normed if "normed_x" in keep else None, y]
        kept += [projected.uvqk, projected.slope] if "uvqk" in keep else [None, None]
        ctx.save_for_backward(x_TE, a, *kept, *weights)
        ctx.rest = shape, plan, p, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        shape, plan, p, seed = ctx.rest
        x, a, normed, y, uvqk, slope, *tensors = ctx.saved_tensors
        weights, dtype = STUWeights(*tensors), x.dtype
        grad = grad.to(dtype).contiguous()

        # what was not kept
        if uvqk is None:
            projected, normed = launch_project(
                x, weights, shape, shape.silu_qkv, normed, keep_normed=True
            )
        else:
            projected = Projected(uvqk, slope, shape)
        if normed is None:
            norm = weights.norm_weight, weights.norm_bias
            normed, _, _ = launch_layer_norm(x, *norm, shape.norm_eps, dtype)

        # f2, and the gate
        d_uvqk = torch.empty_like(projected.uvqk)
        du, *d_qkv = projected.split_parts(d_uvqk)
        d_y = grad @ weights.out_weight.to(dtype)
        da, made, d_norm_weight, d_norm_bias, sum_u = launch_norm_gate_backward(
            d_y, a, projected.u, weights.norm_attn_weight, weights.norm_attn_bias, du,
            eps=shape.norm_eps, concat_ua=shape.concat_ua, p=p, seed=seed, out=y is None,
        )  # fmt: skip
        y = made if y is None else y
        d_out_weight = grad.T @ y
        del d_y, made, y

        sum_q, sum_kv = attention_backward(projected, plan, da, d_qkv)
        del projected, da

        # f1, and the norm
        d_normed = d_uvqk @ weights.uvqk_weight.to(dtype)
        d_uvqk_weight = d_uvqk.T @ normed
        d_uvqk_bias = torch.cat([sum_u, sum_q, sum_kv])  # of each part from the kernel that made it
        dx, d_weight, d_bias, d_out_bias = launch_layer_norm_backward(
            d_normed, x, grad, weights.norm_weight, shape.norm_eps
        )

        of_norm, of_uvqk = (d_weight, d_bias), (d_uvqk_weight, d_uvqk_bias)
        grads = *of_norm, *of_uvqk, d_norm_weight, d_norm_bias, d_out_weight, d_out_bias
        cast = [g.to(dtype) for g, dtype in zip(grads, ctx.types, strict=True)]
        return dx, *cast, None, None, None, None
