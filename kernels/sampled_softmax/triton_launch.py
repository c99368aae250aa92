"""Launches of the sampled softmax kernels; same functions as `torch_chunked`."""

import torch
from torch import Tensor

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.sampled_softmax import triton_kernels
from kernels.sampled_softmax.reference import NORM_EPS, normalise
from kernels.sampled_softmax.torch_chunked import through_norm

TILE = 4096  # numbers of a program's block of vectors: 32 a thread
LONGEST_PART = 4096  # pairs of an item that one program adds where all items have more


def _blocks(dim: int) -> tuple[int, int]:
    """BLOCK_R, BLOCK_D."""
    block_d = next_power_of_2(dim)
    return min(max(TILE // block_d, 1), 128), block_d


def forward(
    users: Tensor,
    items: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    log_rates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per position: loss, log of the summed exponentials, gradient of the loss towards the user
    vector; in float32.
    """
    num_positions, dim = users.shape
    loss, lse = (
        torch.empty(num_positions, dtype=torch.float32, device=users.device) for _ in range(2)
    )
    grad = torch.empty(num_positions, dim, dtype=torch.float32, device=users.device)

    if num_positions:
        launch(
            triton_kernels.forward,
            num_positions,
            (users, items, positives, negatives, log_rates, loss, lse, grad),
            (negatives.shape[1],),
            (dim, 1 / temperature),
            (log_rates is not None, *_blocks(dim)),
            device=users.device,
            num_warps=4,
            num_stages=3,
        )

    return loss, lse, grad


def item_gradients(
    users: Tensor,
    items: Tensor,
    positives: Tensor,
    negatives: Tensor,
    loss: Tensor,
    lse: Tensor,
    share: Tensor,
    temperature: float,
    log_rates: Tensor | None = None,
) -> Tensor:
    """[N, D]: the gradient of `(loss * share).sum()` towards the item vectors, in float32."""
    num_items, dim = items.shape
    columns = negatives.shape[1] + 1
    order, starts = _pairs_by_item(positives, negatives, num_items)

    factor = share / temperature
    per_norm = 1 / torch.linalg.vector_norm(users, dim=1, dtype=torch.float32).clamp(min=NORM_EPS)
    tensors = users, items, per_norm, lse - factor.log(), factor * torch.expm1(-loss), order, starts
    num_parts = min(cdiv(len(order), num_items * LONGEST_PART), 64) if num_items else 1

    grad = torch.empty(num_items, num_parts, dim, dtype=torch.float32, device=items.device)
    if num_items == 0:
        return grad[:, 0]

    launch(
        triton_kernels.item_gradients,
        num_items,
        (*tensors, log_rates, grad),
        (num_parts, columns),
        (dim, 1 / temperature),
        (log_rates is not None, num_parts > 1, *_blocks(dim)),
        device=items.device,
        num_warps=4,
        num_stages=3,
        columns=num_parts,
    )
    if num_parts == 1:
        return grad[:, 0]

    wide = items.float()
    return through_norm(
        grad.sum(1), normalise(wide), torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    )


def _pairs_by_item(positives: Tensor, negatives: Tensor, num_items: int) -> tuple[Tensor, Tensor]:
    """Pairs `position * (1 + R) + column` sorted by the item they drew, and where each item's
    begin.

    Column 0 is the positive. Collisions count for nothing; they sort behind all items. Narrow keys:
    a radix sort takes a pass a byte.
    """
    key = next(
        kind
        for kind in (torch.int16, torch.int32, torch.int64)
        if num_items <= torch.iinfo(kind).max
    )

    ids = torch.empty(len(negatives), negatives.shape[1] + 1, dtype=key, device=negatives.device)
    ids[:, 0] = positives
    ids[:, 1:] = negatives
    ids[:, 1:].masked_fill_(negatives == positives[:, None], num_items)
    ids, order = torch.sort(ids.flatten(), stable=True)

    return order, torch.searchsorted(ids, torch.arange(num_items + 1, dtype=key, device=ids.device))
