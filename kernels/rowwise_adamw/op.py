"""Row-wise AdamW, the op: one step of the rows of a table that have a gradient, in place."""

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend, require
from kernels.rowwise_adamw.reference import rows_and_sums, rowwise_adamw_reference
from kernels.rowwise_adamw.types import Hyper


@torch.no_grad()
def rowwise_adamw(
    weight: Tensor,
    m: Tensor | None,
    v: Tensor,
    ids: Tensor,
    grads: Tensor,
    hyper: Hyper,
    *,
    grad_scale: Tensor | None = None,
    first_row: int = 0,
    backend: Backend = "auto",
) -> None:
    """Update rows `ids` [n] of `weight` [R, d], which may repeat: their gradients [n, d] are added,
    in the order given.
    `m` [R, d] is None where β1 = 0; `v` [R]. The table may be bfloat16, its moments float32.
    `grad_scale`, one number on the device, divides the summed gradients; where it is infinite, the
    step is left out. `first_row`: where `weight` is a block of a
    larger table, the number of its first row there, so that bfloat16 rows are rounded alike however
    the table is cut. Two runs agree bit for bit. Triton never waits for
    the device, and takes moments in pinned memory of the host too; plain PyTorch counts the
    distinct rows on the host.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    _check(weight, m, v, ids, grads, hyper)
    if choose_backend(backend, weight) == "triton":
        from kernels.rowwise_adamw.triton_launch import rowwise_adamw_triton

        require(
            v.dtype == torch.float32, f"the triton backend keeps moments in float32, got {v.dtype}"
        )

        whole = all(x is None or x.is_contiguous() for x in (weight, m, v))
        require(whole, "the table and its moments must be contiguous")
        scale = (
            weight.new_ones((), dtype=torch.float32) if grad_scale is None else grad_scale.float()
        )
        rowwise_adamw_triton(weight, m, v, ids, grads, scale, hyper, first_row)
        return
    if grad_scale is not None and grad_scale.isinf():
        return

    rows, sums = rows_and_sums(ids, grads)
    scaled = sums if grad_scale is None else sums / grad_scale
    rowwise_adamw_reference(weight, m, v, rows, scaled, hyper, first_row)


def _check(
    weight: Tensor, m: Tensor | None, v: Tensor, ids: Tensor, grads: Tensor, hyper: Hyper
) -> None:
    num_rows, dim = weight.shape
    require(
        grads.shape == (len(ids), dim),
        f"grads must be [{len(ids)}, {dim}], got {tuple(grads.shape)}",
    )
    require(m is None or m.shape == weight.shape, "m must be as the table, or None where β1 = 0")
    require(
        (m is None) == (hyper.betas[0] == 0),
        f"m is there where β1 is not 0, got betas {hyper.betas}",
    )
    require(v.shape == (num_rows,), f"v must be [{num_rows}], one per row, got {tuple(v.shape)}")

    kept = all(
        x is None or x.dtype == torch.promote_types(weight.dtype, torch.float32) for x in (m, v)
    )
    require(
        kept,
        f"moments must be float32 (float64 for such a table), got {v.dtype} for {weight.dtype}",
    )
