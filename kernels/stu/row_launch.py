"""The STU layer on CUDA where only some rows are read after it: the last layer's candidates, or
what truncation keeps. Keys and values are made of all rows, the rest of these.

    x of all rows ─norm, f1→ K, V ───┐
    x of the rows ─norm, f1→ U, Q ─attention over K, V→ A ─norm, gate, dropout→ Y ─f2 + x→ out

Attention's kernels find rows by their places among all. They are launched over those tiles in which
a row asks. Of what other rows hold, forward reads nothing; in backward they are zero, so that they
add nothing to the gradients of K and V.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernels.layer_norm.triton_launch import launch_layer_norm, launch_layer_norm_backward
from kernels.linear.triton_launch import launch_linear
from kernels.linear.weights import cast_weight, quantized_weight
from kernels.norm_gate.triton_launch import launch_norm_gate_backward
from kernels.semi_local_attention import triton_launch as attention
from kernels.semi_local_attention.plan import TritonPlan
from kernels.stu.triton_launch import launch_folded, launch_output, weights_of_pass
from kernels.stu.types import STUShape, STUWeights


class Outputs(NamedTuple):
    """Some of f1's outputs: U and Q, or K and V."""

    place: slice
    silu_from: int | None  # of them, the first that is activated


def of_queries(shape: STUShape) -> Outputs:
    """U, activated by the gate, and Q."""
    width_u, width_q = shape.uvqk_widths[:2]
    return Outputs(slice(width_u + width_q), width_u if shape.silu_qkv else None)


def of_keys(shape: STUShape) -> Outputs:
    """K and V."""
    widths = shape.uvqk_widths
    return Outputs(slice(widths[0] + widths[1], None), 0 if shape.silu_qkv else None)


@dataclass(slots=True)
class RowProjected:
    """f1's outputs of T tokens of which R ask, and SiLU's derivative where backward follows."""

    uq: Tensor  # [R, U + Q], U not activated
    kv: Tensor  # [T, K + V]
    slope_q: Tensor | None  # [R, Q]
    slope_kv: Tensor | None  # [T, K + V]
    shape: STUShape

    def split_heads(self, of: Tensor) -> tuple[Tensor, Tensor]:
        """K [T, H, D] and V [T, H, V] of a tensor laid out like `kv`."""
        k, v = of.split_with_sizes(self.shape.uvqk_widths[2:], dim=1)
        heads = self.shape.num_heads, -1
        return k.unflatten(1, heads), v.unflatten(1, heads)

    def split_queries(self, of: Tensor) -> tuple[Tensor, Tensor]:
        """U [R, H V] and Q [R, H D] of a tensor laid out like `uq`."""
        u, q = of.split_with_sizes(self.shape.uvqk_widths[:2], dim=1)
        return u, q


def launch_project_rows(
    x_TE: Tensor, x_RE: Tensor, weights: STUWeights, shape: STUShape, keep_slope: bool
) -> RowProjected:
    """f1 of the normalised x: U and Q of the rows `x_RE`, K and V of all."""
    keep_slope = keep_slope and shape.silu_qkv
    kv, slope_kv = _launch_outputs(x_TE, weights, shape, of_keys(shape), keep_slope)
    uq, slope_q = _launch_outputs(x_RE, weights, shape, of_queries(shape), keep_slope)
    return RowProjected(uq, kv, slope_q, slope_kv, shape)


def launch_frozen_rows(
    x_TE: Tensor, x_RE: Tensor, weights: STUWeights, shape: STUShape
) -> RowProjected:
    """As `launch_project_rows`, where nothing is recorded."""
    kv = launch_folded(x_TE, weights, shape, *of_keys(shape))
    uq = launch_folded(x_RE, weights, shape, *of_queries(shape))
    if kv is None or uq is None:
        return launch_project_rows(x_TE, x_RE, weights, shape, keep_slope=False)
    return RowProjected(uq, kv, None, None, shape)


