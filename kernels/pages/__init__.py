"""Copies out of paged memory.

`op.py` is the face, `reference.py` the truth.
"""
