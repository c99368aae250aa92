"""Number formats of inference: INT4 embedding tables (ULTRA-HSTU, arXiv:2602.16986), FP8 where
training had none.
"""

import logging
from dataclasses import replace

import torch
from torch import Tensor, nn

from kernels.int4_embedding.op import look_up, packed_words, quantize
from pipeline.config import ServeConfig, UserError
from pipeline.model.encoders.stu import STU

logger = logging.getLogger(__name__)

# a table that would shrink by less stays as it is: all such tables of a model are a few hundred KB
WORTH_BYTES = 2**16
CHECKED_ROWS = 2**16  # of a table at a time


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
    """Give the model the number formats that the operator wants of it.

    Raises:
        UserError: FP8 for layers that read concat[U, A, Norm(A) * U]: A is far smaller than the
        others, and under their common scale most of it would be 0.
    """
    if limits.int4_tables:
        quantize_tables(model)
    if limits.fp8 is not None:
        for layer in model.modules():
            if isinstance(layer, STU):
                if limits.fp8 and layer.shape.concat_ua:
                    raise UserError(
                        "serve.fp8 is true, and the model was trained with model.concat_ua: one "
                        "scale a row does not fit both. Set serve.fp8 to null or false"
                    )
                layer.shape = replace(layer.shape, fp8=limits.fp8)


def warn_of_coarse_rows(name: str, weight: Tensor, packed: Int4Embedding) -> None:
    """Say how many rows lose more than the four bits: those whose numbers differ by far less than
    they are from 0, or by less than float16 holds as a scale.
    """
    count = 0
    for first in range(0, len(weight), CHECKED_ROWS):
        rows = weight[first : first + CHECKED_ROWS]
        ids = torch.arange(first, first + len(rows), device=weight.device)
        count += int(coarse_rows(rows, packed(ids)).sum())
    if count:
        logger.warning(
            "INT4: %d of %d rows of %s are off by more than a step of their range / 15, since "
            "float16 cannot hold their scale or bias closely enough",
            count,
            len(weight),
            name,
        )


def coarse_rows(weight: Tensor, packed: Tensor) -> Tensor:
    """bool [R], of rows [R, d] and what their packed form gives back: an exact scale and bias err
    by half a step.
    """
    step = (weight.amax(1) - weight.amin(1)).float() / 15
    return (packed - weight).float().abs().amax(1) > step


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
                packed = Int4Embedding(table.weight)
                warn_of_coarse_rows(f"{parent_name}.{name}", table.weight.detach(), packed)
                setattr(parent, name, packed)
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
