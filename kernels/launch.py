"""Launches of Triton kernels through one cache of what was compiled.

Triton finds the compiled form of a kernel by looking through all its arguments, which costs more
than the launch. Here it is kept under a key: `launch` builds the key from a call's arguments,
`compiled_under` takes one that the caller made once for many launches.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels import compilations

Number = int | float
# → the kernel, so that its id stays its own, and its compiled form
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
    columns: int = 1,
) -> None:
    """`kernel[(programs, columns)](*tensors, *varying, *fixed, *constants)`.

    The compiled form is kept for calls with tensors of the same types and alignment, and the same
    `fixed` and `constants`. The kernel must name what is `varying` in `do_not_specialize`.
    """
    forms = [None if x is None else _form(x) for x in tensors]
    # a kernel's own hash takes a lock
    key = id(kernel), device, *forms, fixed, constants, num_warps, num_stages
    found = _compiled.get(key)
    arguments = *tensors, *varying, *fixed, *constants
    with on_device(device):
        if found is not None:
            found[1][(programs, columns, 1)](*arguments)
            return

        names = kernel.arg_names
        fits = len(arguments) == len(names)
        assert fits, f"{len(arguments)} arguments where the kernel has {names}"
        run = kernel[(programs, columns)]
        keep_compiled(key, kernel, run(*arguments, num_warps=num_warps, num_stages=num_stages))


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """In this block Triton, which launches on the current device, launches on `device`."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(device)


def keep_compiled(key: tuple, kernel: Any, compiled: Any) -> None:
    """Keep what a launch compiled; in the interpreter that is nothing."""
    if compiled is not None:
        _compiled[key] = kernel, compiled


def compiled_under(key: tuple) -> Callable | None:
    """The compiled form kept under `key`, or None."""
    found = _compiled.get(key)
    return None if found is None else found[1]


def constants_of(kernel: Any, named: dict[str, Any]) -> tuple[Any, ...]:
    """The constexpr arguments of a kernel, given by name, in its order."""
    unknown = named.keys() - set(kernel.arg_names)
    assert not unknown, f"the kernel has no {sorted(unknown)}"
    return tuple([named[name] for name in kernel.arg_names if name in named])


def specialised_form(x: Any, *, varies: bool = False) -> Any:
    """The part of an argument that compiled code depends on.

    tensor          type, and its distance from a multiple of 16 bytes
    descriptor      type and box
    int             1, 16 (a multiple of it) or 0 (any other), and its width: Triton's classes
    one that varies from batch to batch, and is in `do_not_specialize`: its width
    bool, str       itself
    float           nothing but that it is one
    """
    if isinstance(x, Tensor | TensorDescriptor):
        return _form(x)
    if isinstance(x, bool | str) or x is None:
        return x
    if isinstance(x, float):
        return float
    if varies:
        return int, x >= 2**31
    class_of = 1 if x == 1 else 16 * (x % 16 == 0)
    return class_of, x >= 2**31


def _form(x: Tensor | TensorDescriptor) -> tuple:
    if isinstance(x, TensorDescriptor):
        return x.base.dtype, *x.block_shape
    return x.dtype, x.data_ptr() % 16


def descriptor_like(template: TensorDescriptor, base: Tensor) -> TensorDescriptor:
    """`template` over another tensor of its shape and strides, 16-byte aligned as it must be.

    A new descriptor would check all that again, which takes longer than encoding it.
    """
    other = object.__new__(TensorDescriptor)
    other.__dict__ = {**template.__dict__, "base": base}
    return other


compilations.count_in(knobs.runtime)


def cdiv(x: int, y: int) -> int:
    """Quotient rounded up. Triton's own unwraps its arguments first: some microseconds."""
    return -(-x // y)


def next_power_of_2(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()
