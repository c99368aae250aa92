"""CSV and JSON lines as tables, a block at a time.

The schema of a file is what its first block shows. Values are then read as text (JSON: as numbers
and text), so that no later row of a file fails the build: what cannot be read is found by the
column that reads it, and its row is quarantined.
"""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

import io
import json as jsonlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, fs, json

from pipeline.config import FileFormat, UserError
from pipeline.logs.columns import is_number, is_text
from pipeline.logs.flattening import holds_column

CSV_ENDINGS = (".csv", ".tsv")
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
PLAIN_ENDINGS = (".txt", ".dat", ".data")  # text, of a form that only `format` can tell
PACKED_ENDINGS = (".gz", ".bz2", ".zst", ".lz4")  # unpacked while reading
FIRST_BYTES, BLOCK_BYTES = 2**20, 2**24
NULLS = ["", "NULL", "null", "\\N", "NaN", "nan"]
UNIT_SEPARATOR = b"\x1f"  # in the place of a separator of several characters
LARGEST = str(2**63 - 1)
END_OF_LINE = ord("\n")
FEWEST_TO_TELL = 3  # columns, and lines within a value, by which rows are told from prose
DECIMAL = r"^\s*[+-]?\d*[.]?\d+([eE][+-]?\d+)?\s*$"


def _whole_pattern() -> str:
    """Text of whole numbers of 64 bits, without leading zeros, which only text keeps; 7.0 too, as
    pandas writes numbers with gaps.
    """
    # of as many digits as the largest, those that are smaller in the first digit that differs
    longest = [LARGEST]
    for place, digit in enumerate(LARGEST):
        least = 1 if place == 0 else 0
        if int(digit) > least:
            smaller = f"[{least}-{int(digit) - 1}]"
            longest.append(LARGEST[:place] + smaller + rf"\d{{{len(LARGEST) - place - 1}}}")
    return rf"^(0|-?([1-9]\d{{0,{len(LARGEST) - 2}}}|{'|'.join(longest)}))(\.0+)?$"


WHOLE = _whole_pattern()


def text_kind(file: str, form: FileFormat) -> str | None:
    """`csv` or `json` for a file that is read as text by its name or by the format; None: Parquet.

    ratings.dat     with names or a separator: csv
    events.csv.gz   csv
    reviews.jsonl   json
    part-0.parquet  None
    """
    path = PurePosixPath(file.partition("?")[0].lower())
    endings = path.suffixes
    if endings and endings[-1] in PACKED_ENDINGS:
        endings = endings[:-1]
    ending = endings[-1] if endings else ""
    if form.kind == "parquet" or ending in (".parquet", ".parq", ".pq"):
        return None
    if form.text_kind is not None:
        return form.text_kind
    if ending in CSV_ENDINGS:
        return "csv"
    return "json" if ending in JSON_ENDINGS else None


def has_text_ending(file: str, kind: str) -> bool:
    """True for a name that files of this kind usually have; a folder holds a README too."""
    endings = PurePosixPath(file.partition("?")[0].lower()).suffixes
    if endings and endings[-1] in PACKED_ENDINGS:
        endings = endings[:-1]
    usual = CSV_ENDINGS if kind == "csv" else JSON_ENDINGS
    return bool(endings) and endings[-1] in (*usual, *PLAIN_ENDINGS)


def separator_of(file: str, form: FileFormat) -> str:
    """The text between two columns of CSV."""
    if form.separator is not None:
        return form.separator
    return "\t" if ".tsv" in file.lower().rpartition("/")[2] else ","


def quote_of(file: str, form: FileFormat) -> str:
    """The character around columns that hold the separator; "" for none."""
    if form.quote is not None:
        return form.quote
    return '"' if separator_of(file, form) in (",", ";") else ""


