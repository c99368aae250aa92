"""Which form of an op runs: asked for by name, never guessed from what happens to be installed."""

import os
from typing import Literal

from torch import Tensor

Backend = Literal["auto", "triton", "torch", "reference"]
# kernels run in Python, on CPU tensors: to test them
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)


def choose_backend(backend: Backend, x: Tensor) -> Backend:
    """`"auto"` is Triton for CUDA tensors and plain PyTorch on the CPU; the reference runs only
    when asked for.

    Raises:
        ValueError: an unknown name, or Triton asked for where it cannot run.
    """
    names = "auto", "triton", "torch", "reference"
    require(backend in names, f"backend must be one of {', '.join(names)}, got {backend!r}")
    if backend == "auto":
        return "triton" if x.is_cuda else "torch"
    if backend == "triton":
        require_triton(x)

    return backend


def require_triton(x: Tensor) -> None:
    require(x.is_cuda or INTERPRETED, "the triton backend needs CUDA tensors")
