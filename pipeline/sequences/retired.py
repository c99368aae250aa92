"""Rows that a compaction has dropped for their age, by user: RETIRED, and its place in SEQUENCE."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.sequences.store import Bucket

RETIRED = pa.schema([("user_id", pa.int64()), ("rows", pa.int64())])


def read_retired(folder: Path, entry: Bucket | None) -> pa.Table:
    return RETIRED.empty_table() if entry is None else pq.read_table(folder / entry.file)


def add_retired(sequences: pa.Table, retired: pa.Table) -> pa.Table:
    """SEQUENCE rows with the retired rows of their users in `first_position`."""
    user, known, rows = (
        column.to_numpy() for column in (sequences["user_id"], retired["user_id"], retired["rows"])
    )
    place = np.searchsorted(known, user).clip(0, len(known) - 1)
    first = sequences["first_position"].to_numpy() + np.where(known[place] == user, rows[place], 0)
    column = sequences.schema.get_field_index("first_position")
    return sequences.set_column(column, sequences.schema.field(column), pa.array(first))
