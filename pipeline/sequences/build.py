"""LOG → SEQUENCE: one row per user, built with Ray Data and published as a store
(pipeline/sequences/store.py).

    files → normalise → parts by user bucket → one vectorised pass per bucket → files by content →
    manifest

Two passes of tasks, with files between them (pipeline/sequences/parts.py,
pipeline/sequences/buckets.py). Ray's object store carries summaries alone and never spills: rows by
bucket are wanted on disk anyway, for a build that was killed to go on from and for the next day's
logs to be added to. What is done to rows is in pipeline/logs/cleaning.py and
pipeline/sequences/users.py; here work is planned, handed out, verified and published.
"""

import fcntl
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipeline import config
from pipeline.config import RunConfig, SideTable, UserError
from pipeline.logs import LogFiles, open_logs
from pipeline.logs.cleaning import LogRules, check_columns
from pipeline.logs.files import CONNECTIONS, count_rows, file_digest, file_stamp, total_bytes
from pipeline.logs.parquet import read_schema
from pipeline.schema import DAY_MS, log_schema
from pipeline.sequences import parts, store
from pipeline.sequences.buckets import (
    BucketRules,
    BucketWork,
    Record,
    find_record,
    plan_buckets,
    write_bucket,
)
from pipeline.sequences.forgotten import read_forgotten
from pipeline.sequences.parts import Part, find_part, plan_parts, write_part
from pipeline.sequences.quality import report
from pipeline.sequences.quality.checks import refuse, run_checks
from pipeline.sequences.quality.drift import refuse_drift
from pipeline.sequences.quality.statistics import Statistics, hints, merge
from pipeline.sequences.side_tables import side_files, write_side_table
from pipeline.sequences.store import Bucket, Manifest
from pipeline.sequences.workers import Workers, workers

logger = logging.getLogger(__name__)

MB = 2**20
BUCKET_MEMORY = 256 * MB  # of building one, where `sequences.num_buckets` leaves their number to us
# worth a warning: logs have been appended for long, or a user has very many rows
MUCH_MEMORY = 4 * BUCKET_MEMORY
MEMORY_PER_BYTE = 5  # of a bucket's rows: themselves, as columns to sort by, in order, and as lists


def log_rules(cfg: RunConfig, logs: LogFiles, num_buckets: int) -> LogRules:
    latest = cfg.sequences.latest_time
    return LogRules(
        columns=logs.columns,
        actions=cfg.source.actions,
        request_columns=cfg.source.request_columns,
        earliest_ms=config.parse_time("sequences.earliest_time", cfg.sequences.earliest_time),
        latest_ms=config.parse_time("sequences.latest_time", latest)
        if latest
        else int(time.time() * 1000) + DAY_MS,
        num_buckets=num_buckets,
    )


def check_logs(cfg: RunConfig) -> tuple[LogFiles, LogRules, int]:
    """The logs, the rules and the number of rows: all files' columns and types checked, without
    reading a row.

    Raises:
        UserError: a missing or mistyped column, or no rows at all.
    """
    logs = open_logs(cfg)
    rows = count_rows(logs.files)
    rules = log_rules(cfg, logs, cfg.sequences.num_buckets or fitting_buckets(cfg, rows))
    with ThreadPoolExecutor(CONNECTIONS) as pool:
        for file, schema in zip(logs.files, pool.map(read_schema, logs.files), strict=True):
            check_columns(schema, rules, file)
    if rows == 0:
        raise UserError(
            f"source.path: the logs are empty, 0 rows in {len(logs.files)} files ({logs.files[0]} "
            "…)"
        )
    return logs, rules, rows


def row_bytes(cfg: RunConfig) -> float:
    """Of a checked row in memory."""
    return (
        sum(
            field.type.bit_width
            for field in log_schema(cfg.source.actions, cfg.source.request_columns)
        )
        / 8
    )


def bucket_memory(cfg: RunConfig, rows: float) -> float:
    """Bytes that a task needs to build a bucket of so many rows."""
    return MEMORY_PER_BYTE * row_bytes(cfg) * rows


def fitting_buckets(cfg: RunConfig, rows: int) -> int:
    """As many that one takes BUCKET_MEMORY, which leaves room for logs to be appended for a good
    while.
    """
    return max(1, round(bucket_memory(cfg, rows) / BUCKET_MEMORY))


