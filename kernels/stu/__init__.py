"""A whole STU layer: fused kernels, and what is kept for backward.

`op.py` is the face, `reference.py` the truth.
"""
