"""A user's own logs: Parquet files read where they lie, with a mapping of column names."""

from pathlib import Path

import pyarrow as pa

from pipeline.config import SourceConfig, UserError
from pipeline.logs.files import list_files, open_parquet


def parquet_files(key: str, path: str | Path) -> list[str]:
    """The Parquet files at `path`, a file or a folder searched in depth, on a disk or in S3, in a
    fixed order.

    Raises:
        UserError: there is nothing, naming the configuration key.
    """
    files = list_files(path)
    if not files:
        raise UserError(f"{key}: no Parquet files at {str(path)!r}")
    return files


def read_schema(file: str) -> pa.Schema:
    with open_parquet(file) as parquet:
        return parquet.schema_arrow


def column_mapping(source: SourceConfig, known: list[str]) -> dict[str, str]:
    """LOG column -> name in the files, for all of `known`; names that `source.columns` leaves out
    are the same.

    Raises:
        UserError: `source.columns` maps something that is no LOG column.
    """
    for name in source.columns:
        if name not in known:
            raise UserError(
                f"source.columns: {name!r} is not a column of the logs; it maps some of {known}"
            )
    return {name: source.columns.get(name, name) for name in known}
