"""Copies out of paged memory and into it, piece by piece."""

from collections.abc import Sequence

import torch
from torch import Tensor


def copy_pieces_reference(
    block: Tensor, pages: Tensor, begins: Tensor, target: Tensor, places: Tensor
) -> None:
    """See `op.copy_pieces`."""
    bounds = begins.tolist()
    for piece, begin in enumerate(places.tolist()):
        own = pages[bounds[piece] : bounds[piece + 1]]
        target[begin : begin + len(own)] = block[own]


def fill_pages_reference(
    sources: Sequence[Tensor], num_words: Tensor, block: Tensor, pages: Tensor, begins: Tensor
) -> None:
    """See `op.fill_pages`."""
    bounds, counts = begins.tolist(), num_words.tolist()
    for piece, source in enumerate(sources):
        # the bytes there are: what fills up the last words has no meaning
        wanted = min(counts[piece] * block.itemsize, source.nbytes)
        numbers = source.reshape(-1).view(torch.uint8)[:wanted]
        own = pages[bounds[piece] : bounds[piece + 1]]
        filled = block[own]
        filled.view(-1).view(torch.uint8)[:wanted] = numbers
        block[own] = filled
