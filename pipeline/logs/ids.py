"""Ids as people have them → the int64 codes that the pipeline works on.

    files                           kind      code
    integers, whole floats and      integer   the number itself
    decimals, 0 or more
    text, UUIDs, bytes, and what    text      a hash of the text
    `source.columns` calls text

The code of a text is that of `pandas.util.hash_array`, without the lowest bit: SipHash-2-4 of its
UTF-8 bytes, keyed by the 16 bytes "0123456789123456", then the last steps of splitmix64; 63 bits, 0
or more. It depends on nothing but the text, so that logs, side tables and requests meet without a
look-up, on every machine and for good. The way back, which also finds two texts of one code, is
pipeline/sequences/dictionary.py.

One text per id, whatever the type of a column: of text the text itself, of a whole number its
digits (7 of 7, 7.0 and decimal 7.00), of a UUID's 16 bytes its lower-case form with dashes, of
other bytes of a fixed size their hexadecimal digits, of other bytes the text that they are in
UTF-8. Nothing is trimmed, and upper and lower case differ. Empty text is no id.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pandas.util import hash_array

from pipeline.config import ColumnReading, UserError
from pipeline.logs.columns import flat_array, plain_values, without_values
from pipeline.schema import MAX_EXACT, TEXT_IDS

LONGEST_ID = 512  # characters
PAIRS = pa.schema([("code", pa.int64()), ("id", pa.string())])
SAMPLE_ROWS = 4096  # of a column, to see whether its values repeat
HEX = np.frombuffer(b"0123456789abcdef", np.uint8)
UUID_BYTES = 16
UUID_DASHES = (8, 12, 16, 20)  # the hexadecimal digits that stand behind a dash
OwnId = int | str  # an id as people have it


# Kinds -----------------------------------------------------------------------


def id_kind(dtype: pa.DataType) -> Literal["integer", "text"] | None:
    """The kind of ids that a column of this type holds; None: it holds none."""
    if isinstance(dtype, pa.BaseExtensionType):
        return id_kind(dtype.storage_type)
    if pa.types.is_dictionary(dtype):
        return id_kind(dtype.value_type)

    types = pa.types
    if types.is_integer(dtype) or types.is_floating(dtype) or types.is_decimal(dtype):
        return "integer"
    if types.is_string(dtype) or types.is_large_string(dtype) or types.is_string_view(dtype):
        return "text"
    if types.is_binary(dtype) or types.is_large_binary(dtype) or types.is_binary_view(dtype):
        return "text"
    return "text" if types.is_fixed_size_binary(dtype) else None


def is_text_id(name: str, types: Mapping[str, pa.DataType], column: str = "NAME") -> bool:
    """True if the id is text in these files, file -> type of its column; all are of one kind.

    Args:
        column: the files' name of it, for the message.

    Raises:
        UserError: it is text in one file and a number in another.
    """
    first: dict[str, str] = {}  # kind -> file
    for file, dtype in types.items():
        kind = id_kind(dtype)
        assert kind is not None, "check_columns has seen the file"
        first.setdefault(kind, file)

    if len(first) > 1:
        text, number = first["text"], first["integer"]
        raise UserError(
            f"{name} is text in {text} ({types[text]}) and a number in {number} ({types[number]}): "
            f"write it alike in all files, or {as_text_advice(name, column)}"
        )
    return "text" in first


def as_text_advice(name: str, column: str = "NAME") -> str:
    """How to have numbers read as text."""
    return (
        f"set source.columns.{name}={{column: {column}, text: true}}, which reads a number as the "
        "text of its digits"
    )


# Codes -----------------------------------------------------------------------


def text_codes(texts: Sequence[str] | np.ndarray) -> np.ndarray:
    """int64 [n], 0 or more: the code of each text, given as such or as its bytes in UTF-8."""
    objects = np.asarray(texts, object)
    hashes = hash_array(objects, categorize=False)  # pyright: ignore[reportCallIssue]
    return (hashes >> np.uint64(1)).astype(np.int64)


def id_code(own: OwnId) -> int:
    """The code of one id."""
    return own if isinstance(own, int) else int(text_codes([own])[0])


def id_codes(own: Sequence[OwnId]) -> np.ndarray:
    """int64 [n]: the codes of ids that are all integers or all text."""
    if own and isinstance(own[0], str):
        return text_codes(own)  # pyright: ignore[reportArgumentType]
    return np.array(own, np.int64)


@dataclass(frozen=True, slots=True)
class CodedColumn:
    """A column of ids as codes."""

    codes: pa.Array  # integers; null where a row has no id
    unreadable: np.ndarray  # bool [rows]: there is something, and it is no id of the kind
    pairs: pa.RecordBatch | None = None  # of text: PAIRS, each id at least once


def code_column(column: pa.ChunkedArray, *, text: bool, unknown: Sequence[str] = ()) -> CodedColumn:
    """The codes of a column of any type that `id_kind` knows; `unknown` values are no ids.

    float, as integers   1.0   NaN    2.5
    code                 1     null   null
    unreadable                        x
    """
    if pa.types.is_dictionary(column.type) and not unknown:
        values, places = _dictionary_parts(flat_array(column))
    else:
        plain = plain_values(column)
        if unknown:
            plain = without_values(plain, tuple(unknown))
        if not text and pa.types.is_integer(plain.type) and plain.type != pa.uint64():
            return CodedColumn(plain, np.zeros(len(plain), bool))
        values, places = _values_and_places(plain, text=text)

    pairs = None
    if text:
        codes, known, pairs = _coded_texts(values)
    else:
        numbers = _as_integers(values)
        known = numbers.is_valid().to_numpy(zero_copy_only=False)
        codes = numbers.fill_null(0).to_numpy()

    there = values.is_valid().to_numpy(zero_copy_only=False)
    unreadable = there & ~known & ~_is_none(values)
    if places is not None:
        # from values to rows; the last place is for rows without a value
        codes = np.append(codes, 0)[places]
        known = np.append(known, False)[places]
        unreadable = np.append(unreadable, False)[places]
    return CodedColumn(pa.array(codes, pa.int64(), mask=~known), unreadable, pairs)


def _coded_texts(values: pa.Array) -> tuple[np.ndarray, np.ndarray, pa.RecordBatch]:
    """The code of each value, 0 where it is no text, int64 [n]; where it is one, bool [n]; and
    PAIRS of those.
    """
    texts = _as_texts(values)
    present = texts.drop_null()
    # hashing bytes spares making text of them, which takes as long again
    codes = text_codes(present.cast(pa.binary()).to_numpy(zero_copy_only=False))
    pairs = pa.record_batch([pa.array(codes), present], PAIRS)

    known = texts.is_valid().to_numpy(zero_copy_only=False)
    if len(present) < len(texts):
        of_present = codes
        codes = np.zeros(len(texts), np.int64)
        codes[known] = of_present
    return codes, known, pairs


def _values_and_places(plain: pa.Array, *, text: bool) -> tuple[pa.Array, np.ndarray | None]:
    """The values of a column, and the place of each row's among them; one behind the last: none.

    Each value is there once, unless few of them repeat: a hash table of so many takes longer than
    a code for each row. Then the values are those of the rows, and there are no places.

    rows     b  null  a  b
    values   b  a
    places   0  2     1  0
    """
    sample = plain.slice(0, SAMPLE_ROWS)
    if text and 2 * len(sample.unique()) > len(sample):
        return plain, None

    return _dictionary_parts(plain.dictionary_encode())


def _dictionary_parts(coded: pa.DictionaryArray) -> tuple[pa.Array, np.ndarray]:
    """The values that are there, and the place of each row's among them, as `_values_and_places`.

    A file's dictionary may hold values of no row, which are no ids of the file's.

    dictionary  a  b  c        values   a  c
    rows        2  0  null  2  places   1  0  2  1
    """
    values = plain_values(pa.chunked_array([coded.dictionary]))
    places = coded.indices.fill_null(len(values)).to_numpy()

    is_there = np.zeros(len(values) + 1, bool)
    is_there[places] = True
    if is_there[:-1].all():
        return values, places
    new_place = np.cumsum(is_there) - is_there
    new_place[-1] = is_there[:-1].sum()
    return values.filter(pa.array(is_there[:-1])), new_place[places]


def own_values(column: pa.ChunkedArray, *, text: bool) -> list[OwnId | None]:
    """The ids of a column as people have them: integers, or text."""
    plain = plain_values(column)
    return (_as_texts(plain) if text else _as_integers(plain)).to_pylist()


def _is_uuid(dtype: pa.DataType) -> bool:
    """True for 16 bytes, with the extension type of UUIDs or without."""
    if isinstance(dtype, pa.UuidType):
        return True
    return pa.types.is_fixed_size_binary(dtype) and dtype.byte_width == UUID_BYTES


def _is_none(values: pa.Array) -> np.ndarray:
    """bool [values]: stands for no id at all, NaN among numbers and empty text."""
    if pa.types.is_floating(values.type):
        return np.isnan(values.to_numpy(zero_copy_only=False))
    if id_kind(values.type) == "text" and not pa.types.is_fixed_size_binary(values.type):
        return pc.call_function("binary_length", [values]).fill_null(0).to_numpy() == 0
    return np.zeros(len(values), bool)


def _as_integers(values: pa.Array) -> pa.Array:
    """int64; null for what is no whole number, or none that int64 or the float holds exactly."""
    if pa.types.is_decimal(values.type):
        whole = map(_whole_decimal, values.to_pylist())
        in_range = [n if n is not None and abs(n) < 2**63 else None for n in whole]
        return pa.array(in_range, pa.int64())

    if pa.types.is_floating(values.type):
        numbers = values.cast(pa.float64()).to_numpy(zero_copy_only=False)  # null becomes NaN
        fine = np.abs(numbers) <= MAX_EXACT
        fine &= np.floor(numbers) == numbers
        return pa.array(np.where(fine, numbers, 0).astype(np.int64), mask=~fine)

    if values.type == pa.uint64():
        numbers = values.fill_null(0).to_numpy()
        bad = (numbers >= 2**63) | values.is_null().to_numpy(zero_copy_only=False)
        return pa.array(numbers.view(np.int64), mask=bad)
    return values.cast(pa.int64())


def _whole_decimal(value: Decimal | None) -> int | None:
    return None if value is None or value % 1 else int(value)


def _as_texts(values: pa.Array) -> pa.Array:
    """string; null for what is no text, empty, or longer than LONGEST_ID characters."""
    if pa.types.is_fixed_size_binary(values.type):
        return _hexadecimal(values, UUID_DASHES if _is_uuid(values.type) else ())
    if pa.types.is_decimal(values.type):
        whole = map(_whole_decimal, values.to_pylist())
        return pa.array([None if n is None else str(n) for n in whole], pa.string())
    if pa.types.is_integer(values.type):
        return values.cast(pa.string())
    if pa.types.is_floating(values.type):
        return _as_integers(values).cast(pa.string())

    raw = values.cast(pa.large_binary())
    try:
        texts = raw.cast(pa.large_string())  # which looks for UTF-8
    except pa.ArrowInvalid:
        texts = pa.array(map(_decoded, raw.to_pylist()), pa.large_string())
    length = pc.call_function("binary_length", [texts]).fill_null(0).to_numpy()
    if length.max(initial=0) > LONGEST_ID:  # bytes, of which a character may have several
        length = pc.call_function("utf8_length", [texts]).fill_null(0).to_numpy()
    return _null_unless((length > 0) & (length <= LONGEST_ID), texts).cast(pa.string())


def _null_unless(fine: np.ndarray, values: pa.Array) -> pa.Array:
    if fine.all():
        return values
    return pc.call_function("if_else", [pa.array(fine), values, pa.scalar(None, values.type)])


def _decoded(raw: bytes | None) -> str | None:
    try:
        return None if raw is None else raw.decode()
    except UnicodeDecodeError:
        return None


def _hexadecimal(values: pa.Array, dashes: Sequence[int]) -> pa.Array:
    """string: the hexadecimal digits of bytes of a fixed size.

    bytes 12 34 ab cd, dashes (4,)      1234-abcd
    """
    width = values.type.byte_width
    raw = np.frombuffer(values.buffers()[1], np.uint8).reshape(-1, width)
    raw = raw[values.offset : values.offset + len(values)]

    digits = np.empty((len(raw), 2 * width), np.uint8)
    digits[:, 0::2], digits[:, 1::2] = HEX[raw >> 4], HEX[raw & 15]
    shown = np.insert(digits, list(dashes), ord("-"), axis=1)

    ends = np.arange(len(raw) + 1, dtype=np.int32) * shown.shape[1]
    texts = pa.StringArray.from_buffers(
        len(raw), pa.py_buffer(ends.tobytes()), pa.py_buffer(shown.tobytes())
    )
    return _null_unless(values.is_valid().to_numpy(zero_copy_only=False), texts)


# Blocks ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class CodedBlock:
    """Rows of a source's table with codes in the place of ids; all else by LOG column."""

    rows: pa.Table
    codes: dict[str, pa.Array]
    unreadable: dict[str, np.ndarray]  # as of CodedColumn
    pairs: dict[str, pa.RecordBatch]  # of text ids, as of CodedColumn


def code_ids(
    block: pa.Table,
    columns: Mapping[str, str],
    readings: Mapping[str, ColumnReading],
    text_ids: Collection[str],
) -> CodedBlock:
    """A block whose ids are codes.

    Args:
        columns: LOG column -> name in the files.
        readings: how it is read, of those of which more than a name is said.
        text_ids: the ids that are text.
    """
    coded = CodedBlock(block, {}, {}, {})
    rows = block
    for name in TEXT_IDS:
        theirs = columns[name]
        if theirs not in block.column_names:
            continue

        unknown = readings[name].unknown if name in readings else ()
        found = code_column(block[theirs], text=name in text_ids, unknown=unknown)
        rows = rows.set_column(rows.column_names.index(theirs), theirs, found.codes)
        coded.codes[name] = found.codes.cast(pa.int64())
        coded.unreadable[name] = found.unreadable
        if found.pairs is not None:
            coded.pairs[name] = found.pairs
    return replace(coded, rows=rows)
