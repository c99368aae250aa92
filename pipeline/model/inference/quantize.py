"""Number formats of inference: INT4 embedding tables (ULTRA-HSTU, arXiv:2602.16986), FP8 where
training had none.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.int4_embedding.op import look_up, packed_words, quantize
from pipeline.config import ServeConfig
from pipeline.model.encoders.stu import STU

logger = logging.getLogger(__name__)

# a table that would shrink by less stays as it is: all such tables of a model are a few hundred KB
WORTH_BYTES = 2**16


class Int4Embedding(nn.Module):
    """An `nn.Embedding` of four bits a number, with row-wise float16 scale and bias, frozen."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = weight.shape
        self.dtype = weight.dtype
        self.packed: Tensor
        self.register_buffer("packed", quantize(weight.detach()))

    def forward(self, ids: Tensor) -> Tensor:
        return look_up(self.packed, ids, dim=self.embedding_dim, dtype=self.dtype)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def as_served(model: nn.Module, limits: ServeConfig) -> None:
    """Give the model the number formats that the operator wants of it."""
    if limits.int4_tables:
        quantize_tables(model)
    if limits.fp8 is not None:
        for layer in model.modules():
            if isinstance(layer, STU):
                layer.shape = replace(layer.shape, fp8=limits.fp8)


def quantize_tables(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Put INT4 tables in the place of the model's embeddings, where that saves `WORTH_BYTES` or
    more.

    Returns:
        Per table its bytes before and after; equal where it stayed.
    """
    found: dict[str, tuple[int, int]] = {}
    changed = total_before = total_after = 0
    for parent_name, parent in list(model.named_modules()):
        for name, table in list(parent.named_children()):
            if not isinstance(table, nn.Embedding):
                continue

            before = table.weight.nbytes
            after = table.num_embeddings * packed_words(table.embedding_dim) * torch.int32.itemsize
            if before - after >= WORTH_BYTES:
                setattr(parent, name, Int4Embedding(table.weight))
                changed += 1
            else:
                after = before

            found[f"{parent_name}.{name}".lstrip(".")] = before, after
            total_before += before
            total_after += after

    logger.info(
        "INT4: %d of %d tables, %d bytes instead of %d",
        changed,
        len(found),
        total_after,
        total_before,
    )
    return found
