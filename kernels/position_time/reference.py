"""Which row of the position and of the time table a token has, and their sum, in plain PyTorch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.position_time.types import Anchor

OCTAVES = 32  # the time buckets cover gaps up to 2**32 ms, 50 days
MS_PER_BUCKET = 60_000  # of an age, under the square root


def time_bucket(gap_ms: Tensor, num_buckets: int) -> Tensor:
    """Bucket 0 for -1, "no real gap"; the others cut log2(1 + gap) evenly."""
    per_octave = (num_buckets - 1) / OCTAVES
    bucket = 1 + torch.floor(torch.log2(1 + gap_ms.clamp(min=0).double()) * per_octave).long()

    return torch.where(gap_ms < 0, 0, bucket.clamp(max=num_buckets - 1))


def age_bucket(age_ms: Tensor, num_buckets: int) -> Tensor:
    """Bucket 0 for -1, "no real time"; the others cut the square root of the age in minutes, one
    each.
    """
    bucket = 1 + torch.floor(torch.sqrt(age_ms.clamp(min=0).double() / MS_PER_BUCKET)).long()

    return torch.where(age_ms < 0, 0, bucket.clamp(max=num_buckets - 1))


BUCKETS = {"event": time_bucket, "query": age_bucket}


def position_time_reference(
    x_TE: Tensor,
    position_PE: Tensor,
    time_BE: Tensor,
    position_T: Tensor,
    gap_ms_T: Tensor,
    anchor: Anchor,
) -> Tensor:
    """x + position table[position modulo its rows] + time table[bucket of the gap], in x's type.

    Where nothing is recorded a table is cast to x's type rather than what was read of it. Its
    gradient is sparse: a row for each token.
    """
    for table, index in (
        (position_PE, position_T % len(position_PE)),
        (time_BE, BUCKETS[anchor](gap_ms_T, len(time_BE))),
    ):
        if torch.is_grad_enabled() and table.requires_grad:
            x_TE = x_TE + F.embedding(index, table, sparse=True).to(x_TE.dtype)
        else:
            x_TE = x_TE + F.embedding(index, table.to(x_TE.dtype))

    return x_TE
