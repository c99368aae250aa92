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

from collections import Counter

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

    uses = Counter(field.name for field in fields)
    doubled = sorted(name for name, times in uses.items() if times > 1)
    if doubled:
        raise UserError(
            f"source.format.impressions: {doubled[0]!r} is the name of another column too; give "
            "the parts other names in source.format.impressions.names"
        )
    return pa.schema(fields, schema.metadata)


def _spread_fields(field: pa.Field, how: Impressions) -> list[pa.Field]:
    """The columns that a list becomes: of text its parts, of structs their fields, else itself.

    impressions: "N1-0 N2-1"         names item, clicked    → item, clicked
    impressions: [{id: N1, at: 3}]                          → id, at
    impressions: [N1, N2]                                   → impressions
    """
    parts_of_text = [pa.field(name, pa.string()) for name in how.names]
    if not is_list(field.type):
        return parts_of_text or [pa.field(field.name, pa.string())]

    element = field.type.value_type
    if pa.types.is_struct(element):
        return [element.field(place) for place in range(element.num_fields)]
    if is_text(element) and parts_of_text:
        return parts_of_text
    return [pa.field(field.name, element)]


def spread_rows(rows: pa.Table, how: Impressions) -> pa.Table:
    """A row for each exposure of these rows, as `spread_schema` has it.

    user  impressions     lengths  owner        user  impressions
    U1    [N1, N2]        2        0 0          U1    N1
    U2    []              0                     U1    N2
    U3    [N9]            1        2            U3    N9

    Raises:
        UserError: a row's lists differ in length.
    """
    schema = spread_schema(rows.schema, how)
    lists, lengths = _lists_of(rows, how)
    columns: dict[str, pa.Array | pa.ChunkedArray] = {}

    # every other column, once for each exposure of its row
    owner = np.repeat(np.arange(rows.num_rows), lengths)
    repeated = rows.drop_columns(list(how.columns)).take(pa.array(owner))
    for name in repeated.column_names:
        columns[name] = repeated[name]

    # the exposures themselves, one after another
    for column, values in lists.items():
        fields = _spread_fields(rows.schema.field(column), how)
        parts = _parts_of_exposures(values.flatten(), how)
        for field, part in zip(fields, parts, strict=True):
            columns[field.name] = part.cast(field.type)
    return pa.table([columns[name] for name in schema.names], schema=schema)


def _parts_of_exposures(exposures: pa.Array, how: Impressions) -> list[pa.Array]:
    """An array for each field of `_spread_fields`."""
    if pa.types.is_struct(exposures.type):
        return exposures.flatten()
    if is_text(exposures.type) and how.names:
        return _parts_of_text(exposures, how)
    return [exposures]


def count_exposures(rows: pa.Table, how: Impressions) -> int:
    """The rows that these would become."""
    _, lengths = _lists_of(rows, how)
    return int(lengths.sum())


def _lists_of(rows: pa.Table, how: Impressions) -> tuple[dict[str, pa.Array], np.ndarray]:
    """The lists by column, and how many exposures each row has, int64 [rows].

    Raises:
        UserError: a row's lists differ in length.
    """
    lists: dict[str, pa.Array] = {}
    lengths: dict[str, np.ndarray] = {}
    for column in how.columns:
        values = plain_values(rows[column])
        lists[column] = values if is_list(values.type) else _split_text(values, how)
        lengths[column] = _list_lengths(lists[column])

    first = how.columns[0]
    for column in how.columns[1:]:
        differ = np.flatnonzero(lengths[column] != lengths[first])
        if len(differ):
            row = differ[0]
            raise UserError(
                f"source.format.impressions: a row has {lengths[first][row]} values in {first!r} "
                f"and {lengths[column][row]} in {column!r}: they must go together"
            )
    return lists, lengths[first]


def _list_lengths(lists: pa.Array) -> np.ndarray:
    """int64 [rows], 0 of a list that is null."""
    return pc.list_value_length(lists).fill_null(0).to_numpy().astype(np.int64)


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

    # pieces of all exposures in one array, those of exposure i from begin[i] on
    split = pc.split_pattern(text, how.part_separator, max_splits=splits, reverse=True)
    pieces, begin = split.values, split.offsets.to_numpy()[:-1]
    num_pieces = _list_lengths(split)

    parts = []
    for number in range(len(how.names)):
        lacking = num_pieces <= number
        place = pa.array(np.where(lacking, 0, begin + number), mask=lacking)
        parts.append(pieces.take(place))
    return parts
