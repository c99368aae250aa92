"""LayerNorm: with a gate or row-wise FP8, and its backward with the residual's gradient.

`op.py` is the face.
"""
