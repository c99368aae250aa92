"""Names of the tensors that a layer may make again in backward instead of keeping them.

A module of its own, which needs no PyTorch: the configuration checks against it.
"""

RECOMPUTABLE = "normed_x", "uvqk", "y"
