"""Names of the tensors that a layer may make again in backward instead of keeping them.

A module of its own, which needs no PyTorch: the configuration checks against it.
"""

from typing import Literal, get_args

Recomputable = Literal["normed_x", "uvqk", "y"]
RECOMPUTABLE: tuple[Recomputable, ...] = get_args(Recomputable)