class TextFile:
    """One CSV or JSON-lines file.

    Args:
        ids: columns of ids; of CSV they are numbers where all of the first block are, unless
            `take_as_text` says more.
        columns: those that are read of JSON, whose other fields may be anything; None: all.
    """

    def __init__(
        self,
        filesystem: fs.FileSystem,
        path: str,
        name: str,
        form: FileFormat,
        ids: Sequence[str] = (),
        columns: Sequence[str] | None = None,
    ) -> None:
        self._filesystem, self._path, self._name = filesystem, path, name
        self._form, self._ids, self._columns = form, ids, columns
        self._is_json = text_kind(name, form) == "json"
        self._decimals = set[str]()  # columns of CSV that hold numbers, and maybe words for none
        try:
            self.schema = self._first_schema()
        except (pa.ArrowException, OSError, UnicodeError, LookupError) as error:
            raise self._refusal(error) from None

    def scan(self) -> tuple[int, dict[str, bool]]:
        """Rows, and of each column of ids if all of it are numbers, for which the file is read
        once.
        """
        numbers = {name: self._is_number(name) for name in self.id_columns()}
        rows = 0
        for block in self._raw_blocks():
            self._refuse_open_quotes(block)
            rows += block.num_rows
            for name, all_so_far in numbers.items():
                if all_so_far and not self._is_json:
                    numbers[name] = _all_whole(block[name], name)
        return rows, numbers

    def take_as_text(self, ids: Sequence[str]) -> None:
        """Read these columns of CSV as the text that they are."""
        for name in ids:
            if not self._is_json and self._is_number(name):
                place = self.schema.get_field_index(name)
                self.schema = self.schema.set(place, pa.field(name, pa.string()))

    def blocks(self, rows: int) -> Iterator[pa.Table]:
        """All rows in tables of at most so many."""
        for batch in self._raw_blocks():
            for start in range(0, batch.num_rows, rows):
                piece = pa.Table.from_batches([batch.slice(start, rows)])
                yield self._with_points(self._with_number_ids(piece))

    def _raw_blocks(self) -> Iterator[pa.RecordBatch]:
        try:
            if self._is_json:
                yield from self._open_json()
            else:
                yield from self._open_csv(self._as_text(), BLOCK_BYTES)
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise self._refusal(error) from None

    def read_all(self) -> pa.Table:
        """A small file as one table, each column of the type that all its values have."""
        try:
            if self._is_json:
                options = json.ReadOptions(block_size=BLOCK_BYTES)
                return json.read_json(self._stream(), read_options=options)

            texts: dict[str, pa.DataType] = dict.fromkeys(self.id_columns(), pa.string())
            stream, (reading, parsing, converting) = self._stream(), self._csv_options(texts)
            table = csv.read_csv(stream, reading, parsing, converting)
            self._refuse_open_quotes(table)
            self.take_as_text([name for name in texts if not _all_whole(table[name], name)])
            return self._with_number_ids(table)
        except (pa.ArrowException, OSError, UnicodeError) as error:
            raise self._refusal(error) from None

    def _refusal(self, error: Exception) -> UserError:
        kind = "JSON lines" if self._is_json else "CSV"
        if self._is_json and self._holds_list():
            return UserError(
                f"{self._name} holds one JSON list, not an object a line: `jq -c '.[]'` makes "
                "lines of it"
            )
        reason = " ".join(str(error).split())[:300]
        reason = "".join(sign for sign in reason if sign.isprintable())  # as of UTF-16
        return UserError(
            f"{self._name} cannot be read as {kind} ({reason}): see source.format, or the table's "
            "own format (docs/guide/data.md)"
        )

    def _holds_list(self) -> bool:
        try:
            with self._stream() as stream:
                return stream.read(64).lstrip().startswith(b"[")
        except (pa.ArrowException, OSError):
            return False

    def _stream(self) -> BinaryIO | pa.NativeFile:
        packed = self._path.lower().endswith(PACKED_ENDINGS)
        stream = self._filesystem.open_input_stream(
            self._path, compression="detect" if packed else None
        )
        separator = separator_of(self._name, self._form)
        if self._is_json or len(separator) == 1:
            return stream
        wrapped = _Replaced(cast(BinaryIO, stream), separator.encode(), UNIT_SEPARATOR)
        return cast(BinaryIO, wrapped)

    # CSV ---------------------------------------------------------------------

    def _open_csv(self, types: dict[str, pa.DataType], block_bytes: int) -> csv.CSVStreamingReader:
        """The file with these types; those of other columns are what its first block shows."""
        reading, parsing, converting = self._csv_options(types)
        reading.block_size, reading.use_threads = block_bytes, False
        return csv.open_csv(self._stream(), reading, parsing, converting)

    def _refuse_open_quotes(self, block: pa.RecordBatch | pa.Table) -> None:
        """Raises UserError for a value that holds whole rows: a quote at its beginning was no
        quote, or was never closed.
        """
        if self._is_json or block.num_columns < FEWEST_TO_TELL:
            return
        separator = separator_of(self._name, self._form)
        delimiter = separator if len(separator) == 1 else UNIT_SEPARATOR.decode()
        # by place: a file without a line of names may have two columns of one name
        for name, column in zip(block.schema.names, block.columns, strict=True):
            if not pa.types.is_string(column.type) or not _has_lines(column):
                continue
            for value in column.filter(pc.match_substring(column, "\n")).to_pylist():
                rows = _rows_within(value, delimiter, block.num_columns)
                if rows >= FEWEST_TO_TELL:
                    raise UserError(
                        f"{self._name}: a value of {name!r} has {rows:,} rows in it, from "
                        f"{value[:40]!r} on: its quote is not closed. Where quotes are signs as "
                        'others, set format: {quote: ""}'
                    )

    def _as_text(self) -> dict[str, pa.DataType]:
        return dict.fromkeys(self.schema.names, pa.string())

    def _csv_options(
        self, types: dict[str, pa.DataType]
    ) -> tuple[csv.ReadOptions, csv.ParseOptions, csv.ConvertOptions]:
        separator = separator_of(self._name, self._form)
        delimiter = separator if len(separator) == 1 else UNIT_SEPARATOR.decode()
        quote = quote_of(self._name, self._form)
        return (
            csv.ReadOptions(
                block_size=BLOCK_BYTES,
                column_names=list(self._form.names) or None,
                encoding=self._form.encoding,
            ),
            csv.ParseOptions(
                delimiter=delimiter,
                quote_char=quote or False,
                newlines_in_values=bool(quote),  # else a row of two lines may lie in two blocks
            ),
            csv.ConvertOptions(
                column_types=types,
                strings_can_be_null=True,
                null_values=NULLS,
                decimal_point=self._form.decimal,
            ),
        )

    def _first_schema(self) -> pa.Schema:
        if self._is_json:
            return self._first_json_schema()

        schema = self._open_csv({}, FIRST_BYTES).schema
        self.schema = schema
        first = next(iter(self._open_csv(self._as_text(), FIRST_BYTES)), None)
        if first is None:
            return schema

        for place, field in enumerate(schema):
            name, values = field.name, first.column(place)
            is_id = name in self._ids and values.null_count < len(values)
            if is_id and _all_whole(values, name):
                kind = pa.int64()
            elif is_id and (pa.types.is_integer(field.type) or pa.types.is_floating(field.type)):
                # leading zeros, text after the first numbers, or more digits than a number holds
                kind = pa.string()
            elif pa.types.is_string(field.type):
                kind = _kind_between_names(values, name, self._form.decimal)
            else:
                kind = field.type
            if _has_numbers(kind, values, self._form.decimal):
                self._decimals.add(name)
            schema = schema.set(place, pa.field(name, kind))
        return schema

    def id_columns(self) -> list[str]:
        """Those of `ids` that the file has."""
        return [name for name in self._ids if name in self.schema.names]

    def _is_number(self, name: str) -> bool:
        return pa.types.is_integer(self.schema.field(name).type)

    def _with_number_ids(self, block: pa.Table) -> pa.Table:
        """Ids as the schema has them. One that is no number is null, among ids that are."""
        for name in self.id_columns():
            place = block.schema.get_field_index(name)
            if not self._is_number(name) or pa.types.is_integer(block[name].type):
                continue
            text = pc.utf8_trim_whitespace(block[name])
            whole = pc.if_else(pc.match_substring_regex(text, WHOLE), text, pa.scalar(None))
            whole = pc.replace_substring_regex(whole, r"\.0+$", "")
            block = block.set_column(place, name, whole.cast(pa.int64(), safe=False))
        return block

    def _with_points(self, block: pa.Table) -> pa.Table:
        """Numbers with a point where the file has another sign: 15,99 as 15.99."""
        if self._is_json or self._form.decimal == ".":
            return block
        for place, field in enumerate(self.schema):
            values = block.column(place)
            if field.name in self._decimals and is_text(values.type):
                points = pc.replace_substring(values, self._form.decimal, ".")
                points = pc.if_else(pc.match_substring_regex(points, DECIMAL), points, values)
                block = block.set_column(place, field.name, points)
        return block

    # JSON lines --------------------------------------------------------------

    def _first_json_schema(self) -> pa.Schema:
        """Numbers but ids as float64, and times as text: a later row may have a fraction."""
        options = json.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
        try:
            found = json.open_json(self._stream(), read_options=options).schema
        except pa.ArrowInvalid:
            found, mixed = self._fields_of_one_type()
            if len(found) == 0 or mixed & {*self._ids, *(self._columns or ())}:
                raise
        fields = []
        for field in found:
            if self._is_wanted(field.name) and (kind := self._json_type(field.name, field.type)):
                fields.append(pa.field(field.name, kind))
        return pa.schema(fields)

    def _fields_of_one_type(self) -> tuple[pa.Schema, set[str]]:
        """The schema of the first lines without the fields that are a number here and an object
        there, and the names of these.
        """
        rows: list[dict[str, Any]] = []
        with self._stream() as stream:
            for line in stream.read(BLOCK_BYTES).splitlines()[:-1]:
                try:
                    row = jsonlib.loads(line) if line.strip() else None
                except ValueError:
                    return pa.schema([]), set()  # Arrow says in which row
                if isinstance(row, dict):
                    rows.append(row)

        fields, mixed = [], set[str]()
        for name in dict.fromkeys(key for row in rows for key in row):
            values = [row.get(name) for row in rows]
            try:
                fields.append(pa.field(name, pa.array(values).type))
            except (pa.ArrowInvalid, pa.ArrowTypeError):
                mixed.add(name)
        return pa.schema(fields), mixed

    def _is_wanted(self, name: str) -> bool:
        if self._columns is None or name in self._columns:
            return True
        return self._form.flatten and any(holds_column(name, column) for column in self._columns)

    def _json_type(self, name: str, found: pa.DataType) -> pa.DataType | None:
        """The type that values of a column are read as; None where all that is known are nulls."""
        if pa.types.is_null(found):
            return None
        if pa.types.is_integer(found) and name not in self._ids:
            return pa.float64()
        if pa.types.is_timestamp(found):
            return pa.string()
        if not self._form.flatten or not pa.types.is_struct(found):
            return found

        fields = []
        for place in range(found.num_fields):
            inner = found.field(place)
            path = f"{name}.{inner.name}"
            if self._is_wanted(path) and (kind := self._json_type(path, inner.type)):
                fields.append(pa.field(inner.name, kind))
        return pa.struct(fields) if fields else None

    def _open_json(self) -> Iterable[pa.RecordBatch]:
        return json.open_json(
            self._stream(),
            read_options=json.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
            parse_options=json.ParseOptions(
                explicit_schema=self.schema, unexpected_field_behavior="ignore"
            ),
        )


