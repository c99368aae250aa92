"""Types of semi-local attention that its callers and all its forms share."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Width of a time bucket on the natural log scale: HSTU's research code, about log10(2).
LOG_BUCKET = 0.301


@dataclass(frozen=True, slots=True)
class RelativeBias:
    """HSTU's relative attention bias (arXiv:2402.17152), shared by the heads and added to the score
    before SiLU.

    `position_table[i]` is for a key i positions before the query, its last entry also for all that
    are farther; a candidate stands right behind the last event it sees. `time_table[b]` is for a
    difference in whole seconds of exp(0.301 b) .. exp(0.301 (b + 1)), the last entry also for
    longer ones. `query_time_T` is the time that a row asks about (HSTU's code takes that of the
    next event); None is the row's own.
    """

    position_table: Tensor  # float [P]
    time_table: Tensor  # float [N]
    event_time_T: Tensor  # int64 [T], ms
    query_time_T: Tensor | None = None  # int64 [T], ms


@dataclass(frozen=True, slots=True)
class QueryRows:
    """The tokens that ask, where not all do: of a last layer those whose rows somebody reads.

    tokens of a batch    c h h x y | c h x      only x and y of both are read
    index                3 4 7
    offsets              0 2 3
    """

    index: Tensor  # int64 [R], ascending
    offsets: Tensor  # int64 [B + 1]: those of each sequence


def whole_seconds(time_ms: Tensor) -> Tensor:
    """Seconds of milliseconds, rounded down: int32, good until 2038."""
    return time_ms.div(1000, rounding_mode="floor").to(torch.int32)


def time_bucket(difference_s: Tensor, num_buckets: int) -> Tensor:
    """Bucket of a difference of whole seconds, of either sign; up to a second is bucket 0.

    In float64: float32's logarithm is off by whole seconds after a week, by others on another
    device.
    """
    seconds = difference_s.abs().to(torch.float64).clamp(min=1.0)
    return (seconds.log() * (1 / LOG_BUCKET)).to(torch.int64).clamp(max=num_buckets - 1)
