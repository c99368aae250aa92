"""What is done to a published store besides building it: compaction, retention, and forgetting
users.

Each makes a new manifest of the published one and new files beside the old ones, and publishes it
in one step, so that a killed run leaves what was published and can be run again.
"""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.config import RunConfig, UserError
from pipeline.logs import live_logs, open_logs
from pipeline.logs.cleaning import LogRules
from pipeline.logs.imported import read_import_report
from pipeline.schema import DAY_MS
from pipeline.sequences import build, store
from pipeline.sequences.buckets import carry_record, plan_buckets
from pipeline.sequences.forgotten import add_forgotten
from pipeline.sequences.parts import Part
from pipeline.sequences.quality import report
from pipeline.sequences.quality.checks import run_checks
from pipeline.sequences.quality.statistics import merge
from pipeline.sequences.store import Bucket, Manifest
from pipeline.sequences.upkeep.compaction import gather, plan_gathering
from pipeline.sequences.upkeep.forgetting import plan_sweep, stage_without, sweep, table_without
from pipeline.sequences.workers import Workers, workers

logger = logging.getLogger(__name__)


def published_with(cfg: RunConfig) -> Manifest:
    """The published version, which was built with the settings of `cfg`.

    Raises:
        UserError: nothing is published, or it was built with others.
    """
    manifest = store.read_manifest(cfg.sequence_dir)
    if keys := build.other_settings(manifest, build.content_settings(cfg)):
        raise UserError(f"{cfg.sequence_dir} holds sequences of other settings ({keys})")
    return manifest


def held_rules(manifest: Manifest) -> LogRules:
    """For rows that were checked when their part was made."""
    return LogRules(
        columns={},
        actions=manifest.actions,
        request_columns=manifest.request_columns,
        earliest_ms=0,
        latest_ms=2**62,
        num_buckets=manifest.num_buckets,
    )


def compact(cfg: RunConfig) -> Manifest:
    """Gather the parts of the published sequences into few; with `sequences.keep_days`, drop rows
    that are too old.

    Without `keep_days` the version keeps its digest and its buckets. What was dropped stays on disk
    in the files of the version before, until the next one is published.

    Raises:
        UserError: nothing is published, it was built with other settings, or all rows are too old.
    """
    folder = cfg.sequence_dir
    with build.locked(folder):
        published = published_with(cfg)
        parts = build.held_parts(folder, published)
        since_ms = oldest_kept_ms(cfg, published)
        work = plan_gathering(parts, published.retired, published.num_buckets, since_ms)
        if len(parts) <= len(work) and since_ms == published.kept_since_ms:
            logger.info(
                "%d parts are few enough, and no rows are too old: nothing to do", len(parts)
            )
            return published
        rules = held_rules(published)
        with workers(cfg.ray, cfg.runs_dir) as run:
            task = partial(gather, rules=rules, since_ms=since_ms, folder=folder)
            gathered = run("gathering the parts", task, work)
            dropped = {number for part in gathered for number in part.dropped}
            retired = {number: entry for part in gathered for number, entry in part.retired.items()}
            now = [part.part for part in gathered]
            changes = {"retired": dict(sorted(retired.items())), "kept_since_ms": since_ms}
            manifest = rebuilt(cfg, published, parts, now, dropped, run, **changes)
        before = [
            version for version in store.versions(folder) if version.digest != manifest.digest
        ][:1]
        store.write_manifest(folder, manifest)
        store.remove_unnamed(folder, [manifest, *map(for_readers, before)])
        logger.info("%d parts in place of %d", len(now), len(parts))
        return manifest


def oldest_kept_ms(cfg: RunConfig, published: Manifest) -> int | None:
    """Compaction drops rows from before; None: it drops none.

    What was dropped once does not come back.
    """
    days, since_ms = cfg.sequences.keep_days, published.kept_since_ms
    return since_ms if days is None else max(published.last_event_ms - days * DAY_MS, since_ms or 0)


def for_readers(manifest: Manifest) -> Manifest:
    """Of a version that nobody builds upon: the files that training, evaluation and serving read."""
    return replace(manifest, parts=(), records=(), retired={})


