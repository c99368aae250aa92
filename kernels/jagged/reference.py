"""What the jagged ops mean, one sequence at a time."""

import torch
from torch import Tensor


def rows_of(x_TE: Tensor, offsets: Tensor) -> list[Tensor]:
    """The sequences, [length, ...] each."""
    return list(x_TE.split(offsets.diff().tolist()))


def concatenate_reference(
    left_TE: Tensor, left_offsets: Tensor, right_TE: Tensor, right_offsets: Tensor
) -> Tensor:
    pairs = zip(rows_of(left_TE, left_offsets), rows_of(right_TE, right_offsets), strict=True)
    return (
        torch.cat([part for pair in pairs for part in pair]) if len(left_offsets) > 1 else left_TE
    )


def split_reference(
    x_TE: Tensor, left_offsets: Tensor, right_offsets: Tensor
) -> tuple[Tensor, Tensor]:
    parts = rows_of(x_TE, left_offsets + right_offsets)
    cuts = left_offsets.diff().tolist()
    left = [part[:cut] for part, cut in zip(parts, cuts, strict=True)]
    right = [part[cut:] for part, cut in zip(parts, cuts, strict=True)]
    return torch.cat([x_TE[:0], *left]), torch.cat([x_TE[:0], *right])


def truncate_tail_reference(
    x_TE: Tensor, seq_offsets: Tensor, num_context: int, tail: Tensor
) -> Tensor:
    kept = [x_TE[:0]]
    for rows, keep in zip(rows_of(x_TE, seq_offsets), tail.tolist(), strict=True):
        kept += [rows[:num_context], rows[max(num_context, len(rows) - keep) :]]
    return torch.cat(kept)
