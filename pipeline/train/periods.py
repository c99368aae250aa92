"""What the periods of the split hold, told before anything is trained."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pipeline.config import SplitConfig, UserError
from pipeline.sequences import store
from pipeline.sequences.quality.periods import (
    PERIODS,
    PeriodCounts,
    add_periods,
    count_periods,
    period_edges,
)

logger = logging.getLogger(__name__)


def check_periods(
    sequence_dir: Path, split: SplitConfig, tasks: Sequence[str], *, validates: bool
) -> dict[str, dict[str, int]]:
    """Rows and labels of each period for the tasks, as `by_name` has them.

    An empty validation or test period, and a task without a positive there, are said; training
    needs neither, unless it `validates`.

    Raises:
        UserError: there is no row to train on, or none to validate on.
    """
    manifest = store.read_manifest(sequence_dir)
    num_actions = len(manifest.actions)
    edges = period_edges(split)
    counted = count_periods(sequence_dir, manifest.buckets, edges, num_actions)
    counts = add_periods(counted, num_actions)

    last = "test" if split.refit else "val"
    if tasks and sum(counts.rows[: PERIODS.index(last)]) == 0:
        raise UserError(
            f"split.t_{last}: no row lies before it, {_span(manifest)}: nothing to train on"
        )
    for number, period in enumerate(PERIODS[1:], start=1):
        if counts.rows[number] == 0:
            _tell_empty(period, manifest, validates)
        else:
            bits = {task: manifest.actions.index(task) for task in tasks}
            _tell_tasks_without_positives(bits, period, number, counts)
    return counts.by_name(manifest.actions, tasks)


def _tell_empty(period: str, manifest: store.Manifest, validates: bool) -> None:
    message = f"split.t_{period}: the {period} period holds no row, {_span(manifest)}"
    if period == "val" and validates:
        raise UserError(f"{message}: train.validate_every has nothing to score")
    logger.warning("%s: there will be no %s metrics", message, period)


def _tell_tasks_without_positives(
    task_bits: Mapping[str, int], period: str, number: int, counts: PeriodCounts
) -> None:
    for task, bit in task_bits.items():
        if counts.positive[number, bit] == 0:
            logger.warning(
                "tasks: %s has no positive among its %d known labels of the %s period: its "
                "metrics there are undefined",
                task,
                counts.known[number, bit],
                period,
            )


def _span(manifest: store.Manifest) -> str:
    first, last = _moment(manifest.first_event_ms), _moment(manifest.last_event_ms)
    return f"the events lie from {first} to {last}"


def _moment(time_ms: int) -> str:
    return f"{np.datetime64(time_ms, 'ms').astype('datetime64[s]')}Z"
