"""Copies out of paged memory, where what lies in pages here and there is joined, and into it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.backend import Backend, choose_backend, require
from kernels.pages.reference import copy_pieces_reference, fill_pages_reference


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


def fill_pages(
    sources: Sequence[Tensor],
    addresses: Tensor,
    num_words: Tensor,
    block: Tensor,
    pages: Tensor,
    begins: Tensor,
    *,
    longest: int,
    backend: Backend = "auto",
) -> None:
    """Copy the first words of S tensors into pages of a block, each into some of its own.

        sources        a a a a a a a   b b      of pages of two words, num_words 5 2
        pages          7 2 5 | 3                begins 0 3 4
        block          7: a a   2: a a   5: a .   3: b b

    What lies behind the words of a piece in its last page stays.

    Args:
        sources: contiguous and 16-byte aligned, on the block's device.
        addresses: int64 [S], `find_addresses(sources)`.
        num_words: int64 [S], words of 8 bytes that count, an even number (`even_words`). A source
            may end within the last 16 bytes: its allocation does not.
        block: int64 [N, words of a page].
        pages: int64 [P], of all pieces one after another.
        begins: int64 [S + 1], where each piece begins among `pages`.
        longest: pages of the longest piece, which the host knows without asking the device.

    Raises:
        ValueError: on shapes and types that do not fit.
    """
    require(
        block.dtype == torch.int64 and block.dim() == 2 and block.is_contiguous(),
        f"block must be int64 [pages, words] and contiguous, got {block.dtype} "
        f"{tuple(block.shape)}",
    )
    index = {"addresses": addresses, "num_words": num_words, "pages": pages, "begins": begins}
    for name, numbers in index.items():
        fits = numbers.dtype == torch.int64 and numbers.dim() == 1 and numbers.is_contiguous()
        require(fits, f"{name} must be int64 and flat, got {numbers.dtype} {tuple(numbers.shape)}")
    num_pieces = len(sources)
    for name, expected in (
        ("addresses", num_pieces),
        ("num_words", num_pieces),
        ("begins", num_pieces + 1),
    ):
        found = len(index[name])
        require(found == expected, f"{name} must be [{expected}], got [{found}]")

    if choose_backend(backend, block) == "triton":
        from kernels.pages.triton_launch import fill_pages_triton

        fill_pages_triton(addresses, num_words, block, pages, begins, longest)
        return
    fill_pages_reference(sources, num_words, block, pages, begins)


def find_addresses(sources: Sequence[Tensor]) -> Tensor:
    """int64 [S] on the CPU: where the numbers of each tensor begin, for `fill_pages`.

    Raises:
        ValueError: a tensor is not contiguous, or does not begin at a multiple of 16 bytes.
    """
    addresses = []
    for tensor in sources:
        address = tensor.data_ptr()
        require(
            tensor.is_contiguous() and address % 16 == 0,
            f"sources must be contiguous and 16-byte aligned, got strides {tensor.stride()} of "
            f"{tuple(tensor.shape)} at {address}",
        )
        addresses.append(address)
    return torch.tensor(addresses, dtype=torch.int64)


def even_words(num_bytes: int) -> int:
    """Words of 8 bytes that hold so many bytes, an even number of them: 4 for 17 bytes."""
    return -(-num_bytes // 16) * 2
