"""The log of the summed exponentials of all scores, without the scores in memory.

    largest_part     of one tensor, the largest finite number of each part
    half_rows        vectors → float16, all times one power of 2 that the largest number fits
    log_partition    one program a block of users: all items block by block, with a running maximum,
                     a sum and, for the users' gradient, the items' mean by their shares
    user_facts       what a block of users brings to the items' gradient, beside its vectors
    item_gradients   one program a block of items: each score anew, its share of the user's sum, and
                     the shares' product with the users

After flash attention (arXiv:2205.14135) and cut cross entropy (arXiv:2411.09009). Sums have a fixed
order: no atomics.

TF32 keeps 11 bits of a number, and so does float16, whose products take half the time and half the
bytes. Its range is small: from 2**-14 its numbers have all their bits, and they end at 2**16. So
vectors are scaled to end at 2**15, and a share, which is 1 or less, is multiplied by 2**15. What is
2**29 times smaller than the largest then still has all its bits. Powers of 2 change no bit.

Suffixes: P rows of a program, N rows of the other side in one step, D the width to a power of 2.
Sums are float32.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SHARE_BITS = tl.constexpr(15)  # a share is multiplied by 2**15
MOST_SHIFT = tl.constexpr(60)  # of a scale: the product of two must be a number, too


@triton.jit(do_not_specialize=["num_rows", "num_blocks"])
def largest_part(
    rows,  # float32 [num_rows, dim]
    parts,  # float32 [programs] out
    num_rows,
    num_blocks,  # of one part
    dim,
    BLOCK: tl.constexpr,
):
    end = num_rows.to(tl.int64) * dim
    begin = tl.program_id(0).to(tl.int64) * num_blocks * BLOCK
    largest = tl.zeros((BLOCK,), tl.float32)
    for block in range(num_blocks):
        at = begin + block * BLOCK + tl.arange(0, BLOCK)
        x = tl.abs(tl.load(rows + at, mask=at < end, other=0.0))
        # what is not finite leaves the scale of all others alone
        largest = tl.maximum(largest, tl.where(x < float("inf"), x, 0.0))
    tl.store(parts + tl.program_id(0), tl.max(largest, 0))


@triton.jit
def _scale_of(parts, num_parts, PARTS: tl.constexpr):
    """The power of 2 that takes the largest of these numbers to between 2**14 and 2**15."""
    number = tl.arange(0, PARTS)
    largest = tl.max(tl.load(parts + number, mask=number < num_parts, other=0.0), 0)
    # the exponent of a float32: its bits 23 to 30
    exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    shift = tl.minimum(tl.maximum(14 - exponent, -MOST_SHIFT), MOST_SHIFT)
    return ((shift + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def half_rows(
    rows,  # float32 [num_rows, dim]
    parts,  # float32 [num_parts], of which there are PARTS or less
    half,  # float16 [a multiple of BLOCK_R, BLOCK_D] out: zeros behind the rows and the width
    scale,  # float32 [1] out
    num_rows,
    num_parts,
    dim,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    own_scale = _scale_of(parts, num_parts, PARTS)
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_D)
    mask = (r < num_rows)[:, None] & (col < dim)
    x = tl.load(rows + r[:, None] * dim + col, mask=mask, other=0.0)
    tl.store(half + r[:, None] * BLOCK_D + col, (x * own_scale).to(tl.float16))
    if tl.program_id(0) == 0:
        tl.store(scale, own_scale)


@triton.jit
def _load_block(half, begin, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """[BLOCK, D]: rows from `begin` on; the tensor has rows up to a multiple of the block."""
    # int64: rows * width passes 2**31 in large catalogues
    place = tl.cast(begin, tl.int64) * BLOCK_D
    row, col = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    return tl.load(half + place + row[:, None] * BLOCK_D + col)


@triton.jit
def _add_items(
    user,
    items,
    begin,
    num_items,
    per_score,
    top,
    total,
    mean,
    MEAN: tl.constexpr,
    LAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Maximum of the products, sum and weighted sum after a block of items; `LAST`: there may be
    fewer.
    """
    item = _load_block(items, begin, BLOCK_N, BLOCK_D)
    product = tl.dot(user, tl.trans(item))  # [P, N]
    if LAST:
        valid = begin + tl.arange(0, BLOCK_N) < num_items
        product = tl.where(valid[None, :], product, float("-inf"))

    new_top = tl.maximum(top, tl.max(product, 1))
    shrink = tl.exp2((top - new_top) * per_score)
    share = tl.exp2(product * per_score - (new_top * per_score - SHARE_BITS)[:, None])
    total = total * shrink + tl.sum(share, 1)
    if MEAN:
        mean = tl.dot(share.to(tl.float16), item, mean * shrink[:, None])
    return new_top, total, mean


