"""How many kernels Triton has compiled in this process, or read from its cache on disk.

A launch that has to wait for one takes from tens of milliseconds to seconds. After a warm-up the
number stands still: `tests/test_compilations.py` draws 2,000 batches.
"""

from collections import Counter
from typing import Any

_by_kernel: Counter[str] = Counter()


def count_compilations() -> int:
    """Kernels made ready so far; 0 where no kernel was ever asked for, or none is installed."""
    return sum(_by_kernel.values())


def compilations_by_kernel() -> dict[str, int]:
    """The same by the kernel's name."""
    return dict(_by_kernel)


def count_in(runtime: Any) -> None:
    """Count from now on what is compiled under `runtime`, which is `triton.knobs.runtime`.

    A hook that somebody else has set there still runs.
    """
    other = runtime.jit_post_compile_hook

    def count(**told: Any) -> Any:
        _by_kernel[told["fn"].name.rpartition(".")[2]] += 1
        return None if other is None else other(**told)

    runtime.jit_post_compile_hook = count