def plan(cfg: RunConfig) -> dict[str, object]:
    """What `build_sequences` would read and how much memory its tasks take."""
    logs, rules, rows = check_logs(cfg)
    return {
        "files": len(logs.files),
        "file_mb": round(total_bytes(logs.files) / MB, 1),
        "rows": rows,
        "parts": -(-rows // parts.PART_ROWS),
        "memory_mb_per_part": round(2 * row_bytes(cfg) * min(rows, parts.RUN_ROWS) / MB, 1),
        "buckets": rules.num_buckets,
        "rows_per_bucket": rows // rules.num_buckets,
        "memory_mb_per_bucket": round(bucket_memory(cfg, rows / rules.num_buckets) / MB, 1),
        "writes": str(cfg.sequence_dir),
    }


def build_sequences(cfg: RunConfig, *, overwrite: bool = False, append: bool = False) -> Manifest:
    """Clean the logs, build one row per user and publish them in `cfg.sequence_dir`.

    The same logs and settings again are found published and left alone. A killed build leaves what
    was published, and the same call goes on where it was. With `append`, files that the published
    version does not have are added to it: the result is byte for byte that of a build of all files,
    of those too that are gone by now.

    Raises:
        UserError: the logs cannot be used, too many rows are bad, or other sequences are published
        there already and
            neither `overwrite` nor `append` says what is to become of them.
    """
    logs, rules, _ = check_logs(cfg)
    folder = cfg.sequence_dir
    with locked(folder):
        files = _digests(logs.files, folder)
        sides = _side_digests(logs)
        settings = content_settings(cfg)
        published = None if overwrite else _published(folder)
        held: list[Part] = []
        if published is not None:
            held = held_parts(folder, published)
            known = {source.digest for part in held for source in part.sources}
            wanted = known | files.keys() if append else files.keys()
            if published.inputs == inputs_digest(settings, wanted, sides):
                logger.info("already published in %s, nothing to do", folder)
                return published
            _refuse_other_sequences(folder, published, settings, len(files.keys() - known), append)
            rules = log_rules(cfg, logs, published.num_buckets)
            files = {digest: file for digest, file in files.items() if digest not in known}
        with workers(cfg.ray, cfg.runs_dir) as run:
            made = _make_parts(cfg, files, rules, folder, run)
            try:
                manifest = build_version(
                    cfg, logs, rules, [*held, *made], made if held else [], published, run
                )
                if cfg.checks.drift:
                    refuse_drift(folder, _readable(folder), manifest, cfg.drift)
            except UserError:  # no killed build: nothing is left to go on with
                _remove_unpublished(folder)
                raise
        publish(folder, manifest)
    return manifest


def content_settings(cfg: RunConfig) -> dict[str, Any]:
    """The settings that the sequences depend on."""
    source, sequences = config.to_dict(cfg.source), config.to_dict(cfg.sequences)
    return {
        "source": {key: source[key] for key in ("columns", "actions", "request_columns")},
        "sequences": {
            key: sequences[key]
            for key in ("num_buckets", "max_rows_per_user", "earliest_time", "latest_time")
        },
    }


def other_settings(manifest: Manifest, settings: dict[str, Any]) -> str:
    """The keys in which these differ from the settings that a version was built with, in words; ""
    where none does.
    """
    old, new = config.flatten(manifest.config), config.flatten(settings)
    return ", ".join(sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key)))


def inputs_digest(settings: dict[str, Any], files: Iterable[str], sides: Sequence[object]) -> str:
    """Of everything that a version is built from: the files of the logs by their digests, in no
    order.
    """
    return _sha256([store.SCHEMA_VERSION, settings, sorted(files), sides])


def inputs_of(cfg: RunConfig, logs: LogFiles, all_parts: Sequence[Part]) -> str:
    files = {source.digest for part in all_parts for source in part.sources}
    return inputs_digest(content_settings(cfg), files, _side_digests(logs))


def bucket_rules(cfg: RunConfig, rules: LogRules) -> BucketRules:
    return BucketRules(
        rules, cfg.sequences.max_rows_per_user, int(cfg.features.hour_utc_offset * 3600 * 1000)
    )


def held_parts(folder: Path, manifest: Manifest) -> list[Part]:
    """The parts of a version.

    Raises:
        UserError: one is missing.
    """
    found = {name: find_part(folder, name) for name in manifest.parts}
    for name, part in found.items():
        if part is None:
            file = folder / parts.PARTS / name
            raise UserError(
                f"{file} is missing or cut off: run jobs.build_sequences with --overwrite"
            )
    return [part for part in found.values() if part]


def held_records(folder: Path, manifest: Manifest) -> list[Record]:
    """What the buckets of a version were built from and counted.

    Raises:
        UserError: one is missing, or a file of its bucket is.
    """
    found = {file: find_record(folder, file) for file in manifest.records}
    for file, record in found.items():
        if record is None:
            raise UserError(
                f"{folder / file} is missing or cut off: run jobs.build_sequences with --overwrite"
            )
    return [record for record in found.values() if record]


