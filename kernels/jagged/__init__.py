"""Packed sequences joined, split and cut short. `op.py` is the face, `reference.py` the truth."""
