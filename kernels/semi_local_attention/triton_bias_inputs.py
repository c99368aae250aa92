"""A relative bias as the attention kernels read it, and the scale of its gradients' sums."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.semi_local_attention import triton_bias
from kernels.semi_local_attention.types import (
    LOG_BUCKET,
    RelativeBias,
    time_bucket,
    whole_seconds,
)

CELLS = triton_bias.CELLS.value
SPREAD = 512  # entries of both tables that a program spreads
LARGEST_OF = 16_384  # numbers that a program of `largest_numbers` reads


@dataclass(frozen=True, slots=True)
class BiasInputs:
    """A `RelativeBias`, spread for look-ups by `spread_bias`."""

    positions: Tensor  # float32 [2 reach + 1]: half the entry of distance i - reach
    cells: Tensor  # int32 [CELLS, 4]: where a bucket begins, half its entries, both buckets
    event_time: Tensor  # int32 [T], s
    query_time: Tensor  # int32 [T], s

    def by_name(self) -> dict[str, Tensor]:
        """The tensors under the names of the kernels' arguments."""
        return {
            "positions": self.positions,
            "cells": self.cells,
            "event_time": self.event_time,
            "query_time": self.query_time,
        }


def spread_bias(bias: RelativeBias, reach: int) -> BiasInputs:
    """The bias tables spread over all distances up to `reach`, and times in whole seconds."""
    position_table = bias.position_table.detach().float().contiguous()
    time_table = bias.time_table.detach().float().contiguous()
    device = position_table.device
    positions = torch.empty(2 * reach + 1, dtype=torch.float32, device=device)
    cells = torch.empty(CELLS, 4, dtype=torch.int32, device=device)

    launch(
        triton_bias.spread_tables,
        cdiv(max(CELLS, len(positions)), SPREAD),
        (position_table, time_table, time_steps(device), positions, cells),
        (len(position_table), len(time_table), reach),
        (),
        (SPREAD,),
        device=device,
        num_warps=4,
        num_stages=3,
    )

    event_time = whole_seconds(bias.event_time_T)
    query_time = event_time if bias.query_time_T is None else whole_seconds(bias.query_time_T)
    return BiasInputs(positions, cells, event_time, query_time)


@cache
def time_steps(device: torch.device) -> Tensor:
    """int32 [CELLS, 2]: where the time bucket changes in a cell of seconds, and its two buckets.

    A cell is the upper 11 bits of the seconds as float32: sign, exponent and two bits more. In it
    the bucket changes at most once: at second `step`, sign included, from the bucket in the lower
    16 bits of the second number to that in the upper 16.
    """
    cell = torch.arange(CELLS // 2, dtype=torch.int32, device=device)
    first = _first_second(cell)
    last = torch.maximum(_first_second(cell + 1) - 1, first)
    below, above = time_bucket(first, 2**15), time_bucket(last, 2**15)

    begins = (above.double() * LOG_BUCKET).exp().ceil()
    never = 2.0**31 - 1
    step = torch.where(above > below, begins, never).to(torch.int64)

    forward = torch.stack([step, below | above << 16], 1)
    backward = torch.stack([1 - step, above | below << 16], 1)  # the sign bit is the highest
    return torch.cat([forward, backward]).to(torch.int32)


def _first_second(cell: Tensor) -> Tensor:
    """The first whole second of a cell; none is beyond 2**31."""
    last_cell = (127 + 31) << 2
    return (cell.clamp(max=last_cell) << 21).view(torch.float32).double().ceil()


def find_largest(grad: Tensor, v: Tensor, dq: Tensor) -> Tensor:
    """The largest |number| of each [T, H, ·], float32 [3]; NaN where one is NaN."""
    num_rows, heads, d_qk = dq.shape
    d_v = v.shape[2]
    block = next_power_of_2(heads * max(d_qk, d_v))
    rows = max(1, LARGEST_OF // block)
    largest = torch.zeros(3, dtype=torch.int32, device=dq.device)
    launch(
        triton_bias.largest_numbers,
        cdiv(num_rows, rows),
        (grad, v, dq, largest),
        (num_rows,),
        (*grad.stride()[:2], *v.stride()[:2], *dq.stride()[:2]),
        (heads, d_qk, d_v, rows, block),
        device=dq.device,
        num_warps=8,
        columns=3,
    )
    return largest.view(torch.float32)


def units_per_one(largest: Tensor, width: int, num_pairs: int) -> Tensor:
    """How many units of the whole-number sums of the bias gradients make 1.0, float32 [1].

    No sum over `num_pairs` pairs of rows, `width` products each, can pass 2**62. `largest` is that
    of `find_largest`.
    """
    steepest = 2.2  # twice SiLU's slope, as the kernels have it
    product = largest[:1] * largest[1:2] * (steepest * width)
    return 2.0**62 / (product * num_pairs).clamp(min=1e-18)
