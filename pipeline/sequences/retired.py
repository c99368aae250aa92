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
    """SEQUENCE rows with the retired rows of their users in `first_position`.

    user_id             3   5   8
    first_position      0   2   0
    retired rows            7   1       RETIRED has users 5 and 8
    result              0   9   1
    """
    user = sequences["user_id"].to_numpy()
    known = retired["user_id"].to_numpy()
    rows = retired["rows"].to_numpy()

    place = np.searchsorted(known, user).clip(0, len(known) - 1)
    dropped = np.where(known[place] == user, rows[place], 0)
    first = sequences["first_position"].to_numpy() + dropped

    column = sequences.schema.get_field_index("first_position")
    return sequences.set_column(column, sequences.schema.field(column), pa.array(first))
