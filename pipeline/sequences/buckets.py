"""A bucket's rows → its file of sequences, its quarantine, and a record of both: the second half of
a build.

    records/bucket-00003-<key>.json   written last: the files, and what was counted; the key says
                                      from which parts

A bucket whose record is there under the key of today's parts need not be built again: that is how a
killed build goes on, and how new logs leave alone the buckets they have no row for.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.logs.cleaning import SOURCE_FILE, LogRules
from pipeline.sequences import store
from pipeline.sequences.parts import Part, batches_of, read_rows
from pipeline.sequences.quality.periods import BucketPeriods, count_bucket_periods
from pipeline.sequences.quality.statistics import Statistics, count_bucket, merge_statistics
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.retired import add_retired, read_retired
from pipeline.sequences.store import Bucket
from pipeline.sequences.users import build_bucket


@dataclass(frozen=True)
class BucketRules:
    """The rules by which a bucket is built and counted."""

    logs: LogRules
    max_rows_per_user: int
    utc_offset_ms: int  # where the days of the statistics begin
    repeats: RepeatRule
    period_edges: list[int]  # where the periods end that are counted


@dataclass(frozen=True)
class BucketWork:
    """A bucket to be built."""

    number: int
    batches: dict[str, list[int]]  # its batches by the name of the part
    rows: int
    retired: Bucket | None  # rows of its users that were dropped for their age
    record: str  # the file that says that it is done


@dataclass(frozen=True)
class Record:
    """A bucket that was built."""

    number: int
    bucket: Bucket | None  # None: no user has a row
    quarantine: Bucket | None
    statistics: Statistics
    periods: BucketPeriods | None = None  # of the split that was set when it was built


def plan_buckets(
    parts: Sequence[Part], retired: Mapping[str, Bucket], rules: BucketRules
) -> list[BucketWork]:
    """The buckets that have rows, in order."""
    numbers: set[int] = set()
    for part in parts:
        numbers.update(part.batches)
    return [
        _plan_bucket(number, parts, retired.get(str(number)), rules) for number in sorted(numbers)
    ]


def _plan_bucket(
    number: int, parts: Sequence[Part], retired: Bucket | None, rules: BucketRules
) -> BucketWork:
    batches = batches_of(parts, number)
    rows = sum(part.bucket_rows.get(number, 0) for part in parts)
    record = record_file(number, batches, retired, rules)
    return BucketWork(number, batches, rows, retired, record)


def record_file(
    number: int,
    parts: Mapping[str, object] | Sequence[str],
    retired: Bucket | None,
    rules: BucketRules,
) -> str:
    """The name of a record, from all that the bucket depends on: `parts`, by name, and the settings
    that the parts' names do not hold.
    """
    what = [store.SCHEMA_VERSION, sorted(parts), rules.max_rows_per_user, rules.utc_offset_ms]
    what.append(rules.repeats.merge)
    if rules.repeats.file_order is not None:
        what.append(sorted(rules.repeats.file_order.items()))
    if retired is not None:
        what.append(retired.file)

    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()
    return f"records/bucket-{number:05d}-{key[:16]}.json"


def write_bucket(work: BucketWork, rules: BucketRules, folder: Path) -> Record:
    """Build the bucket and write its files; the record comes last."""
    rows = read_rows(folder, work.batches, work.number, rules.logs)
    assert rows.num_rows == work.rows, (
        f"{rows.num_rows} rows in the parts of bucket {work.number}, indexed {work.rows}"
    )
    built = build_bucket(rows, rules.logs, rules.max_rows_per_user, rules.repeats)
    del rows  # while the files are written

    kept = built.sequences
    # the same rows give the same bytes, in whatever files they came: those are in the statistics
    left_out = built.quarantine.drop_columns([SOURCE_FILE])
    if work.retired is not None:
        kept = add_retired(kept, read_retired(folder, work.retired))

    stem = f"bucket-{work.number:05d}"
    bucket, quarantine = None, None
    if kept.num_rows:
        bucket = store.write_table(kept, folder, f"buckets/{stem}", users=kept.num_rows)
    if left_out.num_rows:
        quarantine = store.write_table(left_out, folder, f"quarantine/{stem}")

    statistics = count_bucket(built, rules.logs, rules.utc_offset_ms)
    periods = count_bucket_periods(kept, rules.period_edges, len(rules.logs.actions))
    record = Record(work.number, bucket, quarantine, statistics, periods)
    store.write_json(folder / work.record, vars(record), indent=None)
    return record


def total_statistics(records: Sequence[Record]) -> Statistics:
    """The counts over all these buckets."""
    return merge_statistics([record.statistics for record in records])


def carry_record(folder: Path, before: BucketWork, now: BucketWork) -> None:
    """Write the bucket's record under its new key: its rows lie in other parts now."""
    record = find_record(folder, before.record)
    assert record is not None, f"{folder / before.record} is gone, or a file of it"
    store.write_json(folder / now.record, vars(record), indent=None)


def find_record(folder: Path, file: str) -> Record | None:
    """The record of a bucket that was built; None where there is none, or a file is not whole."""
    try:
        raw = json.loads((folder / file).read_text())
        record = Record(
            number=raw["number"],
            bucket=_whole_file(folder, raw["bucket"]),
            quarantine=_whole_file(folder, raw["quarantine"]),
            statistics=Statistics(**raw["statistics"]),
            periods=BucketPeriods(**raw["periods"]) if raw.get("periods") else None,
        )
    except (FileNotFoundError, json.JSONDecodeError, KeyError, TypeError):
        # TypeError: fields of another version
        return None
    return record


def _whole_file(folder: Path, raw: dict[str, Any] | None) -> Bucket | None:
    """The file that a record names, if it names one.

    Raises:
        FileNotFoundError: it is not there, or cut off.
    """
    if raw is None:
        return None
    entry = Bucket(**raw)
    path = folder / entry.file
    if path.stat().st_size != entry.bytes:
        raise FileNotFoundError(path)
    return entry
