"""Embedding rows of four bits a number, for inference.

`op.py` is the face, `reference.py` the truth.
"""
