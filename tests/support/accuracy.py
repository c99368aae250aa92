"""The rule of `benchmarks/kernels/accuracy.py` as an assertion."""

from collections.abc import Sequence

from torch import Tensor

from benchmarks.kernels.accuracy import find_stray


def assert_as_accurate(
    fast: Sequence[Tensor], plain: Sequence[Tensor], truth: Sequence[Tensor], *, num_terms: int = 1
) -> None:
    """Every result is as near to its float64 truth as plain PyTorch's, but for rounding."""
    stray = find_stray(fast, plain, truth, num_terms=num_terms)
    assert stray is None, stray