def rebuilt(
    cfg: RunConfig,
    published: Manifest,
    parts_before: Sequence[Part],
    parts: Sequence[Part],
    changed: Collection[int],
    run: Workers,
    **changes: Any,
) -> Manifest:
    """The published version over other parts: buckets with the numbers `changed` are built again,
    the others stay, unless what is counted of them has changed with the settings.

    `changes` are fields of the manifest that are not counted from the buckets.
    """
    folder, rules = cfg.sequence_dir, held_rules(published)
    bucket_rules = build.bucket_rules(cfg, rules)
    retired: Mapping[str, Bucket] = changes.get("retired", published.retired)
    before = {
        task.number: task for task in plan_buckets(parts_before, published.retired, bucket_rules)
    }
    counted = merge([record.statistics for record in build.held_records(folder, published)])
    work = plan_buckets(parts, retired, bucket_rules)
    if not work:
        raise UserError(
            f"{folder}: no rows would be left; remove the folder of the run, if that is what is "
            "wanted"
        )
    for task in work:
        if task.number not in changed and before[task.number].record in published.records:
            carry_record(folder, before[task.number], task)
    kept = (
        "counts",
        "actions",
        "request_columns",
        "num_buckets",
        "side_tables",
        "config",
        "inputs",
        "retired",
    )
    rest = {name: getattr(published, name) for name in (*kept, "kept_since_ms")} | changes
    return build.compose(
        folder,
        parts,
        work,
        build.build_buckets(cfg, work, rules, run),
        imported_quarantined=Counter(published.quarantined) - Counter(counted.quarantined),
        **rest,
    )


def forget(cfg: RunConfig, users: np.ndarray) -> dict[str, int]:
    """Take the users, int64, out of everything that the run's sequences and the files around them
    hold.

    They go on a list first, so that no later build takes them in again. Then come parts, buckets,
    quarantine and tables, as a new version in the place of all that are kept, the report, the
    exported events (live_logs) and the predictions of evaluations. Run again, it does what a killed
    run left and changes nothing else.

    Returns the rows that were removed, by where they were.

    Raises:
        UserError: nothing is published, it was built with other settings, or nobody else would be
        left.
    """
    folder = cfg.sequence_dir
    with build.locked(folder):
        published = published_with(cfg)
        add_forgotten(folder, users)
        column = cfg.source.columns.get("user_id", "user_id")
        exported = [stage_without(Path(file), users, column) for file in live_logs(cfg)]
        exported = [file for file in exported if file is not None]
        manifest, removed = _without(
            cfg, published, users, {file.old_digest: file.new_digest for file in exported}
        )
        if manifest != published:
            store.write_manifest(folder, manifest)
        store.remove_unnamed(folder, [manifest])  # the version before has the users too
        _report_again(cfg, manifest)
        for file in exported:  # after the manifest, which knows them by their new digests
            file.replace()
    predictions = sorted(cfg.run_dir.rglob("predictions/*.parquet"))
    predicted = [stage_without(file, users, "user_id") for file in predictions]
    predicted = [file for file in predicted if file is not None]
    for file in predicted:
        file.replace()
    removed["live_logs"] = sum(file.removed for file in exported)
    removed["predictions"] = sum(file.removed for file in predicted)
    return removed


def _without(
    cfg: RunConfig, published: Manifest, users: np.ndarray, digests: Mapping[str, str]
) -> tuple[Manifest, dict[str, int]]:
    """The published version without the users, its files written; and the rows removed."""
    folder, rules = cfg.sequence_dir, held_rules(published)
    parts = build.held_parts(folder, published)
    with workers(cfg.ray, cfg.runs_dir) as run:
        task = partial(sweep, users=users, rules=rules, folder=folder)
        swept = run("taking users out of the parts", task, plan_sweep(parts, users, digests))
        retired = {
            number: table_without(folder, entry, users)
            for number, entry in published.retired.items()
        }
        tables = {
            name: table_without(folder, entry, users) if name == "users" else (entry, 0)
            for name, entry in published.side_tables.items()
        }
        changed = {number for part in swept for number in part.removed}
        changed |= {int(number) for number, (_, rows) in retired.items() if rows}
        removed = {
            "parts": sum(rows for part in swept for rows in part.removed.values()),
            "retired": sum(rows for _, rows in retired.values()),
            "users": sum(rows for _, rows in tables.values()),
        }
        now = [part.part for part in swept]
        if now == parts and not changed and not removed["users"]:
            return published, {"sequences": 0, "quarantine": 0, **removed}
        changes: dict[str, Any] = {
            "retired": {number: entry for number, (entry, _) in retired.items() if entry.rows},
            "side_tables": {name: entry for name, (entry, _) in tables.items()},
        }
        if digests:
            changes["inputs"] = build.inputs_of(cfg, open_logs(cfg), now)
        manifest = rebuilt(cfg, published, parts, now, changed, run, **changes)
    left_out = [
        sum(entry.rows for entry in version.quarantine) for version in (published, manifest)
    ]
    rows = {
        "sequences": published.num_rows - manifest.num_rows,
        "quarantine": left_out[0] - left_out[1],
    }
    return manifest, rows | removed


def _report_again(cfg: RunConfig, manifest: Manifest) -> None:
    """The report shows rows and names users: write it again from what is left."""
    if not (cfg.run_dir / "report").exists():
        return
    totals = merge([record.statistics for record in build.held_records(cfg.sequence_dir, manifest)])
    imported = None if cfg.source.kind == "parquet" else read_import_report(cfg)
    report.write(cfg, totals, held_rules(manifest), imported, run_checks(cfg.checks, totals))
