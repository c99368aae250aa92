"""Labels of rows, by the bits of their action masks: which are known, and which are positive."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.sequences import arrow_lists


def label_counts(
    action_mask: np.ndarray, known_mask: np.ndarray, task_bits: Sequence[int]
) -> np.ndarray:
    """bool [N, 2 tasks]: which labels of a row are known, and which are known and positive.

    task_bits 0, 2            known     positive
    action 101, known 001     1 0       1 0
    action 100, known 101     1 1       0 1
    """
    num_tasks = len(task_bits)
    labels = np.empty((len(known_mask), 2 * num_tasks), bool)
    for i, place in enumerate(task_bits):  # column by column: NumPy is slow along a short last axis
        bit = np.int32(1 << place)
        labels[:, i] = (known_mask & bit) != 0
        labels[:, num_tasks + i] = (action_mask & known_mask & bit) != 0
    return labels


def positive_rows(action_mask: np.ndarray, known_mask: np.ndarray, bits: int) -> np.ndarray:
    """bool [N]: the events that count as next items.

    bits 110                          0: all
    action 010, known 011       true
    action 010, known 001      false
    action 001, known 111      false
    """
    if bits == 0:
        return np.ones(len(action_mask), bool)
    return (action_mask & known_mask & bits) != 0


def rows_of_kind(order_only: np.ndarray, rows: str) -> np.ndarray:
    """bool [N]: the rows that a dense feature of these `rows` counts."""
    return np.ones_like(order_only) if rows == "all" else order_only == (rows == "order_only")


@dataclass(frozen=True, slots=True)
class TaskCounts:
    """Labels of each task, int64 [tasks]."""

    known: np.ndarray
    positive: np.ndarray

    @classmethod
    def none(cls, num_tasks: int) -> "TaskCounts":
        return cls(np.zeros(num_tasks, np.int64), np.zeros(num_tasks, np.int64))

    @classmethod
    def of_rows(cls, table: pa.Table, chosen: np.ndarray, task_bits: Sequence[int]) -> "TaskCounts":
        """Those of the rows of SEQUENCE where `chosen`, bool [N], is true."""
        action = arrow_lists.flat_column(table, "action_mask")[chosen]
        known = arrow_lists.flat_column(table, "known_mask")[chosen]
        counts = label_counts(action, known, task_bits).sum(0, dtype=np.int64)
        return cls(*np.split(counts, 2))

    def add(self, other: "TaskCounts") -> "TaskCounts":
        return TaskCounts(self.known + other.known, self.positive + other.positive)
