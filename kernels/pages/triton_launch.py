"""Launches of the copies out of pages and into them."""

from torch import Tensor

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.pages import triton_kernels

PAGES = 4  # of a program: 16 words of 8 bytes a thread, where a page has 512


def copy_pieces_triton(
    block: Tensor,
    pages: Tensor,
    begins: Tensor,
    target: Tensor,
    places: Tensor,
    longest: int,
) -> None:
    """See `op.copy_pieces`."""
    if longest == 0:
        return
    words = block.shape[1]
    launch(
        triton_kernels.copy_pieces,
        cdiv(longest, PAGES),
        (block, pages, begins, target, places),
        (),
        (words,),
        (PAGES, next_power_of_2(words)),
        device=block.device,
        num_warps=4,
        columns=len(places),
    )


def fill_pages_triton(
    addresses: Tensor,
    num_words: Tensor,
    block: Tensor,
    pages: Tensor,
    begins: Tensor,
    longest: int,
) -> None:
    """See `op.fill_pages`."""
    if longest == 0:
        return
    words = block.shape[1]
    launch(
        triton_kernels.fill_pages,
        cdiv(longest, PAGES),
        (addresses, num_words, block, pages, begins),
        (),
        (words,),
        (PAGES, next_power_of_2(words)),
        device=block.device,
        num_warps=4,
        columns=len(num_words),
    )
