"""The baseline that a model must beat: the item's smoothed rate in the training period.

    rows of the training period → `ItemCounts` → rate of each candidate's item → NE, AUC, GAUC

It knows the item and nothing of the user, the history or the surface. Computed on the very rows
that the model is scored on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.batches.counts import search_sorted
from pipeline.batches.examples import UserEvents
from pipeline.batches.labels import label_counts
from pipeline.config import SplitConfig
from pipeline.evaluate.metrics import TaskMetrics

PRIOR = 20.0  # known labels that an item's rate is smoothed by, as the demo's feature `item`
NAMES = ("ne", "auc", "gauc")


@dataclass(frozen=True, slots=True)
class ItemCounts:
    """Rows of the training period and their known and positive labels, by item. K tasks."""

    item_id: np.ndarray  # int64 [I], sorted
    rows: np.ndarray  # int64 [I]
    labels: np.ndarray  # int64 [I, 2 K]: known labels of each task, then positive ones

    def find(self, item_id: np.ndarray) -> np.ndarray:
        """int64 [n]: place of each item, I for one without a row."""
        place = search_sorted(self.item_id, item_id)
        seen = place < len(self.item_id)
        seen[seen] = self.item_id[place[seen]] == item_id[seen]
        return np.where(seen, place, len(self.item_id))


def count_items(
    users: UserEvents, split: SplitConfig, task_bits: Sequence[int], negatives: int = 0
) -> ItemCounts:
    """Count the timed rows of the training period of these users.

    With `examples.negatives` an item is drawn about as often as it has rows: so many known labels
    more for each positive.
    """
    events = users.events
    chosen = (users.request_time < split.train_end_ms) & ~events.order_only
    labels = label_counts(events.action_mask[chosen], events.known_mask[chosen], task_bits)
    labels = labels.astype(np.int64)
    labels[:, : len(task_bits)] += negatives * labels[:, len(task_bits) :]
    return _grouped(events.item_id[chosen], np.ones(chosen.sum(), np.int64), labels)


def merge_counts(parts: Sequence[ItemCounts]) -> ItemCounts:
    """The counts of all parts' rows."""
    items = np.concatenate([part.item_id for part in parts])
    rows = np.concatenate([part.rows for part in parts])
    labels = np.concatenate([part.labels for part in parts])
    return _grouped(items, rows, labels)


def _grouped(item_id: np.ndarray, rows: np.ndarray, labels: np.ndarray) -> ItemCounts:
    """The sums by item.

    item_id   7  3  7        item_id   3  7
    rows      1  1  1    →   rows      1  2
    """
    items, place = np.unique(item_id, return_inverse=True)
    sums = np.zeros((len(items), labels.shape[1]), np.int64)
    np.add.at(sums, place, labels)
    return ItemCounts(items, np.bincount(place, rows, len(items)).astype(np.int64), sums)


def item_logits(counts: ItemCounts, item_id: np.ndarray) -> np.ndarray:
    """Log-odds of each candidate's smoothed rate, float64 [n, K].

    A rate is (positive + PRIOR · base) / (known + PRIOR), the base being the task's rate over all
    rows; an item without a row has the base:

        known, positive     0 0     80 60      of all items 100 and 60: a base of 0.6
        rate                0.6     72 / 100
    """
    num_tasks = counts.labels.shape[1] // 2
    padded = np.vstack([counts.labels, np.zeros((1, 2 * num_tasks), np.int64)])
    found = padded[counts.find(item_id)]
    known, positive = found[:, :num_tasks], found[:, num_tasks:]

    total = counts.labels.sum(0)
    base = total[num_tasks:] / np.maximum(total[:num_tasks], 1)
    base = np.clip(base, 1e-6, 1 - 1e-6)  # a task never or always seen in the training period
    rate = (positive + PRIOR * base) / (known + PRIOR)
    return np.log(rate / (1 - rate))


def baseline_metrics(
    counts: ItemCounts, predictions: pa.Table, tasks: Sequence[str]
) -> Mapping[str, float]:
    """`baseline_ne/<task>` and so on: the item's rate on the rows of `predictions`."""
    logits = item_logits(counts, predictions["item_id"].to_numpy())
    users = predictions["user_id"].to_numpy()

    values = {}
    for number, task in enumerate(tasks):
        label = predictions[f"label.{task}"].combine_chunks()
        known = label.is_valid().to_numpy(zero_copy_only=False)
        metrics = TaskMetrics()
        metrics.add(logits[known, number], label.drop_null().to_numpy(), users[known])

        found = metrics.result()
        for name in NAMES:
            values[f"baseline_{name}/{task}"] = found[name]
    return values
