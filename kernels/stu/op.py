"""One STU layer, the op: checks and the choice of backend.

    x [T, E] + weights + the batch's mask → `stu_layer` → [T, E]

Which code runs, with `backend` "auto":

    tensors                  in `stu_layer`                 in `project_uvqk`, `gated_output`
    CUDA, half precision     fused kernels, own backward    fused kernels; PyTorch to train
    CUDA, float32            PyTorch, Triton's attention    PyTorch
    CPU                      PyTorch, blocked attention     PyTorch
"""

from functools import lru_cache

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend, require
from kernels.semi_local_attention.op import semi_local_attention, triton_plan
from kernels.semi_local_attention.types import QueryRows, RelativeBias
from kernels.stu.recompute import RECOMPUTABLE
from kernels.stu.reference import (
    output_reference,
    project_reference,
    project_rows_reference,
)
from kernels.stu.types import Sequences, STUShape, STUWeights


def stu_layer(
    x_TE: Tensor,
    weights: STUWeights,
    shape: STUShape,
    sequences: Sequences,
    *,
    p: float = 0.0,
    seed: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The layer's output [T, E].

    Dropout `p` on what the output layer reads; `seed`, in 0..2**31 - 1, fixes its mask, the same on
    every backend, and None draws one, on a GPU there. `"auto"` is, in half precision on CUDA, the
    fused Triton kernels, and otherwise PyTorch around `semi_local_attention`. Fused under autocast,
    the output has autocast's type: the residual stream is in half precision. `"triton"` and
    `"torch"` say which attention that is, `"reference"` is dense.

    Raises:
        ValueError: on shapes and types that do not fit, FP8 on a GPU without it.
    """
    if is_fused(x_TE, shape, backend):
        # where Triton is not installed, CPUs still work
        from kernels.stu.triton_launch import FusedLayer, launch_layer

        _check(x_TE.shape, tuple([w.shape for w in weights]), shape, p)
        require(
            max(shape.d_qk, shape.d_v) <= 256,
            f"heads must be at most 256 wide, got {shape.d_qk} and {shape.d_v}",
        )
        mask = shape.window, shape.full_rows, shape.prefix
        rows = sequences.seq_offsets, sequences.max_seq_len, sequences.mask_tensors
        plan = triton_plan(len(x_TE), *rows, *mask)
        x_TE = x_TE.to(_compute_dtype(x_TE)).contiguous()
        drawn = _seed_tensor(p, seed, x_TE.device)
        if torch.is_grad_enabled():
            return FusedLayer.apply(x_TE, *weights, shape, plan, p, drawn)
        return launch_layer(x_TE, weights, shape, plan, p, drawn)

    u, q, k, v = project_uvqk(x_TE, weights, shape, backend=backend)
    a = attend_rows(q, k, v, shape, sequences, backend=backend)
    return gated_output(x_TE, u, a, weights, shape, p=p, seed=seed, backend=backend)


def makes_rows(x_TE: Tensor, shape: STUShape, backend: Backend, *, biased: bool) -> bool:
    """True where `stu_layer_rows` makes some rows alone: on a CPU the blocked form, on a GPU the
    fused kernels, which know no bias.
    """
    if is_fused(x_TE, shape, backend):
        return not biased
    return not x_TE.is_cuda and backend in ("auto", "torch")


def stu_layer_rows(
    x_TE: Tensor,
    weights: STUWeights,
    shape: STUShape,
    sequences: Sequences,
    rows: QueryRows,
    *,
    bias: RelativeBias | None = None,
    p: float = 0.0,
    backend: Backend = "auto",
) -> Tensor:
    """The output [R, E] of some rows alone, where `makes_rows`: K and V are made of all rows, the
    rest of these. Dropout draws for these rows only.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    _check(x_TE.shape, tuple([w.shape for w in weights]), shape, p)
    if is_fused(x_TE, shape, backend):
        if not torch.is_grad_enabled():
            return stu_rows_and_keys(x_TE, weights, shape, sequences, rows, p=p)[0]
        from kernels.stu.row_launch import FusedRows

        plan = _plan_of_rows(len(x_TE), shape, sequences, rows)
        x_TE = x_TE.to(_compute_dtype(x_TE)).contiguous()
        drawn = _seed_tensor(p, None, x_TE.device)
        return FusedRows.apply(x_TE, rows.index, *weights, shape, plan, p, drawn)

    u, q, k, v = project_rows_reference(x_TE, weights, shape, rows.index)
    a = attend_rows(q, k, v, shape, sequences, bias=bias, query_rows=rows, backend="torch")
    return output_reference(x_TE.index_select(0, rows.index), u, a, weights, shape, p)


def stu_rows_and_keys(
    x_TE: Tensor,
    weights: STUWeights,
    shape: STUShape,
    sequences: Sequences,
    rows: QueryRows,
    *,
    p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The output [R, E] of some rows alone, and K [T, H, D] and V [T, H, V] of all; by the fused
    kernels (`is_fused`), where nothing is recorded.
    """
    from kernels.stu.row_launch import launch_layer_rows

    plan = _plan_of_rows(len(x_TE), shape, sequences, rows)
    x_TE = x_TE.to(_compute_dtype(x_TE)).contiguous()
    drawn = _seed_tensor(p, None, x_TE.device)
    return launch_layer_rows(x_TE, rows.index, weights, shape, plan, p, drawn)


def _plan_of_rows(num_tokens: int, shape: STUShape, sequences: Sequences, rows: QueryRows):
    mask = shape.window, shape.full_rows, shape.prefix
    where = sequences.seq_offsets, sequences.max_seq_len, sequences.mask_tensors
    return triton_plan(num_tokens, *where, *mask, rows)


def project_uvqk(
    x_TE: Tensor, weights: STUWeights, shape: STUShape, *, backend: Backend = "auto"
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U [T, H V] as `gated_output` takes it, Q and K [T, H, D], V [T, H, V].

    No row needs another, as in `gated_output`.

    The fused kernels are for inference: where gradients are recorded, only `stu_layer` has them.
    """
    _check(x_TE.shape, tuple(w.shape for w in weights), shape, 0.0)
    if torch.is_grad_enabled() or not is_fused(x_TE, shape, backend):
        return project_reference(x_TE, weights, shape)

    from kernels.stu.triton_launch import launch_frozen_project

    x_TE = x_TE.to(_compute_dtype(x_TE)).contiguous()
    projected = launch_frozen_project(x_TE, weights, shape)
    u, q, k, v = projected.split_parts(projected.uvqk)
    return u, q, k, v


def attend_rows(
    q_THD: Tensor,
    k_THD: Tensor,
    v_THV: Tensor,
    shape: STUShape,
    sequences: Sequences,
    *,
    bias: RelativeBias | None = None,
    query_rows: QueryRows | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """A [T, H, V], or [R, H, V] of `query_rows`."""
    return semi_local_attention(
        q_THD,
        k_THD,
        v_THV,
        sequences.seq_offsets,
        max_seq_len=sequences.max_seq_len,
        num_targets=sequences.num_targets,
        target_visible=sequences.target_visible,
        target_from=sequences.target_from,
        extra_full_rows=sequences.extra_full_rows,
        window=shape.window,
        full_rows=shape.full_rows,
        prefix=shape.prefix,
        bias=bias,
        query_rows=query_rows,
        attn_alpha=shape.attn_alpha,
        scaling_seq_len=shape.scaling_seq_len,
        out_dtype=shape.attended_dtype(q_THD.dtype),
        backend=backend,
    )


def gated_output(
    x_TE: Tensor,
    u_TE: Tensor,
    a_THV: Tensor,
    weights: STUWeights,
    shape: STUShape,
    *,
    p: float = 0.0,
    seed: int | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The layer's output [T, E] from its input, the U of `project_uvqk` and A."""
    _check(x_TE.shape, tuple(w.shape for w in weights), shape, p)
    if torch.is_grad_enabled() or not is_fused(x_TE, shape, backend):
        return output_reference(x_TE, u_TE, a_THV, weights, shape, p, seed)

    from kernels.stu.triton_launch import launch_output

    x_TE = x_TE.to(_compute_dtype(x_TE)).contiguous()
    drawn = _seed_tensor(p, seed, x_TE.device)
    return launch_output(x_TE, a_THV.flatten(1), u_TE, weights, shape, p, drawn, keep_y=False)[0]


def is_fused(x_TE: Tensor, shape: STUShape, backend: Backend) -> bool:
    """True where the fused kernels take this.

    On a GPU float32 is left to PyTorch, whose products are faster there.
    """
    half = _compute_dtype(x_TE).itemsize == 2 or not x_TE.is_cuda
    fused = choose_backend(backend, x_TE) == "triton" and half and len(x_TE) > 0
    if fused and shape.fp8 and x_TE.is_cuda:
        name = torch.cuda.get_device_name(x_TE.device)
        capability = torch.cuda.get_device_capability(x_TE.device)
        require(capability >= (8, 9), f"FP8 needs compute capability 8.9, {name} has {capability}")
    return fused


def _compute_dtype(x_TE: Tensor) -> torch.dtype:
    device = x_TE.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x_TE.dtype


def _seed_tensor(p: float, seed: int | None, device: torch.device) -> Tensor | None:
    """int64 [1] on the device, where kernels read it: a CUDA graph draws another at each replay."""
    if p == 0:
        return None
    if seed is None:
        return torch.randint(2**31, (1,), device=device)
    return torch.full((1,), seed, device=device)


@lru_cache(1024)  # a model asks the same of every layer
def _check(x: torch.Size, weights: tuple[torch.Size, ...], shape: STUShape, p: float) -> None:
    require(len(x) == 2, f"x must be [T, E], got {tuple(x)}")
    width, projected, attended = x[1], sum(shape.uvqk_widths), shape.uvqk_widths[0]
    gated = attended * (3 if shape.concat_ua else 1)
    norm, uvqk = ((width,), (width,)), ((projected, width), (projected,))
    norm_attn, out = ((attended,), (attended,)), ((width, gated), (width,))
    sizes = *norm, *uvqk, *norm_attn, *out

    for name, size, expected in zip(STUWeights._fields, weights, sizes, strict=True):
        require(size == expected, f"{name} must be {expected}, got {tuple(size)}")

    require(0 <= p < 1, f"p must be in [0, 1), got {p}")
    unknown = set(shape.recompute) - set(RECOMPUTABLE)
    require(not unknown, f"recompute may name {RECOMPUTABLE}, got {sorted(unknown)}")
