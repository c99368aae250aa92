"""Semi-local attention on Triton as PyTorch sees it: an autograd function, and cached attention."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.semi_local_attention.plan import TritonPlan
from kernels.semi_local_attention.triton_bias_inputs import BiasInputs, spread_bias
from kernels.semi_local_attention.triton_launch import (
    AttentionProblem,
    find_problem,
    launch_backward_bias,
    launch_backward_keys,
    launch_backward_queries,
    launch_forward,
    launch_forward_cached,
)
from kernels.semi_local_attention.types import RelativeBias


class TritonAttention(torch.autograd.Function):
    """Attention of (q, k, v, position table, time table, plan, problem, bias inputs)."""

    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        position_table,
        time_table,
        plan: TritonPlan,
        problem: AttentionProblem,
        bias: BiasInputs | None,
    ):
        ctx.save_for_backward(q, k, v)
        ctx.plan, ctx.problem, ctx.bias = plan, problem, bias
        return launch_forward(plan, problem, (q, k, v), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        plan, problem, bias = ctx.plan, ctx.problem, ctx.bias
        q, k, v = ctx.saved_tensors
        grad = grad.to(q.dtype).contiguous()
        operands = q, k, v, grad if grad.data_ptr() % 16 == 0 else grad.clone()

        dq, dk, dv = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v)]
        launch_backward_queries(plan, problem, operands, dq, bias)
        launch_backward_keys(plan, problem, operands, dk, dv, bias)

        d_position = d_time = None
        if bias is not None:
            d_position, d_time = launch_backward_bias(plan, problem, operands, dq, bias)
        return dq, dk, dv, d_position, d_time, None, None, None


def semi_local_attention_triton(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    plan: TritonPlan,
    *,
    bias: RelativeBias | None,
    attn_alpha: float,
    scaling_seq_len: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `reference.semi_local_attention_reference`; the sums are float32 until they are stored."""
    if plan.num_tokens == 0:
        return v_THV.new_empty(v_THV.shape, dtype=out_dtype)

    inputs, tables, learned = None, None, (None, None)
    if bias is not None:
        inputs = spread_bias(bias, plan.max_seq_len)
        tables = len(bias.position_table), len(bias.time_table)
        learned = bias.position_table, bias.time_table
    problem, operands = find_problem(
        (q_THD, k_THD, v_THV), plan, attn_alpha, scaling_seq_len, tables, out_dtype
    )

    if torch.is_grad_enabled():
        out = TritonAttention.apply(*operands, *learned, plan, problem, inputs)
    else:
        out = launch_forward(plan, problem, operands, inputs)
    return out if out.shape[2] == v_THV.shape[2] else out[..., : v_THV.shape[2]]


def cached_attention_triton(
    q: Tensor,
    own_k: Tensor,
    own_v: Tensor,
    k: Tensor,
    v: Tensor,
    plan: TritonPlan,
    *,
    attn_alpha: float,
    scaling_seq_len: int,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As `reference.cached_attention_reference`, forward only."""
    if plan.num_tokens == 0:
        return own_v.new_empty(own_v.shape, dtype=out_dtype)
    if len(k) == 0:  # no user has a cache: a descriptor needs a row
        k, v = own_k, own_v

    problem, operands = find_problem(
        (q, k, v, own_k, own_v), plan, attn_alpha, scaling_seq_len, out_dtype=out_dtype
    )
    out = launch_forward_cached(plan, problem, operands)
    return out[..., : own_v.shape[2]]
