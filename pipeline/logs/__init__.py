"""Where logs come from: a user's own Parquet, a public dataset, or a generator.

An adapter or generator writes LOG, USER and ITEM tables under the run's `logs/`; a user's own files
stay where they are. `open_logs` answers for all of them what the builder reads.
"""

from functools import partial
from pathlib import Path

from pipeline.config import RunConfig, RunFolders, SideTable, SourceConfig
from pipeline.config.folders import LOG_FOLDER
from pipeline.logs import kuairand, parquet, synthetic
from pipeline.logs.imported import (
    ImportReport,
    LogFiles,
    import_once,
    read_import_report,
    source_fingerprint,
)
from pipeline.logs.rows import count_rows
from pipeline.schema import ROW_DIGEST

__all__ = [
    "LIVE_FILES",
    "ImportReport",
    "LogFiles",
    "import_logs",
    "live_log_dir",
    "open_logs",
    "plan_import",
]

LIVE_FILES = "events-*.parquet"

WRITERS = {"kuairand": kuairand.write_logs, "synthetic": synthetic.write_logs}
PLANS = {"kuairand": kuairand.plan, "synthetic": synthetic.plan}


def import_logs(cfg: RunConfig, *, overwrite: bool = False) -> ImportReport:
    """Write the run's logs, once: the same source and settings again are found and left alone.

    Raises:
        UserError: the source is missing or broken, or other logs are there already and `overwrite`
        is not set.
    """
    if cfg.source.kind == "parquet":
        files = open_logs(cfg.source, cfg.run_dir).files
        return ImportReport(kind="parquet", rows=count_rows(files, cfg.source.format), files=files)

    write = partial(WRITERS[cfg.source.kind], cfg.source, cfg.seed)
    return import_once(cfg.log_dir, write, source_fingerprint(cfg.source, cfg.seed), overwrite)


def plan_import(source: SourceConfig, folders: RunFolders) -> dict[str, object]:
    """What `import_logs` would write."""
    if source.kind == "parquet":
        files = open_logs(source, folders.run_dir).files
        return {
            "import": "nothing to do, logs are read where they are",
            "rows": count_rows(files, source.format),
        }
    return {"writes": str(folders.log_dir), **PLANS[source.kind](source)}


def live_log_dir(run_dir: Path) -> Path:
    """Where `jobs.export_events` puts what the server was sent."""
    return run_dir / "live_logs"


def live_logs(run_dir: Path) -> list[str]:
    """Its files, sorted."""
    return sorted(str(file) for file in live_log_dir(run_dir).glob("*.parquet"))


def open_logs(source: SourceConfig, run_dir: Path) -> LogFiles:
    """The files of a run's logs, what their columns are called, and the side tables.

    Raises:
        UserError: there are no files, or the import has not run.
    """
    ours = [column.name for column in source.events.log_columns]
    known = [*ours, ROW_DIGEST]
    if source.kind == "parquet":
        assert source.path is not None, "SourceConfig asks for it"
        found = parquet.find_logs("source.path", source.path, source.format)
        return LogFiles(
            files=[*found.files, *live_logs(run_dir)],
            columns=parquet.column_mapping(source, known),
            users=source.users,
            items=source.items,
            left_out=found.left_out,
        )

    log_dir = run_dir / LOG_FOLDER
    report = read_import_report(log_dir)
    written = [str(log_dir / file) for file in report.files]
    return LogFiles(
        files=[*written, *live_logs(run_dir)],
        columns={name: name for name in known},
        users=SideTable(path=str(log_dir / "users.parquet"), id_column="user_id"),
        items=SideTable(path=str(log_dir / "items.parquet"), id_column="item_id"),
        imported=report,
    )
