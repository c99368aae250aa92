"""Arrow list columns as what they are: flat values and offsets."""

import numpy as np
import pyarrow as pa


def _combined(table: pa.Table, name: str) -> pa.Array:
    column = table[name]
    if column.num_chunks == 1:  # a server's request: one row, and every call counts
        return column.chunk(0)
    combined = column.combine_chunks()
    return combined.chunk(0) if isinstance(combined, pa.ChunkedArray) else combined


def list_offsets(table: pa.Table, name: str = "item_id") -> np.ndarray:
    """Offsets of a list column from 0, int64 [rows + 1].

    A slice's own offsets do not start at 0.
    """
    if table.num_rows == 0:
        return np.zeros(1, np.int64)
    offsets = _combined(table, name).offsets.to_numpy().astype(np.int64)
    return offsets - offsets[0]


def flat_column(table: pa.Table, name: str) -> np.ndarray:
    """All elements of a list column, row after row."""
    return _combined(table, name).flatten().to_numpy(zero_copy_only=False)
