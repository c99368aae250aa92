"""What the feature maps have to know of the training period's rows: ids, values of the request
columns, how many labels are known and positive. A bucket is read by itself, in any process.

    bucket → `read_rows` → `BucketRows` ─┐
    bucket → `read_rows` → `BucketRows` ─┴→ `TrainingRows.join`
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.batches.counts import distinct_values
from pipeline.batches.labels import TaskCounts
from pipeline.config import FeatureConfig, SplitConfig, UserError
from pipeline.sequences import arrow_lists


@dataclass(frozen=True, slots=True)
class BucketRows:
    """Facts about a bucket's rows in the training period."""

    items: np.ndarray  # int64, sorted
    timed_items: np.ndarray  # int64, sorted: those of timed rows
    timed_count: np.ndarray  # int64: timed rows of each
    users: np.ndarray  # int64, sorted
    request: dict[str, np.ndarray]  # values of each request column in timed rows, sorted
    timed: TaskCounts  # labels of timed rows
    weighed: TaskCounts  # of the rows that the loss weighs


def read_rows(
    table: pa.Table,
    features: FeatureConfig,
    task_bits: Sequence[int],
    end_ms: int,
    *,
    weighs_order_only: bool,
) -> BucketRows:
    """Those of the bucket's rows before `end_ms`."""
    stored = [name for name in features.request if name != "hour"]
    names = ("item_id", "event_time", "order_only", *stored)
    flat = {name: arrow_lists.flat_column(table, name) for name in names}

    training = flat["event_time"] < end_ms
    timed = training & ~flat["order_only"]
    timed_items, timed_count = np.unique(flat["item_id"][timed], return_counts=True)
    user = np.repeat(table["user_id"].to_numpy(), np.diff(arrow_lists.list_offsets(table)))

    request = {}
    for name in stored:
        request[name] = distinct_values(flat[name][timed])
    weighed = training if weighs_order_only else timed
    return BucketRows(
        items=distinct_values(flat["item_id"][training]),
        timed_items=timed_items,
        timed_count=timed_count,
        users=distinct_values(user[training]),
        request=request,
        timed=TaskCounts.of_rows(table, timed, task_bits),
        weighed=TaskCounts.of_rows(table, weighed, task_bits),
    )


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """Facts about the rows of the training period; `items` and `users` know order_only rows too."""

    items: np.ndarray  # int64, sorted
    item_count: np.ndarray  # timed rows of each
    users: np.ndarray  # int64, sorted
    request: dict[str, np.ndarray]  # int64 values of each request column, sorted, unknown left out
    base_rates: dict[str, float]

    @classmethod
    def join(
        cls,
        buckets: Sequence[BucketRows],
        tasks: Sequence[str],
        split: SplitConfig,
        negatives: int,
    ) -> "TrainingRows":
        """Those of all buckets; `negatives` are drawn beside each positive.

        Raises:
            UserError: no label is known, or those of a task are all alike.
        """
        # labels
        timed = weighed = TaskCounts.none(len(tasks))
        for bucket in buckets:
            timed, weighed = timed.add(bucket.timed), weighed.add(bucket.weighed)
        totals, positives = timed.known.astype(float), timed.positive.astype(float)
        if tasks and totals.max() == 0:
            end = "split.t_test" if split.refit else "split.t_val"
            raise UserError(f"no row with a known label lies before {end}: nothing to train on")

        # ids and values
        vocabulary = distinct_values(np.concatenate([bucket.items for bucket in buckets]))
        item_count = np.zeros(len(vocabulary), np.int64)
        for bucket in buckets:
            item_count[np.searchsorted(vocabulary, bucket.timed_items)] += bucket.timed_count

        known_values = {}
        for name in buckets[0].request:
            parts = [bucket.request[name] for bucket in buckets]
            values = distinct_values(np.concatenate(parts)).astype(np.int64)
            known_values[name] = values[values >= 0]

        refuse_one_class(tasks, weighed, split, negatives)

        # each drawn item is one more known label
        totals += negatives * positives
        rates = (positives / np.maximum(totals, 1)).tolist()
        return cls(
            items=vocabulary,
            item_count=item_count,
            users=distinct_values(np.concatenate([bucket.users for bucket in buckets])),
            request=known_values,
            base_rates=dict(zip(tasks, rates, strict=True)),
        )


def refuse_one_class(
    tasks: Sequence[str], counts: TaskCounts, split: SplitConfig, negatives: int
) -> None:
    """Go on only if every task has something to tell apart; `negatives` are drawn beside each
    positive.

    Raises:
        UserError: the labels of a task are all alike in the training period, or there are none.
    """
    end = "split.t_test" if split.refit else "split.t_val"
    for task, known, positive in zip(
        tasks, counts.known.tolist(), counts.positive.tolist(), strict=True
    ):
        if known == 0:
            raise UserError(
                f"tasks: {task} is known in no row of the training period, before {end}: take it "
                "out of tasks"
            )

        alike = f"in all {known:,} rows of the training period, before {end}, that know it"
        if positive == 0:
            raise UserError(
                f"tasks: {task} is 0 {alike}: nothing can be learned of it. Take it out of tasks, "
                "or see in source.columns how it is read"
            )
        if positive == known and negatives == 0:
            raise UserError(
                f"tasks: {task} is 1 {alike}: there is nothing to tell apart. Where the logs hold "
                "positives only, set examples.negatives, to 4 for instance: so many items are "
                "drawn beside each"
            )
