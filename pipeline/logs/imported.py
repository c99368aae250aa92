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
from pipeline.config import RunConfig, SideTable, UserError
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
    cfg: RunConfig, write: Callable[[RunConfig, Path], ImportReport], overwrite: bool
) -> ImportReport:
    """`write(cfg, folder)` into a staging folder that becomes `cfg.log_dir`, unless the same logs
    are there.
    """
    fingerprint = _fingerprint(cfg)
    if cfg.log_dir.exists() and not overwrite:
        found = read_import_report(cfg)
        if found.fingerprint == fingerprint:
            return found
        raise UserError(
            f"{cfg.log_dir} holds logs of another source or other settings; choose another name "
            "or pass --overwrite"
        )
    staging = cfg.run_dir / ".logs-staging"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        report = dataclasses.replace(write(cfg, staging), fingerprint=fingerprint)
        (staging / REPORT).write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
        _swap(staging, cfg.log_dir)
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


def read_import_report(cfg: RunConfig) -> ImportReport:
    path = cfg.log_dir / REPORT
    try:
        return ImportReport(**json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(f"no imported logs at {cfg.log_dir}: run jobs.import_logs first") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(
            f"{path} is broken ({error}): run jobs.import_logs with --overwrite"
        ) from None


def _fingerprint(cfg: RunConfig) -> str:
    """Of everything that the written logs depend on: the settings and, where there is one, the
    source's files.
    """
    source = cfg.source
    parts: list[object] = [source.kind, source.actions]
    if source.kind == "synthetic":
        parts += [cfg.seed, config.to_dict(source.synthetic)]
    else:
        assert source.path is not None, "SourceConfig asks for it"
        parts += [[base_name(file), file_digest(file)] for file in list_files(source.path)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
