"""Functions of Triton kernels that several ops share."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def approximate_tanh(x):
    """One special-function instruction of CUDA devices; 2**-11 of error.

    That is below the rounding to half precision that must follow.
    """
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def sigmoid(x):
    return 1 / (1 + tl.exp2(x * -LOG2_E))
