"""Launching a Triton kernel without looking through its arguments anew each time, which costs more
than the launch.
"""

from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Number = int | float
# → the kernel, so that its id stays its own, and what came of it
_compiled: dict[tuple, tuple[Any, Any]] = {}


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

    The kernel compiled at the first call is kept for the next with tensors of the same types and
    alignment and the
    same `fixed` and `constants`. It must declare what is `varying` with `do_not_specialize`.
    """
    forms = [None if x is None else _form(x) for x in tensors]
    # a kernel's own hash takes a lock
    key = id(kernel), device, *forms, fixed, constants, num_warps, num_stages
    found = _compiled.get(key)
    if found is None:
        everything = *tensors, *varying, *fixed, *constants
        compiled = kernel[(programs,)](*everything, num_warps=num_warps, num_stages=num_stages)
        if compiled is not None:  # in the interpreter there is nothing to keep
            _compiled[key] = kernel, compiled
    else:
        found[1][(programs, 1, 1)](*tensors, *varying, *fixed, *constants)


def _form(x: Tensor | TensorDescriptor) -> tuple:
    """What compiled code depends on."""
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    return x.dtype, x.data_ptr() % 16


def described(template: TensorDescriptor, base: Tensor) -> TensorDescriptor:
    """`template` over another tensor of its shape and strides, 16-byte aligned as it must be: a new
    descriptor would check all that again, which takes longer than encoding it."""
    other = object.__new__(TensorDescriptor)
    other.__dict__ = {**template.__dict__, "base": base}
    return other


def cdiv(x: int, y: int) -> int:
    """Triton's own unwraps its arguments, for kernels: some microseconds on the host."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
