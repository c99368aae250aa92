"""Launches of the kernels in float16; same functions as `torch_chunked`."""

import math

import torch
from torch import Tensor

from kernels.launch import cdiv, launch, next_power_of_2
from kernels.sampled_softmax import half_kernels

TILE = 4096  # numbers of a program's block of vectors
LONGEST_PART = 4096  # pairs of a key that one program adds
MOST_WIDTH = 256  # of a vector that a program holds 16 of in registers
MOST_PAIRS = 2**31 - 1  # their numbers are int32
# shares are multiplied by it before they become float16, whose least normal number is 6e-5
SHARE_SCALE = 2.0**15
SHORT_KEYS = 2**16 - 1  # of 16 bits; one more stands for collisions


def _blocks(dim: int) -> tuple[int, int]:
    """BLOCK_R, BLOCK_D: powers of 2, and 16 or more, as a matrix product takes them."""
    block_d = max(next_power_of_2(dim), 16)
    return min(max(TILE // block_d, 16), 128), block_d


def fits(num_positions: int, num_negatives: int, dim: int) -> bool:
    """Tell whether these kernels take a call of that size."""
    return dim <= MOST_WIDTH and num_positions * (num_negatives + 1) <= MOST_PAIRS


def unit_rows(rows: Tensor, *, broken_to_zero: bool = False) -> tuple[Tensor, Tensor]:
    """Unit vectors in float16, [n, D to a power of 2], and the lengths of the rows, float32 [n]."""
    num_rows, dim = rows.shape
    block_r, block_d = _blocks(dim)
    unit = torch.empty(num_rows, block_d, dtype=torch.float16, device=rows.device)
    norms = torch.empty(num_rows, dtype=torch.float32, device=rows.device)
    if num_rows:
        launch(
            half_kernels.unit_rows,
            cdiv(num_rows, block_r),
            (rows, unit, norms),
            (num_rows,),
            (dim,),
            (broken_to_zero, block_r, block_d),
            device=rows.device,
            num_warps=4,
        )
    return unit, norms


def forward(
    users: Tensor,
    items: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    log_rates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per position: loss, log of the summed exponentials, gradient of the loss towards the user
    vector; in float32.
    """
    num_positions, dim = users.shape
    loss, lse = (
        torch.empty(num_positions, dtype=torch.float32, device=users.device) for _ in range(2)
    )
    grad = torch.empty(num_positions, dim, dtype=torch.float32, device=users.device)
    if num_positions == 0:
        return loss, lse, grad

    unit_users, user_norms = unit_rows(users, broken_to_zero=True)
    unit_items, _ = unit_rows(items)
    launch(
        half_kernels.forward,
        num_positions,
        (unit_users, user_norms, unit_items, positives, negatives, log_rates, loss, lse, grad),
        (negatives.shape[1],),
        (dim, 1 / temperature),
        (log_rates is not None, *_blocks(dim)),
        device=users.device,
        num_warps=1,
        num_stages=3,
    )
    return loss, lse, grad


def item_gradients(
    users: Tensor,
    items: Tensor,
    positives: Tensor,
    negatives: Tensor,
    loss: Tensor,
    lse: Tensor,
    share: Tensor,
    temperature: float,
    log_rates: Tensor | None = None,
) -> Tensor:
    """[N, D]: the gradient of `(loss * share).sum()` towards the item vectors, in float32."""
    num_items, dim = items.shape
    if num_items == 0 or len(users) == 0:
        return torch.zeros(num_items, dim, dtype=torch.float32, device=items.device)

    order, starts, first_odd = sorted_pairs(positives, negatives, num_items)
    num_keys, paired = len(starts) - 1, first_odd is not None
    further_key, further_part = further_parts(starts, len(order) // LONGEST_PART)

    of_position, factor = facts_of_positions(positives, first_odd, loss, lse, share, temperature)

    unit_users, _ = unit_rows(users, broken_to_zero=True)
    unit_items, item_norms = unit_rows(items)
    block_r, block_d = _blocks(dim)
    grad = torch.empty(num_items, dim, dtype=torch.float32, device=items.device)
    partial = torch.empty(len(further_key), 2, block_d, dtype=torch.float32, device=items.device)
    tensors = unit_users, unit_items, item_norms, of_position, order, starts
    tensors += further_key, further_part, log_rates, factor, grad, partial
    columns, rated = negatives.shape[1] + 1, log_rates is not None
    launch(
        half_kernels.item_gradients,
        num_keys + len(further_key),
        tensors,
        (num_keys, num_items),
        (dim, 1 / temperature),
        (columns, rated, paired, LONGEST_PART, block_r, block_d),
        device=items.device,
        num_warps=1,
        num_stages=2,
    )
    if len(further_key):
        launch(
            half_kernels.add_further_parts,
            len(further_key),
            (unit_items, item_norms, starts, further_key, further_part, partial, grad),
            (num_keys, num_items),
            (dim,),
            (paired, LONGEST_PART, block_d),
            device=items.device,
            num_warps=1,
        )
    return grad


def facts_of_positions(
    positives: Tensor,
    first_odd: Tensor | None,
    loss: Tensor,
    lse: Tensor,
    share: Tensor,
    temperature: float,
) -> tuple[Tensor, Tensor]:
    """What the gradient's kernel reads of each position, float32 [P, 4], and the factor of its
    sums, [1].

    Shares are parts of the largest, times SHARE_SCALE: so few of them are too small for float16.
    """
    most = share.max()
    scaled = share / most * SHARE_SCALE
    divisor = lse / math.log(2) - scaled.log2()  # as a power of 2
    of_positive = scaled * torch.expm1(-loss)
    if first_odd is None:
        first_odd = torch.zeros_like(positives)
    is_odd = positives.remainder(2)

    facts = torch.stack([divisor, of_positive, first_odd.float(), is_odd.float()], 1)
    return facts, (most / (temperature * SHARE_SCALE)).view(1)


def further_parts(starts: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Parts of LONGEST_PART pairs beyond the first of each key, int64 [most]: the key, and the
    number of the part. Where there are fewer, the key is the number of keys.

    pairs of four keys    3 9 4 12      parts of 4
    keys                  1 1 3 3 4     for most = 5
    parts                 1 2 1 2 -
    """
    counts = (starts.diff() - 1).clamp(min=0) // LONGEST_PART
    ends = counts.cumsum(0)
    number = torch.arange(most, device=starts.device)
    key = torch.searchsorted(ends, number, right=True)
    begins = torch.cat([ends - counts, ends[-1:]])
    return key, number - begins[key] + 1


def sorted_pairs(
    positives: Tensor, negatives: Tensor, num_items: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Pairs `position * (1 + R) + column` sorted by key, where each key's begin, and the columns
    `first_odd` where a key stands for two items.

    A radix sort takes a pass a byte, so keys have 16 bits where that is enough.
    """
    num_positions, num_negatives = negatives.shape
    device, kind, paired, num_keys = positives.device, torch.int16, False, num_items
    if num_items > SHORT_KEYS:
        paired, num_keys = True, cdiv(num_items, 2)
    if num_keys > SHORT_KEYS:
        kind, paired, num_keys = torch.int32, False, num_items

    lowest = torch.iinfo(kind).min if kind == torch.int16 else 0
    keys = torch.empty(num_positions, num_negatives + 1, dtype=kind, device=device)
    first_odd = torch.empty(num_positions, dtype=torch.int32, device=device) if paired else None
    block_r = min(max(next_power_of_2(num_negatives), 16), 1024)
    launch(
        half_kernels.pair_keys,
        num_positions,
        (positives, negatives, keys, first_odd),
        (num_keys, num_negatives),
        (),
        (paired, lowest, block_r),
        device=device,
        num_warps=4,
    )
    keys, order = torch.sort(keys.flatten(), stable=True)
    wanted = torch.arange(lowest, lowest + num_keys + 1, dtype=kind, device=device)
    return order, torch.searchsorted(keys, wanted), first_odd
