"""Sampled softmax on tensor cores: the products of unit vectors in float16, sums in float32.

The numbers of a unit vector are 1 or less, so float16 keeps the 11 bits of them that TF32 would, in
half the bytes. Reading the drawn rows is what the loss takes its time for.

    unit_rows        vectors → unit vectors in float16, and lengths
    forward          one program a position, as attention of one query over the drawn items
    pair_keys        what the pairs (position, drawn item) are sorted by
    item_gradients   one program a key: all pairs that drew its item, or its two items; long ones
                     have further programs, whose sums `add_further_parts` adds

A tensor core multiplies 16 rows at a time. Forward has one: the user, 16 times over. Backward has
up to two different ones, so that a key may stand for two neighbouring items: keys of 16 bits, which
sort in half the time of 32, are then enough for 131,070 items. Sums have a fixed order: no atomics.

Suffixes: R negatives or pairs of a block, D the width, to a power of 2.
"""

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-6)
ROWS = tl.constexpr(16)  # of one product, the fewest
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _through_norm(grad, direction, norm):
    """[rows, D]: the gradient towards x from that towards x / max(norm, NORM_EPS)."""
    along = tl.where(norm > NORM_EPS, tl.sum(grad * direction, 1), 0.0)
    return (grad - along[:, None] * direction) / tl.maximum(norm, NORM_EPS)[:, None]


