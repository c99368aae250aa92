"""Types of row-wise AdamW that its callers and all its forms share."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Hyper:
    """Settings of one step; `step` counts from 1."""

    step: int
    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float

    @property
    def corrections(self) -> tuple[float, float]:
        """What the two moments are divided by, since they start at 0."""
        return 1 - self.betas[0] ** self.step, 1 - self.betas[1] ** self.step
