"""The full softmax, the op: the log of the summed exponentials of a user's scores of all items,
whose positions × items would not fit in memory.

    −log softmax of item j = log_partition(user, items) − user · item_j
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.backend import Backend, choose_backend, require
from kernels.full_softmax.reference import log_partition_reference
from kernels.full_softmax.torch_chunked import chunked_log_partition

MOST_WIDTH = 512  # of a vector that the kernel holds in a program's memory


def log_partition(
    users_PD: Tensor,
    items_ND: Tensor,
    *,
    tf32: bool | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """[P]: log Σ_j exp(user · item_j) over the N items, −inf where N is 0.

    Gradients reach users and items. No weights: one that multiplies a user's result reaches both
    gradients, and with a weight of 0 the user counts for neither. A user that is not finite has a
    result that is not, and leaves other users' results and gradients alone; every item's gradient
    has a part of it.

    `tf32` allows products of the 11 bits that TF32 keeps of a number, None: where
    `torch.set_float32_matmul_precision` does. Then the kernel reads vectors in float16, which has
    as many, scaled to its range; sums are float32. `"auto"` is
    the kernel for CUDA tensors in float32, up to 512 wide, where TF32 is allowed, and else PyTorch
    by chunks of the items, whose products follow PyTorch's own setting. On the CPU and with Triton
    two runs agree bit for bit.

    Raises:
        ValueError: on shapes and types that do not fit, and on Triton asked for where it cannot
            run.
    """
    _check(users_PD, items_ND)
    if tf32 is None:
        tf32 = torch.get_float32_matmul_precision() != "highest"

    width, dtype = users_PD.shape[1], users_PD.dtype
    chosen = choose_backend(backend, users_PD)
    if backend == "auto" and not (tf32 and width <= MOST_WIDTH and dtype == torch.float32):
        chosen = "torch"

    if chosen == "reference":
        return log_partition_reference(users_PD, items_ND)
    if chosen == "torch":
        return chunked_log_partition(users_PD, items_ND)

    require(tf32, "the triton backend's products are of 11 bits, which tf32=False does not allow")
    require(dtype == torch.float32, f"the triton backend takes float32, got {dtype}")
    most = f"the triton backend takes vectors of up to {MOST_WIDTH} numbers, got {width}"
    require(width <= MOST_WIDTH, most)
    return LogPartition.apply(users_PD.contiguous(), items_ND.contiguous())


def _check(users_PD: Tensor, items_ND: Tensor) -> None:
    vectors = users_PD.dim() == items_ND.dim() == 2 and users_PD.shape[1] == items_ND.shape[1]
    shown = f"{tuple(users_PD.shape)} and {tuple(items_ND.shape)}"
    require(vectors, f"users must be [P, D] and items [N, D], got {shown}")

    same = users_PD.dtype == items_ND.dtype and users_PD.dtype.is_floating_point
    types = f"{users_PD.dtype} and {items_ND.dtype}"
    require(same, f"users and items must have one float type, got {types}")


class LogPartition(torch.autograd.Function):
    """The kernel's form; both tensors contiguous, in float32."""

    @staticmethod
    def forward(ctx, users: Tensor, items: Tensor) -> Tensor:
        from kernels.full_softmax import triton_launch

        half_users, half_items = (triton_launch.half_rows(x) for x in (users, items))
        ctx.sizes = len(items), users.shape[1]
        lse, mean = triton_launch.log_partition(
            half_users, half_items, len(users), *ctx.sizes, with_mean=ctx.needs_input_grad[0]
        )
        tensors = half_users.rows, half_users.scale, half_items.rows, half_items.scale
        ctx.save_for_backward(*tensors, lse, mean)
        return lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        from kernels.full_softmax import triton_launch

        user_rows, user_scale, item_rows, item_scale, lse, mean = ctx.saved_tensors
        factor = grad.contiguous()
        of_users = of_items = None
        if ctx.needs_input_grad[0]:
            of_users = mean * factor[:, None]
        if ctx.needs_input_grad[1]:
            users = triton_launch.HalfRows(user_rows, user_scale)
            items = triton_launch.HalfRows(item_rows, item_scale)
            of_items = triton_launch.item_gradients(users, items, lse, factor, *ctx.sizes)
        return of_users, of_items
