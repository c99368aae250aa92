"""USER and ITEM tables of the source → side tables of the store."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import ColumnFeature, SideTable, UserError
from pipeline.logs.arrow_errors import reading_file
from pipeline.logs.cleaning import plain_type
from pipeline.logs.columns import is_number, is_text
from pipeline.logs.ids import (
    LONGEST_ID,
    CodedColumn,
    OwnId,
    as_text_advice,
    code_column,
    id_kind,
)
from pipeline.logs.parquet import find_logs
from pipeline.logs.rows import read_schema, read_table
from pipeline.sequences.forgotten import Forgotten
from pipeline.sequences.quality.periods import distinct_ids
from pipeline.sequences.store import Bucket, write_table

logger = logging.getLogger(__name__)

FEWEST_TO_JUDGE = 20  # ids, of which a table that is the right one has some


def write_side_table(
    name: str,
    table: SideTable,
    id_column: str,
    folder: Path,
    forgotten: Forgotten,
    *,
    text: bool = False,
) -> tuple[Bucket, pa.RecordBatch | None]:
    """`name` ("users" or "items") as one file, its id column int64 under our name, sorted by it.

    Where ids are text in the logs, the file has their codes, and PAIRS are returned beside it.

    Raises:
        UserError: as `read_side_table`.
    """
    rows, pairs = read_side_table(name, table, id_column, text=text)
    if name == "users" and forgotten.hashes:
        rows = rows.filter(pa.array(~forgotten.has_users(rows[id_column].to_numpy())))
    return write_table(rows, folder, f"tables/{name}"), pairs


def read_side_table(
    name: str, table: SideTable, id_column: str, *, text: bool
) -> tuple[pa.Table, pa.RecordBatch | None]:
    """The table of `write_side_table`, and where its ids are text their PAIRS.

    Raises:
        UserError: there is no such column, its ids are not of the logs' kind, or one is null or
        repeated.
    """
    files = [read_table(file, table.format, table.id_column) for file in side_files(name, table)]
    with reading_file(f"source.{name}: {table.path}"):
        side = pa.concat_tables(files, promote_options="permissive")
    ids = _checked_ids(f"source.{name}", table, side, id_column, text=text)
    chosen = _one_row_of_each(f"source.{name}", table, side, ids.codes)

    rest = side.drop_columns([table.id_column])
    if id_column in rest.column_names:
        raise UserError(
            f"source.{name}: {table.path} has another column called {id_column!r} beside "
            f"{table.id_column!r}"
        )

    columns = {id_column: ids.codes.cast(pa.int64())}
    for column in rest.column_names:
        columns[column] = rest[column]
    # the files' own schema metadata is left behind
    rows = pa.table(columns)
    if len(chosen) < rows.num_rows:
        rows = rows.take(pa.array(chosen))
    return rows.sort_by(id_column), ids.pairs


def check_feature_columns(
    name: str, table: SideTable, columns: Mapping[str, ColumnFeature]
) -> None:
    """Go on only if the table has the columns of `features`, in types that they can be read from.

    Raises:
        UserError: naming the feature, the column and its type.
    """
    if not columns:
        return
    fields: dict[str, pa.Field] = {}
    for file in side_files(name, table):
        for field in read_schema(file, table.format, [table.id_column]):
            fields.setdefault(field.name, field)

    for column, feature in columns.items():
        key = f"features.{name[:-1]}.{column}"
        if column not in fields:
            raise UserError(
                f"{key}: the {name} table {table.path} has no such column; it has {list(fields)}"
            )
        refused = refused_feature_type(plain_type(fields[column].type), feature)
        if refused is not None:
            raise UserError(f"{key}: {refused}, found {fields[column].type} in {table.path}")


def refused_feature_type(found: pa.DataType, feature: ColumnFeature) -> str | None:
    """What the column of such a feature must be; None where `found` is it."""
    kinds = pa.types
    is_list = kinds.is_list(found) or kinds.is_large_list(found)
    inner = found.value_type if is_list else found
    if kinds.is_nested(inner) or kinds.is_binary(inner):
        return "must be numbers, text, dates, or lists of them"
    if feature.kind == "list":
        fine = is_list or is_text(found) or kinds.is_null(found)
        return None if fine else "must be lists, or text with a separator, where kind is list"
    if is_list:
        return "is a list: set kind: list"
    if feature.kind == "quantile":
        number = is_number(found) or kinds.is_temporal(found) or kinds.is_boolean(found)
        rule = "must be numbers, dates or times where kind is quantile"
        return None if number or kinds.is_null(found) else rule
    return None


@dataclass(frozen=True, slots=True)
class SideJoin:
    """How many ids of the logs a side table has."""

    wanted: int  # distinct ids that were looked for
    found: int  # of them, in the table

    @property
    def share(self) -> float:
        return self.found / max(self.wanted, 1)

    def is_enough(self, least: float) -> bool:
        """A few ids without a match prove nothing; many do."""
        nothing = self.found == 0 and self.wanted >= FEWEST_TO_JUDGE
        return not nothing and self.share >= least


def side_joins(
    name: str, id_column: str, folder: Path, side: Bucket, buckets: Sequence[Bucket]
) -> tuple[SideJoin, np.ndarray, np.ndarray]:
    """The join of a side table with the sequences of one bucket, buckets being users at random, and
    the codes of a few ids of the logs and of the table.

    A table of which one bucket has nothing is held against the next, up to the first match: it may
    be a small table of rare ids.
    """
    known = pq.read_table(folder / side.file, columns=[id_column])[id_column].to_numpy()
    wanted = np.empty(0, np.int64)
    found = 0

    for bucket in buckets:
        ids = pq.read_table(folder / bucket.file, columns=[id_column])[id_column].combine_chunks()
        if name == "items":
            ids = ids.flatten()
        wanted = distinct_ids(np.concatenate([wanted, ids.to_numpy()]))
        found = int(np.isin(wanted, known).sum())
        if found:
            break

    return SideJoin(len(wanted), found), wanted[:3], known[:3]


def refuse_poor_join(
    name: str, join: SideJoin, least: float, seen: Sequence[OwnId], known: Sequence[OwnId]
) -> None:
    """Go on only if the table `name` has the share `least` of the ids in the logs, and not none of
    many; `seen` are a few ids of the logs, `known` of the table.

    Raises:
        UserError: it has not.
    """
    if join.is_enough(least):
        return
    raise UserError(
        f"source.{name}: the table has {join.share:.1%} of the {name} in the logs, of "
        f"{join.wanted} looked at such as {list(seen)}; in the table there are {list(known)}: is "
        f"id_column the right one? checks.min_joined_share is {least:g}"
    )


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

    return ids


def _one_row_of_each(key: str, table: SideTable, side: pa.Table, codes: pa.Array) -> np.ndarray:
    """Positions of the rows that are used, in order: one of each id, by `table.repeats`.

    codes     7  9  7  8
    first     0  1     3
    last         1  2  3

    Raises:
        UserError: an id is repeated, and `repeats` does not say which row counts.
    """
    numbers = codes.to_numpy()
    _, first, counts = np.unique(numbers, return_index=True, return_counts=True)
    repeated = first[counts > 1]
    if not len(repeated):
        return np.arange(len(numbers))

    twice = side[table.id_column][int(repeated[0])].as_py()
    others = f", as do {len(repeated) - 1} other ids" if len(repeated) > 1 else ""
    found = f"{key}: {table.id_column} {twice} stands in several rows of {table.path}{others}"
    if table.repeats == "refuse":
        raise UserError(f"{found}; {key}.repeats=last, or first, says which of them counts")
    logger.warning("%s: the %s row of each is used", found, table.repeats)
    if table.repeats == "last":
        _, from_end = np.unique(numbers[::-1], return_index=True)
        return np.sort(len(numbers) - 1 - from_end)
    return np.sort(first)


def side_files(name: str, table: SideTable) -> list[str]:
    return find_logs(f"source.{name}.path", table.path, table.format).files
