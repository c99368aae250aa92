"""Types of the STU layer that its callers and all its forms share."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class STUWeights(NamedTuple):
    """Linear weights are [outputs, inputs], as in `nn.Linear`; f1's outputs are U, Q, K, V."""

    norm_weight: Tensor
    norm_bias: Tensor
    uvqk_weight: Tensor
    uvqk_bias: Tensor
    norm_attn_weight: Tensor
    norm_attn_bias: Tensor
    out_weight: Tensor
    out_bias: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class STUShape:
    """What a layer is, beside its weights."""

    num_heads: int
    d_qk: int
    d_v: int
    norm_eps: float
    attn_alpha: float
    scaling_seq_len: int
    window: int | None
    full_rows: int
    prefix: int
    silu_qkv: bool = True  # False: Q, K and V stay linear, the authors' production form
    concat_ua: bool = False  # f2 reads concat[U, A, Norm(A) ⊙ U], their other difference
    fp8: bool = False  # f1 and f2 on row-wise e4m3, backward as if nothing had been rounded
    norm_a_fp32: bool = False  # Norm(A) reads A in float32, not rounded to half precision
    recompute: tuple[str, ...] = ()  # of RECOMPUTABLE: made again in backward instead of kept

    def attended_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """A's type where the layer computes in `dtype`."""
        return torch.promote_types(dtype, torch.float32) if self.norm_a_fp32 else dtype

    @property
    def uvqk_widths(self) -> list[int]:
        return [self.num_heads * width for width in (self.d_v, self.d_qk, self.d_qk, self.d_v)]


@dataclass(frozen=True, slots=True)
class Sequences:
    """How the rows of a batch fall into sequences, as `semi_local_attention` takes it."""

    seq_offsets: Tensor
    max_seq_len: int
    num_targets: Tensor | None = None
    target_visible: Tensor | None = None
    target_from: Tensor | None = None
    extra_full_rows: Tensor | None = None

    @property
    def mask_tensors(
        self,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
        return self.num_targets, self.target_visible, self.target_from, self.extra_full_rows
