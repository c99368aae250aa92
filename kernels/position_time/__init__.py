"""Position and time added to tokens. `op.py` is the face, `reference.py` the truth."""
