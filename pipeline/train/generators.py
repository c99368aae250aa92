"""The random generators of a step: seeded, and set back where draws are to come again."""

import torch
from torch import Tensor


def seed_generators(seed: int) -> None:
    """As `torch.manual_seed`, which also writes down who called it: as long as a small layer."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def generator_states() -> list[Tensor]:
    """States of the generators that `seed_generators` seeds: of the CPU and of the GPU in use."""
    states = [torch.default_generator.get_state()]
    if torch.cuda.is_initialized():
        states.append(torch.cuda.get_rng_state())
    return states


def set_generators(states: list[Tensor]) -> None:
    """As they stood then."""
    torch.default_generator.set_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state)
