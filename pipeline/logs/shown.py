"""Rows of generated logs as somebody sees them who reads a history."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class ShownRows:
    """Rows of logs as a reader of histories sees them, in any order, int64 [rows] each."""

    user: np.ndarray
    place: np.ndarray  # of the row among its user's, from 0
    category: np.ndarray  # among those that are planted, from 0
    action: np.ndarray  # 0 or 1
