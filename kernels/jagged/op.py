"""Jagged ops: packed sequences joined, split and cut short, with offsets that stay on the device.

How many rows an output has, only the host can say when it makes the tensor; callers know it from
lengths that they
kept on the host, so nothing here waits for a GPU. Offsets are int64 [B + 1] from 0 to the number of
rows.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend, require
from kernels.jagged.reference import concatenate_reference, split_reference, truncate_tail_reference


def concatenate_sequences(
    left_TE: Tensor,
    left_offsets: Tensor,
    right_TE: Tensor,
    right_offsets: Tensor,
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Sequence b of the left, then sequence b of the right: [T_left + T_right, E], offsets `left +
    right`.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    same = left_TE.dim() == right_TE.dim() == 2 and left_TE.shape[1] == right_TE.shape[1]
    require(
        same,
        f"both sides must be [T, E] of one width, got {tuple(left_TE.shape)}, "
        f"{tuple(right_TE.shape)}",
    )
    require(
        left_TE.dtype == right_TE.dtype,
        f"both sides must have one type, got {left_TE.dtype}, {right_TE.dtype}",
    )
    _check_offsets(left_offsets, right_offsets)

    chosen = choose_backend(backend, left_TE)
    if chosen == "reference":
        return concatenate_reference(left_TE, left_offsets, right_TE, right_offsets)
    if chosen == "triton":
        from kernels.jagged.triton_launch import Concatenate

        return Concatenate.apply(left_TE, right_TE, left_offsets, right_offsets)
    left_at, right_at = _places(left_offsets, right_offsets, len(left_TE), len(right_TE))
    out = left_TE.new_empty(len(left_TE) + len(right_TE), left_TE.shape[1])
    return out.index_copy(0, left_at, left_TE).index_copy(0, right_at, right_TE)


def split_sequences(
    x_TE: Tensor,
    left_offsets: Tensor,
    right_offsets: Tensor,
    *,
    num_left: int,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The opposite of `concatenate_sequences`; `num_left` is `left_offsets[-1]`.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    require(x_TE.dim() == 2, f"x must be [T, E], got {tuple(x_TE.shape)}")
    require(0 <= num_left <= len(x_TE), f"num_left must be in 0..{len(x_TE)}, got {num_left}")
    _check_offsets(left_offsets, right_offsets)

    chosen = choose_backend(backend, x_TE)
    if chosen == "reference":
        return split_reference(x_TE, left_offsets, right_offsets)
    if chosen == "triton":
        from kernels.jagged.triton_launch import Split

        return Split.apply(x_TE, num_left, left_offsets, right_offsets)
    left_at, right_at = _places(left_offsets, right_offsets, num_left, len(x_TE) - num_left)
    return x_TE.index_select(0, left_at), x_TE.index_select(0, right_at)


def truncate_tail(
    x_TE: Tensor,
    seq_offsets: Tensor,
    tail: Tensor,
    *,
    num_context: int = 0,
    num_rows: int,
    backend: Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """The first `num_context` rows of each sequence and its last `tail[b]`, and the offsets of what
    is left.

    A sequence no longer than both together is untouched. `tail` int [B], on the device; `num_rows`
    is the sum of what is left, `min(length, num_context + tail)`.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    require(x_TE.dim() == 2, f"x must be [T, E], got {tuple(x_TE.shape)}")
    _check_offsets(seq_offsets, seq_offsets)
    fits = tail.shape == (len(seq_offsets) - 1,) and not tail.is_floating_point()
    require(
        fits,
        f"tail must be int [{len(seq_offsets) - 1}], one per sequence, got {tail.dtype} "
        f"{tuple(tail.shape)}",
    )
    require(num_context >= 0, f"num_context must be 0 or more, got {num_context}")
    require(0 <= num_rows <= len(x_TE), f"num_rows must be in 0..{len(x_TE)}, got {num_rows}")
    lengths = torch.minimum(seq_offsets.diff(), tail + num_context)
    new_offsets = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))

    chosen = choose_backend(backend, x_TE)
    if chosen == "reference":
        return truncate_tail_reference(x_TE, seq_offsets, num_context, tail), new_offsets
    if chosen == "triton":
        from kernels.jagged.triton_launch import TruncateTail

        return TruncateTail.apply(
            x_TE, seq_offsets, new_offsets, num_context, num_rows
        ), new_offsets
    sequence = sequence_index(new_offsets, num_rows)

    at = torch.arange(num_rows, device=x_TE.device) - new_offsets[sequence]
    dropped = (seq_offsets.diff() - lengths)[sequence]
    source = seq_offsets[sequence] + at + torch.where(at >= num_context, dropped, 0)
    return x_TE.index_select(0, source), new_offsets


def sequence_index(offsets: Tensor, num_rows: int) -> Tensor:
    """int64 [rows]: the sequence that each row belongs to."""
    lengths = offsets.diff()
    index = torch.arange(lengths.numel(), device=offsets.device)
    return torch.repeat_interleave(index, lengths, output_size=num_rows)


def _places(
    left_offsets: Tensor, right_offsets: Tensor, num_left: int, num_right: int
) -> tuple[Tensor, Tensor]:
    """Where the rows of either side lie in the whole."""
    device = left_offsets.device
    left_at = (
        torch.arange(num_left, device=device)
        + right_offsets[sequence_index(left_offsets, num_left)]
    )

    right_at = (
        torch.arange(num_right, device=device)
        + left_offsets[1:][sequence_index(right_offsets, num_right)]
    )
    return left_at, right_at


def _check_offsets(left: Tensor, right: Tensor) -> None:
    types = left.dtype == right.dtype == torch.int64 and left.dim() == 1 and len(left) >= 1
    require(types, f"offsets must be int64 [B + 1], got {left.dtype} {tuple(left.shape)}")
    require(
        left.shape == right.shape,
        f"both sides need as many sequences, got {len(left) - 1} and {len(right) - 1}",
    )