def _make_parts(
    cfg: RunConfig, files: dict[str, str], rules: LogRules, folder: Path, run: Workers
) -> list[Part]:
    """The parts of these files, digest -> path; those that a killed build has finished are found."""
    # as configured: None moves with the clock
    times = [cfg.sequences.earliest_time, cfg.sequences.latest_time]
    forgotten = read_forgotten(folder)
    settings = {
        "columns": rules.columns,
        "actions": rules.actions,
        "request_columns": rules.request_columns,
        "times": times,
        "num_buckets": rules.num_buckets,
        "forgotten": forgotten.hashes,
    }
    work = plan_parts(files, settings)
    found = [part for part in (find_part(folder, task.name) for task in work) if part]
    names = {part.name for part in found}
    missing = [task for task in work if task.name not in names]
    if found:
        logger.info("%d of %d parts are there already", len(found), len(work))
    return found + run(
        "reading the logs",
        partial(write_part, rules=rules, folder=folder, forgotten=forgotten),
        missing,
    )


def build_version(
    cfg: RunConfig,
    logs: LogFiles,
    rules: LogRules,
    all_parts: Sequence[Part],
    new_parts: Sequence[Part],
    published: Manifest | None,
    run: Workers,
) -> Manifest:
    """The version that `all_parts` make, all its files written, not yet published. Only touched
    buckets are built.

    Raises:
        UserError: too many rows are bad, among all or among those of `new_parts`, or a side table
        cannot be used.
    """
    folder = cfg.sequence_dir
    retired, kept_since_ms = (
        (published.retired, published.kept_since_ms) if published else ({}, None)
    )
    forgotten = read_forgotten(folder)
    tables = {"users": (logs.users, "user_id"), "items": (logs.items, "item_id")}
    side_tables = {
        name: write_side_table(name, table, id_column, folder, forgotten)
        for name, (table, id_column) in tables.items()
        if table is not None
    }
    work = plan_buckets(all_parts, retired, bucket_rules(cfg, rules))
    records = build_buckets(cfg, work, rules, run)
    totals = merge([record.statistics for record in records])
    broken = sum((Counter(part.broken) for part in new_parts), Counter())
    checks = run_checks(cfg.checks, totals, sum(part.rows for part in new_parts), broken)
    page = report.write(cfg, totals, rules, logs.imported, checks)
    refuse(checks, hints(totals, rules), page)
    return compose(
        folder,
        all_parts,
        work,
        records,
        imported_quarantined=logs.imported.quarantined if logs.imported else {},
        counts=logs.imported.counts if logs.imported else {},
        actions=cfg.source.actions,
        request_columns=cfg.source.request_columns,
        num_buckets=rules.num_buckets,
        side_tables=side_tables,
        config=content_settings(cfg),
        inputs=inputs_of(cfg, logs, all_parts),
        retired=retired,
        kept_since_ms=kept_since_ms,
    )


