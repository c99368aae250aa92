"""One optimizer step of the touched rows of an embedding table.

`op.py` is the face, `reference.py` the truth.
"""
