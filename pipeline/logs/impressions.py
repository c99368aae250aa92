"""Rows that hold a list of exposures, spread into a row for each.

    in the file                                     in LOG's terms
    user  time   impressions                        user  time   item_id  clicked
    U1    09:05  N1-0 N2-1             text         U1    09:05  N1       0
    U1    09:05  [{id: N1, …}, …]      structs      U1    09:05  N2       1
    U1    09:05  [N1, N2]  [0, 1]      lists

Every other column is repeated in each of the rows; the lists themselves are gone. A row whose list
is null or empty shows nothing, and makes no row.
"""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import Impressions, UserError
from pipeline.logs.columns import is_text, plain_values


def spread_schema(schema: pa.Schema, how: Impressions) -> pa.Schema:
    """The schema of what `spread_rows` makes of a table of `schema`.

    Raises:
        UserError: a column is missing, or two would have one name.
    """
    fields = [field for field in schema if field.name not in how.columns]
    for column in how.columns:
        if column not in schema.names:
            raise UserError(
                f"no column {column!r} for source.format.impressions; found {schema.names}"
            )
        fields += _spread_fields(schema.field(column), how)

    names = [field.name for field in fields]
    doubled = sorted({name for name in names if names.count(name) > 1})
    if doubled:
        raise UserError(
            f"source.format.impressions: {doubled[0]!r} is the name of another column too; give "
            "the parts other names in source.format.impressions.names"
        )
    return pa.schema(fields, schema.metadata)


def _spread_fields(field: pa.Field, how: Impressions) -> list[pa.Field]:
    """The columns that a list becomes: of text its parts, of structs their fields, else itself."""
    if not is_list(field.type):
        return [pa.field(name, pa.string()) for name in how.names or (field.name,)]
    inner = field.type.value_type
    if pa.types.is_struct(inner):
        return [inner.field(place) for place in range(inner.num_fields)]
    if is_text(inner) and how.names:
        return [pa.field(name, pa.string()) for name in how.names]
    return [pa.field(field.name, inner)]


def spread_rows(rows: pa.Table, how: Impressions) -> pa.Table:
    """A row for each exposure of these rows, as `spread_schema` has it.

    Raises:
        UserError: a row's lists differ in length.
    """
    schema = spread_schema(rows.schema, how)
    lists, lengths = _lists_of(rows, how)
    owner = np.repeat(np.arange(rows.num_rows), lengths)

    columns: dict[str, pa.Array | pa.ChunkedArray] = {}
    rest = rows.drop_columns(list(how.columns)).take(pa.array(owner))
    for name in rest.column_names:
        columns[name] = rest[name]
    for column, values in lists.items():
        flat = values.flatten()
        fields = _spread_fields(rows.schema.field(column), how)
        if pa.types.is_struct(flat.type):
            parts = flat.flatten()
        elif is_text(flat.type) and how.names:
            parts = _parts_of_text(flat, how)
        else:
            parts = [flat]
        for field, part in zip(fields, parts, strict=True):
            columns[field.name] = part.cast(field.type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def count_exposures(rows: pa.Table, how: Impressions) -> int:
    """The rows that these would become."""
    _, lengths = _lists_of(rows, how)
    return int(lengths.sum())


def _lists_of(rows: pa.Table, how: Impressions) -> tuple[dict[str, pa.Array], np.ndarray]:
    """The lists by column, and how many exposures each row has, int64 [rows]."""
    lists: dict[str, pa.Array] = {}
    lengths: np.ndarray | None = None
    first = how.columns[0]
    for column in how.columns:
        values = plain_values(rows[column])
        lists[column] = values if is_list(values.type) else _split_text(values, how)
        found = pc.list_value_length(lists[column]).fill_null(0).to_numpy().astype(np.int64)
        if lengths is None:
            lengths = found
        elif (lengths != found).any():
            row = int(np.flatnonzero(lengths != found)[0])
            raise UserError(
                f"source.format.impressions: a row has {lengths[row]} values in {first!r} and "
                f"{found[row]} in {column!r}: they must go together"
            )
    assert lengths is not None, "Impressions asks for a column"
    return lists, lengths


def is_list(kind: pa.DataType) -> bool:
    types = pa.types
    return types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)


def _split_text(values: pa.Array, how: Impressions) -> pa.Array:
    """Lists of the pieces between separators; null where there is nothing."""
    text = pc.utf8_trim_whitespace(values.cast(pa.string()))
    text = pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)
    if how.separator == " ":
        return pc.utf8_split_whitespace(text)
    return pc.split_pattern(text, how.separator)


def _parts_of_text(exposures: pa.Array, how: Impressions) -> list[pa.Array]:
    """The parts of each exposure by `how.names`, split from the end; null where it has fewer.

    names item, clicked      N1-0     N-2-1      N3
    item                     N1       N-2        N3
    clicked                  0        1          null
    """
    text = pc.utf8_trim_whitespace(exposures.cast(pa.string()))
    splits = len(how.names) - 1
    if splits == 0:
        return [text]
    split = pc.split_pattern(text, how.part_separator, max_splits=splits, reverse=True)
    values, begin = split.values, split.offsets.to_numpy()[:-1]
    counts = pc.list_value_length(split).fill_null(0).to_numpy()

    parts = []
    for number in range(len(how.names)):
        lacking = counts <= number
        place = pa.array(np.where(lacking, 0, begin + number), mask=lacking)
        parts.append(values.take(place))
    return parts
