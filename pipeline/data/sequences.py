"""LOG → SEQUENCE: one row per user, built with Ray Data and published as a store (pipeline/data/store.py).

    Parquet → normalise → repartition by user bucket → one vectorised pass per bucket → staged files → manifest

What is done to rows is in pipeline/data/cleaning.py and pipeline/data/build.py; here tables are moved and published.
"""

import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from pipeline import config
from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig, SideTable, UserError
from pipeline.data import report, store
from pipeline.data.build import write_partition, write_table
from pipeline.data.checks import refuse, run_checks
from pipeline.data.cleaning import USER_BUCKET, LogRules, check_columns, normalise
from pipeline.data.sources import LogFiles, open_logs
from pipeline.data.sources.files import by_filesystem, file_digest, open_parquet, total_bytes
from pipeline.data.sources.parquet import count_rows, parquet_files, read_schema
from pipeline.data.statistics import Statistics, hints, merge
from pipeline.data.store import Bucket, Manifest
from pipeline.schema import log_schema

logger = logging.getLogger(__name__)

DAY_MS = 24 * 3600 * 1000
SECONDS_BETWEEN_LINES = 10  # of progress


def log_rules(cfg: RunConfig, logs: LogFiles) -> LogRules:
    latest = cfg.sequences.latest_time
    return LogRules(
        columns=logs.columns,
        actions=cfg.source.actions,
        request_columns=cfg.source.request_columns,
        earliest_ms=config.parse_time("sequences.earliest_time", cfg.sequences.earliest_time),
        latest_ms=config.parse_time("sequences.latest_time", latest) if latest else int(time.time() * 1000) + DAY_MS,
        num_buckets=cfg.sequences.num_buckets,
    )


def check_logs(cfg: RunConfig) -> tuple[LogFiles, LogRules]:
    """The logs and the rules, all files' columns and types checked, without reading a row.

    Raises:
        UserError: a missing or mistyped column, or no rows at all.
    """
    logs = open_logs(cfg)
    rules = log_rules(cfg, logs)
    for file in logs.files:
        check_columns(read_schema(file), rules, file)
    if count_rows(logs.files) == 0:
        raise UserError(f"source.path: the logs are empty, 0 rows in {len(logs.files)} files ({logs.files[0]} …)")
    return logs, rules


def plan(cfg: RunConfig) -> dict[str, object]:
    """What `build_sequences` would read and how much memory a bucket takes."""
    logs, rules = check_logs(cfg)
    rows = count_rows(logs.files)
    row_bytes = sum(field.type.bit_width for field in log_schema(rules.actions, rules.request_columns)) / 8
    bucket_mb = rows * row_bytes / rules.num_buckets / 2**20
    return {
        "files": len(logs.files),
        "file_mb": round(total_bytes(logs.files) / 2**20, 1),
        "rows": rows,
        "buckets": rules.num_buckets,
        "rows_per_bucket": rows // rules.num_buckets,
        "memory_mb_per_bucket": round(3 * bucket_mb, 1),  # the rows, their sort keys and the lists made of them
        "object_store_mb": round(rows * row_bytes / 2**20, 1),
        "writes": str(cfg.sequence_dir),
    }


def build_sequences(cfg: RunConfig, *, overwrite: bool = False) -> Manifest:
    """Clean the logs, build one row per user and publish them in `cfg.sequence_dir`.

    The same logs and settings again are found published and left alone. A killed build leaves what was published.

    Raises:
        UserError: the logs cannot be used, too many rows are bad, or other sequences are published there already and
            `overwrite` is not set.
    """
    logs, rules = check_logs(cfg)
    settings = {
        "source": {key: config.to_dict(cfg.source)[key] for key in ("columns", "actions", "request_columns")},
        "sequences": config.to_dict(cfg.sequences),
    }
    inputs = _inputs_digest(logs, settings)
    folder = cfg.sequence_dir
    with _locked(folder):
        if (folder / store.MANIFEST).exists() and not overwrite:
            published = store.read_manifest(folder)
            if published.inputs == inputs:
                logger.info("already published in %s, nothing to do", folder)
                return published
            raise UserError(
                f"{folder} holds sequences of other logs or settings; choose another name or pass --overwrite"
            )
        staging = folder / ".staging"
        shutil.rmtree(staging, ignore_errors=True)
        (staging / "quarantine").mkdir(parents=True)
        try:
            manifest = _build(cfg, logs, rules, staging, settings, inputs)
            _publish(folder, staging, manifest)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return manifest


