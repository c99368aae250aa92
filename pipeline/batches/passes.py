"""A pass over the buckets of a store: each by itself, in this process or in a task on a cluster."""

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa

from pipeline.sequences import store

if typing.TYPE_CHECKING:  # it imports Ray
    from pipeline.sequences.workers import Workers

T = TypeVar("T")

ROW_BYTES = 160  # of a row while a pass looks at it: its columns in Arrow and in NumPy


def run_here(
    what: str, function: Callable[[Any], Any], items: Sequence[Any], memory_bytes: float = 0
) -> list[Any]:
    """`Workers` that are this process."""
    return [function(item) for item in items]


@dataclass(frozen=True, slots=True)
class BucketWork:
    """A bucket to be looked at."""

    number: int
    rows: int


def pass_over(
    what: str, look: Callable[[pa.Table], T], sequence_dir: Path, run: "Workers" = run_here
) -> list[T]:
    """`look` of each bucket's sequences, in the order of the buckets.

    `what` names the pass in the log. A task of `run` reads a bucket and returns what `look` found,
    which should be small.
    """
    manifest = store.read_manifest(sequence_dir)
    work = []
    for number, bucket in enumerate(manifest.buckets):
        work.append(BucketWork(number, bucket.rows))

    most_rows = max((bucket.rows for bucket in work), default=0)
    look_at = partial(_look_at, look=look, sequence_dir=sequence_dir, manifest=manifest)
    found = dict(run(what, look_at, work, ROW_BYTES * most_rows))
    return [found[bucket.number] for bucket in work]


def _look_at(
    work: BucketWork, look: Callable[[pa.Table], T], sequence_dir: Path, manifest: store.Manifest
) -> tuple[int, T]:
    return work.number, look(store.read_bucket(sequence_dir, manifest, work.number))
