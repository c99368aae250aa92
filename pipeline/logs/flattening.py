"""Objects of JSON and structs of Parquet as columns of their own.

    in the file                                  in LOG's terms
    time   user                 context          time   user.id  user.plan  context.geo.country
    09:05  {id: 7, plan: free}  {geo: {…: DE}}   09:05  7        free       DE

A field of an object that is null is null.
"""

import pyarrow as pa


def flat_schema(schema: pa.Schema) -> pa.Schema:
    """The schema of what `flat_rows` makes of a table of `schema`."""
    fields: list[pa.Field] = []
    for field in schema:
        fields += _flat_fields(field)
    return pa.schema(fields, schema.metadata)


def _flat_fields(field: pa.Field) -> list[pa.Field]:
    if not pa.types.is_struct(field.type):
        return [field]
    fields: list[pa.Field] = []
    for place in range(field.type.num_fields):
        inner = field.type.field(place)
        fields += _flat_fields(inner.with_name(f"{field.name}.{inner.name}").with_nullable(True))
    return fields


def flat_rows(rows: pa.Table) -> pa.Table:
    """The table without structs."""
    while any(pa.types.is_struct(field.type) for field in rows.schema):
        rows = rows.flatten()
    return rows


def holds_column(outer: str, name: str) -> bool:
    """True if the column `name` is `outer`, or lies in it: user holds user.id."""
    return name == outer or name.startswith(f"{outer}.")
