"""Row-wise INT4 tables: packed once on the CPU, looked up and dequantised in one pass wherever they
are.

A row is `1 + ceil(E / 8)` words of 32 bits: float16 scale (low half) and bias, then eight codes a
word, the first in the lowest bits. That is E / 2 + 4 bytes where E is a multiple of 8.
"""

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend, require
from kernels.int4_embedding.reference import quantize_reference

CHUNK = 2**24  # numbers packed at a time: what is made on the way is several times as large
FLOATS = torch.float16, torch.bfloat16, torch.float32, torch.float64


def packed_words(dim: int) -> int:
    return 1 + -(-dim // 8)


def quantize(table_RE: Tensor) -> Tensor:
    """int32 [R, packed_words(E)].

    Raises:
        ValueError: not a float table, or numbers that float16 cannot hold.
    """
    fits = table_RE.dim() == 2 and table_RE.dtype in FLOATS
    require(fits, f"the table must be floats [R, E], got {table_RE.dtype} {tuple(table_RE.shape)}")
    num_rows, dim = table_RE.shape
    packed = torch.empty(num_rows, packed_words(dim), dtype=torch.int32, device=table_RE.device)

    step = max(CHUNK // max(dim, 1), 1)
    for begin in range(0, num_rows, step):
        packed[begin : begin + step] = _pack(
            *quantize_reference(table_RE[begin : begin + step].float())
        )

    return packed


def _pack(codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    finite = bool(torch.isfinite(scale).all() & torch.isfinite(bias).all())
    require(
        finite,
        "a table of finite numbers below 65,504 is needed: float16 holds the scale and bias of a "
        "row",
    )

    codes = torch.nn.functional.pad(codes.int(), (0, -codes.shape[1] % 8)).unflatten(1, (-1, 8))
    shifts = 4 * torch.arange(8, dtype=torch.int32, device=codes.device)
    words = (codes << shifts).sum(2, dtype=torch.int32)  # bits of different codes: adding is or-ing
    low, high = (x.half().view(torch.int16).int() for x in (scale, bias))
    return torch.cat([(low & 0xFFFF) | (high << 16), words], dim=1)


def look_up(
    packed: Tensor,
    ids: Tensor,
    *,
    dim: int,
    dtype: torch.dtype = torch.float32,
    backend: Backend = "auto",
) -> Tensor:
    """Rows `ids`, int [...], of a table of width `dim` that `quantize` packed: [..., dim] in
    `dtype`. No gradients.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    fits = (
        packed.dtype == torch.int32 and packed.dim() == 2 and packed.shape[1] == packed_words(dim)
    )

    shown = f"got {packed.dtype} {tuple(packed.shape)}"
    require(
        fits, f"the table must be int32 [R, {packed_words(dim)}] for rows of {dim} numbers, {shown}"
    )
    require(ids.dtype in (torch.int32, torch.int64), f"ids must be int32 or int64, got {ids.dtype}")
    require(dtype in FLOATS, f"dtype must be a float, got {dtype}")
    flat = ids.reshape(-1)
    if choose_backend(backend, packed) == "triton":
        from kernels.int4_embedding.triton_launch import look_up_triton

        return look_up_triton(packed, flat, dim, dtype).view(*ids.shape, dim)
    rows = packed.index_select(0, flat)
    # two codes a byte, the first in its low half
    pairs = rows[:, 1:].contiguous().view(torch.uint8)
    codes = torch.empty(*pairs.shape, 2, dtype=torch.float32, device=packed.device)
    codes[..., 0], codes[..., 1] = pairs & 15, pairs >> 4
    scale, bias = rows[:, :1].contiguous().view(torch.float16).to(torch.float32).split(1, dim=1)
    return codes.flatten(1)[:, :dim].mul_(scale).add_(bias).to(dtype).view(*ids.shape, dim)
