"""Sampled softmax, the op: a retrieval loss whose positions × negatives × width would not fit in
memory.
"""

from types import ModuleType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import Backend, choose_backend, require
from kernels.sampled_softmax import torch_chunked
from kernels.sampled_softmax.reference import sampled_softmax_reference


def draw_negatives(
    num_items: int,
    num_positions: int,
    num_negatives: int,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """int32 [P, R], uniform over all items with replacement, anew for each position."""
    shape = num_positions, num_negatives
    return torch.randint(num_items, shape, generator=generator, device=device, dtype=torch.int32)


def sampled_softmax(
    users_PD: Tensor,
    items_ND: Tensor,
    positives: Tensor,
    negatives: Tensor,
    *,
    weights: Tensor | None = None,
    log_rates: Tensor | None = None,
    temperature: float = 0.05,
    tf32: bool | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """The weighted mean over P positions of −log softmax of the positive among itself and R
    negatives; a number.

    Scores are cosines over `temperature`; a negative that equals the positive counts for nothing.
    `positives` int [P], `negatives` int [P, R]; `weights` [P], 0 or more and not all 0; None: all
    alike. `log_rates` [N], float32, is taken from the scores of negatives: with the log of how
    often an item is expected among the R drawn, the loss is that of all items in expectation
    (logQ correction). Sums are float32 for half-precision vectors. Gradients reach users and items;
    with Triton, and on the CPU, two runs agree bit for bit.

    `tf32` allows products of the 11 bits that TF32 keeps of a number, None: where
    `torch.set_float32_matmul_precision` does. Then the kernels read unit vectors in float16, which
    has as many, in half the bytes; vectors of half precision are read so always.

    Raises:
        ValueError: on shapes, types and numbers that do not fit.
    """
    _check(users_PD, items_ND, positives, negatives, temperature)

    wide = torch.promote_types(users_PD.dtype, torch.float32)
    weights = users_PD.new_ones(len(users_PD), dtype=wide) if weights is None else weights.to(wide)
    require(
        weights.shape == positives.shape,
        f"weights must be [{len(users_PD)}], got {tuple(weights.shape)}",
    )

    if log_rates is not None:
        shown = tuple(log_rates.shape)
        require(shown == (len(items_ND),), f"log_rates must be [{len(items_ND)}], got {shown}")
        log_rates = log_rates.to(wide).contiguous()

    chosen = choose_backend(backend, users_PD)
    if chosen == "reference":
        return sampled_softmax_reference(
            users_PD, items_ND, positives, negatives, weights, temperature, log_rates
        )
    if chosen == "triton":
        require(
            users_PD.dtype != torch.float64,
            "the triton backend takes float16, bfloat16 and float32",
        )
        form = _kernels(users_PD, negatives, tf32)
    else:
        form = torch_chunked
    tensors = [x.contiguous() for x in (users_PD, items_ND, positives, negatives)]
    return SampledSoftmax.apply(*tensors, weights, temperature, form, log_rates)


def _kernels(users: Tensor, negatives: Tensor, tf32: bool | None) -> ModuleType:
    """The kernels in float16 where the numbers' types and the call's size allow it."""
    from kernels.sampled_softmax import half_launch, triton_launch

    if tf32 is None:
        tf32 = torch.get_float32_matmul_precision() != "highest"
    few_bits = tf32 or users.dtype != torch.float32
    num_positions, num_negatives = negatives.shape
    if few_bits and half_launch.fits(num_positions, num_negatives, users.shape[1]):
        return half_launch
    return triton_launch


def _check(
    users_PD: Tensor, items_ND: Tensor, positives: Tensor, negatives: Tensor, temperature: float
) -> None:
    vectors = users_PD.dim() == items_ND.dim() == 2 and users_PD.shape[1] == items_ND.shape[1]
    shown = f"{tuple(users_PD.shape)} and {tuple(items_ND.shape)}"
    require(vectors, f"users must be [P, D] and items [N, D], got {shown}")

    same = users_PD.dtype == items_ND.dtype and users_PD.dtype.is_floating_point
    require(
        same, f"users and items must have one float type, got {users_PD.dtype} and {items_ND.dtype}"
    )

    drawn = negatives.dim() == 2 and positives.shape == negatives.shape[:1] == users_PD.shape[:1]
    shown = f"{tuple(positives.shape)} and {tuple(negatives.shape)}"
    require(
        drawn,
        f"positives must be [{len(users_PD)}] and negatives [{len(users_PD)}, R], got {shown}",
    )

    types = not (positives.is_floating_point() or negatives.is_floating_point())
    require(
        types,
        f"positives and negatives must be item rows, got {positives.dtype} and {negatives.dtype}",
    )
    require(temperature > 0, f"temperature must be greater than 0, got {temperature}")


class SampledSoftmax(torch.autograd.Function):
    """`form` is a module of `forward` and `item_gradients`: torch_chunked, triton_launch or
    half_launch.
    """

    @staticmethod
    def forward(
        ctx, users: Tensor, items: Tensor, positives: Tensor, negatives: Tensor, weights: Tensor,
        temperature: float, form: ModuleType, log_rates: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        drawn = users, items, positives, negatives
        loss, lse, user_grad = form.forward(*drawn, temperature, log_rates)
        share = weights / weights.sum()

        ctx.save_for_backward(*drawn, loss, lse, user_grad, share, log_rates)
        ctx.temperature, ctx.form = temperature, form
        return (loss * share).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        *drawn, loss, lse, user_grad, share, log_rates = ctx.saved_tensors
        users, items, positives, negatives = drawn
        of_users = of_items = None
        if ctx.needs_input_grad[0]:
            of_users = ((grad * share)[:, None] * user_grad).to(users.dtype)

        if ctx.needs_input_grad[1]:
            tensors = users, items, positives, negatives, loss, lse, share
            found = ctx.form.item_gradients(*tensors, ctx.temperature, log_rates)
            of_items = (found * grad).to(items.dtype)

        return of_users, of_items, None, None, None, None, None, None
