"""Position and time added to tokens, the op: checks and the choice of backend.

tokens [T, E] + a position and a gap each → `add_position_time` → [T, E]

A third table, made by the caller in this step, may be added in the same pass.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend, require
from kernels.position_time.reference import BUCKETS, position_time_reference
from kernels.position_time.types import Anchor

FLOATS = torch.float16, torch.bfloat16, torch.float32


def add_position_time(
    x_TE: Tensor,
    position_PE: Tensor,
    time_BE: Tensor,
    position_T: Tensor,
    gap_ms_T: Tensor,
    *,
    anchor: Anchor = "event",
    third: tuple[Tensor, Tensor] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """x + position table[position modulo P] + time table[bucket of the gap] [T, E], in x's type.

    `position_T` int [T]; `gap_ms_T` int64 [T] in ms, -1 for none. `anchor` says how a gap falls
    into one of B buckets: "event" by its logarithm, "query" by its square root
    (`reference.BUCKETS`). `third`: a table [N, E] whose rows are added too, and int [T] in 0..N - 1
    the row of each token. Gradients of the two tables are sparse and may name a row several times,
    the third's is dense. With Triton the sum is rounded once, gradients are added by row, in an
    order that the rows alone decide, and the host never waits for the device.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    shapes = (
        x_TE.dim() == position_PE.dim() == time_BE.dim() == 2
        and position_PE.shape[1] == time_BE.shape[1]
    )
    shown = f"{tuple(x_TE.shape)}, {tuple(position_PE.shape)} and {tuple(time_BE.shape)}"

    fits = (
        shapes
        and x_TE.shape[1] == position_PE.shape[1]
        and len(position_PE) >= 1
        and len(time_BE) >= 2
    )
    require(fits, f"x must be [T, E] and the tables [P, E] and [2 or more, E], got {shown}")
    placed = position_T.shape == gap_ms_T.shape == x_TE.shape[:1]
    shown = f"{tuple(position_T.shape)} and {tuple(gap_ms_T.shape)}"
    require(placed, f"position and gap_ms must be [{len(x_TE)}], one per token, got {shown}")
    require(anchor in BUCKETS, f"anchor must be one of {', '.join(BUCKETS)}, got {anchor!r}")

    third_NE, third_T = third or (None, None)
    if third_NE is not None and third_T is not None:
        fits = third_NE.shape[1:] == x_TE.shape[1:] and third_T.shape == x_TE.shape[:1]
        shown = f"{tuple(third_NE.shape)} and {tuple(third_T.shape)}"
        require(fits, f"third must be [N, {x_TE.shape[1]}] and [{len(x_TE)}], got {shown}")

    if choose_backend(backend, x_TE) != "triton":
        out = position_time_reference(x_TE, position_PE, time_BE, position_T, gap_ms_T, anchor)
        if third_NE is None or third_T is None:
            return out
        return out + third_NE.to(out.dtype).index_select(0, third_T)
    from kernels.position_time.triton_launch import AddPositionTime, find_rows, launch_add

    require(
        x_TE.dtype in FLOATS,
        f"the triton backend takes float16, bfloat16 and float32, got {x_TE.dtype}",
    )
    tables = [position_PE, time_BE]
    whole = position_PE.is_contiguous() and time_BE.is_contiguous()
    require(whole, "the triton backend needs contiguous tables")
    if third_NE is not None and third_T is not None:
        tables.append(third_NE.contiguous())
        third_T = third_T.contiguous()

    x_TE = x_TE.contiguous()
    places = position_T.contiguous(), gap_ms_T.contiguous(), third_T
    if torch.is_grad_enabled():
        return AddPositionTime.apply(x_TE, *places, anchor, *tables)
    found = find_rows(*places, tuple(map(len, tables)), anchor)
    return launch_add(x_TE, tuple(tables), found)
