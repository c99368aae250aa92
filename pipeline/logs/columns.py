"""One column of a source's file as a column of LOG: what its values mean, by `source.columns`.

    what a file has                         what LOG has
    seconds, local times, ISO text          milliseconds, UTC (pipeline/logs/times.py)
    event_type = purchase, stars of 4 up    an action of 0 and 1
    -1, NaN, ''                             null: not known
    text known at the request               a number of 31 bits
    dictionary, string_view, decimal        the plain type of the values

A value that is there and cannot be read is told apart from one that is not there: its row is
quarantined as `<column>_unreadable`.
"""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

import hashlib
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ColumnReading
from pipeline.logs import times
from pipeline.schema import MAX_INT32, Column

YES, NO = ("1", "1.0", "true"), ("0", "0.0", "false")


@dataclass(frozen=True)
class ReadColumn:
    """A column's values, not yet of LOG's type where one might not fit."""

    values: pa.Array
    unreadable: np.ndarray | None = None  # bool [rows]; None: there are none


def read_column(block: pa.Table, column: Column, reading: ColumnReading | str) -> ReadColumn:
    """The source's column; all null where the block does not have it."""
    theirs = reading if isinstance(reading, str) else reading.column
    if theirs not in block.column_names:
        return ReadColumn(pa.nulls(block.num_rows, column.dtype))

    values = plain_values(block[theirs])
    plain = isinstance(reading, str)
    how = ColumnReading(column=reading) if isinstance(reading, str) else reading
    kind = values.type
    if pa.types.is_null(kind):
        return ReadColumn(pa.nulls(block.num_rows, column.dtype))
    if plain and pa.types.is_integer(kind) and not column.is_float:
        return ReadColumn(values.cast(pa.int64(), safe=False))

    if column.name == "event_time":
        return _marked(values, times.read_times(time_values(block, how), how))
    if column.role == "action":
        return _read_action(values, how)
    if how.unknown:
        values = without_values(values, how.unknown)
    if column.role == "request" and how.text:
        return ReadColumn(text_codes(values))
    if pa.types.is_boolean(column.dtype):
        return _read_flags(values)
    if column.is_float:
        return _read_floats(values, column.dtype)
    return _read_integers(values, how)


def time_values(block: pa.Table, how: ColumnReading) -> pa.Array:
    """The column of times, or of dates with the times of day beside them."""
    values = plain_values(block[how.column])
    if how.clock is None:
        return values
    return times.join_clock(values, plain_values(block[how.clock]), how.format)


def plain_values(column: pa.ChunkedArray) -> pa.Array:
    """One array without a dictionary, a view or an extension around its values."""
    array = flat_array(column)
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if array.type == pa.string_view():
        return array.cast(pa.large_string())
    if array.type == pa.binary_view():
        return array.cast(pa.large_binary())
    return array


def without_views(block: pa.Table) -> pa.Table:
    """The block with string_view and binary_view columns as plain ones: Arrow can take no rows of
    views.
    """
    for place, name in enumerate(block.column_names):
        if block.schema.field(place).type in (pa.string_view(), pa.binary_view()):
            block = block.set_column(place, name, plain_values(block[name]))
    return block


def flat_array(column: pa.ChunkedArray) -> pa.Array:
    """One array: `combine_chunks` gives a chunked one for some types and for none at all."""
    if column.num_chunks == 1:
        return column.chunk(0)  # which it would copy
    array = column.combine_chunks()
    return array if isinstance(array, pa.Array) else pa.concat_arrays(array.chunks)


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or kind == pa.string_view()


def is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)


def _marked(before: pa.Array, after: pa.Array) -> ReadColumn:
    """`after`, with the values marked that were there before and could not be read."""
    present = before.is_valid().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(before.type):
        present &= ~pc.is_nan(before).fill_null(False).to_numpy(zero_copy_only=False)
    lost = present & after.is_null().to_numpy(zero_copy_only=False)
    return ReadColumn(after, lost if lost.any() else None)


def without_values(values: pa.Array, unknown: tuple[str, ...]) -> pa.Array:
    """The values, null where they are one of `unknown`."""
    is_unknown = _is_one_of(values, unknown)
    return pc.if_else(pa.array(~is_unknown), values, pa.scalar(None, values.type))


def _is_one_of(values: pa.Array, wanted: tuple[str, ...]) -> np.ndarray:
    """bool [rows]. Numbers compare as numbers, booleans as true and false, text as it is."""
    kind = values.type
    if pa.types.is_boolean(kind):
        chosen = [text == "true" for text in wanted if text in ("true", "false")]
        found = pc.is_in(values, value_set=pa.array(chosen, pa.bool_()))
    elif is_number(kind):
        numbers = []
        for text in wanted:
            if (number := as_number(text)) is not None:
                numbers.append(number)
        found = pc.is_in(
            values.cast(pa.float64(), safe=False), value_set=pa.array(numbers, pa.float64())
        )
    else:
        found = pc.is_in(
            values.cast(pa.large_string()), value_set=pa.array(wanted, pa.large_string())
        )
    valid = values.is_valid().to_numpy(zero_copy_only=False)
    return valid & found.to_numpy(zero_copy_only=False)


def as_number(text: str) -> float | None:
    """The number that the text is, None where it is none."""
    try:
        return float(text)
    except ValueError:
        return None


# Actions ---------------------------------------------------------------------