def _build(
    cfg: RunConfig, logs: LogFiles, rules: LogRules, staging: Path, settings: dict[str, Any], inputs: str
) -> Manifest:
    """Everything but the publishing: the files lie in `staging`, under the names that they will have in the version."""
    tables = {"users": (logs.users, "user_id"), "items": (logs.items, "item_id")}
    side_tables = {
        name: _write_side_table(name, table, id_column, staging)
        for name, (table, id_column) in tables.items()
        if table is not None
    }
    summaries = _run_buckets(cfg, logs, rules, staging)
    totals = merge([Statistics(**summary["statistics"]) for summary in summaries])
    buckets = [Bucket(**summary["bucket"]) for summary in summaries if summary["bucket"]]
    _verify(staging, buckets, totals, count_rows(logs.files))
    checks = run_checks(cfg.checks, totals)
    page = report.write(cfg, totals, rules, logs.imported, checks)
    refuse(checks, hints(totals, rules), page)
    assert totals.first_event_ms is not None and totals.last_event_ms is not None, "some rows were kept"
    imported = logs.imported.quarantined if logs.imported else {}
    quarantine = [Bucket(**summary["quarantine"]) for summary in summaries if summary["quarantine"]]
    version = _version(cfg, [*buckets, *quarantine, *side_tables.values()])
    return Manifest(
        digest=version,
        num_users=sum(bucket.users for bucket in buckets),
        num_rows=totals.rows_kept,
        rows_in=totals.rows_in,
        rows_capped=totals.rows_capped,
        quarantined=dict(sorted((Counter(totals.quarantined) + Counter(imported)).items())),
        counts=logs.imported.counts if logs.imported else {},
        first_event_ms=totals.first_event_ms,
        last_event_ms=totals.last_event_ms,
        actions=cfg.source.actions,
        request_columns=cfg.source.request_columns,
        num_buckets=cfg.sequences.num_buckets,
        buckets=tuple(_in_version(bucket, version) for bucket in buckets),
        side_tables={name: _in_version(entry, version) for name, entry in side_tables.items()},
        config=settings,
        inputs=inputs,
    )


