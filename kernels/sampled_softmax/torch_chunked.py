"""Sampled softmax in plain PyTorch, some positions at a time: vectors of negatives exist for one
chunk only.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from kernels.sampled_softmax.reference import COLLISION, NORM_EPS, normalise

CHUNK = 2**22  # numbers of gathered vectors in memory at once


def chunks(negatives: Tensor, dim: int) -> Iterator[slice]:
    num_positions, num_negatives = negatives.shape
    size = max(CHUNK // ((num_negatives + 1) * dim), 1)
    for begin in range(0, num_positions, size):
        yield slice(begin, begin + size)


def _scores(
    user: Tensor,
    items: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    log_rates: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids [p, 1 + R], the positive first; their unit vectors [p, 1 + R, D]; and their scores."""
    ids = torch.cat([positives[:, None], negatives], dim=1)
    vectors = normalise(items[ids].to(user.dtype))

    scores = torch.bmm(vectors, user[:, :, None])[:, :, 0] / temperature
    if log_rates is not None:
        scores[:, 1:] -= log_rates[negatives]
    scores[:, 1:].masked_fill_(negatives == positives[:, None], COLLISION)
    return ids, vectors, scores


def forward(
    users: Tensor,
    items: Tensor,
    positives: Tensor,
    negatives: Tensor,
    temperature: float,
    log_rates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Per position: loss [P], log of the summed exponentials [P], gradient of the loss towards the
    user vector [P, D].

    All in float32, or float64 where the vectors are.
    """
    wide = torch.promote_types(users.dtype, torch.float32)
    loss, lse, grad = (
        users.new_empty(len(users), dtype=wide),
        users.new_empty(len(users), dtype=wide),
        [],
    )

    for part in chunks(negatives, users.shape[1]):
        raw = users[part].to(wide)
        norm = torch.linalg.vector_norm(raw, dim=1, keepdim=True)
        user = raw / norm.clamp(min=NORM_EPS)
        drawn = positives[part], negatives[part]
        _, vectors, scores = _scores(user, items, *drawn, temperature, log_rates)
        lse[part] = torch.logsumexp(scores, dim=1)
        loss[part] = lse[part] - scores[:, 0]

        share = (scores - lse[part, None]).exp()
        share[:, 0] = torch.expm1(-loss[part])
        grad.append(
            through_norm(torch.bmm(share[:, None], vectors)[:, 0] / temperature, user, norm)
        )

    return loss, lse, torch.cat(grad) if grad else users.to(wide)


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
    """[N, D]: the gradient of `(loss * share).sum()` towards the item vectors, in the type of
    `lse`.
    """
    grad = torch.zeros_like(items, dtype=lse.dtype)

    for part in chunks(negatives, users.shape[1]):
        user = normalise(users[part].to(lse.dtype))
        drawn = positives[part], negatives[part]
        ids, _, scores = _scores(user, items, *drawn, temperature, log_rates)

        factor = (scores - lse[part, None]).exp()
        factor[:, 0] = torch.expm1(-loss[part])  # share - 1, without its cancellation
        factor *= share[part, None] / temperature
        grad.index_add_(0, ids.flatten(), (factor[:, :, None] * user[:, None]).flatten(0, 1))
    wide = items.to(lse.dtype)
    return through_norm(grad, normalise(wide), torch.linalg.vector_norm(wide, dim=1, keepdim=True))


def through_norm(grad: Tensor, direction: Tensor, norm: Tensor) -> Tensor:
    """The gradient towards x from that towards x / max(norm, NORM_EPS)."""
    along = (grad * direction).sum(1, keepdim=True) * direction
    return torch.where(norm > NORM_EPS, grad - along, grad) / norm.clamp(min=NORM_EPS)
