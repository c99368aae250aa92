"""Pages of several pieces to where each piece begins, and back. A page is copied by one program,
whole.
"""

import triton
import triton.language as tl


@triton.jit
def copy_pieces(
    block,  # int64 [N, words]
    pages,  # int64 [P]
    begins,  # int64 [S + 1]
    target,  # int64 [M, words]
    places,  # int64 [S]
    words,
    BLOCK_P: tl.constexpr,  # pages of a program
    BLOCK_W: tl.constexpr,  # a power of two, at least words
):
    piece = tl.program_id(1)
    begin = tl.load(begins + piece)
    num_pages = tl.load(begins + piece + 1) - begin

    at = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    col = tl.arange(0, BLOCK_W)
    inside = at < num_pages
    page = tl.load(pages + begin + at, mask=inside, other=0)
    mask = inside[:, None] & (col < words)
    x = tl.load(block + page[:, None] * words + col, mask=mask)
    to = tl.load(places + piece) + at
    tl.store(target + to[:, None] * words + col, x, mask=mask)


@triton.jit
def fill_pages(
    addresses,  # int64 [S], of sources of int64 words: multiples of 16
    num_words,  # int64 [S], even
    block,  # int64 [N, words]
    pages,  # int64 [P]
    begins,  # int64 [S + 1]
    words,
    BLOCK_P: tl.constexpr,  # pages of a program
    BLOCK_W: tl.constexpr,  # a power of two, at least words
):
    piece = tl.program_id(1)
    begin = tl.load(begins + piece)
    num_pages = tl.load(begins + piece + 1) - begin
    source = tl.load(addresses + piece).to(tl.pointer_type(tl.int64))
    source = tl.multiple_of(source, 16)
    count = tl.multiple_of(tl.load(num_words + piece), 2)  # so that 16 bytes are copied at a time

    at = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    col = tl.arange(0, BLOCK_W)
    word = at[:, None] * words + col
    inside = at < num_pages
    mask = inside[:, None] & (col < words) & (word < count)
    x = tl.load(source + word, mask=mask)
    page = tl.load(pages + begin + at, mask=inside, other=0)
    tl.store(block + page[:, None] * words + col, x, mask=mask)