@triton.jit(do_not_specialize=["num_rows"])
def unit_rows(
    rows,  # [num_rows, dim]
    unit,  # float16 [num_rows, BLOCK_D] out: zeros behind the width
    norms,  # float32 [num_rows] out
    num_rows,
    dim,
    BROKEN_TO_ZERO: tl.constexpr,  # a row that is not finite: its norm alone says so
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    col = tl.arange(0, BLOCK_D)
    mask = (r < num_rows)[:, None] & (col < dim)
    x = tl.load(rows + r[:, None] * dim + col, mask=mask, other=0.0).to(tl.float32)

    norm = tl.sqrt(tl.sum(x * x, 1))
    x = x / tl.maximum(norm, NORM_EPS)[:, None]
    if BROKEN_TO_ZERO:
        x = tl.where((norm < float("inf"))[:, None], x, 0.0)
    tl.store(norms + r, norm, mask=r < num_rows)
    tl.store(unit + r[:, None] * BLOCK_D + col, x.to(tl.float16), mask=(r < num_rows)[:, None])


@triton.jit(do_not_specialize=["num_negatives"])
def forward(
    unit_users,  # float16 [P, BLOCK_D]
    user_norms,  # float32 [P]
    unit_items,  # float16 [N, BLOCK_D]
    positives,  # int [P]
    negatives,  # int [P, num_negatives]
    log_rates,  # float32 [N]: less of a negative's score; read with RATES only
    loss,  # float32 [P] out
    lse,  # float32 [P] out: log of the summed exponentials
    grad,  # float32 [P, dim] out: of the loss, towards the user
    num_negatives,
    dim,
    per_temperature,
    RATES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    position = tl.program_id(0).to(tl.int64)
    col = tl.arange(0, BLOCK_D)
    # scores are powers of 2, not of e, until the end
    scale = per_temperature / LN_2
    row = tl.arange(0, ROWS)[:, None] * 0
    user_16 = tl.load(unit_users + position * BLOCK_D + (row + col))
    user = tl.load(unit_users + position * BLOCK_D + col).to(tl.float32)
    norm = tl.load(user_norms + position)

    positive = tl.load(positives + position).to(tl.int64)
    own = tl.load(unit_items + positive * BLOCK_D + col).to(tl.float32)
    # a user that is not finite has a row of zeros, and a loss that is not finite
    own_score = tl.sum(user * own, 0) * scale + norm * 0.0

    # a maximum, sums and a weighted mean, as they are after the positive
    top = tl.zeros((ROWS,), tl.float32) + own_score
    total = tl.full((ROWS,), 1.0, tl.float32)
    mean = tl.zeros((ROWS, BLOCK_D), tl.float32) + own[None, :]
    for begin in range(0, num_negatives, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        valid = r < num_negatives
        item = tl.load(negatives + position * num_negatives + r, mask=valid, other=0)
        item = item.to(tl.int64)
        x = tl.load(unit_items + item[:, None] * BLOCK_D + col, mask=valid[:, None], other=0.0)

        # a collision's share is 0
        less = tl.where(valid & (item != positive), 0.0, float("inf"))
        if RATES:
            less += tl.load(log_rates + item, mask=valid, other=0.0) / LN_2
        score = tl.dot(user_16, tl.trans(x)) * scale - less[None, :]  # [16, R]

        new_top = tl.maximum(top, tl.max(score, 1))
        shrink, share = tl.exp2(top - new_top), tl.exp2(score - new_top[:, None])
        total = total * shrink + tl.sum(share, 1)
        mean = tl.dot(share.to(tl.float16), x, mean * shrink[:, None])
        top = new_top

    # all 16 rows are alike
    whole = tl.sum(total, 0) / ROWS
    out = (tl.sum(top, 0) / ROWS - own_score + tl.log2(whole)) * LN_2
    tl.store(loss + position, out)
    tl.store(lse + position, out + own_score * LN_2)
    toward = (tl.sum(mean, 0) / (ROWS * whole) - own) * per_temperature
    along = tl.where(norm > NORM_EPS, tl.sum(toward * user, 0), 0.0)
    toward = (toward - along * user) / tl.maximum(norm, NORM_EPS)
    tl.store(grad + position * dim + col, toward, mask=col < dim)


@triton.jit(do_not_specialize=["num_keys", "num_negatives"])
def pair_keys(
    positives,  # int [P]
    negatives,  # int [P, num_negatives]
    keys,  # int [P, 1 + num_negatives] out: the positive's, then those of the negatives
    first_odd,  # int32 [P] out, with PAIRED: the column from which on negatives have odd numbers
    num_keys,
    num_negatives,
    PAIRED: tl.constexpr,  # items 2k and 2k + 1 share the key k
    LOWEST: tl.constexpr,  # the key 0, as it is stored
    BLOCK_R: tl.constexpr,
):
    """Keys of a position's pairs. With two items to a key, even ones come first and odd ones last,
    so that a pair's column tells which of the two it drew.

    items of a row    7  4 3 8 5     the positive is 7
    keys              3  2 4 2 1     of 4, 8, 5 and 3; first_odd = 3

    A negative that is the positive has the key `num_keys`, behind all others.
    """
    position = tl.program_id(0).to(tl.int64)
    own_keys = keys + position * (num_negatives + 1)
    kind = keys.dtype.element_ty
    positive = tl.load(positives + position).to(tl.int32)
    own = positive // 2 if PAIRED else positive
    tl.store(own_keys, (own + LOWEST).to(kind))

    num_even = tl.full((), 0, tl.int32)
    for begin in range(0, num_negatives, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        valid = r < num_negatives
        item = tl.load(negatives + position * num_negatives + r, mask=valid, other=1).to(tl.int32)
        key, place = item, r
        if PAIRED:
            key = item // 2
            even = 1 - item % 2
            before = num_even + tl.cumsum(even, 0) - even
            place = tl.where(even == 1, before, num_negatives - 1 - (r - before))
            num_even += tl.sum(even, 0)
        key = tl.where(item == positive, num_keys, key)
        tl.store(own_keys + 1 + place, (key + LOWEST).to(kind), mask=valid)
    if PAIRED:
        tl.store(first_odd + position, 1 + num_even)


@triton.jit(do_not_specialize=["num_keys", "num_items"])
def item_gradients(
    unit_users,  # float16 [P, BLOCK_D]
    unit_items,  # float16 [N, BLOCK_D]
    item_norms,  # float32 [N]
    # float32 [P, 4]: log2 of a share's divisor, the positive's factor, its column `first_odd`, and
    # whether the positive's number is odd
    of_position,
    order,  # int64 [pairs]: position * columns + column, sorted by key; column 0 is the positive
    starts,  # int64 [keys + 1]: where each key's pairs begin
    further_key,  # int64 [F]: of each further part; the number of keys where there is none
    further_part,  # int64 [F]: the first of a key's further parts is 1
    log_rates,  # float32 [N], with RATES
    factor,  # float32 [1]: of all sums
    grad,  # float32 [N, dim] out; of keys with further parts the sum of their first alone
    partial,  # float32 [F, 2, BLOCK_D] out: sums of further parts, towards the normalised item
    num_keys,
    num_items,
    dim,
    per_temperature,
    COLUMNS: tl.constexpr,
    RATES: tl.constexpr,
    PAIRED: tl.constexpr,
    LONGEST: tl.constexpr,  # pairs of a part
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Programs after those of the keys add the further parts of long ones."""
    further = tl.program_id(0).to(tl.int64) - num_keys
    key, part = further + num_keys, tl.zeros((), tl.int64)
    if further >= 0:
        key = tl.load(further_key + further)
        part = tl.load(further_part + further)
    used = key < num_keys
    start = tl.load(starts + key, mask=used, other=0)
    stop = tl.load(starts + key + 1, mask=used, other=0)
    begin = start + part * LONGEST
    end = tl.minimum(begin + LONGEST, stop)

    # rows of the product: the key's item 16 times over, or its two in turn
    col, row = tl.arange(0, BLOCK_D), tl.arange(0, ROWS)
    scale = per_temperature / LN_2
    of_key = 2 if PAIRED else 1
    which = row % of_key
    item = key * of_key + which
    there = used & (item < num_items)
    x = tl.load(unit_items + item[:, None] * BLOCK_D + col, mask=there[:, None], other=0.0)
    rates = tl.zeros((ROWS,), tl.float32)
    if RATES:
        rates += tl.load(log_rates + item, mask=there, other=0.0) / LN_2

    total = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for at in range(begin, end, BLOCK_R):
        pair = at + tl.arange(0, BLOCK_R)
        valid = pair < end
        drawn = tl.load(order + pair, mask=valid, other=0).to(tl.int32)
        position = drawn // COLUMNS
        column = drawn - position * COLUMNS
        position = position.to(tl.int64)
        user = tl.load(
            unit_users + position[:, None] * BLOCK_D + col, mask=valid[:, None], other=0.0
        )

        facts = of_position + position * 4
        less = tl.load(facts, mask=valid, other=float("inf"))
        of_positive = tl.load(facts + 1, mask=valid, other=0.0)
        score = tl.dot(x, tl.trans(user)) * scale - rates[:, None]  # [16, R]
        share = tl.exp2(score - less[None, :])
        share = tl.where((valid & (column == 0))[None, :], of_positive[None, :], share)

        if PAIRED:
            first_odd = tl.load(facts + 2, mask=valid, other=0.0)
            odd_positive = tl.load(facts + 3, mask=valid, other=0.0)
            odd = tl.where(column == 0, odd_positive > 0, column >= first_odd)
            share = tl.where(odd[None, :] == (which == 1)[:, None], share, 0.0)
        total = tl.dot(share.to(tl.float16), user, total)

    total *= tl.load(factor)
    first = row < of_key
    if further >= 0:
        place = (further * 2 + row)[:, None] * BLOCK_D + col
        tl.store(partial + place, total, mask=first[:, None])
    else:
        if stop - start <= LONGEST:
            norm = tl.load(item_norms + item, mask=there, other=1.0)
            total = _through_norm(total, x.to(tl.float32), norm)
        mask = (there & first)[:, None] & (col < dim)
        tl.store(grad + item[:, None] * dim + col, total, mask=mask)


@triton.jit(do_not_specialize=["num_keys", "num_items"])
def add_further_parts(
    unit_items,  # float16 [N, BLOCK_D]
    item_norms,  # float32 [N]
    starts,  # int64 [keys + 1]
    further_key,  # int64 [F]
    further_part,  # int64 [F]
    partial,  # float32 [F, 2, BLOCK_D]
    grad,  # float32 [N, dim] in and out
    num_keys,
    num_items,
    dim,
    PAIRED: tl.constexpr,
    LONGEST: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a further part; the one of a key's first adds all of its key, in their order."""
    further = tl.program_id(0).to(tl.int64)
    key = tl.load(further_key + further)
    if key < num_keys and tl.load(further_part + further) == 1:
        length = tl.load(starts + key + 1) - tl.load(starts + key)
        num_further = (length - 1) // LONGEST
        col, row = tl.arange(0, BLOCK_D), tl.arange(0, 2)
        of_key = 2 if PAIRED else 1
        item = key * of_key + row
        there = (item < num_items) & (row < of_key)
        place = grad + item[:, None] * dim + col
        mask = there[:, None] & (col < dim)

        total = tl.load(place, mask=mask, other=0.0)
        for one in range(further, further + num_further):
            rows = (one * 2 + row)[:, None] * BLOCK_D + col
            total += tl.load(partial + rows, mask=there[:, None], other=0.0)
        x = tl.load(unit_items + item[:, None] * BLOCK_D + col, mask=there[:, None], other=0.0)
        norm = tl.load(item_norms + item, mask=there, other=1.0)
        tl.store(place, _through_norm(total, x.to(tl.float32), norm), mask=mask)
