"""Copies out of paged memory, piece by piece."""

from torch import Tensor


def copy_pieces_reference(
    block: Tensor, pages: Tensor, begins: Tensor, target: Tensor, places: Tensor
) -> None:
    """See `op.copy_pieces`."""
    bounds = begins.tolist()
    for piece, begin in enumerate(places.tolist()):
        own = pages[bounds[piece] : bounds[piece + 1]]
        target[begin : begin + len(own)] = block[own]
