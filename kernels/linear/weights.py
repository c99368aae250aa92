"""Weights in the form a kernel reads, a smaller type or row-wise FP8; those of a frozen model are
made once.
"""

from collections.abc import Callable
from typing import TypeVar
from weakref import ref

import torch
from torch import Tensor

from kernels.layer_norm.triton_launch import launch_quantize

Form = TypeVar("Form")
# id of a weight → it, kind → (state of the weight, its form)
_forms: dict[int, tuple[ref, dict]] = {}


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    return (
        weight if weight.dtype == dtype else _form(weight, dtype, lambda: weight.detach().to(dtype))
    )


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [N, K] and its scales, float32 [N]: one for each output."""
    return _form(weight, "fp8", lambda: launch_quantize(weight.detach()))


def _form(weight: Tensor, kind: object, build: Callable[[], Form]) -> Form:
    """The form, kept from an earlier call if the weight is frozen and was not changed in place
    since.

    A weight that requires a gradient is never kept: fused optimizers change it without counting a
    version.
    """
    if weight.requires_grad:
        return build()

    owner = id(weight)
    entry = _forms.get(owner)
    if entry is None or entry[0]() is not weight:
        entry = _forms[owner] = ref(weight, lambda _: _forms.pop(owner, None)), {}
    state = weight.data_ptr(), weight.device, 0 if weight.is_inference() else weight._version

    found = entry[1].get(kind)
    if found is None or found[0] != state:
        found = entry[1][kind] = state, build()
    return found[1]
