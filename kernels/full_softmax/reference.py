"""The log of the summed exponentials of all scores as it is defined, with all scores in memory."""

import torch
from torch import Tensor


def log_partition_reference(users_PD: Tensor, items_ND: Tensor) -> Tensor:
    """[P]: log Σ_j exp(user · item_j) over the N items; −inf where there are none.

    The softmax loss of a positive j is this less user · item_j.
    """
    return torch.logsumexp(users_PD @ items_ND.T, dim=1)
