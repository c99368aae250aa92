"""Tensors of a batch as views of one buffer, so that one copy takes all of them to a GPU.

    columns   seq_offsets 24 bytes, num_targets 8 bytes, …     `pack_tensors`
    buffer    [seq_offsets . . . . . | num_targets . . . . | …]
    begin      0                       64                       128

A copy of its own for each tensor costs the host a call, and from memory that is not pinned the host
waits for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from math import prod

import torch
from torch import Tensor

ALIGNED = 64  # bytes between the beginnings of columns


@dataclass(frozen=True, slots=True)
class Column:
    """Where a tensor lies in the buffer."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Packed:
    """A buffer, uint8, and what lies in it."""

    columns: tuple[Column, ...]
    buffer: Tensor

    def holds(self, tensors: Mapping[str, Tensor]) -> bool:
        """Tell whether these very tensors are the views of the buffer."""
        if len(tensors) != len(self.columns):
            return False
        first = self.buffer.data_ptr()
        for column in self.columns:
            tensor = tensors.get(column.name)
            # an empty one lies nowhere
            if tensor is None or (tensor.numel() and tensor.data_ptr() != first + column.begin):
                return False
            if tensor.dtype != column.dtype or tuple(tensor.shape) != column.shape:
                return False
        return True

    def views(self) -> dict[str, Tensor]:
        """The tensors by name, views of the buffer."""
        found = {}
        for column in self.columns:
            part = self.buffer[column.begin : column.begin + column.num_bytes]
            found[column.name] = part.view(column.dtype).view(column.shape)
        return found


def pack_tensors(tensors: Mapping[str, Tensor], *, pin_memory: bool = False) -> Packed:
    """The tensors, which are on the CPU, copied into one buffer."""
    columns: list[Column] = []
    end = 0
    for name, tensor in tensors.items():
        columns.append(Column(name, tensor.dtype, tuple(tensor.shape), end))
        end += -(-tensor.nbytes // ALIGNED) * ALIGNED

    buffer = torch.empty(end, dtype=torch.uint8, pin_memory=pin_memory)
    packed = Packed(tuple(columns), buffer)
    for name, view in packed.views().items():
        view.copy_(tensors[name])
    return packed


def copy_packed(packed: Packed, device: torch.device) -> Packed:
    """The same on a device. On a GPU the copy goes over a stream of its own, beside what the
    current one is still at; the host waits for nothing if the buffer is pinned.
    """
    if device.type != "cuda":
        return Packed(packed.columns, packed.buffer.to(device))

    current, stream = torch.cuda.current_stream(device), _copy_stream(device)
    with torch.cuda.stream(stream):
        there = packed.buffer.to(device, non_blocking=True)
    current.wait_stream(stream)
    there.record_stream(current)  # its memory is not given away while this one uses it
    return Packed(packed.columns, there)


@cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
