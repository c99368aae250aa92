"""The STU layer on CUDA where only some rows are read after it: the last layer's candidates, or
what truncation keeps. Keys and values are made of all rows, the rest of these.

    x of all rows ─norm, f1→ K, V ───┐
    x of the rows ─norm, f1→ U, Q ─attention over K, V→ A ─norm, gate, dropout→ Y ─f2 + x→ out

Attention's kernels find rows by their places among all. They are launched over those tiles in which
a row asks; what other rows of Q and A hold is never read.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.layer_norm.triton_launch import launch_layer_norm
from kernels.linear.triton_launch import launch_linear
from kernels.linear.weights import cast_weight, quantized_weight
from kernels.semi_local_attention import triton_launch as attention
from kernels.semi_local_attention.plan import TritonPlan
from kernels.stu.triton_launch import launch_output
from kernels.stu.types import STUShape, STUWeights


@dataclass(frozen=True, slots=True)
class Outputs:
    """Some of f1's outputs: U and Q, or K and V."""

    begin: int
    end: int
    silu_from: int | None  # of them, the first that is activated


def of_queries(shape: STUShape) -> Outputs:
    """U, activated by the gate, and Q."""
    width_u, width_q = shape.uvqk_widths[:2]
    return Outputs(0, width_u + width_q, width_u if shape.silu_qkv else None)


def of_keys(shape: STUShape) -> Outputs:
    """K and V."""
    widths = shape.uvqk_widths
    return Outputs(widths[0] + widths[1], sum(widths), 0 if shape.silu_qkv else None)


def launch_outputs(x_TE: Tensor, weights: STUWeights, shape: STUShape, outputs: Outputs) -> Tensor:
    """Some of f1's outputs [T, end - begin] of the normalised x."""
    dtype, place = x_TE.dtype, slice(outputs.begin, outputs.end)
    norm = weights.norm_weight, weights.norm_bias, shape.norm_eps, dtype
    normed, codes, scale = launch_layer_norm(x_TE, *norm, out=not shape.fp8, fp8=shape.fp8)
    bias = weights.uvqk_bias[place]

    # the whole weight is kept in its small type, not a part of it
    if codes is not None and scale is not None:
        w, w_scale = quantized_weight(weights.uvqk_weight)
        scales = scale, w_scale[place]
        out, _ = launch_linear(
            codes, w[place], bias, silu_from=outputs.silu_from, scales=scales, dtype=dtype
        )
    else:
        assert normed is not None
        w = cast_weight(weights.uvqk_weight, dtype)
        out, _ = launch_linear(normed, w[place], bias, silu_from=outputs.silu_from, dtype=dtype)
    return out


def launch_layer_rows(
    x_TE: Tensor,
    index: Tensor,
    weights: STUWeights,
    shape: STUShape,
    plan: TritonPlan,
    p: float,
    seed: Tensor | None,
) -> Tensor:
    """The layer's output [R, E] of the rows `index`, int64 [R], which `plan` knows; nothing is
    recorded.
    """
    num_tokens, heads = len(x_TE), shape.num_heads
    kv = launch_outputs(x_TE, weights, shape, of_keys(shape))
    k, v = kv.split_with_sizes(shape.uvqk_widths[2:], dim=1)

    x_RE = x_TE.index_select(0, index)
    uq = launch_outputs(x_RE, weights, shape, of_queries(shape))
    u, q_rows = uq.split_with_sizes(shape.uvqk_widths[:2], dim=1)
    q = torch.empty(num_tokens, q_rows.shape[1], dtype=q_rows.dtype, device=q_rows.device)
    q.index_copy_(0, index, q_rows)

    qkv = [part.unflatten(1, (heads, -1)) for part in (q, k, v)]
    scale = shape.attn_alpha, shape.scaling_seq_len
    out_dtype = shape.attended_dtype(x_TE.dtype)
    problem, operands = attention.find_problem(tuple(qkv), plan, *scale, out_dtype=out_dtype)
    a = attention.launch_forward(plan, problem, operands)
    a_rows = a.index_select(0, index)[..., : shape.d_v].flatten(1)
    return launch_output(x_RE, a_rows, u, weights, shape, p, seed, keep_y=False)[0]
