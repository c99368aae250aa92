"""Linear layer with its neighbours fused: bias, SiLU, residual, row-wise FP8. `op.py` is the face."""