def compose(
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
    totals = merge([record.statistics for record in records])
    buckets = tuple(record.bucket for record in records if record.bucket)
    quarantine = tuple(record.quarantine for record in records if record.quarantine)
    _verify(folder, buckets, totals, sum(part.rows for part in all_parts))
    assert totals.first_event_ms is not None and totals.last_event_ms is not None, (
        "some rows were kept"
    )
    contents = [
        [entry.file, entry.sha256]
        for entry in (*buckets, *quarantine, *rest["side_tables"].values())
    ]
    return Manifest(
        digest=_sha256(
            [
                store.SCHEMA_VERSION,
                rest["actions"],
                rest["request_columns"],
                rest["num_buckets"],
                contents,
            ]
        ),
        num_users=sum(bucket.users for bucket in buckets),
        num_rows=totals.rows_kept,
        rows_in=totals.rows_in,
        rows_capped=totals.rows_capped,
        users_capped=totals.users_capped,
        quarantined=dict(
            sorted((Counter(totals.quarantined) + Counter(imported_quarantined)).items())
        ),
        first_event_ms=totals.first_event_ms,
        last_event_ms=totals.last_event_ms,
        buckets=buckets,
        quarantine=quarantine,
        parts=tuple(sorted(part.name for part in all_parts)),
        records=tuple(task.record for task in work),
        **rest,
    )


def build_buckets(
    cfg: RunConfig, work: Sequence[BucketWork], rules: LogRules, run: Workers
) -> list[Record]:
    folder = cfg.sequence_dir
    found = [record for record in (find_record(folder, task.record) for task in work) if record]
    done = {record.number for record in found}
    missing = [task for task in work if task.number not in done]
    if found:
        logger.info("%d of %d buckets stay as they are", len(found), len(work))
    needed = [bucket_memory(cfg, task.rows) for task in work]
    if needed and max(needed) > MUCH_MEMORY:
        logger.warning(
            "a bucket takes up to %d MB of a worker's memory, on average %d MB: "
            "rebuild with more sequences.num_buckets, or see in the report who has so many rows",
            *(max(needed) / MB, sum(needed) / len(needed) / MB),
        )
    write = partial(write_bucket, rules=bucket_rules(cfg, rules), folder=folder)
    return sorted(found + run("building buckets", write, missing), key=lambda record: record.number)


def _verify(
    folder: Path, buckets: Sequence[Bucket], totals: Statistics, rows_in_parts: int
) -> None:
    """Every row that the files have is accounted for, and the files written hold what was counted."""
    files = [pq.read_metadata(folder / bucket.file) for bucket in buckets]
    written = sum(bucket.rows for bucket in buckets)
    assert len({bucket.file for bucket in buckets}) == len(buckets), "a bucket was built twice"
    assert [meta.num_rows for meta in files] == [bucket.users for bucket in buckets], (
        "users written and counted differ"
    )
    assert written == totals.rows_kept, f"{written} rows written, {totals.rows_kept} kept"
    accounted = totals.rows_kept + totals.rows_capped + sum(totals.quarantined.values())
    assert rows_in_parts == totals.rows_in == accounted, (
        f"{rows_in_parts} rows read, {accounted} accounted for"
    )


def _refuse_other_sequences(
    folder: Path, published: Manifest, settings: dict[str, Any], new_files: int, append: bool
) -> None:
    if keys := other_settings(published, settings):
        raise UserError(
            f"{folder} holds sequences of other settings ({keys}); choose another name or pass "
            "--overwrite"
        )
    if not append:
        raise UserError(
            f"{folder} holds sequences of other logs or settings ({new_files} files of the logs "
            "are new); "
            "pass --append to add new files, --overwrite to build from what is there now, or "
            "choose another name"
        )


def publish(folder: Path, manifest: Manifest) -> None:
    """Make this the version that readers see. The one before stays for those who read it still."""
    before = _readable(folder)
    if before is None or before.digest == manifest.digest:
        others = [
            version for version in store.versions(folder) if version.digest != manifest.digest
        ]
        before = others[0] if others else None
    store.write_manifest(folder, manifest)
    store.remove_unnamed(folder, [manifest, before] if before else [manifest])


def _remove_unpublished(folder: Path) -> None:
    published = _readable(folder)
    if published is not None or not (folder / store.MANIFEST).exists():
        store.remove_unnamed(folder, [published, *store.versions(folder)] if published else [])


def _published(folder: Path) -> Manifest | None:
    return store.read_manifest(folder) if (folder / store.MANIFEST).exists() else None


def _readable(folder: Path) -> Manifest | None:
    """The published version; None where there is none, or one that `overwrite` is to replace."""
    try:
        return store.read_manifest(folder)
    except UserError:
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One build at a time; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / store.LOCK, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another job is building sequences in {folder}") from None
        yield


def _digests(files: Sequence[str], folder: Path) -> dict[str, str]:
    """Digest -> file; of files with the same contents the first.

    Those seen before, by their stamps, are not read.
    """
    memory = folder / store.DIGESTS
    try:
        seen = json.loads(memory.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        seen = {}
    stamps = [file_stamp(file) for file in files]
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        digests = list(
            pool.map(
                lambda file, stamp: (
                    seen[file][1] if seen.get(file, [""])[0] == stamp else file_digest(file)
                ),
                files,
                stamps,
            )
        )
    now = {
        file: [stamp, digest] for file, stamp, digest in zip(files, stamps, digests, strict=True)
    }
    if now != seen:
        store.write_json(memory, now)
    found: dict[str, str] = {}
    for file, digest in zip(files, digests, strict=True):
        if digest in found:
            logger.warning("%s is the same file as %s: it is read once", file, found[digest])
        found.setdefault(digest, file)
    return found


def _side_digests(logs: LogFiles) -> list[object]:
    sides: dict[str, SideTable | None] = {"users": logs.users, "items": logs.items}
    return [
        [name, table.id_column, [file_digest(file) for file in side_files(name, table)]]
        for name, table in sides.items()
        if table
    ]


def _sha256(what: object) -> str:
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
