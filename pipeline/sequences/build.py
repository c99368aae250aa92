"""LOG → SEQUENCE: one row per user, built with Ray Data and published as a store
(pipeline/sequences/store.py).

    files → normalise → parts by user bucket → one vectorised pass per bucket → files by content →
    manifest

Two passes of tasks, with files between them (pipeline/sequences/parts.py,
pipeline/sequences/buckets.py). Ray's object store carries summaries alone and never spills: rows by
bucket are wanted on disk anyway, for a build that was killed to go on from and for the next day's
logs to be added to. What is done to rows is in pipeline/logs/cleaning.py and
pipeline/sequences/users.py; here work is planned and handed out, and what came of it is checked;
pipeline/sequences/versions.py verifies and publishes.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline import config
from pipeline.config import (
    CheckConfig,
    ColumnReading,
    DriftConfig,
    FeatureConfig,
    RunConfig,
    RunFolders,
    SequenceConfig,
    SideTable,
    SourceConfig,
    SplitConfig,
    UserError,
)
from pipeline.logs import LogFiles, live_log_dir
from pipeline.logs.cleaning import LogRules
from pipeline.logs.files import PLAIN, total_bytes
from pipeline.schema import NAMED_IDS
from pipeline.sequences import parts, store
from pipeline.sequences.buckets import (
    BucketRules,
    BucketWork,
    Record,
    find_record,
    plan_buckets,
    total_statistics,
    write_bucket,
)
from pipeline.sequences.checked_logs import check_logs
from pipeline.sequences.contents import (
    content_settings,
    digests_of_files,
    form_settings,
    inputs_digest,
    inputs_of_parts,
    other_settings,
    side_digests,
    source_digests,
)
from pipeline.sequences.dictionary import texts_of, write_dictionaries, write_pairs
from pipeline.sequences.forgotten import read_forgotten
from pipeline.sequences.parts import PARTS, Part, find_part, plan_parts, write_part
from pipeline.sequences.preview import IdSample, sample_ids
from pipeline.sequences.quality import report
from pipeline.sequences.quality.checks import Check, refuse_failed, run_checks
from pipeline.sequences.quality.drift import refuse_drift
from pipeline.sequences.quality.own_ids import name_ids
from pipeline.sequences.quality.periods import (
    add_periods,
    count_periods,
    distinct_items,
    period_edges,
)
from pipeline.sequences.quality.statistics import (
    Statistics,
    hash_hint,
    log_hints,
    positives_only,
)
from pipeline.sequences.repeats import RepeatRule
from pipeline.sequences.side_tables import (
    read_side_table,
    refuse_poor_join,
    side_joins,
    write_side_table,
)
from pipeline.sequences.sizes import MB, MUCH_MEMORY, bucket_memory, part_memory, row_bytes
from pipeline.sequences.store import Bucket, Manifest
from pipeline.sequences.versions import (
    compose_manifest,
    held_parts,
    lock_folder,
    publish_version,
    published_version,
    readable_version,
    remove_unpublished,
)
from pipeline.sequences.workers import Workers, workers

logger = logging.getLogger(__name__)

HOUR_MS = 3600 * 1000


def plan_build(cfg: RunConfig) -> dict[str, object]:
    """The files and rows that `build_sequences` would read, and the memory that its tasks take.

    Raises:
        UserError: the logs or a side table cannot be used, as far as some of the rows show it.
    """
    logs, rules, rows_of_files = check_logs(cfg.source, cfg.sequences, cfg.features, cfg.run_dir)
    rows = sum(rows_of_files.values())
    bytes_per_row = row_bytes(rules.events)
    rows_per_bucket = rows // rules.num_buckets

    sample = sample_ids([file for file in logs.files if rows_of_files[file]], rules)
    for name, count in sample.no_numbers.items():
        if hint := hash_hint(name, count, sample.rows, rules):
            logger.warning("%s: %d of %d rows are no ids; %s", name, count, sample.rows, hint)
    joined = _check_sampled_joins(logs, rules, sample, rows, cfg.checks.min_joined_share)
    # a user is never divided
    user_rows = round(sample.largest_user() * rows)
    largest_bucket = max(rows_per_bucket, user_rows)

    return {
        "files": len(logs.files),
        "files_left_out": len(logs.left_out),
        "file_mb": round(total_bytes(logs.files) / MB, 1),
        "rows": rows,
        "rows_looked_at": sample.rows,
        "joined": joined,
        "parts": -(-rows // parts.PART_ROWS),
        "memory_mb_per_part": round(part_memory(rows, bytes_per_row) / MB, 1),
        "buckets": rules.num_buckets,
        "rows_per_bucket": rows_per_bucket,
        "memory_mb_per_bucket": round(bucket_memory(rows_per_bucket, bytes_per_row) / MB, 1),
        "rows_of_largest_user": user_rows,
        "memory_mb_of_largest_bucket": round(bucket_memory(largest_bucket, bytes_per_row) / MB, 1),
        "writes": str(cfg.sequence_dir),
    }


def _check_sampled_joins(
    logs: LogFiles, rules: LogRules, sample: IdSample, rows: int, least: float
) -> dict[str, float]:
    """Share of the sample's ids that each side table has, by table, all of whose rows are read.

    Raises:
        UserError: a table cannot be used, or joins too little and the sample is all there is.
    """
    shares = {}
    for name, table, column in _side_tables(logs):
        text = column in rules.events.text_ids
        side, pairs = read_side_table(name, table, column, text=text)
        join = sample.join(column, side[column].to_numpy())
        shares[name] = round(join.share, 3)

        known = side[column] if pairs is None else pairs["id"]
        try:
            refuse_poor_join(
                name, join, least, sample.examples[column], known.slice(0, 3).to_pylist()
            )
        except UserError as error:
            if sample.rows == rows:
                raise
            logger.warning("%s (of the first rows of some files)", error)
    return shares


def _side_tables(logs: LogFiles) -> list[tuple[str, SideTable, str]]:
    """The side tables that there are: name, table and our id column."""
    found = []
    for name, table, column in (("users", logs.users, "user_id"), ("items", logs.items, "item_id")):
        if table is not None:
            found.append((name, table, column))
    return found


def build_sequences(cfg: RunConfig, *, overwrite: bool = False, append: bool = False) -> Manifest:
    """Clean the logs, build one row per user and publish them in `cfg.sequence_dir`.

    The same logs and settings again are found published and left alone. A killed build leaves what
    was published, and the same call goes on where it was. With `append`, files that the published
    version does not have are added to it: the result is byte for byte that of a build of all files,
    of those too that are gone by now.

    Raises:
        UserError: the logs cannot be used, too many rows are bad, or other sequences are published
            there already and neither `overwrite` nor `append` says what is to become of them.
    """
    store.require_own(cfg.sequences)
    logs, rules, rows_of_files = check_logs(cfg.source, cfg.sequences, cfg.features, cfg.run_dir)
    folder = cfg.sequence_dir

    with lock_folder(folder), ThreadPoolExecutor(max_workers=1) as beside:
        files = present = digests_of_files(logs.files, folder)
        sides = side_digests(logs)
        settings = content_settings(cfg.source, cfg.sequences)
        published = None if overwrite else published_version(folder)

        held: list[Part] = []
        if published is not None:
            held = held_parts(folder, published)
            known = source_digests(held)
            wanted = known | files.keys() if append else files.keys()
            if published.inputs == inputs_digest(settings, wanted, sides):
                logger.info("already published in %s, nothing to do", folder)
                return published

            _refuse_other_sequences(folder, published, settings, len(files.keys() - known), append)
            _refuse_other_ids(folder, published, rules)
            rules = replace(rules, num_buckets=published.num_buckets)
            files = {digest: file for digest, file in files.items() if digest not in known}

        with workers(cfg.ray, cfg.runs_dir) as run:
            made = _make_parts(cfg.sequences, files, rules, folder, run)
            all_parts = [*held, *made]
            building = bucket_rules(
                cfg.sequences, cfg.features, cfg.split, rules, all_parts, cfg.run_dir
            )
            with _removing_refused(folder, made):
                built = build_files(folder, logs, rules, all_parts, published, building, run)

            # a cluster takes a second to end, in which nothing else would be done
            inputs = _list_inputs(logs, rows_of_files, present, held, made)
            new_parts = made if held else []
            held_to = VersionSettings(
                cfg.folders, cfg.source, cfg.sequences, cfg.split, cfg.checks, cfg.drift
            )
            checking = beside.submit(
                check_version, held_to, logs, rules, all_parts, new_parts, published, built, inputs
            )
        with _removing_refused(folder, made):
            manifest = checking.result()
        publish_version(folder, manifest)
    _tell_capped(manifest, cfg.sequences.max_rows_per_user)
    return manifest


@contextmanager
def _removing_refused(folder: Path, made: Sequence[Part]) -> Iterator[None]:
    """Remove what a refused build has written, but for its parts: the logs need not be read again
    by the next build, of a mended setting.
    """
    try:
        yield
    except UserError:
        remove_unpublished(folder, made)
        raise


def _tell_capped(manifest: Manifest, max_rows_per_user: int) -> None:
    if manifest.rows_capped:
        logger.info(
            "%d older rows of %d users are beyond sequences.max_rows_per_user (%d) and left out",
            manifest.rows_capped,
            manifest.users_capped,
            max_rows_per_user,
        )


def _list_inputs(
    logs: LogFiles,
    rows: Mapping[str, int],
    present: Mapping[str, str],
    held: Sequence[Part],
    made: Sequence[Part],
) -> report.InputFiles:
    """The files of a version: those that are there, given as digest -> file, and those that only
    the parts of the version before, `held`, remember.
    """
    digest_of = {file: digest for digest, file in present.items()}
    read: dict[str, int] = {}
    left_out = dict(logs.left_out)
    for file in logs.files:
        if file in digest_of:
            read[file] = rows[file]
        else:
            left_out[file] = "the same bytes as another file"

    gone: Counter[str] = Counter()
    for part in held:
        for source in part.sources:
            if source.digest not in present:
                gone[source.digest] += source.rows

    paths = {}
    for part in (*held, *made):
        for source in part.sources:
            paths[str(source.key)] = present.get(source.digest, source.path)
    return report.InputFiles(read, left_out, len(gone), gone.total(), paths)


def bucket_rules(
    sequences: SequenceConfig,
    features: FeatureConfig,
    split: SplitConfig,
    rules: LogRules,
    all_parts: Sequence[Part],
    run_dir: Path,
) -> BucketRules:
    """The rules for the buckets of these parts."""
    offset_ms = int(features.hour_utc_offset * HOUR_MS)
    repeats = RepeatRule(merge=sequences.repeats == "merge")
    if repeats.merge and sequences.repeated_outcomes == "last_file":
        repeats = replace(repeats, file_order=_file_order(all_parts, live_log_dir(run_dir)))
    edges = period_edges(split)
    return BucketRules(rules, sequences.max_rows_per_user, offset_ms, repeats, edges)


def _file_order(all_parts: Sequence[Part], live_dir: Path) -> dict[int, int]:
    """Place of each file by its key: by path, as dated names sort; posted events come last."""
    paths: dict[int, tuple[bool, str]] = {}
    for part in all_parts:
        for source in part.sources:
            posted = Path(source.path).parent == live_dir
            paths[source.key] = (posted, source.path)
    in_order = sorted(paths, key=lambda key: (paths[key], key))
    return {key: place for place, key in enumerate(in_order)}


def _reading_settings(reading: ColumnReading) -> dict[str, object]:
    """The reading as settings; one without a clock as before there were any, so that parts keep
    their names.
    """
    settings = config.to_dict(reading)
    if reading.clock is None:
        del settings["clock"]
    return settings


def _make_parts(
    sequences: SequenceConfig,
    files: Mapping[str, str],
    rules: LogRules,
    folder: Path,
    run: Workers,
) -> list[Part]:
    """The parts of these files, digest -> path; those that a killed build finished are found."""
    forgotten = read_forgotten(folder)
    settings = {
        "columns": rules.columns,
        "actions": rules.events.actions,
        "request_columns": rules.events.request,
        # as configured: None moves with the clock
        "times": [sequences.earliest_time, sequences.latest_time],
        "num_buckets": rules.num_buckets,
        "forgotten": forgotten.hashes,
    }
    if rules.readings:  # parts of plain columns keep their names
        settings["readings"] = {
            name: _reading_settings(reading) for name, reading in rules.readings.items()
        }
    if rules.format != PLAIN:
        settings["format"] = form_settings(rules.format)
    if rules.events.text_ids:  # parts without such columns keep their names
        settings["text_ids"] = rules.events.text_ids
    for column in rules.events.declared:  # so here
        settings[f"outcome {column.name}"] = [str(column.dtype), column.at_least]

    found, missing = [], []
    work = plan_parts(files, settings, rules.format)
    for task in work:
        part = find_part(folder, task.name)
        if part is None:
            missing.append(task)
        else:
            found.append(part)

    if found:
        logger.info("%d of %d parts are there already", len(found), len(work))
    write = partial(write_part, rules=rules, folder=folder, forgotten=forgotten)
    most_rows = max((task.rows for task in missing), default=0)
    memory = part_memory(most_rows, row_bytes(rules.events))
    return found + run("reading the logs", write, missing, memory)


@dataclass(frozen=True)
class BuiltFiles:
    """The files of a version, not yet held against its limits."""

    side_tables: Mapping[str, Bucket]
    dictionaries: dict[str, dict[str, Bucket]]  # by column and number
    work: Sequence[BucketWork]
    records: Sequence[Record]


def build_files(
    folder: Path,
    logs: LogFiles,
    rules: LogRules,
    all_parts: Sequence[Part],
    published: Manifest | None,
    building: BucketRules,
    run: Workers,
) -> BuiltFiles:
    """The files of the version that `all_parts` make. Only touched buckets are built.

    Raises:
        UserError: a side table cannot be used.
    """
    side_tables, side_pairs = _write_side_tables(logs, rules, folder)

    pairs = _new_pairs(all_parts, published, side_pairs)
    before = published.dictionaries if published else {}
    dictionaries = write_dictionaries(folder, pairs, before, rules.num_buckets, run)

    work = plan_buckets(all_parts, published.retired if published else {}, building)
    records = build_buckets(folder, work, building, run)
    return BuiltFiles(side_tables, dictionaries, work, records)


@dataclass(frozen=True)
class VersionSettings:
    """What a version is counted by, reported with and held against."""

    folders: RunFolders
    source: SourceConfig
    sequences: SequenceConfig
    split: SplitConfig
    checks: CheckConfig
    drift: DriftConfig


def check_version(
    held_to: VersionSettings,
    logs: LogFiles,
    rules: LogRules,
    all_parts: Sequence[Part],
    new_parts: Sequence[Part],
    published: Manifest | None,
    built: BuiltFiles,
    inputs: report.InputFiles,
) -> Manifest:
    """The manifest of these files, which are counted, reported and held against all limits.

    Raises:
        UserError: too many rows are bad, among all or among those of `new_parts`, a side table
            joins too little, or the version is too far from the one before.
    """
    source, limits, folders = held_to.source, held_to.checks, held_to.folders
    folder = folders.sequence_dir
    side_tables, dictionaries, records = built.side_tables, built.dictionaries, built.records
    _check_joins(limits.min_joined_share, rules, folder, side_tables, dictionaries, records)
    periods = report_periods(held_to.split, source.actions, folder, records, side_tables)
    totals = name_ids(folder, dictionaries, total_statistics(records), rules.num_buckets)
    checks = _check_counts(limits, totals, new_parts)
    page = report.write_report(
        folders.run_dir, folders.name, totals, rules, logs.imported, checks, inputs, periods
    )
    refuse_failed(checks, log_hints(totals, rules), page)
    _tell_positives_only(totals, rules)

    settings = content_settings(source, held_to.sequences)
    manifest = compose_manifest(
        folder,
        all_parts,
        built.work,
        records,
        imported_quarantined=logs.imported.quarantined if logs.imported else {},
        counts=logs.imported.counts if logs.imported else {},
        actions=source.actions,
        request_columns=source.request_columns,
        outcome_columns=config.to_dict(source)["outcome_columns"],
        num_buckets=rules.num_buckets,
        side_tables=side_tables,
        text_ids=rules.events.text_ids,
        dictionaries=dictionaries,
        config=settings,
        inputs=inputs_of_parts(settings, logs, all_parts),
        retired=published.retired if published else {},
        kept_since_ms=published.kept_since_ms if published else None,
    )
    if limits.drift:
        refuse_drift(folder, readable_version(folder), manifest, held_to.drift)
    return manifest


def _tell_positives_only(totals: Statistics, rules: LogRules) -> None:
    only = positives_only(totals, rules)
    if only:
        logger.warning(
            "%s: true wherever known, logs of positives only; to train on it set "
            "examples.negatives",
            ", ".join(only),
        )


def report_periods(
    split: SplitConfig,
    actions: Sequence[str],
    folder: Path,
    records: Sequence[Record],
    side_tables: Mapping[str, Bucket],
) -> report.PeriodReport:
    """Rows and labels of each period of the split, and how many items the item table knows."""
    edges = period_edges(split)
    counted, uncounted, buckets = [], [], []
    for record in records:
        if record.bucket is None:
            continue
        buckets.append(record.bucket)
        if record.periods is not None and record.periods.edges == edges:
            counted.append(record.periods)
        else:  # it was built under another split
            uncounted.append(record.bucket)
    counted += count_periods(folder, uncounted, edges, len(actions))
    periods = add_periods(counted, len(actions)).by_name(actions, actions)

    items = distinct_items(folder, buckets)
    known = None
    if "items" in side_tables:
        table = pq.read_table(folder / side_tables["items"].file, columns=["item_id"])
        known = int(np.isin(items, table["item_id"].to_numpy()).sum())
    return report.PeriodReport(periods, len(items), known)


def _write_side_tables(
    logs: LogFiles, rules: LogRules, folder: Path
) -> tuple[dict[str, Bucket], dict[str, dict[str, int]]]:
    """The side tables, and by column the files of their ids that are text, with their bytes."""
    forgotten = read_forgotten(folder)
    written: dict[str, Bucket] = {}
    pairs: dict[str, dict[str, int]] = {}
    for name, table, column in _side_tables(logs):
        text = column in rules.events.text_ids
        written[name], ids = write_side_table(name, table, column, folder, forgotten, text=text)
        if ids is not None:
            stem = f"{PARTS}/side-{name}"
            pairs[column] = write_pairs(folder, stem, column, ids, rules.num_buckets, forgotten)
    return written, pairs


def _check_joins(
    least: float,
    rules: LogRules,
    folder: Path,
    side_tables: Mapping[str, Bucket],
    dictionaries: Mapping[str, Mapping[str, Bucket]],
    records: Sequence[Record],
) -> None:
    """Side tables that join less than the share `least` are refused."""
    buckets = [record.bucket for record in records if record.bucket is not None]
    for name, column in (("users", "user_id"), ("items", "item_id")):
        if name not in side_tables or not buckets:
            continue

        join, seen, known = side_joins(name, column, folder, side_tables[name], buckets)
        logger.info("source.%s: the table has %.1f%% of the %s seen", name, 100 * join.share, name)
        examples = [seen.tolist(), known.tolist()]
        if column in rules.events.text_ids:
            chunks = dictionaries.get(column, {})
            for place, codes in enumerate((seen, known)):
                texts = texts_of(folder, chunks, codes, rules.num_buckets)
                examples[place] = texts.to_pylist()
        refuse_poor_join(name, join, least, *examples)


def _new_pairs(
    all_parts: Sequence[Part],
    published: Manifest | None,
    of_side_tables: Mapping[str, Mapping[str, int]],
) -> dict[str, dict[str, int]]:
    """By column of text ids: the files with those of the side tables and of the parts that
    `published` lacks, and their bytes.
    """
    held = set(published.parts) if published else set()
    found: dict[str, dict[str, int]] = {name: {} for name in NAMED_IDS}
    for part in all_parts:
        if part.name not in held:
            for column, size in part.ids.items():
                found[column][part.ids_file(column)] = size
    for column, files in of_side_tables.items():
        found[column] |= files
    return found


def _check_counts(
    checks: CheckConfig, totals: Statistics, new_parts: Sequence[Part]
) -> list[Check]:
    new_rows = 0
    broken: Counter[str] = Counter()
    for part in new_parts:
        new_rows += part.rows
        broken.update(part.broken)
    return run_checks(checks, totals, new_rows, broken)


def build_buckets(
    folder: Path, work: Sequence[BucketWork], rules: BucketRules, run: Workers
) -> list[Record]:
    """The records of these buckets, by number; buckets that are there already stay as they are."""
    found, missing = [], []
    for task in work:
        record = find_record(folder, task.record)
        if record is None:
            missing.append(task)
        else:
            found.append(record)

    if found:
        logger.info("%d of %d buckets stay as they are", len(found), len(work))
    _warn_of_memory(work, rules.logs)

    write = partial(write_bucket, rules=rules, folder=folder)
    most_rows = max((task.rows for task in missing), default=0)
    memory = bucket_memory(most_rows, row_bytes(rules.logs.events))
    records = found + run("building buckets", write, missing, memory)
    return sorted(records, key=lambda record: record.number)


def _warn_of_memory(work: Sequence[BucketWork], rules: LogRules) -> None:
    bytes_per_row = row_bytes(rules.events)
    needed = [bucket_memory(task.rows, bytes_per_row) for task in work]
    if needed and max(needed) > MUCH_MEMORY:
        logger.warning(
            "a bucket takes up to %d MB of a worker's memory, on average %d MB: "
            "rebuild with more sequences.num_buckets, or see in the report who has so many rows",
            max(needed) / MB,
            sum(needed) / len(needed) / MB,
        )


def _refuse_other_sequences(
    folder: Path, published: Manifest, settings: dict[str, Any], new_files: int, append: bool
) -> None:
    keys = other_settings(published, settings)
    if keys:
        raise UserError(
            f"{folder} holds sequences of other settings ({keys}); choose another name or pass "
            "--overwrite"
        )
    if not append:
        raise UserError(
            f"{folder} holds sequences of other logs or settings ({new_files} files of the logs "
            "are new); pass --append to add new files, --overwrite to build from what is there "
            "now, or choose another name"
        )


def _refuse_other_ids(folder: Path, published: Manifest, rules: LogRules) -> None:
    """Go on only if ids are text here that are text in the published version."""
    for name in NAMED_IDS:
        before = "text" if name in published.text_ids else "numbers"
        now = "text" if name in rules.events.text_ids else "numbers"
        if before != now:
            raise UserError(
                f"{name}: the new files have {now}, the sequences published in {folder} have "
                f"{before}: write it as before, or build from all files with --overwrite"
            )
