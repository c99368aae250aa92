"""A user's own logs: files read where they lie, with a mapping of column names."""

from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa

from pipeline.config import FileFormat, SourceConfig, UserError
from pipeline.logs.files import PLAIN, FoundFiles, find_files
from pipeline.schema import LOG_OPTIONAL, ROW_DIGEST


def find_logs(key: str, path: str | Path, form: FileFormat = PLAIN) -> FoundFiles:
    """The files at `path`, a file, a folder searched in depth or a pattern, on a disk or in a
    bucket, in a fixed order; and what is left out.

    Raises:
        UserError: there is nothing to read, or the place is a table of Delta, Iceberg or Hudi,
            naming the configuration key.
    """
    try:
        found = find_files(path, form)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None

    if not found.files:
        others = f"; left out: {count_reasons(found.left_out)}" if found.left_out else ""
        kind = {"csv": "CSV files", "json": "files of JSON lines"}.get(form.text_kind or "")
        nor = "" if kind or form.kind else ", nor CSV or JSON lines"
        if _is_missing(str(path)):
            nor += ": there is no such file or folder"
        raise UserError(f"{key}: no {kind or 'Parquet files'} at {str(path)!r}{nor}{others}")
    return found


def _is_missing(path: str) -> bool:
    """True for a plain path of the file system at which there is nothing."""
    is_plain = "://" not in path and not any(sign in path for sign in "*?[")
    return is_plain and not Path(path).expanduser().exists()


def count_reasons(left_out: Mapping[str, str]) -> str:
    """The files that were left out, by reason, with one file for each.

    {"a/_x": "hidden", "a/_y": "hidden"}    2 (hidden: a/_x …)
    """
    files: dict[str, list[str]] = {}
    for file, reason in left_out.items():
        files.setdefault(reason, []).append(file)

    words = []
    for reason, found in files.items():
        more = " …" if len(found) > 1 else ""
        words.append(f"{len(found)} ({reason}: {found[0]}{more})")
    return ", ".join(words)


def refuse_unasked_columns(schema: pa.Schema, source: SourceConfig, file: str) -> None:
    """Go on only if `source.columns` speaks of every column whose name would change how rows are
    read: a `request_id` or `known_mask` of one's own may mean something else.

    Raises:
        UserError: naming the column, and how to have it read or not.
    """
    for name in schema.names:
        if name in (*LOG_OPTIONAL, ROW_DIGEST) and name not in source.columns:
            raise UserError(
                f"{file}: column {name!r} has a name that changes how rows are read "
                f"(docs/guide/data.md, LOG), and source.columns does not speak of it: set "
                f"source.columns.{name}={name} if it is meant, source.columns.{name}='' if not"
            )


def column_mapping(source: SourceConfig, known: list[str]) -> dict[str, str]:
    """LOG column -> name in the files, for all of `known`; names that `source.columns` leaves out
    are the same, and "" stands for an optional column that is not to be read.

    Raises:
        UserError: `source.columns` maps something that is no LOG column.
    """
    for name in source.columns:
        if name not in known:
            raise UserError(
                f"source.columns: {name!r} is not a column of the logs; it maps some of {known}"
            )
        if not source.column_name(name) and name not in (*LOG_OPTIONAL, ROW_DIGEST):
            raise UserError(
                f"source.columns.{name}: only an optional column can be left out, by ''"
            )
    return {name: source.column_name(name) for name in known}
