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
# id of a weight → it, kind → (state of what the form is made of, the form)
_forms: dict[int, tuple[ref, dict]] = {}


def cast_weight(weight: Tensor, dtype: torch.dtype) -> Tensor:
    if weight.dtype == dtype:
        return weight
    return frozen_form(weight, dtype, lambda: weight.detach().to(dtype))


def quantized_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """e4m3 [N, K] and its scales, float32 [N]: one for each output."""
    return frozen_form(weight, "fp8", lambda: launch_quantize(weight.detach()))


def frozen_form(
    weight: Tensor, kind: object, build: Callable[[], Form], others: tuple[Tensor, ...] = ()
) -> Form:
    """The form, kept from an earlier call if the weight is frozen and neither it nor the `others`
    that the form is made of were changed in place since.

    A weight that requires a gradient is never kept: fused optimizers change it without counting a
    version.
    """
    if weight.requires_grad:
        return build()

    owner = id(weight)
    entry = _forms.get(owner)
    if entry is None or entry[0]() is not weight:
        entry = _forms[owner] = ref(weight, lambda _: _forms.pop(owner, None)), {}
    states = [_state(t) for t in (weight, *others)]

    found = entry[1].get(kind)
    if found is None or found[0] != states:
        # the others are held, so that no new tensor takes their place in memory
        found = entry[1][kind] = states, build(), others
    return found[1]


def _state(weight: Tensor) -> tuple[int, torch.device, int]:
    return weight.data_ptr(), weight.device, 0 if weight.is_inference() else weight._version
