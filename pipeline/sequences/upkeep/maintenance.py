"""Upkeep of a published store: compaction, retention, and forgetting users.

Each makes a new manifest of the published one and new files beside the old ones, and publishes it
in one step, so that a killed run leaves what was published and can be run again.
"""

import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from pipeline.config import (
    CheckConfig,
    RunConfig,
    RunFolders,
    SequenceConfig,
    SourceConfig,
    SplitConfig,
    UserError,
)
from pipeline.files import sweep_staged
from pipeline.logs import LIVE_FILES, live_log_dir, live_logs, open_logs
from pipeline.logs.cleaning import LogRules, has_log_form
from pipeline.logs.imported import read_import_report
from pipeline.schema import DAY_MS
from pipeline.sequences import build, store
from pipeline.sequences.buckets import BucketRules, carry_record, plan_buckets, total_statistics
from pipeline.sequences.contents import content_settings, inputs_of_parts, other_settings
from pipeline.sequences.dictionary import chunks_without
from pipeline.sequences.forgotten import add_forgotten
from pipeline.sequences.parts import Part
from pipeline.sequences.quality import report
from pipeline.sequences.quality.checks import run_checks
from pipeline.sequences.quality.newest import find_newest
from pipeline.sequences.quality.own_ids import name_ids
from pipeline.sequences.store import Bucket, Manifest
from pipeline.sequences.upkeep.compaction import Gathered, gather_part, plan_gathering
from pipeline.sequences.upkeep.forgetting import (
    Rewritten,
    plan_sweep,
    stage_without,
    sweep_part,
    table_without,
)
from pipeline.sequences.upkeep.readers import run_folders
from pipeline.sequences.versions import (
    compose_manifest,
    held_parts,
    held_records,
    lock_folder,
    version_but,
)
from pipeline.sequences.workers import Workers, workers

logger = logging.getLogger(__name__)


def published_with(folder: Path, source: SourceConfig, cfg: SequenceConfig) -> Manifest:
    """The version published in `folder`, which was built with these settings.

    Raises:
        UserError: nothing is published, or it was built with others.
    """
    manifest = store.read_manifest(folder)
    settings = content_settings(source, cfg)
    keys = other_settings(manifest, settings)
    if keys:
        raise UserError(f"{folder} holds sequences of other settings ({keys})")
    return manifest


@dataclass(frozen=True)
class HeldVersion:
    """A published version with what makes another one of it."""

    folder: Path
    manifest: Manifest
    parts: Sequence[Part]
    rules: BucketRules
    run: Workers


def held_rules(manifest: Manifest) -> LogRules:
    """For rows that were checked when their part was made."""
    return LogRules(
        columns={},
        events=manifest.events,
        earliest_ms=0,
        latest_ms=2**62,
        num_buckets=manifest.num_buckets,
    )


def compact_sequences(cfg: RunConfig) -> Manifest:
    """Gather the parts of the published sequences into few; with `sequences.keep_days`, drop rows
    that are too old.

    Without `keep_days` the version keeps its digest and its buckets. What was dropped stays on disk
    in the files of the version before, until the next one is published.

    Raises:
        UserError: nothing is published, it was built with other settings, or more rows are too old
            than `sequences.max_dropped_share` allows.
    """
    store.require_own(cfg.sequences)
    folder = cfg.sequence_dir
    with lock_folder(folder):
        published = published_with(folder, cfg.source, cfg.sequences)
        parts = held_parts(folder, published)
        since_ms = oldest_kept_ms(cfg.sequences, folder, published)

        work = plan_gathering(parts, published.retired, published.num_buckets, since_ms)
        if len(parts) <= len(work) and since_ms == published.kept_since_ms:
            logger.info(
                "%d parts are few enough, and no rows are too old: nothing to do", len(parts)
            )
            return published

        logs = held_rules(published)
        rules = build.bucket_rules(cfg.sequences, cfg.features, cfg.split, logs, parts, cfg.run_dir)
        with workers(cfg.ray, cfg.runs_dir) as run:
            held = HeldVersion(folder, published, parts, rules, run)
            task = partial(gather_part, rules=rules, since_ms=since_ms, folder=folder)
            gathered = run("gathering the parts", task, work)
            try:
                _refuse_large_drop(cfg.sequences, gathered, since_ms)
            except UserError:
                store.remove_unnamed(folder, [published, *store.versions(folder)])
                raise

            now: list[Part] = []
            dropped: set[int] = set()
            retired: dict[str, Bucket] = {}
            for one in gathered:
                now.append(one.part)
                dropped.update(one.dropped)
                retired.update(one.retired)
            retired = dict(sorted(retired.items()))

            changes = {"retired": retired, "kept_since_ms": since_ms}
            manifest = rebuild_version(held, now, dropped, **changes)

        before = version_but(folder, manifest.digest)
        store.write_manifest(folder, manifest)
        store.remove_unnamed(folder, [manifest, for_readers(before)] if before else [manifest])
        logger.info("%d parts in place of %d", len(now), len(parts))
        return manifest