def _has_lines(column: pa.Array | pa.ChunkedArray) -> bool:
    """True for text with an end of line in it; to look at the bytes costs next to nothing."""
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    for chunk in chunks:
        data = chunk.buffers()[2]
        if data is not None and bool((np.frombuffer(data, np.uint8) == END_OF_LINE).any()):
            return True
    return False


def _rows_within(value: str, separator: str, num_columns: int) -> int:
    """How many whole rows a value holds: all lines between its first and its last, if each has as
    many columns as a row; else 0.

    a b\n7;x;9\n8;y;9\nc    2, of three columns
    """
    lines = value.splitlines()[1:-1]
    counts = {line.count(separator) for line in lines}
    return len(lines) if counts == {num_columns - 1} else 0


def _all_whole(column: pa.Array | pa.ChunkedArray, name: str) -> bool:
    """True for text of whole numbers; a line of names among the rows counts for nothing."""
    text = pc.utf8_trim_whitespace(column.drop_null())
    whole = pc.or_(pc.match_substring_regex(text, WHOLE), pc.equal(text, name))
    return bool(pc.all(whole).as_py() is not False)


def _kind_between_names(column: pa.Array, name: str, decimal: str) -> pa.DataType:
    """The type of a column that is text because the file's line of names comes again among its
    rows, as where exports were joined.

    price, 7.5, price, 8     double
    """
    is_name = pc.equal(column, name).fill_null(False)
    if not pc.any(is_name).as_py():
        return pa.string()
    values = pc.utf8_trim_whitespace(column.filter(pc.invert(is_name)).drop_null())
    values = pc.replace_substring(values, decimal, ".")
    numbers = len(values) > 0 and pc.all(pc.match_substring_regex(values, DECIMAL)).as_py()
    return pa.float64() if numbers else pa.string()


