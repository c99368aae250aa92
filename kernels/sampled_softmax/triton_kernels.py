"""Sampled softmax without the vectors of the negatives in memory.

Forward, one program a position: gathers the negatives' rows block by block and, as attention does,
keeps a running maximum, sum and weighted mean of them; that mean is the gradient towards the user,
so backward needs no second pass. Backward towards items, one program an item: all (position,
column) pairs that drew it, sorted by item, each score anew from the two vectors. Sums have a fixed
order: no atomics. Suffixes: R negatives or pairs of a block, D the width.
"""

import triton
import triton.language as tl

NORM_EPS = tl.constexpr(1e-6)


@triton.jit
def _through_norm(grad, direction, norm):
    """The gradient towards x from that towards x / max(norm, NORM_EPS)."""
    along = tl.where(norm > NORM_EPS, tl.sum(grad * direction, 0), 0.0)
    return (grad - along * direction) / tl.maximum(norm, NORM_EPS)


@triton.jit(do_not_specialize=["num_negatives"])
def forward(
    users,  # [P, dim]
    items,  # [N, dim]
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
    user = tl.load(users + position * dim + col, mask=col < dim, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(user * user, 0))
    user = user / tl.maximum(norm, NORM_EPS)

    positive = tl.load(positives + position).to(tl.int64)
    own = tl.load(items + positive * dim + col, mask=col < dim, other=0.0).to(tl.float32)
    own = own / tl.maximum(tl.sqrt(tl.sum(own * own, 0)), NORM_EPS)
    own_score = tl.sum(user * own, 0) * per_temperature

    # A maximum and sums per row of a block, brought together once, at the end: no step waits for
    # other warps.
    top = tl.zeros((BLOCK_R,), tl.float32) + own_score
    total = tl.zeros((BLOCK_R,), tl.float32)
    mean = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for begin in range(0, num_negatives, BLOCK_R):
        r = begin + tl.arange(0, BLOCK_R)
        item = tl.load(
            negatives + position * num_negatives + r, mask=r < num_negatives, other=0
        ).to(tl.int64)

        # a collision's logit is so low that its share is zero
        counts = (r < num_negatives) & (item != positive)
        mask = (r < num_negatives)[:, None] & (col < dim)
        x = tl.load(items + item[:, None] * dim + col, mask=mask, other=0.0).to(tl.float32)

        per_norm = 1 / tl.maximum(tl.sqrt(tl.sum(x * x, 1)), NORM_EPS)
        score = tl.sum(x * user, 1) * per_norm * per_temperature
        if RATES:
            score -= tl.load(log_rates + item, mask=r < num_negatives, other=0.0)
        score = tl.where(counts, score, float("-inf"))

        new_top = tl.maximum(top, score)
        shrink, share = tl.exp(top - new_top), tl.exp(score - new_top)
        total = total * shrink + share
        mean = mean * shrink[:, None] + (share * per_norm)[:, None] * x
        top = new_top

    highest = tl.max(top, 0)
    shrink, own_share = tl.exp(top - highest), tl.exp(own_score - highest)
    whole = tl.sum(total * shrink, 0) + own_share

    out = highest + tl.log(whole)
    tl.store(lse + position, out)
    tl.store(loss + position, out - own_score)
    toward = ((tl.sum(mean * shrink[:, None], 0) + own_share * own) / whole - own) * per_temperature
    tl.store(grad + position * dim + col, _through_norm(toward, user, norm), mask=col < dim)


@triton.jit(do_not_specialize=["num_parts", "columns"])
def item_gradients(
    users,  # [P, dim]
    items,  # [N, dim]
    per_user_norm,  # float32 [P]
    # float32 [P]: lse - log(factor); factor is how much a position counts, over the temperature
    shifted_lse,
    of_positive,  # float32 [P]: factor * (share of the positive - 1)
    order,  # int64 [pairs]: position * columns + column, sorted by item; column 0 is the positive
    starts,  # int64 [N + 1]: where each item's pairs begin
    log_rates,  # float32 [N], with RATES
    grad,  # [N, dim] out; with SPLIT float32 [N, parts, dim]: sums towards the normalised item
    num_parts,
    columns,
    dim,
    per_temperature,
    RATES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    item = tl.program_id(0).to(tl.int64)
    begin, end = tl.load(starts + item), tl.load(starts + item + 1)
    col = tl.arange(0, BLOCK_D)

    x = tl.load(items + item * dim + col, mask=col < dim, other=0.0).to(tl.float32)
    norm = tl.sqrt(tl.sum(x * x, 0))
    x = x / tl.maximum(norm, NORM_EPS)

    if SPLIT:
        length = tl.cdiv(tl.cdiv(end - begin, num_parts), BLOCK_R) * BLOCK_R
        begin += tl.program_id(1) * length
        end = tl.minimum(end, begin + length)

    total = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for at in range(begin, end, BLOCK_R):
        pair = at + tl.arange(0, BLOCK_R)
        valid = pair < end
        drawn = tl.load(order + pair, mask=valid, other=0)

        position = drawn // columns
        is_positive = valid & (drawn == position * columns)
        user = tl.load(
            users + position[:, None] * dim + col, mask=valid[:, None] & (col < dim), other=0.0
        )
        user = user.to(tl.float32)
        per_norm = tl.load(per_user_norm + position, mask=valid, other=0.0)

        score = tl.sum(user * x, 1) * per_norm * per_temperature
        if RATES:
            score -= tl.load(log_rates + item)
        share = tl.exp(score - tl.load(shifted_lse + position, mask=valid, other=float("inf")))
        share = tl.where(
            is_positive, tl.load(of_positive + position, mask=is_positive, other=0.0), share
        )
        total += (share * per_norm)[:, None] * user
    toward = tl.sum(total, 0)

    if SPLIT:
        place = grad + (item * num_parts + tl.program_id(1)) * dim + col
        tl.store(place, toward, mask=col < dim)
    else:
        out = _through_norm(toward, x, norm)
        tl.store(grad + item * dim + col, out.to(grad.dtype.element_ty), mask=col < dim)