def _refuse_large_drop(
    cfg: SequenceConfig, gathered: Sequence[Gathered], since_ms: int | None
) -> None:
    """Go on only if the share of the rows that would be dropped is within the limit.

    Raises:
        UserError: it is not, with the figures.
    """
    kept = dropped = 0
    for one in gathered:
        kept += one.part.rows
        dropped += sum(one.dropped.values())
    if since_ms is None or dropped <= cfg.max_dropped_share * (kept + dropped):
        return

    oldest = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=since_ms)
    share = dropped / (kept + dropped)
    raise UserError(
        f"compaction would drop {dropped:,} of {kept + dropped:,} rows ({share:.2%}), those from "
        f"before {oldest.isoformat(timespec='seconds')} (sequences.keep_days: {cfg.keep_days}), "
        f"and nothing is changed: sequences.max_dropped_share is {cfg.max_dropped_share:g}. Where "
        f"that is meant, set it to {math.ceil(share * 100) / 100:g} for this run"
    )


def oldest_kept_ms(cfg: SequenceConfig, folder: Path, published: Manifest) -> int | None:
    """The time before which compaction drops rows; None: it drops none.

    Days are counted back from the newest event, which a few stray rows do not move
    (quality/newest.py). What was dropped once does not come back.
    """
    since_ms = published.kept_since_ms
    if cfg.keep_days is None:
        return since_ms
    newest_ms = find_newest(folder, published, now_ms=int(time.time() * 1000))
    return max(newest_ms - cfg.keep_days * DAY_MS, since_ms or 0)


def for_readers(manifest: Manifest) -> Manifest:
    """A version that nobody builds upon: it names the files that training, evaluation and serving
    read.
    """
    return replace(manifest, parts=(), records=(), retired={})


def rebuild_version(
    held: HeldVersion, parts: Sequence[Part], changed: Collection[int], **changes: Any
) -> Manifest:
    """The held version over other parts: buckets with the numbers `changed` are built again,
    the others stay, unless what is counted of them has changed with the settings.

    `changes` are fields of the manifest that are not counted from the buckets.

    Raises:
        UserError: no rows would be left.
    """
    folder, published, rules = held.folder, held.manifest, held.rules
    records = held_records(folder, published)
    counted = total_statistics(records)

    retired: Mapping[str, Bucket] = changes.get("retired", published.retired)
    work = plan_buckets(parts, retired, rules)
    if not work:
        raise UserError(
            f"{folder}: no rows would be left; remove the folder of the run, if that is what is "
            "wanted"
        )

    # a bucket whose rows are the same keeps its record, under the name that its new parts give it
    work_before = plan_buckets(held.parts, published.retired, rules)
    before = {task.number: task for task in work_before}
    for task in work:
        if task.number not in changed and before[task.number].record in published.records:
            carry_record(folder, before[task.number], task)

    rest: dict[str, Any] = {
        "counts": published.counts,
        "actions": published.actions,
        "request_columns": published.request_columns,
        "outcome_columns": published.outcome_columns,
        "num_buckets": published.num_buckets,
        "side_tables": published.side_tables,
        "text_ids": published.text_ids,
        "dictionaries": published.dictionaries,
        "config": published.config,
        "inputs": published.inputs,
        "retired": published.retired,
        "kept_since_ms": published.kept_since_ms,
    }
    return compose_manifest(
        folder,
        parts,
        work,
        build.build_buckets(folder, work, rules, held.run),
        imported_quarantined=Counter(published.quarantined) - Counter(counted.quarantined),
        **(rest | changes),
    )


def forget_users(cfg: RunConfig, users: np.ndarray) -> dict[str, int]:
    """Take the users, int64, out of everything that the run's sequences and the files around them
    hold.

    They go on a list first, so that no later build takes them in again. Then come parts, buckets,
    quarantine and tables, as a new version in the place of all that are kept, the report, the
    exported events (live_logs), predictions of evaluations and recommended lists, those of runs
    that were trained on these sequences too. Run again, it
    does what a killed run left and changes nothing else.

    Returns the rows that were removed, by where they were.

    Raises:
        UserError: nothing is published, it was built with other settings, or nobody else would be
            left.
    """
    store.require_own(cfg.sequences)
    folder = cfg.sequence_dir
    with lock_folder(folder):
        published = published_with(folder, cfg.source, cfg.sequences)
        add_forgotten(folder, users)

        column = cfg.source.column_name("user_id")
        sweep_staged(live_log_dir(cfg.run_dir), LIVE_FILES)
        text = "user_id" in published.text_ids
        exported = _stage_files(map(Path, live_logs(cfg.run_dir)), users, column, text=text)
        digests = {file.old_digest: file.new_digest for file in exported}

        parts = held_parts(folder, published)
        logs = held_rules(published)
        rules = build.bucket_rules(cfg.sequences, cfg.features, cfg.split, logs, parts, cfg.run_dir)

        def inputs_of(parts: Sequence[Part]) -> str:
            settings = content_settings(cfg.source, cfg.sequences)
            return inputs_of_parts(settings, open_logs(cfg.source, cfg.run_dir), parts)

        with workers(cfg.ray, cfg.runs_dir) as run:
            held = HeldVersion(folder, published, parts, rules, run)
            manifest, removed = _without(held, users, digests, inputs_of)
        if manifest != published:
            store.write_manifest(folder, manifest)
        store.remove_unnamed(folder, [manifest])  # the version before has the users too
        _report_again(cfg.folders, cfg.source, cfg.split, cfg.checks, manifest)

        # after the manifest, which knows them by their new digests
        removed["live_logs"] = _publish_files(exported)

    folders = run_folders(cfg.run_dir)
    for name in ("predictions", "recommendations"):
        files = []
        for run in folders:
            files += sorted(run.rglob(f"{name}/*.parquet"))
        rewritten = _stage_files(files, users, "user_id", text=text)
        removed[name] = _publish_files(rewritten)
    return removed


