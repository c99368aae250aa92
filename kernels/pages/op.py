"""Copies out of paged memory: what lies in pages here and there is joined where it is wanted."""

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend, require
from kernels.pages.reference import copy_pieces_reference


def copy_pieces(
    block: Tensor,
    pages: Tensor,
    begins: Tensor,
    target: Tensor,
    places: Tensor,
    *,
    longest: int,
    backend: Backend = "auto",
) -> None:
    """Copy S pieces, each of some pages of a block, each to a place of its own in `target`.

        pages          7 2 5 | 3 9      two pieces, begins 0 3 5
        target         . . 7 2 5 . 3 9  places 2 6

    Args:
        block: int64 [N, words of a page].
        pages: int64 [P], of all pieces one after another.
        begins: int64 [S + 1], where each piece begins among `pages`.
        target: int64 [M, words of a page]; its places must not overlap.
        places: int64 [S], the row of `target` where each piece begins.
        longest: pages of the longest piece, which the host knows without asking the device.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    words = block.dtype == target.dtype == torch.int64 and block.dim() == target.dim() == 2
    require(
        words and block.shape[1] == target.shape[1],
        f"block and target must be int64 [pages, words] of one width, got {block.dtype} "
        f"{tuple(block.shape)} and {target.dtype} {tuple(target.shape)}",
    )
    whole = block.is_contiguous() and target.is_contiguous()
    require(whole, "block and target must be contiguous")
    for name, index in (("pages", pages), ("begins", begins), ("places", places)):
        fits = index.dtype == torch.int64 and index.dim() == 1 and index.is_contiguous()
        require(fits, f"{name} must be int64 and flat, got {index.dtype} {tuple(index.shape)}")
    require(
        len(begins) == len(places) + 1,
        f"begins must be [{len(places) + 1}], one more than pieces, got [{len(begins)}]",
    )

    if choose_backend(backend, block) == "triton":
        from kernels.pages.triton_launch import copy_pieces_triton

        copy_pieces_triton(block, pages, begins, target, places, longest)
        return
    copy_pieces_reference(block, pages, begins, target, places)
