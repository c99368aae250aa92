"""Logs that we wrote ourselves: staged in a folder of their own, published by a rename, described
in import.json.
"""

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline import config
from pipeline.config import SideTable, SourceConfig, UserError
from pipeline.logs.files import base_name, file_digest, list_files

REPORT = "import.json"


@dataclass(frozen=True)
class ImportReport:
    """What an import did. `quarantined` counts rows of the source's own tables by reason."""

    kind: str
    rows: int  # LOG rows
    files: list[str]  # of the log, relative to the log folder where we wrote them
    quarantined: dict[str, int] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)  # whatever else the adapter noticed
    fingerprint: str = ""  # of the source and the settings


@dataclass(frozen=True)
class LogFiles:
    """What the sequence builder reads."""

    files: list[str]
    columns: dict[str, str]  # LOG column -> name in the files, whether or not the files have it
    users: SideTable | None
    items: SideTable | None
    imported: ImportReport | None = None
    left_out: dict[str, str] = field(default_factory=dict)  # file beside the logs -> why not read


def import_once(
    log_dir: Path, write: Callable[[Path], ImportReport], fingerprint: str, overwrite: bool
) -> ImportReport:
    """Call `write` with a staging folder that becomes `log_dir`, unless the same logs are there:
    those of this `fingerprint`.

    Raises:
        UserError: other logs are there, and `overwrite` is not set.
    """
    if log_dir.exists() and not overwrite:
        found = read_import_report(log_dir)
        if found.fingerprint == fingerprint:
            return found
        raise UserError(
            f"{log_dir} holds logs of another source or other settings; choose another name "
            "or pass --overwrite"
        )

    staging = log_dir.with_name(".logs-staging")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        report = dataclasses.replace(write(staging), fingerprint=fingerprint)
        (staging / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
        _swap(staging, log_dir)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return report


def _swap(staging: Path, target: Path) -> None:
    """Put `staging` in the place of `target`; a kill between the two renames leaves no logs, never
    half of them.
    """
    if target.exists():
        old = target.with_name(".logs-old")
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
        staging.rename(target)
        shutil.rmtree(old)
    else:
        staging.rename(target)


def read_import_report(log_dir: Path) -> ImportReport:
    path = log_dir / REPORT
    try:
        return ImportReport(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"no imported logs at {log_dir}: run jobs.import_logs first") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(
            f"{path} is broken ({error}): run jobs.import_logs with --overwrite"
        ) from None


def source_fingerprint(source: SourceConfig, seed: int) -> str:
    """SHA-256 over everything that the written logs depend on: the settings and, where there is
    one, the source's files.
    """
    parts: list[object] = [source.kind, source.actions]
    if source.kind == "synthetic":
        parts += [seed, config.to_dict(source.synthetic)]
    else:
        assert source.path is not None, "SourceConfig asks for it"
        parts += [[base_name(file), file_digest(file)] for file in list_files(source.path)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