@triton.jit(do_not_specialize=["num_users", "num_items"])
def log_partition(
    half_users,  # float16 [P to a multiple, BLOCK_D]
    half_items,  # float16 [N to a multiple, BLOCK_D]
    user_scale,  # float32 [1]
    item_scale,  # float32 [1]
    lse,  # float32 [P] out
    mean,  # float32 [P, dim] out, with MEAN: Σ share · item
    num_users,
    num_items,
    dim,
    MEAN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    first = tl.program_id(0) * BLOCK_P
    user = _load_block(half_users, first, BLOCK_P, BLOCK_D)
    of_items = tl.load(item_scale)
    # scores are powers of 2, not of e, until the end
    per_score = LOG2_E / tl.load(user_scale) / of_items

    top = tl.full((BLOCK_P,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_P,), tl.float32)
    sums = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    # whole blocks need no mask
    whole = num_items // BLOCK_N * BLOCK_N
    for begin in range(0, whole, BLOCK_N):
        top, total, sums = _add_items(
            user, half_items, begin, num_items, per_score, top, total, sums,
            MEAN, False, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if whole < num_items:
        top, total, sums = _add_items(
            user, half_items, whole, num_items, per_score, top, total, sums,
            MEAN, True, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    p = first + tl.arange(0, BLOCK_P)
    out = (top * per_score - SHARE_BITS + tl.log2(total)) * LN_2
    # of no items at all
    out = tl.where(total == 0, float("-inf"), out)
    tl.store(lse + p, out, mask=p < num_users)
    if MEAN:
        sums = sums / tl.where(total == 0, 1.0, total)[:, None] / of_items
        col = tl.arange(0, BLOCK_D)
        place = p.to(tl.int64)[:, None] * dim + col
        tl.store(mean + place, sums, mask=(p < num_users)[:, None] & (col < dim))


@triton.jit(do_not_specialize=["num_users", "num_padded", "num_parts"])
def user_facts(
    lse,  # float32 [P]
    factor,  # float32 [P]: gradient of a user's lse
    parts,  # float32 [num_parts]: of the factor
    facts,  # float32 [2, P to a multiple] out: lse as a power of 2, less the bits; scaled factor
    scale,  # float32 [1] out: of the factor
    num_users,
    num_padded,
    num_parts,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Users behind the last have a share and a factor of 0."""
    # to 1, where vectors go to 2**15: the shares that it multiplies have the bits
    own_scale = _scale_of(parts, num_parts, PARTS) * (1 / 2**15)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = p < num_users
    less = tl.load(lse + p, mask=mask, other=float("inf")) * LOG2_E - SHARE_BITS
    tl.store(facts + p, less)
    tl.store(facts + num_padded + p, tl.load(factor + p, mask=mask, other=0.0) * own_scale)
    if tl.program_id(0) == 0:
        tl.store(scale, own_scale)


@triton.jit(do_not_specialize=["num_items", "num_padded"])
def item_gradients(
    half_items,  # float16 [N to a multiple, BLOCK_D]
    half_users,  # float16 [P to a multiple, BLOCK_D]
    item_scale,  # float32 [1]
    user_scale,  # float32 [1]
    facts,  # float32 [2, P to a multiple]
    factor_scale,  # float32 [1]
    grad,  # float32 [N, dim] out
    num_items,
    num_padded,
    dim,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Σ over the users of factor · share · user; here P are items and N users."""
    first = tl.program_id(0) * BLOCK_P
    item = _load_block(half_items, first, BLOCK_P, BLOCK_D)
    of_users = tl.load(user_scale)
    per_score = LOG2_E / of_users / tl.load(item_scale)

    total = tl.zeros((BLOCK_P, BLOCK_D), tl.float32)
    for begin in range(0, num_padded, BLOCK_N):
        user = _load_block(half_users, begin, BLOCK_N, BLOCK_D)
        n = begin + tl.arange(0, BLOCK_N)
        less, factor = tl.load(facts + n), tl.load(facts + num_padded + n)
        product = tl.dot(item, tl.trans(user))  # [P, N]
        share = tl.exp2(product * per_score - less[None, :]) * factor[None, :]
        total = tl.dot(share.to(tl.float16), user, total)

    total = total / of_users / tl.load(factor_scale) * (1 / 2**SHARE_BITS)
    p, col = first + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_D)
    place = p.to(tl.int64)[:, None] * dim + col
    tl.store(grad + place, total, mask=(p < num_items)[:, None] & (col < dim))
