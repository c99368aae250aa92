"""Look-up of packed INT4 rows: eight codes to a 32-bit word, after one word of float16 scale and
bias.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_ids"])
def look_up(
    packed,  # int32 [R, words]
    ids,  # int [N]
    out,  # [N, dim]
    num_ids,
    dim,
    words,
    BLOCK_N: tl.constexpr,
    CODE_WORDS: tl.constexpr,  # a power of two, at least words - 1
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = n < num_ids
    row = packed + tl.load(ids + n, mask=valid, other=0).to(tl.int64) * words
    word = tl.arange(0, CODE_WORDS)
    codes = tl.load(row[:, None] + 1 + word, mask=valid[:, None] & (word < words - 1), other=0)

    header = tl.load(row, mask=valid, other=0)
    scale = header.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    bias = (header >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    # a thread writes the eight numbers of its word
    codes = (codes[:, :, None] >> (4 * tl.arange(0, 8))) & 15
    x = codes.to(tl.float32) * scale[:, None, None] + bias[:, None, None]
    x = tl.reshape(x.to(out.dtype.element_ty), (BLOCK_N, CODE_WORDS * 8))
    col = tl.arange(0, CODE_WORDS * 8)
    tl.store(out + n[:, None] * dim + col, x, mask=valid[:, None] & (col < dim))
