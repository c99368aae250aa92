"""Copies out of paged memory and into it.

`op.py` is the face, `reference.py` the truth.
"""
