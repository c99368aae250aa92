"""USER and ITEM tables of the source → side tables of the store."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import SideTable, UserError
from pipeline.logs.files import open_parquet
from pipeline.logs.parquet import parquet_files
from pipeline.sequences.forgotten import Forgotten
from pipeline.sequences.store import Bucket, write_table


def write_side_table(
    name: str, table: SideTable, id_column: str, folder: Path, forgotten: Forgotten
) -> Bucket:
    """`name` ("users" or "items") as one file, its id column int64 under our name, sorted by it.

    Raises:
        UserError: there is no such column, its type is not an integer's, or an id is null or
        repeated.
    """
    files = [_read(file) for file in side_files(name, table)]
    side = pa.concat_tables(files, promote_options="permissive")
    ids = _checked_ids(f"source.{name}", table, side)

    rest = side.drop_columns([table.id_column])
    if id_column in rest.column_names:
        raise UserError(
            f"source.{name}: {table.path} has another column called {id_column!r} beside "
            f"{table.id_column!r}"
        )

    columns = {id_column: ids.cast(pa.int64())}
    for column in rest.column_names:
        columns[column] = rest[column]
    rows = pa.table(columns).sort_by(id_column)  # the files' own schema metadata is left behind

    if name == "users" and forgotten.hashes:
        rows = rows.filter(pa.array(~forgotten.has_users(rows[id_column].to_numpy())))
    return write_table(rows, folder, f"tables/{name}")


def _checked_ids(key: str, table: SideTable, side: pa.Table) -> pa.ChunkedArray:
    if table.id_column not in side.column_names:
        raise UserError(
            f"{key}.id_column: no column {table.id_column!r} in {table.path}; found "
            f"{side.column_names}"
        )

    ids = side[table.id_column]
    if not pa.types.is_integer(ids.type):
        raise UserError(
            f"{key}.id_column: {table.id_column!r} in {table.path} must be an integer, found "
            f"{ids.type}"
        )

    if ids.null_count:
        raise UserError(
            f"{key}.id_column: {table.id_column!r} in {table.path} is null in {ids.null_count} rows"
        )

    values, counts = np.unique(ids.to_numpy(), return_counts=True)
    if (counts > 1).any():
        twice = values[counts > 1][0]
        raise UserError(f"{key}: {table.id_column} {twice} stands in several rows of {table.path}")
    return ids


def side_files(name: str, table: SideTable) -> list[str]:
    return parquet_files(f"source.{name}.path", table.path)


def _read(file: str) -> pa.Table:
    with open_parquet(file) as parquet:
        return parquet.read()