def _has_numbers(kind: pa.DataType, column: pa.Array, decimal: str) -> bool:
    """True for a column of numbers, or of text that mostly is numbers and has no other digits.

    7,5 | 8 | n/a     yes
    a,7 | 7,5         no
    """
    if is_number(kind) or pa.types.is_null(kind):
        return True
    if not is_text(kind):
        return False
    values = pc.utf8_trim_whitespace(column.drop_null())
    points = pc.replace_substring(values, decimal, ".")
    numbers = pc.match_substring_regex(points, DECIMAL)
    others = values.filter(pc.invert(numbers))
    words = not pc.any(pc.match_substring_regex(others, r"\d")).as_py()
    return words and 2 * len(others) < len(values)


class _Replaced(io.RawIOBase):
    """A stream with one byte string in the place of another, wherever its blocks break.

    :: as |
    read       "ab::cd:"  ":ef"
    gives      "ab|cd"    "|ef"
    """

    def __init__(self, stream: BinaryIO, old: bytes, new: bytes) -> None:
        self._stream, self._old, self._new = stream, old, new
        self._kept = b""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size is None or size < 0:
            size = BLOCK_BYTES
        while True:
            read = self._stream.read(max(size - len(self._kept), 1))
            data = (self._kept + read).replace(self._old, self._new)
            self._kept = b""
            if read:
                data = self._keep_beginning(data)
            if data or not read:
                return data

    def _keep_beginning(self, data: bytes) -> bytes:
        """The data without what may be the beginning of one more separator at its end."""
        for length in range(len(self._old) - 1, 0, -1):
            if data.endswith(self._old[:length]):
                self._kept = data[-length:]
                return data[:-length]
        return data
