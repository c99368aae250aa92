"""The one rule by which a kernel is judged: as accurate as plain PyTorch, beside a float64 truth.

`tests/support/accuracy.py` asserts it; the parity suites here report what breaks it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

FACTOR = 2.0  # a kernel may stray so many times as far as plain PyTorch does
EPS = 2.0**-23  # of float32, in which every sum is kept
ROUNDINGS = 8  # in the making of one term: products, activation, slope, scale


def rounding_allowance(num_terms: int, sum_of_sizes: Tensor) -> Tensor:
    """Largest error that rounding alone explains in a float32 sum of `num_terms` terms.

    A term passes through about ROUNDINGS roundings before it is added, and through log2(n)
    additions when the sum is a tree. Each rounding changes a number by at most eps of itself, so

        |error| <= (ROUNDINGS + log2 n) * eps * sum |terms|

    (Higham, Accuracy and Stability of Numerical Algorithms, section 4.2). The bound depends on
    neither the processor nor the luck of plain PyTorch. For n = 276 pairs it is 2e-6 of the sum of
    sizes; terms of random sign sum to about 1/sqrt(n) of that, so one per cent of a result is
    6e-4: three hundred times the allowance.
    """
    additions = math.log2(max(num_terms, 1))
    return (ROUNDINGS + additions) * EPS * sum_of_sizes


def find_stray(
    fast: Sequence[Tensor],
    plain: Sequence[Tensor],
    truth: Sequence[Tensor],
    *,
    num_terms: int = 1,
    sums_of_sizes: dict[int, Tensor] | None = None,
    floor: float = 1e-12,
) -> str | None:
    """The first result that strays too far from its float64 truth, or None.

    The i-th result may stray everywhere by

        FACTOR * (plain PyTorch's largest error) + rounding_allowance(...) + floor

    The second term is needed because the quotient of two rounding errors has no bound: plain
    PyTorch may be exact by luck.

    Args:
        num_terms: how many terms the longest sum has.
        sums_of_sizes: by place in the list, the sum of |terms| of each number of a result. Without
            it sqrt(num_terms) * max |truth| stands for the sum: so large it is when signs are
            random.
        floor: error of a result whose exact value is 0.
    """
    for i, (got, there, expected) in enumerate(zip(fast, plain, truth, strict=True)):
        if not got.numel():
            continue

        error = (got.double() - expected).abs()
        plain_error = (there.double() - expected).abs().max()
        sizes = (sums_of_sizes or {}).get(i)
        if sizes is None:
            sizes = math.sqrt(num_terms) * expected.abs().max()

        allowed = FACTOR * plain_error + rounding_allowance(num_terms, sizes) + floor
        allowed = torch.broadcast_to(allowed, error.shape)
        within = error <= allowed  # NaN is not
        if not within.all():
            worst = (error / allowed).nan_to_num(nan=torch.inf).argmax()
            found, limit = error.flatten()[worst].item(), allowed.flatten()[worst].item()
            return f"output {i}: error {found:.2e}, allowed {limit:.2e}"
    return None
