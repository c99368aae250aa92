"""Tokens where nothing is recorded: one kernel for what training makes in several passes over all
tokens. What they mean is the plain PyTorch of `pipeline/model/tokens.py`.
"""

# Of a linear map fused with its gate: a single step of the product. More would be too many for a
# kernel that makes its outputs twice.
MOST_INPUTS = 256