def _launch_outputs(
    x_TE: Tensor, weights: STUWeights, shape: STUShape, outputs: Outputs, keep_slope: bool
) -> tuple[Tensor, Tensor | None]:
    dtype, place = x_TE.dtype, outputs.place
    norm = weights.norm_weight, weights.norm_bias, shape.norm_eps, dtype
    normed, codes, scale = launch_layer_norm(x_TE, *norm, out=not shape.fp8, fp8=shape.fp8)

    # what is kept in its small type is the whole weight, not a part of it
    read, w, scales = normed, None, None
    if codes is not None and scale is not None:
        w, w_scale = quantized_weight(weights.uvqk_weight)
        read, scales = codes, (scale, w_scale[place])
    else:
        w = cast_weight(weights.uvqk_weight, dtype)
    assert read is not None
    return launch_linear(
        read, w[place], weights.uvqk_bias[place], silu_from=outputs.silu_from,
        keep_slope=keep_slope, scales=scales, dtype=dtype,
    )  # fmt: skip


def _attention_problem(
    projected: RowProjected, plan: TritonPlan, index: Tensor, *, zeros: bool
) -> tuple[attention.AttentionProblem, tuple[Tensor, ...]]:
    """The attention problem and its operands q, k, v, with q at its rows' places among all."""
    shape, num_tokens = projected.shape, len(projected.kv)
    _, q_rows = projected.split_queries(projected.uq)
    make = torch.zeros if zeros else torch.empty
    q = make(num_tokens, q_rows.shape[1], dtype=q_rows.dtype, device=q_rows.device)
    _put_rows(q, index, q_rows)

    qkv = q.unflatten(1, (shape.num_heads, -1)), *projected.split_heads(projected.kv)
    scale = shape.attn_alpha, shape.scaling_seq_len
    out_dtype = shape.attended_dtype(q_rows.dtype)
    return attention.find_problem(qkv, plan, *scale, out_dtype=out_dtype)


def _put_rows(out: Tensor, index: Tensor, rows: Tensor) -> None:
    """Copy rows to the places `index`, where they can in words of 8 bytes: PyTorch copies numbers
    one by one.
    """
    parts = [part for x in (out, rows) for part in (*x.shape[1:], x.stride(0), x.storage_offset())]
    if all(part * rows.element_size() % 8 == 0 for part in parts):
        out, rows = out.view(torch.int64), rows.view(torch.int64)
    out.index_copy_(0, index, rows)


def attention_of_rows(projected: RowProjected, plan: TritonPlan, index: Tensor) -> Tensor:
    """A [R, H V]."""
    problem, operands = _attention_problem(projected, plan, index, zeros=False)
    a = attention.launch_forward(plan, problem, operands)
    return a.index_select(0, index)[..., : projected.shape.d_v].flatten(1)


