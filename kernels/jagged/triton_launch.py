"""Launches of the jagged kernels, and their autograd."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.jagged import triton_kernels
from kernels.launch import cdiv, launch, next_power_of_2

TILE = 4096  # elements of a program's tile: 32 a thread
WIDEST = 512


def _launch(
    kernel,
    num_rows: int,
    num_sequences: int,
    *tensors: Tensor,
    backward: bool,
    extra: tuple[int, ...] = (),
) -> None:
    """Copies of `num_rows` rows; `backward` is the kernel's one flag, SPLIT or BACKWARD."""
    width = tensors[0].shape[1]
    if num_rows * width == 0:
        return

    block_e = min(next_power_of_2(width), WIDEST)
    block_t = max(TILE // block_e, 1)
    steps = num_sequences.bit_length()  # bisecting B sequences takes so many
    launch(
        kernel,
        cdiv(num_rows, block_t),
        tuple([x.contiguous() for x in tensors]),
        (num_rows, num_sequences, steps, *extra),
        (width,),
        (backward, block_t, block_e),
        device=tensors[0].device,
        num_warps=4,
        num_stages=3,
        columns=cdiv(width, block_e),
    )


def _join(left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor) -> Tensor:
    whole = left.new_empty(len(left) + len(right), left.shape[1])
    tensors = whole, left, right, left_offsets, right_offsets
    _launch(
        triton_kernels.concatenate_or_split,
        len(whole),
        len(left_offsets) - 1,
        *tensors,
        backward=False,
    )

    return whole


def _part(
    whole: Tensor, num_left: int, left_offsets: Tensor, right_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    left = whole.new_empty(num_left, whole.shape[1])
    right = whole.new_empty(len(whole) - num_left, whole.shape[1])
    tensors = whole, left, right, left_offsets, right_offsets
    _launch(
        triton_kernels.concatenate_or_split,
        len(whole),
        len(left_offsets) - 1,
        *tensors,
        backward=True,
    )

    return left, right


class Concatenate(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, left: Tensor, right: Tensor, left_offsets: Tensor, right_offsets: Tensor
    ) -> Tensor:
        ctx.save_for_backward(left_offsets, right_offsets)
        ctx.num_left = len(left)

        return _join(left, right, left_offsets, right_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return *_part(grad, ctx.num_left, *ctx.saved_tensors), None, None


class Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx, whole: Tensor, num_left: int, left_offsets: Tensor, right_offsets: Tensor):
        ctx.save_for_backward(left_offsets, right_offsets)
        return _part(whole, num_left, left_offsets, right_offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, left: Tensor, right: Tensor):
        return _join(left, right, *ctx.saved_tensors), None, None, None


class TruncateTail(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, long: Tensor, offsets: Tensor, new_offsets: Tensor, num_context: int, num_rows: int
    ) -> Tensor:
        ctx.save_for_backward(offsets, new_offsets)
        ctx.num_context, ctx.num_rows = num_context, len(long)
        short = long.new_empty(num_rows, long.shape[1])

        tensors = long, short, offsets, new_offsets
        _launch(
            triton_kernels.truncate_tail,
            num_rows,
            len(offsets) - 1,
            *tensors,
            extra=(num_context,),
            backward=False,
        )

        return short

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        offsets, new_offsets = ctx.saved_tensors
        long = grad.new_empty(ctx.num_rows, grad.shape[1])
        tensors = long, grad, offsets, new_offsets

        extra = (ctx.num_context,)
        _launch(
            triton_kernels.truncate_tail,
            len(long),
            len(offsets) - 1,
            *tensors,
            extra=extra,
            backward=True,
        )

        return long, None, None, None, None