def _stage_files(
    files: Iterable[Path], users: np.ndarray, column: str, *, text: bool
) -> list[Rewritten]:
    staged = []
    for file in files:
        own = "user_id" if has_log_form(pq.read_schema(file)) else column
        rewritten = stage_without(file, users, own, text=text)
        if rewritten is not None:
            staged.append(rewritten)
    return staged


def _publish_files(files: Sequence[Rewritten]) -> int:
    """Put the files in their places; returns the rows removed from them."""
    removed = 0
    for file in files:
        file.publish_rest()
        removed += file.removed
    return removed


def _without(
    held: HeldVersion,
    users: np.ndarray,
    digests: Mapping[str, str],
    inputs_of: Callable[[Sequence[Part]], str],
) -> tuple[Manifest, dict[str, int]]:
    """The held version without the users, its files written; and the rows removed.

    Args:
        digests: old -> new, of the files of the logs that had rows of them.
        inputs_of: the digest of a version's inputs, by its parts.
    """
    folder, published = held.folder, held.manifest
    task = partial(sweep_part, users=users, rules=held.rules.logs, folder=folder)
    work = plan_sweep(held.parts, users, digests)
    swept = held.run("taking users out of the parts", task, work)

    changed: set[int] = set()  # buckets
    removed = {"parts": 0, "retired": 0, "users": 0}
    now: list[Part] = []
    for one in swept:
        now.append(one.part)
        changed.update(one.removed)
        removed["parts"] += sum(one.removed.values())

    retired, rows_retired = _retired_without(folder, published.retired, users)
    removed["retired"] = sum(rows_retired.values())
    changed.update(rows_retired)

    tables = dict(published.side_tables)
    if "users" in tables:
        tables["users"], removed["users"] = table_without(folder, tables["users"], users)

    dictionaries = dict(published.dictionaries)
    if "user_id" in dictionaries:
        dictionaries["user_id"], removed["ids"] = chunks_without(
            folder, "user_id", dictionaries["user_id"], users, published.num_buckets
        )

    if now == held.parts and not changed and not any(map(removed.get, ("users", "ids"))):
        return published, {"sequences": 0, "quarantine": 0, **removed}

    changes: dict[str, Any] = {
        "retired": retired,
        "side_tables": tables,
        "dictionaries": dictionaries,
    }
    if digests:
        changes["inputs"] = inputs_of(now)
    manifest = rebuild_version(held, now, changed, **changes)

    counts = {
        "sequences": published.num_rows - manifest.num_rows,
        "quarantine": _quarantined_rows(published) - _quarantined_rows(manifest),
    }
    return manifest, counts | removed


def _retired_without(
    folder: Path, retired: Mapping[str, Bucket], users: np.ndarray
) -> tuple[dict[str, Bucket], dict[int, int]]:
    """The retired files without the users, and the rows removed, by buckets that had some."""
    left: dict[str, Bucket] = {}
    removed: dict[int, int] = {}
    for number, entry in retired.items():
        rest, rows = table_without(folder, entry, users)
        if rows:
            removed[int(number)] = rows
        if rest.rows:
            left[number] = rest
    return left, removed


def _quarantined_rows(manifest: Manifest) -> int:
    return sum(entry.rows for entry in manifest.quarantine)


def _report_again(
    folders: RunFolders,
    source: SourceConfig,
    split: SplitConfig,
    limits: CheckConfig,
    manifest: Manifest,
) -> None:
    """The report shows rows and names users: write it again from what is left."""
    folder, run_dir = folders.sequence_dir, folders.run_dir
    if not (run_dir / "report").exists():
        return

    records = held_records(folder, manifest)
    totals = name_ids(
        folder, manifest.dictionaries, total_statistics(records), manifest.num_buckets
    )
    checks = run_checks(limits, totals)
    imported = None if source.kind == "parquet" else read_import_report(folders.log_dir)
    inputs = report.read_inputs(run_dir)
    periods = build.report_periods(split, source.actions, folder, records, manifest.side_tables)
    rules = held_rules(manifest)
    report.write_report(run_dir, folders.name, totals, rules, imported, checks, inputs, periods)
