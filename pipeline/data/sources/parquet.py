"""A user's own logs: Parquet files read where they lie, with a mapping of column names."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import SourceConfig, UserError


def parquet_files(key: str, path: str | Path) -> list[str]:
    """The Parquet files at `path`, a file or a folder searched in depth, in a fixed order.

    Raises:
        UserError: there is nothing, naming the configuration key.
    """
    path = Path(path).absolute()  # workers may have another working directory
    if path.is_file():
        return [str(path)]
    files = sorted(str(file) for file in path.rglob("*.parquet") if file.is_file())
    if not files:
        raise UserError(f"{key}: no Parquet files at {str(path)!r}")
    return files


def read_schema(file: str) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file} cannot be read as Parquet: {error}") from None


def count_rows(files: list[str]) -> int:
    """Rows by the files' own metadata, without reading them."""
    return sum(pq.read_metadata(file).num_rows for file in files)


def column_mapping(source: SourceConfig, known: list[str]) -> dict[str, str]:
    """LOG column -> name in the files, for all of `known`; names that `source.columns` leaves out are the same.

    Raises:
        UserError: `source.columns` maps something that is no LOG column.
    """
    for name in source.columns:
        if name not in known:
            raise UserError(f"source.columns: {name!r} is not a column of the logs; it maps some of {known}")
    return {name: source.columns.get(name, name) for name in known}
