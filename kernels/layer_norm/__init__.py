"""LayerNorm with row-wise FP8 output, and its backward with the residual's gradient. `op.py` is the face."""
