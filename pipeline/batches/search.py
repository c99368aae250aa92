"""Looking up many values in sorted ones."""

import numpy as np


def places(values: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """`np.searchsorted(values, wanted)`, int64 [n], several times as fast where both are long.

    The wanted are looked up in rising order: neighbours then touch the same memory, and sorting
    them costs less than that saves.
    """
    if len(values) < 256 or len(wanted) < 256:
        return np.searchsorted(values, wanted)
    order = np.argsort(wanted)
    found = np.empty(len(wanted), np.int64)
    found[order] = np.searchsorted(values, wanted[order])
    return found
