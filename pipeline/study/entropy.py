"""How much the sequences hold that can be learned: approximate entropy, and the Performance Law's
D' (arXiv:2412.00430), number of tokens × 1 / ApEn.

Approximate entropy (Pincus 1991) of a sequence of N ids, for runs of m of them:

    C_i    share of the N - m + 1 runs of m ids that equal the i-th, itself among them
    Φ_m    mean of ln C_i over i
    ApEn   Φ_m - Φ_{m+1}: how much more surprising a run is with one more id

Ids are equal or not, so the tolerance r of numbers is 0. Low: what comes next repeats what came
before. The authors take the mean over sequences, and so do we. A run equals itself, so a sequence
without repeats has an ApEn near 0 as well: read it beside the share of rows that repeat.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

RUN = 1  # m
SHORTEST = 10  # rows of a user that count


@dataclass(frozen=True, slots=True)
class DataQuality:
    """Of the training rows."""

    users: int  # with `SHORTEST` rows or more
    tokens: int  # all rows
    repeated_share: float  # of rows whose item the user has had before
    entropy: float  # ApEn, mean over these users
    effective_tokens: float  # D'


def approximate_entropy(ids: np.ndarray, run: int = RUN) -> float:
    """ApEn of one sequence, int64 [N], for runs of `run` ids.

    Of a b a b a b every a is followed by b: nothing is left to tell.

    >>> round(approximate_entropy(np.array([1, 2] * 50)), 3)
    0.0
    >>> rng = np.random.default_rng(0)
    >>> bool(approximate_entropy(rng.integers(0, 2, 1000)) > 0.69)
    True
    """
    return max(_phi(ids, run) - _phi(ids, run + 1), 0.0)


def _phi(ids: np.ndarray, run: int) -> float:
    """Mean log share of the runs that equal each."""
    windows = np.lib.stride_tricks.sliding_window_view(ids, run)
    _, inverse, counts = np.unique(windows, axis=0, return_inverse=True, return_counts=True)
    return float(np.log(counts[inverse.ravel()] / len(windows)).mean())


def measure_quality(sequences: Iterable[np.ndarray]) -> DataQuality:
    """Of the users' item ids, oldest first, each int64 [rows]."""
    tokens, repeated = 0, 0
    found = []
    for ids in sequences:
        tokens += len(ids)
        repeated += len(ids) - len(np.unique(ids))
        if len(ids) >= SHORTEST:
            found.append(approximate_entropy(ids))

    entropy = float(np.mean(found)) if found else float("nan")
    effective = tokens / entropy if entropy > 0 else float("nan")
    return DataQuality(len(found), tokens, repeated / max(tokens, 1), entropy, effective)
