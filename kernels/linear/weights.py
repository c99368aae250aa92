"""Weights in the form a kernel reads, made once for inference: in a smaller type, or as row-wise FP8."""

from collections.abc import Callable
from typing import TypeVar
from weakref import ref

import torch
from torch import Tensor

from kernels.layer_norm.triton_launch import launch_quantize

Form = TypeVar("Form")
_forms: dict[int, tuple[ref, dict]] = {}  # id of a weight → it, kind → (state of the weight, its form)


def cast_weight(weight: Tensor, dtype: torch.dtype, *, keep: bool) -> Tensor:
    """`keep`: for later calls, as long as the weight is not changed in place."""
    if weight.dtype == dtype:
        return weight
    return _kept(weight, dtype, lambda: weight.detach().to(dtype)) if keep else weight.detach().to(dtype)


def quantized_weight(weight: Tensor, *, keep: bool) -> tuple[Tensor, Tensor]:
    """e4m3 [N, K] and its scales, float32 [N]: one for each output."""
    return _kept(weight, "fp8", lambda: launch_quantize(weight.detach())) if keep else launch_quantize(weight.detach())


def _kept(weight: Tensor, kind: object, build: Callable[[], Form]) -> Form:
    owner = id(weight)
    entry = _forms.get(owner)
    if entry is None or entry[0]() is not weight:
        entry = _forms[owner] = ref(weight, lambda _: _forms.pop(owner, None)), {}
    state = weight.data_ptr(), weight.device, 0 if weight.is_inference() else weight._version
    found = entry[1].get(kind)
    if found is None or found[0] != state:
        found = entry[1][kind] = state, build()
    return found[1]
