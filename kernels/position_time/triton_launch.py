"""Launches of the position and time kernels, and their autograd function."""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.position_time import triton_kernels
from kernels.position_time.types import Anchor

# PyTorch 2.11 says so once of every process, although the one sparse tensor made here opts out.
warnings.filterwarnings("ignore", message="Sparse invariant checks are implicitly disabled")

TILE = 2048  # numbers that a program of the forward kernel holds: 16 a thread
FOUND = 256  # tokens whose keys a program finds
# Places of sorted keys that a program sums, and columns, by the bytes of a number. Half as many
# places as Hopper's widest products take leave a program 59 registers instead of 168, and so more
# programs to wait for rows at a time. float32 has no tensor cores here.
SUMMED = {2: (32, 128), 4: (32, 64)}
PARTIAL = 32  # partial sums read at a time
NAMED = 16  # rows of the tables that a program names


@dataclass(frozen=True, slots=True)
class TableRows:
    """Which row of each table a token has: the keys, int [tables, T], and the tables' rows.

    Rows count through the tables, one after another:

        tables      position 3 rows, time 2        keys of a token    1 and 3 + 0
    """

    keys: Tensor
    sizes: tuple[int, ...]


def find_rows(
    position_T: Tensor,
    gap_ms_T: Tensor,
    third_T: Tensor | None,
    sizes: tuple[int, ...],
    anchor: Anchor,
) -> TableRows:
    """The rows of tokens in the position table, the time table and, with `third_T`, a third."""
    num_rows, device = len(position_T), position_T.device
    # the fewer bits the fewer passes of the sort in backward
    kind = torch.int16 if sum(sizes) < 2**15 else torch.int32
    keys = torch.empty(len(sizes), num_rows, dtype=kind, device=device)
    if num_rows:
        launch(
            triton_kernels.find_keys, cdiv(num_rows, FOUND),
            (position_T, gap_ms_T, third_T, keys), (num_rows,), sizes[:2],
            (FOUND, anchor == "event", third_T is not None), device=device, num_warps=4,
        )  # fmt: skip
    return TableRows(keys, sizes)


def launch_add(x_TE: Tensor, tables: tuple[Tensor, ...], found: TableRows) -> Tensor:
    """x and its rows of the tables, added in float32 and rounded once."""
    num_rows, width = x_TE.shape
    out = torch.empty(num_rows, width, dtype=x_TE.dtype, device=x_TE.device)
    if num_rows:
        block = max(16, next_power_of_2(width))
        rows = max(TILE // block, 1)
        position, time, *third = tables

        launch(
            triton_kernels.add_rows, cdiv(num_rows, rows),
            (x_TE, found.keys, position, time, third[0] if third else None, out), (num_rows,),
            (width, x_TE.stride(0), *found.sizes[:2]), (rows, block, bool(third)),
            device=x_TE.device, num_warps=4,
        )  # fmt: skip
    return out


def launch_table_gradients(grad_TE: Tensor, found: TableRows) -> tuple[Tensor, Tensor]:
    """To which row of its table each sum belongs, int64 [K] of K rows of all tables, and sums of
    the gradient's rows, float32 [K, E].

    Rows that no token has are zero and belong to a row that has tokens. Two runs agree bit for bit.
    """
    num_rows, width = grad_TE.shape
    num_keys, device = sum(found.sizes), grad_TE.device
    num_places = found.keys.numel()

    keys, order = torch.sort(found.keys.flatten(), stable=True)
    chunk, columns = SUMMED[grad_TE.element_size()]
    block = min(columns, max(16, next_power_of_2(width)))
    blocks, chunks = cdiv(width, block), cdiv(num_places, chunk)

    ids = torch.empty(num_keys, dtype=torch.int64, device=device)
    sums = torch.empty(num_keys, width, dtype=torch.float32, device=device)
    partial = torch.empty(chunks, 2, width, dtype=torch.float32, device=device)

    launch(
        triton_kernels.name_rows, cdiv(num_keys, NAMED), (keys, ids, sums),
        (num_rows, num_rows.bit_length()), (width, *found.sizes[:2], num_keys), (NAMED, block),
        device=device, num_warps=4,
    )  # fmt: skip

    launch(
        triton_kernels.sum_runs, chunks * blocks, (keys, order, grad_TE, sums, partial),
        (num_rows, num_places), (width, grad_TE.stride(0)), (chunk, block),
        device=device, num_warps=4,
    )  # fmt: skip

    launch(
        triton_kernels.finish_runs, chunks * blocks, (keys, partial, sums), (num_places,), (width,),
        (chunk, PARTIAL, block), device=device, num_warps=4,
    )  # fmt: skip

    return ids, sums


class AddPositionTime(torch.autograd.Function):
    """Of (x, position, gap, rows of a third table or None, anchor, and two or three tables)."""

    @staticmethod
    def forward(ctx, x_TE, position_T, gap_ms_T, third_T, anchor, *tables):
        sizes = tuple(len(table) for table in tables)
        found = find_rows(position_T, gap_ms_T, third_T, sizes, anchor)
        ctx.found = found if any(ctx.needs_input_grad[5:]) else None
        ctx.tables = [(table.shape, table.dtype) for table in tables]
        return launch_add(x_TE, tables, found)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        found = ctx.found
        if found is None:
            return grad, None, None, None, None, *[None for _ in ctx.tables]

        rows = grad if grad.stride(1) == 1 else grad.contiguous()
        num_rows, sizes = len(rows), found.sizes
        # summing would give more rows, not fewer
        by_token = num_rows == 0 or (num_rows < sum(sizes) and len(sizes) == 2)
        if by_token:
            positions, times, *_ = found.keys.long()
            parts = [(positions, rows.float()), (times - sizes[0], rows.float())]
        else:
            ids, sums = launch_table_gradients(rows, found)
            parts = list(zip(ids.split(sizes), sums.split(sizes), strict=True))

        tables = []
        for (shape, dtype), (of_rows, values) in zip(ctx.tables[:2], parts[:2], strict=True):
            # With the check of its rows the host would wait for the device.
            gradient = torch.sparse_coo_tensor(
                of_rows[None], values.to(dtype), shape, check_invariants=False
            )
            tables.append(gradient)

        if len(sizes) == 3:  # of no parameter, but of what was made in this step
            shape, dtype = ctx.tables[2]
            third = rows.new_zeros(shape) if by_token else parts[2][1]
            tables.append(third.to(dtype))
        return grad, None, None, None, None, *tables
