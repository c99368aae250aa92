"""Sampled softmax as it is defined, with every negative's vector in memory at once."""

import torch
from torch import Tensor

NORM_EPS = 1e-6  # lower bound of the norm that a vector is divided by
COLLISION = -5e4  # logit of a negative that is the positive


def normalise(x: Tensor) -> Tensor:
    """Vectors along the last axis, of length 1."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp(min=NORM_EPS)


def sampled_softmax_reference(
    users_PD: Tensor,
    items_ND: Tensor,
    positives: Tensor,
    negatives: Tensor,
    weights: Tensor,
    temperature: float,
    log_rates: Tensor | None = None,
) -> Tensor:
    """The weighted mean over P positions of −log softmax of the positive among itself and R
    negatives.

    Scores are cosines over `temperature`; a negative that equals the positive gets COLLISION
    instead. HSTU, arXiv:2402.17152, trains retrieval with it. `positives` int [P], `negatives` int
    [P, R], `weights` [P]. `log_rates` [N] are taken from the negatives' scores.
    """
    user, item = normalise(users_PD), normalise(items_ND)
    score = (user * item[positives]).sum(1, keepdim=True) / temperature
    against = torch.einsum("pd,prd->pr", user, item[negatives]) / temperature
    if log_rates is not None:
        against = against - log_rates[negatives]
    against = against.masked_fill(negatives == positives[:, None], COLLISION)
    loss = torch.logsumexp(torch.cat([score, against], dim=1), dim=1) - score[:, 0]
    return (loss * weights).sum() / weights.sum()
