"""Launching a Triton kernel without looking through its arguments anew each time, which costs more than the launch."""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Number = int | float
_compiled: dict[tuple, Any] = {}


def launch(
    kernel: Any,
    programs: int,
    tensors: tuple[Tensor | TensorDescriptor | None, ...],
    varying: tuple[Number, ...],
    fixed: tuple[Number, ...],
    constants: tuple[Any, ...],
    *,
    device: torch.device,
    num_warps: int,
    num_stages: int = 1,
) -> None:
    """`kernel[(programs,)](*tensors, *varying, *fixed, *constants)`.

    The kernel compiled at the first call is kept for the next with tensors of the same types and alignment and the
    same `fixed` and `constants`. It must declare what is `varying` with `do_not_specialize`.
    """
    key = kernel, device, tuple(map(_form, tensors)), fixed, constants, num_warps, num_stages
    compiled = _compiled.get(key)
    if compiled is None:
        everything = *tensors, *varying, *fixed, *constants
        compiled = kernel[(programs,)](*everything, num_warps=num_warps, num_stages=num_stages)
        if compiled is not None:  # in the interpreter there is nothing to keep
            _compiled[key] = compiled
    else:
        compiled[(programs, 1, 1)](*tensors, *varying, *fixed, *constants)


def _form(x: Tensor | TensorDescriptor | None) -> tuple | None:
    """What compiled code depends on."""
    if x is None:
        return None
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    return x.dtype, x.data_ptr() % 16
