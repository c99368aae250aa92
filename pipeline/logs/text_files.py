"""CSV and JSON lines as tables, a block at a time.

The schema of a file is what its first block shows. Values are then read as text (JSON: as numbers
and text), so that no later row of a file fails the build: what cannot be read is found by the
column that reads it, and its row is quarantined.
"""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import BinaryIO, cast

import pyarrow as pa
import pyarrow.compute as pc
from pyarrow import csv, fs, json

from pipeline.config import FileFormat, UserError

CSV_ENDINGS = (".csv", ".tsv")
JSON_ENDINGS = (".jsonl", ".ndjson", ".json")
PLAIN_ENDINGS = (".txt", ".dat", ".data")  # text, of a form that only `format` can tell
PACKED_ENDINGS = (".gz", ".bz2", ".zst", ".lz4")  # unpacked while reading
FIRST_BYTES, BLOCK_BYTES = 2**20, 2**24
NULLS = ["", "NULL", "null", "\\N", "NaN", "nan"]
UNIT_SEPARATOR = b"\x1f"  # in the place of a separator of several characters
WHOLE = r"^(0|-?[1-9]\d{0,18})$"  # without leading zeros, which only text keeps


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
            rows += block.num_rows
            for name, is_number in numbers.items():
                if is_number and not self._is_json:
                    numbers[name] = _all_whole(block[name])
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
                yield self._with_number_ids(piece)

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
            self.take_as_text([name for name in texts if not _all_whole(table[name])])
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
            csv.ParseOptions(delimiter=delimiter, quote_char=quote or False),
            csv.ConvertOptions(column_types=types, strings_can_be_null=True, null_values=NULLS),
        )

    def _first_schema(self) -> pa.Schema:
        if self._is_json:
            return self._first_json_schema()

        schema = self._open_csv({}, FIRST_BYTES).schema
        self.schema = schema
        if not any(map(self._is_number, self.id_columns())):
            return schema

        # leading zeros, or text after the first numbers
        first = next(iter(self._open_csv(self._as_text(), FIRST_BYTES)), None)
        for name in self.id_columns():
            if first is not None and not _all_whole(first[name]):
                place = schema.get_field_index(name)
                schema = schema.set(place, pa.field(name, pa.string()))
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
            block = block.set_column(place, name, whole.cast(pa.int64(), safe=False))
        return block

    # JSON lines --------------------------------------------------------------

    def _first_json_schema(self) -> pa.Schema:
        """Numbers but ids as float64, and times as text: a later row may have a fraction."""
        options = json.ReadOptions(block_size=BLOCK_BYTES, use_threads=False)
        found = json.open_json(self._stream(), read_options=options).schema
        fields = []
        for field in found:
            if self._columns is not None and field.name not in self._columns:
                continue
            dtype = field.type
            if pa.types.is_integer(dtype) and field.name not in self._ids:
                dtype = pa.float64()
            if pa.types.is_timestamp(dtype):
                dtype = pa.string()
            if not pa.types.is_null(dtype):
                fields.append(pa.field(field.name, dtype))
        return pa.schema(fields)

    def _open_json(self) -> Iterable[pa.RecordBatch]:
        return json.open_json(
            self._stream(),
            read_options=json.ReadOptions(block_size=BLOCK_BYTES, use_threads=False),
            parse_options=json.ParseOptions(
                explicit_schema=self.schema, unexpected_field_behavior="ignore"
            ),
        )


def _all_whole(column: pa.Array | pa.ChunkedArray) -> bool:
    text = pc.utf8_trim_whitespace(column.drop_null())
    return bool(pc.all(pc.match_substring_regex(text, WHOLE)).as_py() is not False)


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
