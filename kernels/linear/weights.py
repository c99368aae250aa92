"""Weights in the form a kernel reads, a smaller type or row-wise FP8; those of a frozen model are
made once.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple, TypeVar
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


class FoldedLinear(NamedTuple):
    """A linear map of normalised rows as one of the rows themselves.

    With the norm's weight γ and bias β, and v = w γ, each of whose rows is less its mean:

        LayerNorm(x) wᵀ + bias = x vᵀ / sqrt(var + eps) + (β wᵀ + bias)

    x keeps its mean, of which rows of v that add up to 0 take nothing.
    """

    weight: Tensor  # [N, K], v
    bias: Tensor  # float32 [N]


def folded_linear(
    weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor, dtype: torch.dtype
) -> FoldedLinear | None:
    """The map with the norm before it, its weight in `dtype`. None where any of them is trained:
    the map would have to be made anew at each call.
    """
    sources = bias, norm_weight, norm_bias
    trained = [source.requires_grad for source in (weight, *sources)]
    if any(trained):
        return None

    def build() -> FoldedLinear:
        # once for a model, and number by number: on a CPU
        w, gain, offset = (_exact(source) for source in (weight, norm_weight, norm_bias))
        scaled = w * gain
        centred = scaled - scaled.mean(1, keepdim=True)

        v = round_rows(centred, dtype)
        shift = w @ offset + _exact(bias)
        return FoldedLinear(v.to(weight.device), shift.float().to(weight.device))

    return frozen_form(weight, ("folded", dtype), build, sources)


def _exact(weight: Tensor) -> Tensor:
    return weight.detach().double().cpu()


def round_rows(exact_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """Float64 numbers rounded so that a row keeps its sum.

    What rounding takes from the sum is added to the row's largest number, what is lost in that to
    the next one, and so on: the smallest loses next to nothing.
    """
    order = exact_NK.abs().argsort(dim=1, descending=True, stable=True)
    columns = exact_NK.gather(1, order).T.contiguous()
    rounded = columns.to(dtype)
    lost = (columns - rounded.double()).sum(0)

    for column in rounded:
        wanted = column.double() + lost
        column.copy_(wanted)
        lost = wanted - column.double()

    return torch.empty_like(exact_NK, dtype=dtype).scatter_(1, order, rounded.T)


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
        # the table is bound, since weights may go after the names of modules when Python ends
        drop = partial(_drop_form, _forms, owner)
        entry = _forms[owner] = ref(weight, drop), {}
    states = [_state(t) for t in (weight, *others)]

    found = entry[1].get(kind)
    if found is None or found[0] != states:
        # the others are held, so that no new tensor takes their place in memory
        found = entry[1][kind] = states, build(), others
    return found[1]


def _drop_form(forms: dict, owner: int, _: ref) -> None:
    forms.pop(owner, None)


def _state(weight: Tensor) -> tuple[int, torch.device, int]:
    return weight.data_ptr(), weight.device, 0 if weight.is_inference() else weight._version