def _run_buckets(cfg: RunConfig, logs: LogFiles, rules: LogRules, staging: Path) -> list[dict[str, Any]]:
    """Read, normalise, shuffle and build with Ray Data; one summary per bucket that has rows, in bucket order."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns that its bars are off
    write = partial(
        write_partition,
        rules=rules,
        max_rows_per_user=cfg.sequences.max_rows_per_user,
        folder=str(staging),
        utc_offset_ms=int(cfg.features.hour_utc_offset * 3600 * 1000),
    )
    with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir):
        ray.data.DataContext.get_current().enable_progress_bars = False
        sources = [
            ray.data.read_parquet(files, filesystem=filesystem, partitioning=None)
            for filesystem, files in by_filesystem(logs.files)
        ]
        normalised = [
            source.map_batches(partial(normalise, rules=rules), batch_size=None, batch_format="pyarrow")
            for source in sources
        ]
        rows = normalised[0].union(*normalised[1:]) if len(normalised) > 1 else normalised[0]
        built = rows.repartition(rules.num_buckets, keys=[USER_BUCKET]).map_batches(
            write, batch_size=None, batch_format="pyarrow"
        )
        summaries, said = [], time.monotonic()
        for row in built.iter_rows():
            summaries.append(json.loads(row["summary"]))
            if time.monotonic() - said > SECONDS_BETWEEN_LINES:
                logger.info("built %d of at most %d buckets", len(summaries), rules.num_buckets)
                said = time.monotonic()
    return sorted(summaries, key=lambda summary: summary["number"])


def _write_side_table(name: str, table: SideTable, id_column: str, staging: Path) -> Bucket:
    """A USER or ITEM table as one file, its id column int64 under our name, sorted by it."""
    key = f"source.{name}"
    files = parquet_files(f"{key}.path", table.path)
    side = pa.concat_tables([open_parquet(file).read() for file in files], promote_options="permissive")
    if table.id_column not in side.column_names:
        raise UserError(f"{key}.id_column: no column {table.id_column!r} in {table.path}; found {side.column_names}")
    ids = side[table.id_column]
    if not pa.types.is_integer(ids.type):
        raise UserError(f"{key}.id_column: {table.id_column!r} in {table.path} must be an integer, found {ids.type}")
    if ids.null_count:
        raise UserError(f"{key}.id_column: {table.id_column!r} in {table.path} is null in {ids.null_count} rows")
    values, counts = np.unique(ids.to_numpy(), return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1][0]
        raise UserError(f"{key}: {table.id_column} {twice} stands in several rows of {table.path}")
    rest = side.drop_columns([table.id_column])
    if id_column in rest.column_names:
        raise UserError(f"{key}: {table.path} has another column called {id_column!r} beside {table.id_column!r}")
    columns = {id_column: ids.cast(pa.int64())} | {column: rest[column] for column in rest.column_names}
    return write_table(pa.table(columns).sort_by(id_column), staging, f"{name}.parquet")


def _verify(staging: Path, buckets: list[Bucket], totals: Statistics, rows_in_files: int) -> None:
    """Every row that the files have is accounted for, and the files written hold what was counted."""
    files = [pq.read_metadata(staging / bucket.file) for bucket in buckets]
    written = sum(bucket.rows for bucket in buckets)
    assert len({bucket.file for bucket in buckets}) == len(buckets), "a bucket was built twice"
    assert [meta.num_rows for meta in files] == [bucket.users for bucket in buckets], "users written and counted differ"
    assert written == totals.rows_kept, f"{written} rows written, {totals.rows_kept} kept"
    accounted = totals.rows_kept + totals.rows_capped + sum(totals.quarantined.values())
    assert rows_in_files == totals.rows_in == accounted, f"{rows_in_files} rows read, {accounted} accounted for"


def _version(cfg: RunConfig, entries: list[Bucket]) -> str:
    contents = [[entry.file, entry.sha256] for entry in entries]
    what = [store.SCHEMA_VERSION, cfg.source.actions, cfg.source.request_columns, contents]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()


def _in_version(entry: Bucket, version: str) -> Bucket:
    return replace(entry, file=f"{version[:16]}/{entry.file}")


def _publish(folder: Path, staging: Path, manifest: Manifest) -> None:
    """Give the staged files their name, then the manifest. The version before stays for those who read it still."""
    version = folder / manifest.digest[:16]
    before = _published_version(folder)
    if version != before:  # else the same contents are published already
        shutil.rmtree(version, ignore_errors=True)  # left by a build that was killed here
        staging.rename(version)
    store.write_manifest(folder, manifest)
    for other in folder.iterdir():
        if other.is_dir() and other not in (version, before, staging):
            shutil.rmtree(other)


def _published_version(folder: Path) -> Path | None:
    try:
        return folder / store.read_manifest(folder).digest[:16]
    except UserError:
        return None


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One build at a time; the lock goes with the process."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another job is building sequences in {folder}") from None
        yield


def _inputs_digest(logs: LogFiles, settings: dict[str, Any]) -> str:
    sides = [(table.id_column, parquet_files("", table.path)) for table in (logs.users, logs.items) if table]
    files = [*logs.files, *(file for _, side in sides for file in side)]
    with ThreadPoolExecutor() as pool:  # hashing lets go of the interpreter
        digests = list(pool.map(file_digest, files))
    what = [store.SCHEMA_VERSION, settings, digests, [id_column for id_column, _ in sides]]
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()
