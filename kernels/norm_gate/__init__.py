"""Norm(A) * SiLU(U) with dropout and row-wise FP8 output. `op.py` is the face, `reference.py` the truth."""
