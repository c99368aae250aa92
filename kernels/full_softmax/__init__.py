"""The softmax over all items of a retrieval. `op.py` is the face, `reference.py` the truth."""
