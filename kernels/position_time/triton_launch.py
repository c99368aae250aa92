"""Launches of the position and time kernels, and their autograd function."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.position_time import triton_kernels
from kernels.position_time.types import Anchor

TILE = 2048  # numbers that a program of the forward kernel holds: 16 a thread
# Places of sorted keys that a program sums, and columns, by the bytes of a number: float32 has no
# tensor cores here.
SUMMED = {2: (64, 128), 4: (32, 64)}
PARTIAL = 32  # partial sums read at a time
NAMED = 16  # rows of the tables that a program names


def launch_add(
    x_TE: Tensor, position_PE: Tensor, time_BE: Tensor, position_T: Tensor, gap_ms_T: Tensor,
    anchor: Anchor, keep_keys: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """As `reference.position_time_reference`, its sums in float32; and each token's keys [2, T],
    for backward.
    """
    num_rows, width = x_TE.shape
    tables = len(position_PE), len(time_BE)
    out = torch.empty(num_rows, width, dtype=x_TE.dtype, device=x_TE.device)
    keys = None
    if keep_keys:  # the fewer bits the fewer passes of the sort
        kind = torch.int16 if sum(tables) < 2**15 else torch.int32
        keys = torch.empty(2, num_rows, dtype=kind, device=x_TE.device)

    if num_rows:
        block = max(16, next_power_of_2(width))
        rows = max(TILE // block, 1)

        launch(
            triton_kernels.add_forward, cdiv(num_rows, rows),
            (x_TE, position_PE, time_BE, position_T, gap_ms_T, out, keys), (num_rows,),
            (width, x_TE.stride(0), *tables), (rows, block, anchor == "event", keep_keys),
            device=x_TE.device, num_warps=4,
        )  # fmt: skip
    return out, keys


def launch_table_gradients(
    grad_TE: Tensor, keys: Tensor, num_positions: int, num_buckets: int
) -> tuple[Tensor, Tensor]:
    """To which row of its table each sum belongs, int64 [P + B], and sums of the gradient's rows,
    float32 [P + B, E].

    Rows that no token has are zero and belong to a row that has tokens. Two runs agree bit for bit.
    """
    num_rows, width = grad_TE.shape
    num_keys, device = num_positions + num_buckets, grad_TE.device

    keys, order = torch.sort(keys.flatten(), stable=True)
    chunk, columns = SUMMED[grad_TE.element_size()]
    block = min(columns, max(16, next_power_of_2(width)))
    blocks, chunks = cdiv(width, block), cdiv(2 * num_rows, chunk)

    ids = torch.empty(num_keys, dtype=torch.int64, device=device)
    sums = torch.empty(num_keys, width, dtype=torch.float32, device=device)
    partial = torch.empty(chunks, 2, width, dtype=torch.float32, device=device)

    launch(
        triton_kernels.name_rows, cdiv(num_keys, NAMED), (keys, ids, sums),
        (num_rows, num_rows.bit_length()), (width, num_positions, num_keys), (NAMED, block),
        device=device, num_warps=4,
    )  # fmt: skip

    launch(
        triton_kernels.sum_runs, chunks * blocks, (keys, order, grad_TE, sums, partial),
        (num_rows,), (width, grad_TE.stride(0)), (chunk, block), device=device, num_warps=4,
    )  # fmt: skip

    launch(
        triton_kernels.finish_runs, chunks * blocks, (keys, partial, sums), (num_rows,), (width,),
        (chunk, PARTIAL, block), device=device, num_warps=4,
    )  # fmt: skip

    return ids, sums


class AddPositionTime(torch.autograd.Function):
    """Of (x, position table, time table, position, gap, anchor)."""

    @staticmethod
    def forward(ctx, x_TE, position_PE, time_BE, position_T, gap_ms_T, anchor):
        of_tables = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        out, keys = launch_add(
            x_TE, position_PE, time_BE, position_T, gap_ms_T, anchor, keep_keys=of_tables
        )
        ctx.keys, ctx.tables = (
            keys,
            tuple((table.shape, table.dtype) for table in (position_PE, time_BE)),
        )
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.keys is None:
            return grad, None, None, None, None, None
        shapes = [shape for shape, _ in ctx.tables]
        sizes = [shape[0] for shape in shapes]
        rows = grad if grad.stride(1) == 1 else grad.contiguous()
        if len(rows) < sum(sizes):  # summing would give more rows, not fewer
            positions, times = ctx.keys.long()
            parts = [(positions, rows.float()), (times - sizes[0], rows.float())]
        else:
            ids, sums = launch_table_gradients(rows, ctx.keys, *sizes)
            parts = list(zip(ids.split(sizes), sums.split(sizes), strict=True))

        tables = []
        for (of_rows, values), (shape, dtype) in zip(parts, ctx.tables, strict=True):
            # With the check of its rows the host would wait for the device.
            gradient = torch.sparse_coo_tensor(
                of_rows[None], values.to(dtype), shape, check_invariants=False
            )
            tables.append(gradient)

        return grad, *tables, None, None, None
