"""Placeholder until the generator lands in the next commit."""

from pathlib import Path

from pipeline.config import RunConfig, UserError
from pipeline.data.sources.imported import ImportReport


def plan(cfg: RunConfig) -> dict[str, object]:
    raise UserError(f"source.kind {cfg.source.kind} is not there yet")


def write_logs(cfg: RunConfig, folder: Path) -> ImportReport:
    raise UserError(f"source.kind {cfg.source.kind} is not there yet, nothing written to {folder}")
