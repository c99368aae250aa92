"""Parts gathered into few, and rows dropped for their age: what a store that grows day by day needs
now and then.

    many parts ── rows of a few buckets at a time ── kept ──▶ one part per range of buckets
                                                  └─ older than the limit ──▶ retired/: the number
                                                                              dropped, by user

The buckets keep their bytes where no row is dropped. A user's dropped rows count in
`first_position`, so that the positions of the others stay what they were. A row that comes after
its time has been dropped stays until the next compaction, and is counted as one more even if it was
there before.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.logs.cleaning import REASON, USER_BUCKET
from pipeline.sequences import store
from pipeline.sequences.arrow_lists import list_offsets
from pipeline.sequences.buckets import BucketRules
from pipeline.sequences.parts import (
    PART_ROWS,
    Part,
    PartWriter,
    Source,
    batches_of,
    part_name,
    read_rows,
)
from pipeline.sequences.retired import RETIRED, read_retired
from pipeline.sequences.store import Bucket
from pipeline.sequences.users import build_bucket

NOT_A_TIME = "event_time_before_range"  # such a row's time says nothing of its age
NO_CAP = 2**62


@dataclass(frozen=True)
class Gathering:
    """A part to be made of the rows that others have in some buckets."""

    name: str
    sources: tuple[Source, ...]  # that the part will stand for
    batches: dict[int, dict[str, list[int]]]  # by bucket: its batches by the name of the part
    retired: dict[str, Bucket]  # by number of the bucket: the rows dropped before
    rows: int


@dataclass(frozen=True)
class Gathered:
    part: Part
    retired: dict[str, Bucket]  # by number of the bucket: the rows dropped so far
    dropped: dict[int, int]  # by bucket, where there were any: the rows dropped now


def plan_gathering(
    parts: Sequence[Part], retired: Mapping[str, Bucket], num_buckets: int, since_ms: int | None
) -> list[Gathering]:
    """Ranges of buckets with about PART_ROWS rows, one bucket at least; the first part stands for
    all sources.

        bucket              0    1    2    3    4       PART_ROWS = 1000
        rows                400  400  300  900  0
        sum of rows         400  800  1100 2000 2000
        part                0    0    1    1    1
    """
    sources: list[Source] = []
    rows = np.zeros(num_buckets, np.int64)
    for part in parts:
        sources += part.sources
        for number, count in part.bucket_rows.items():
            rows[number] += count

    # a new part where the sum of rows enters another PART_ROWS
    place = (np.cumsum(rows) - 1).clip(0) // PART_ROWS
    ranges = np.split(np.arange(num_buckets), np.flatnonzero(np.diff(place)) + 1)

    names = sorted(part.name for part in parts)
    work = []
    for numbers in map(np.ndarray.tolist, ranges):
        before = {str(number): retired[str(number)] for number in numbers if str(number) in retired}
        gathering = Gathering(
            name=part_name(["gathered", names, numbers, since_ms]),
            sources=() if work else tuple(sources),
            batches={number: batches_of(parts, number) for number in numbers},
            retired=before,
            rows=int(rows[numbers].sum()),
        )
        work.append(gathering)
    return work


def gather_part(
    work: Gathering, rules: BucketRules, since_ms: int | None, folder: Path
) -> Gathered:
    """Write the part, bucket by bucket, and the tables of what was dropped."""
    retired, dropped = dict(work.retired), {}
    with PartWriter(folder, work.name, rules.logs) as writer:
        for number, batches in work.batches.items():
            rows = read_rows(folder, batches, number, rules.logs)
            if since_ms is not None:
                rows, old = split_by_age(rows, since_ms)
                if old.num_rows:
                    dropped[number] = old.num_rows
                    table = _add_dropped(folder, retired.get(str(number)), old, rules)
                    if table.num_rows:  # not all that is old was good
                        stem = f"retired/bucket-{number:05d}"
                        retired[str(number)] = store.write_table(table, folder, stem)

            for batch in rows.drop_columns([USER_BUCKET]).combine_chunks().to_batches():
                writer.write(number, batch)

        part = writer.close(work.sources)

    assert part.rows + sum(dropped.values()) == work.rows, (
        f"{part.rows} + {dropped} rows of {work.rows}"
    )
    return Gathered(part, retired, dropped)


def _add_dropped(
    folder: Path, before: Bucket | None, old: pa.Table, rules: BucketRules
) -> pa.Table:
    """RETIRED: what a bucket's users had dropped before, and these rows."""
    counted = pa.concat_tables([read_retired(folder, before), count_by_user(old, rules)])
    total = counted.group_by("user_id").aggregate([("rows", "sum")])
    return total.rename_columns({"rows_sum": "rows"}).select(RETIRED.names).sort_by("user_id")


def split_by_age(rows: pa.Table, since_ms: int) -> tuple[pa.Table, pa.Table]:
    """Rows to keep and rows from before `since_ms`.

    A row without a usable time has no age and is kept.
    """
    time, reason = pc.field("event_time"), pc.field(REASON)
    no_age = time.is_null() | (reason == NOT_A_TIME)
    has_age = reason.is_null() | (reason != NOT_A_TIME)

    kept = rows.filter(no_age | (time >= since_ms))
    old = rows.filter((time < since_ms) & has_age)
    return kept, old


def count_by_user(rows: pa.Table, rules: BucketRules) -> pa.Table:
    """RETIRED: the rows of each user that a build would have kept: good ones, repeats once."""
    built = build_bucket(rows, rules.logs, NO_CAP, rules.repeats).sequences
    lengths = np.diff(list_offsets(built))
    return pa.table([built["user_id"], pa.array(lengths, pa.int64())], schema=RETIRED)
