"""Versions of the published sequences: the parts and records that one holds, its manifest once its
files are checked, and the step that puts it in the place of the one before.
"""

import fcntl
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline.config import UserError
from pipeline.sequences import store
from pipeline.sequences.buckets import BucketWork, Record, find_record, total_statistics
from pipeline.sequences.contents import content_digest
from pipeline.sequences.parts import PARTS, Part, find_part
from pipeline.sequences.quality.statistics import Statistics
from pipeline.sequences.store import Bucket, Manifest

BUILD_AGAIN = "run jobs.build_sequences with --overwrite"


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """One build at a time; the lock goes with the process.

    Raises:
        UserError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / store.LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another job is building sequences in {folder}") from None
        yield


def published_version(folder: Path) -> Manifest | None:
    return store.read_manifest(folder) if (folder / store.MANIFEST).exists() else None


def readable_version(folder: Path) -> Manifest | None:
    """The published version; None where there is none, or one that `overwrite` is to replace."""
    try:
        return store.read_manifest(folder)
    except UserError:
        return None


def version_but(folder: Path, digest: str) -> Manifest | None:
    """The newest version that is kept, but for that of this digest; None where there is none."""
    for version in store.versions(folder):
        if version.digest != digest:
            return version
    return None


def held_parts(folder: Path, manifest: Manifest) -> list[Part]:
    """The parts of a version.

    Raises:
        UserError: one is missing.
    """
    found = []
    for name in manifest.parts:
        part = find_part(folder, name)
        if part is None:
            file = folder / PARTS / name
            raise UserError(f"{file} is missing or cut off: {BUILD_AGAIN}")
        found.append(part)
    return found


def held_records(folder: Path, manifest: Manifest) -> list[Record]:
    """What the buckets of a version were built from, and their counts.

    Raises:
        UserError: one is missing, or a file of its bucket is.
    """
    found = []
    for file in manifest.records:
        record = find_record(folder, file)
        if record is None:
            raise UserError(f"{folder / file} is missing or cut off: {BUILD_AGAIN}")
        found.append(record)
    return found


def compose_manifest(
    folder: Path,
    all_parts: Sequence[Part],
    work: Sequence[BucketWork],
    records: Sequence[Record],
    *,
    imported_quarantined: Mapping[str, int],
    **rest: Any,
) -> Manifest:
    """The manifest of these parts and of the buckets made of them, once their files are checked;
    `rest` as it is.
    """
    totals = total_statistics(records)
    buckets, quarantine = [], []
    for record in records:
        if record.bucket:
            buckets.append(record.bucket)
        if record.quarantine:
            quarantine.append(record.quarantine)

    _verify(folder, buckets, totals, all_parts)
    assert totals.first_event_ms is not None and totals.last_event_ms is not None, (
        "some rows were kept"
    )

    # the version is named by the contents of its files
    entries = [*buckets, *quarantine, *rest["side_tables"].values()]
    for chunks in rest["dictionaries"].values():
        entries += chunks.values()
    named_by = [
        store.SCHEMA_VERSION,
        rest["actions"],
        rest["request_columns"],
        rest["num_buckets"],
        [[entry.file, entry.sha256] for entry in entries],
    ]
    quarantined = Counter(totals.quarantined) + Counter(imported_quarantined)
    names = [part.name for part in all_parts]
    record_files = [task.record for task in work]
    num_users = sum(bucket.users for bucket in buckets)

    return Manifest(
        digest=content_digest(named_by),
        num_users=num_users,
        num_rows=totals.rows_kept,
        rows_in=totals.rows_in,
        rows_merged=totals.rows_merged,
        rows_capped=totals.rows_capped,
        users_capped=totals.users_capped,
        quarantined=dict(sorted(quarantined.items())),
        first_event_ms=totals.first_event_ms,
        last_event_ms=totals.last_event_ms,
        buckets=tuple(buckets),
        quarantine=tuple(quarantine),
        parts=tuple(sorted(names)),
        records=tuple(record_files),
        **rest,
    )


def _verify(
    folder: Path, buckets: Sequence[Bucket], totals: Statistics, all_parts: Sequence[Part]
) -> None:
    """Every row of the parts is accounted for, and the files written hold what was counted."""
    written = 0
    files: set[str] = set()
    for bucket in buckets:
        assert bucket.file not in files, f"{bucket.file} was built twice"
        files.add(bucket.file)
        written += bucket.rows

        users = pq.read_metadata(folder / bucket.file).num_rows
        assert users == bucket.users, f"users written and counted differ in {bucket.file}"
    assert written == totals.rows_kept, f"{written} rows written, {totals.rows_kept} kept"

    rows_in_parts = sum(part.rows for part in all_parts)
    accounted = totals.rows_kept + totals.rows_merged + totals.rows_capped
    accounted += sum(totals.quarantined.values())
    assert rows_in_parts == totals.rows_in == accounted, (
        f"{rows_in_parts} rows read, {accounted} accounted for"
    )


def publish_version(folder: Path, manifest: Manifest) -> None:
    """Make this the version that readers see. The one before stays for those who read it still."""
    before = readable_version(folder)
    if before is None or before.digest == manifest.digest:
        before = version_but(folder, manifest.digest)

    store.write_manifest(folder, manifest)
    store.remove_unnamed(folder, [manifest, before] if before else [manifest])


def remove_unpublished(folder: Path, made: Sequence[Part]) -> None:
    """Remove what a refused build has written, but for its parts."""
    parts_made = [part.name for part in made]
    published = readable_version(folder)
    if published is not None:
        store.remove_unnamed(folder, [published, *store.versions(folder)], parts_made)
    elif not (folder / store.MANIFEST).exists():
        store.remove_unnamed(folder, [], parts_made)
