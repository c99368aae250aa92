"""Rows ordered by several columns at once.

The columns are packed into one 64-bit key as long as their ranges leave room, and such a key is
sorted by NumPy's vectorised sort. `np.lexsort`, which sorts once per column, takes about ten times
as long on logs.
"""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

KEY_BITS = 63
NARROW_BITS = 32  # of a column that leaves room for others in a key
HASH_BITS = 60  # a column that needs so many has codes of text, or hashes of another kind
LAST_KEY = np.iinfo(np.int64).max


def sort_key(rows: pa.Table, name: str) -> np.ndarray:
    """A column as integers to sort and compare by; null sorts last.

    Of a float the bits, turned so that they compare as the numbers do:

        value       -2.5   -0.0    0.0    2.5   null
        key        small      0      0  large   last
    """
    column = rows[name]
    if pa.types.is_floating(column.type):
        # adding 0.0 makes -0.0 and 0.0 one value
        bits = (column.fill_null(0).to_numpy() + 0.0).view(np.int64)
        key = np.where(bits < 0, bits ^ LAST_KEY, bits)
        return np.where(column.is_null().to_numpy(), LAST_KEY, key)

    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    dtype = np.dtype(column.type.to_pandas_dtype())
    last = np.iinfo(dtype).max
    if column.null_count == 0:
        return column.to_numpy()
    if column.null_count == len(column):
        return np.full(len(column), last, dtype)
    return column.fill_null(last).to_numpy()


def argsort_rows(columns: Sequence[np.ndarray]) -> np.ndarray:
    """The rows by the first column, then by the second, and so on.

    Rows equal in all of them come in any order.
    """
    key, bits = _pack_rows(columns)
    return _argsort_narrow(key, bits)


def _argsort_narrow(values: np.ndarray, bits: int) -> np.ndarray:
    """The rows by one column, int64 from 0 on, of so many bits; equal rows come in any order.

    Where they leave room, the number of the row takes the bits below them, since NumPy's vectorised
    sort takes a third of the time of its argsort.

        row         0        1        2
        value       101      001      110
        packed      101|00   001|01   110|10
        rows        1 0 2
    """
    row_bits = (len(values) - 1).bit_length()
    if len(values) == 0 or bits + row_bits > KEY_BITS:
        return np.argsort(values)

    packed = values << row_bits
    packed |= np.arange(len(values))
    packed.sort()
    return packed & ((1 << row_bits) - 1)


def argsort_hashes(values: np.ndarray) -> np.ndarray:
    """The rows by one column, integers of 0 or more that differ in their high bits, as hashes do;
    equal rows come in any order.

    The number of the row takes the place of the low bits, since NumPy's vectorised sort takes a
    third of the time of its argsort. Where two values differ in those bits alone and come in the
    wrong order, argsort does it.

        row         0         1         2         3
        value       101101    001110    110000    001111
        packed      1011|00   0011|01   1100|10   0011|11
        rows        1 3 0 2
    """
    row_bits = (len(values) - 1).bit_length()
    value_bits = int(values.max()).bit_length() if len(values) else 0
    left_out = max(0, value_bits + row_bits - KEY_BITS)

    packed = (values >> left_out).astype(np.int64) << row_bits
    packed |= np.arange(len(values))
    packed.sort()
    order = packed & ((1 << row_bits) - 1)

    if left_out:
        ascending = values[order]
        if (ascending[1:] < ascending[:-1]).any():
            return np.argsort(values)
    return order


def rank_rows(columns: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [rows]: the number of different smaller rows.

    Equal rows share a rank, and ranks have no gaps.

        columns  (2, 5)  (1, 9)  (2, 5)  (2, 7)
        rank     1       0       1       2
    """
    key, bits = _pack_rows(columns)
    return _rank_ordered(key, _argsort_narrow(key, bits))


def narrow_key(column: np.ndarray) -> np.ndarray:
    """A column that several keys are going to hold: as it is, or as ranks where it would fill a key
    by itself, so that those are found once.

        codes of text   5e18  7  5e18        numbers   12  7  12
        key             1     0  1           key       12  7  12
    """
    if len(column) == 0 or int(column.max()) - int(column.min()) < 2**NARROW_BITS:
        return column
    return _rank_values(column)


def pack_rows(columns: Sequence[np.ndarray]) -> np.ndarray:
    """int64 [rows] that compares as the rows do: equal where all columns agree, smaller where they
    come first.

        columns  10 11 13   counted from the smallest   0 1 3      2 bits
                  7  7  6                               1 1 0      1 bit
        key                 first << 1 | second         1 3 6
    """
    key, _ = _pack_rows(columns)
    return key


def _pack_rows(columns: Sequence[np.ndarray]) -> tuple[np.ndarray, int]:
    """The key of `pack_rows`, and the bits that it needs."""
    key, bits = np.zeros(len(columns[0]), np.int64), 0
    if len(key) == 0:
        return key, bits

    for column in columns:
        digit, width = _as_digit(column)
        # the wider of the two as ranks, both if need be: of fewer than 2**31 rows two ranks fit
        while bits + width > KEY_BITS:
            if width > bits:
                digit, width = _as_rank(digit)
            else:
                key, bits = _as_rank(key)
        key = key << width | digit if bits else digit
        bits += width
    return key, bits


def _as_digit(column: np.ndarray) -> tuple[np.ndarray, int]:
    """The column counted from its smallest value, int64 from 0 on, and the bits that it needs."""
    low, high = int(column.min()), int(column.max())
    width = (high - low).bit_length()
    if width <= KEY_BITS and low >= -(2**63) and high < 2**63:
        return column.astype(np.int64, copy=False) - low, width
    return _as_rank(column)


def _as_rank(values: np.ndarray) -> tuple[np.ndarray, int]:
    """int64 [rows], the rank of each value, and the bits that they need."""
    ranks = _rank_values(values)
    return ranks, int(ranks.max()).bit_length()


def _rank_values(values: np.ndarray) -> np.ndarray:
    """int64 [rows]: the number of different smaller values."""
    if len(values) and values.min() >= 0 and int(values.max()) >= 2**HASH_BITS:
        order = argsort_hashes(values)
    else:
        order = np.argsort(values)
    return _rank_ordered(values, order)


def _rank_ordered(values: np.ndarray, order: np.ndarray) -> np.ndarray:
    """The rank of each value, where `order` are the rows in ascending order."""
    values = values[order]
    ranks = np.empty(len(order), np.int64)
    ranks[order] = np.cumsum(np.r_[False, values[1:] != values[:-1]])
    return ranks