def launch_layer_rows(
    x_TE: Tensor,
    index: Tensor,
    weights: STUWeights,
    shape: STUShape,
    plan: TritonPlan,
    p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The layer's output [R, E] of the rows `index`, int64 [R], of which `plan` knows; and K
    [T, H, D] and V [T, H, V]. Nothing is recorded.
    """
    x_RE = x_TE.index_select(0, index)
    projected = launch_frozen_rows(x_TE, x_RE, weights, shape)
    a = attention_of_rows(projected, plan, index)
    u, _ = projected.split_queries(projected.uq)
    out, _ = launch_output(x_RE, a, u, weights, shape, p, seed, keep_y=False)
    return out, *projected.split_heads(projected.kv)


def attention_backward_rows(
    projected: RowProjected, plan: TritonPlan, index: Tensor, da: Tensor, d_kv: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill the gradient of what made K and V from that of A, [R, H V]; return the gradient of what
    made Q, [R, H D], and the sum of K's and V's over rows.
    """
    shape, num_tokens = projected.shape, len(projected.kv)
    problem, operands = _attention_problem(projected, plan, index, zeros=True)
    d_rows = torch.zeros(num_tokens, da.shape[1], dtype=da.dtype, device=da.device)
    _put_rows(d_rows, index, da)
    d_heads = d_rows.unflatten(1, (shape.num_heads, -1))
    if problem.d_v > shape.d_v:
        d_heads = F.pad(d_heads, (0, problem.d_v - shape.d_v))

    given = *operands, d_heads
    dq = torch.empty(num_tokens, shape.num_heads, shape.d_qk, dtype=da.dtype, device=da.device)
    attention.launch_backward_queries(plan, problem, given, dq)
    dq_rows = dq.index_select(0, index).flatten(1)
    if projected.slope_q is not None:
        dq_rows *= projected.slope_q

    slopes = (None, None)
    if projected.slope_kv is not None:
        slopes = projected.split_heads(projected.slope_kv)
    dk, dv = projected.split_heads(d_kv)
    sum_kv = attention.launch_backward_keys(
        plan, problem, given, dk, dv, slope_k=slopes[0], slope_v=slopes[1], summed=True
    )
    assert sum_kv is not None
    return dq_rows, sum_kv


class FusedRows(torch.autograd.Function):
    """As `launch_layer_rows`, of (x, index, *weights, shape, plan, dropout, seed)."""

    @staticmethod
    def forward(ctx, x_TE: Tensor, index: Tensor, *arguments):
        *tensors, shape, plan, p, seed = arguments
        weights = weights_of_pass(STUWeights(*tensors), shape, x_TE.dtype)
        ctx.types = [w.dtype for w in tensors]

        x_RE = x_TE.index_select(0, index)
        keep_slope = "uvqk" not in shape.recompute
        projected = launch_project_rows(x_TE, x_RE, weights, shape, keep_slope)
        a = attention_of_rows(projected, plan, index)
        u, _ = projected.split_queries(projected.uq)
        keep_y = "y" not in shape.recompute
        out, y = launch_output(x_RE, a, u, weights, shape, p, seed, keep_y=keep_y)

        kept = [None] * 4
        if keep_slope:
            kept = [projected.uq, projected.kv, projected.slope_q, projected.slope_kv]
        ctx.save_for_backward(x_TE, index, a, y, *kept, *weights)
        ctx.rest = shape, plan, p, seed
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        shape, plan, p, seed = ctx.rest
        x, index, a, y, *made, norm_w, norm_b, uvqk_w, uvqk_b, gate_w, gate_b, out_w, out_b = (
            ctx.saved_tensors
        )
        weights = STUWeights(norm_w, norm_b, uvqk_w, uvqk_b, gate_w, gate_b, out_w, out_b)
        dtype, grad = x.dtype, grad.to(x.dtype).contiguous()
        x_rows = x.index_select(0, index)
        uq, kv, slope_q, slope_kv = made
        if uq is None:  # to be made again
            projected = launch_project_rows(x, x_rows, weights, shape, keep_slope=True)
        else:
            projected = RowProjected(uq, kv, slope_q, slope_kv, shape)
        normed, _, _ = launch_layer_norm(x, norm_w, norm_b, shape.norm_eps, dtype)
        assert normed is not None

        # f2, and the gate
        d_uq, d_kv = torch.empty_like(projected.uq), torch.empty_like(projected.kv)
        du, dq = projected.split_queries(d_uq)
        d_y = grad @ out_w.to(dtype)
        u, _ = projected.split_queries(projected.uq)
        da, y_again, d_gate_w, d_gate_b, sum_u = launch_norm_gate_backward(
            d_y, a, u, gate_w, gate_b, du, eps=shape.norm_eps, concat_ua=shape.concat_ua, p=p,
            seed=seed, out=y is None,
        )  # fmt: skip
        d_out_w = grad.T @ (y_again if y is None else y)

        dq_rows, sum_kv = attention_backward_rows(projected, plan, index, da, d_kv)
        dq.copy_(dq_rows)
        sum_q = dq_rows.sum(0, dtype=torch.float32)

        # f1: its gradient of all rows, then what the rows that ask add
        of_rows = d_uq.shape[1]
        w = uvqk_w.to(dtype)
        d_normed = d_kv @ w[of_rows:]
        d_asking = d_normed.index_select(0, index) + d_uq @ w[:of_rows]
        _put_rows(d_normed, index, d_asking)
        d_uvqk_w = torch.cat([d_uq.T @ normed.index_select(0, index), d_kv.T @ normed])
        d_uvqk_b = torch.cat([sum_u, sum_q, sum_kv])

        # the norm, and the residual
        around = torch.zeros_like(x)
        _put_rows(around, index, grad)
        dx, d_norm_w, d_norm_b, d_out_b = launch_layer_norm_backward(
            d_normed, x, around, norm_w, shape.norm_eps
        )
        grads = d_norm_w, d_norm_b, d_uvqk_w, d_uvqk_b, d_gate_w, d_gate_b, d_out_w, d_out_b
        cast = [g.to(dtype) for g, dtype in zip(grads, ctx.types, strict=True)]
        return dx, None, *cast, None, None, None, None