def _read_action(values: pa.Array, how: ColumnReading) -> ReadColumn:
    """0 and 1, null where unknown; without a rule the numbers as they are, for the check of them.

    rule                   3.5    4    null   -1, which is unknown
    at_least 4             0      1    null   null

    rule                   view   purchase    ''
    equals purchase        0      1           null
    present                1      1           0
    """
    if is_text(values.type):
        values = values.cast(pa.large_string())
        empty = pc.equal(pc.utf8_trim_whitespace(values), "")
        values = pc.if_else(empty, pa.scalar(None, values.type), values)
    if how.unknown:
        values = without_values(values, how.unknown)

    if how.present:
        there = _with_nan_unknown(values).is_valid().to_numpy(zero_copy_only=False)
        return ReadColumn(pa.array(there.astype(np.int64)))
    if how.equals:
        number = _with_nan_unknown(values)
        return ReadColumn(_yes_or_no(number, _is_one_of(number, how.equals)))

    numbers = _as_floats(values, flags=not how.has_rule)
    if not how.has_rule:
        return _marked(values, numbers)

    value = numbers.fill_null(0).to_numpy()
    yes = np.ones(len(value), bool)
    if how.at_least is not None:
        yes &= value >= how.at_least
    if how.at_most is not None:
        yes &= value <= how.at_most
    marked = _marked(values, numbers)
    return ReadColumn(_yes_or_no(numbers, yes), marked.unreadable)


def _yes_or_no(values: pa.Array, yes: np.ndarray) -> pa.Array:
    absent = values.is_null().to_numpy(zero_copy_only=False)
    return pa.array(yes.astype(np.int64), mask=absent)


def _with_nan_unknown(values: pa.Array) -> pa.Array:
    if not pa.types.is_floating(values.type):
        return values
    return pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)


def _as_floats(values: pa.Array, *, flags: bool = False) -> pa.Array:
    """float64, null where there is no number; with `flags` true and false are 1 and 0."""
    kind = values.type
    if pa.types.is_boolean(kind):
        return values.cast(pa.int8()).cast(pa.float64())
    if is_number(kind):
        return _with_nan_unknown(values.cast(pa.float64(), safe=False))

    text = pc.utf8_lower(pc.utf8_trim_whitespace(values.cast(pa.large_string())))
    if flags:
        text = pc.if_else(pc.is_in(text, pa.array(YES, text.type)), "1", text)
        text = pc.if_else(pc.is_in(text, pa.array(NO, text.type)), "0", text)
    is_number_text = pc.match_substring_regex(text, times.NUMBER)
    return pc.if_else(is_number_text, text, pa.scalar(None, text.type)).cast(pa.float64())


# Numbers and text ------------------------------------------------------------


def _read_floats(values: pa.Array, dtype: pa.DataType) -> ReadColumn:
    """An outcome: null and NaN are unknown."""
    if is_number(values.type):
        numbers = values.cast(dtype, safe=False).to_numpy(zero_copy_only=False)
        return ReadColumn(pa.array(numbers, dtype, from_pandas=True))
    return _marked(without_values(values, ("",)), _as_floats(values).cast(dtype))


def _read_integers(values: pa.Array, how: ColumnReading) -> ReadColumn:
    """Whole numbers, whatever their type; a fraction cannot be read, unless `unit` rounds it.

    3, 3.0, "3", true     3, 3, 3, 1
    3.5, "x"              cannot be read
    NaN, ""               null
    """
    if pa.types.is_integer(values.type):
        whole = values.cast(pa.int64(), safe=False)
        return ReadColumn(times.read_times(whole, how) if how.unit else whole)

    present = values
    if is_text(values.type):
        present = without_values(values, ("",))
    numbers = _as_floats(present)
    if how.unit:
        return _marked(present, times.read_times(numbers, how))

    value = numbers.fill_null(0).to_numpy()
    readable = numbers.is_valid().to_numpy(zero_copy_only=False)
    readable &= (value == np.floor(value)) & (np.abs(value) < 2.0**63)
    whole = np.where(readable, value, 0).astype(np.int64)
    return _marked(present, pa.array(whole, mask=~readable))


def _read_flags(values: pa.Array) -> ReadColumn:
    """Booleans, or numbers and text of 0 and 1."""
    if pa.types.is_boolean(values.type):
        return ReadColumn(values)
    if is_text(values.type):
        values = without_values(values, ("",))
    numbers = _as_floats(values, flags=True)
    value = numbers.fill_null(0).to_numpy()
    readable = numbers.is_valid().to_numpy(zero_copy_only=False) & np.isin(value, (0, 1))
    return _marked(values, pa.array(value == 1, mask=~readable))


def text_code(text: str) -> int:
    """The number that stands for a text in a request column, from 0 to 2**31 - 1.

    It depends on the text alone, so that files, days and the server agree without a dictionary.
    """
    digest = hashlib.blake2b(text.encode(), digest_size=4).digest()
    return int.from_bytes(digest, "little") & MAX_INT32


def text_codes(values: pa.Array) -> pa.Array:
    """int64 `text_code` of each value; null where it is null or ''."""
    text = values.cast(pa.large_string()).dictionary_encode()
    codes: list[int | None] = []
    for value in text.dictionary.to_pylist():
        codes.append(text_code(value) if value else None)
    return pa.array(codes, pa.int64()).take(text.indices)
