"""USER and ITEM tables of the source → side tables of the store."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.config import SideTable, UserError
from pipeline.logs.arrow_errors import reading_file
from pipeline.logs.ids import LONGEST_ID, CodedColumn, as_text_advice, code_column, id_kind
from pipeline.logs.parquet import find_logs
from pipeline.logs.rows import read_table
from pipeline.sequences.forgotten import Forgotten
from pipeline.sequences.store import Bucket, write_table


def write_side_table(
    name: str,
    table: SideTable,
    id_column: str,
    folder: Path,
    forgotten: Forgotten,
    *,
    text: bool = False,
) -> tuple[Bucket, pa.Array | None]:
    """`name` ("users" or "items") as one file, its id column int64 under our name, sorted by it.

    Where ids are text in the logs, the file has their codes, and the ids are returned beside it.

    Raises:
        UserError: there is no such column, its ids are not of the logs' kind, or one is null or
        repeated.
    """
    files = [read_table(file, table.format, table.id_column) for file in side_files(name, table)]
    with reading_file(f"source.{name}: {table.path}"):
        side = pa.concat_tables(files, promote_options="permissive")
    ids = _checked_ids(f"source.{name}", table, side, id_column, text=text)

    rest = side.drop_columns([table.id_column])
    if id_column in rest.column_names:
        raise UserError(
            f"source.{name}: {table.path} has another column called {id_column!r} beside "
            f"{table.id_column!r}"
        )

    columns = {id_column: ids.codes.cast(pa.int64())}
    for column in rest.column_names:
        columns[column] = rest[column]
    rows = pa.table(columns).sort_by(id_column)  # the files' own schema metadata is left behind

    if name == "users" and forgotten.hashes:
        rows = rows.filter(pa.array(~forgotten.has_users(rows[id_column].to_numpy())))
    return write_table(rows, folder, f"tables/{name}"), ids.texts


def _checked_ids(
    key: str, table: SideTable, side: pa.Table, id_column: str, *, text: bool
) -> CodedColumn:
    if table.id_column not in side.column_names:
        raise UserError(
            f"{key}.id_column: no column {table.id_column!r} in {table.path}; found "
            f"{side.column_names}"
        )

    column = side[table.id_column]
    named = f"{key}.id_column: {table.id_column!r} in {table.path}"
    kind = id_kind(column.type)
    if kind is None:
        raise UserError(f"{named} must be whole numbers or text, found {column.type}")
    if kind == "text" and not text:
        raise UserError(
            f"{named} is text ({column.type}), {id_column} in the logs is a number: write it "
            f"alike, or {as_text_advice(id_column)}"
        )

    ids = code_column(column, text=text)
    bad = int(ids.unreadable.sum())
    if bad:
        example = column.filter(pa.array(ids.unreadable))[0].as_py()
        rule = f"text of at most {LONGEST_ID} characters" if text else "whole numbers"
        raise UserError(f"{named} must be {rule}, and is not in {bad} rows: {example!r}")
    if ids.codes.null_count:
        raise UserError(f"{named} is null in {ids.codes.null_count} rows")

    _, first, counts = np.unique(ids.codes.to_numpy(), return_index=True, return_counts=True)
    if (counts > 1).any():
        twice = column[int(first[counts > 1][0])].as_py()
        raise UserError(f"{key}: {table.id_column} {twice} stands in several rows of {table.path}")
    return ids


def side_files(name: str, table: SideTable) -> list[str]:
    return find_logs(f"source.{name}.path", table.path, table.format).files
