"""The sampled softmax loss of a retrieval model. `op.py` is the face, `reference.py` the truth."""
