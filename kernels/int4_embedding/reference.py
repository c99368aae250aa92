"""Row-wise INT4 as plain numbers, unpacked."""

import torch
from torch import Tensor


def quantize_reference(table_RE: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0..15 [R, E], scale [R, 1] and bias [R, 1]; a row is `codes * scale + bias`, in the
    type of the table.

    bias = min, scale = (max − min) / 15, both rounded to float16 before the codes are taken, so
    that the codes make up for that rounding. A constant row has scale 0.
    """
    bias = table_RE.amin(1, keepdim=True)
    scale = (table_RE.amax(1, keepdim=True) - bias) / 15
    bias, scale = (x.half().to(table_RE.dtype) for x in (bias, scale))
    steps = torch.where(scale > 0, (table_RE - bias) / scale, 0)
    return steps.round().clamp(0, 15), scale, bias
