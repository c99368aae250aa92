"""SiLU attention over jagged sequences with the semi-local mask.

`op.py` is the face, `reference.py` the truth.
"""
