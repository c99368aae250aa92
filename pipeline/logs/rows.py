"""A file of logs or of a side table, opened by what it is: Parquet, CSV or JSON lines."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import FileFormat, Impressions, UserError
from pipeline.logs.arrow_errors import reading_column, reading_file
from pipeline.logs.cleaning import LOG_FORM
from pipeline.logs.files import CONNECTIONS, PLAIN, file_stamp, locate, open_parquet
from pipeline.logs.flattening import flat_rows, flat_schema, holds_column
from pipeline.logs.impressions import count_exposures, spread_rows, spread_schema
from pipeline.logs.text_files import TextFile, text_kind

USUAL_EXPOSURES = 16  # of a row: blocks are read so much smaller, to be of the usual size spread
COUNTED_ROWS = 2**16
INDEX_BYTES = 3  # of a row, at most: a number into a dictionary of up to 2**24 texts


class RowFile(Protocol):
    """Rows that are read in blocks, and in groups that two tasks may share."""

    @property
    def schema(self) -> pa.Schema: ...

    def group_rows(self) -> list[int]:
        """Rows of each group."""
        ...

    def blocks(
        self, rows: int, groups: Sequence[int], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        """The rows of these groups, in tables of at most so many; of Parquet these columns alone
        where some are named.
        """
        ...


class _ParquetRows:
    def __init__(self, file: pq.ParquetFile, path: str) -> None:
        self._file, self._path = file, path
        self.schema = file.schema_arrow

    def group_rows(self) -> list[int]:
        groups = range(self._file.metadata.num_row_groups)
        return [self._file.metadata.row_group(group).num_rows for group in groups]

    def blocks(
        self, rows: int, groups: Sequence[int], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        wanted = None if columns is None else list(columns)
        batches = self._file.iter_batches(
            rows, row_groups=list(groups), columns=wanted, use_threads=False
        )
        while True:
            with reading_file(self._path):
                try:
                    batch = next(batches, None)
                except (pa.ArrowException, OSError):
                    self._name_damaged(groups)
                    raise
            if batch is None:
                return
            if batch.num_rows:
                yield pa.Table.from_batches([batch])

    def _name_damaged(self, groups: Sequence[int]) -> None:
        """Raises ColumnTrouble for the first column that cannot be read by itself."""
        for name in self.schema.names:
            with reading_column(name):
                self._file.read_row_groups(list(groups), columns=[name], use_threads=False)


class _TextRows:
    """A text file is one group."""

    def __init__(self, file: TextFile, count: int) -> None:
        self._file, self._count = file, count
        self.schema = file.schema

    def group_rows(self) -> list[int]:
        return [self._count]

    def blocks(
        self, rows: int, groups: Sequence[int], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        if groups:
            yield from self._file.blocks(rows)


class _FlatRows:
    """A file whose objects are columns of their own."""

    def __init__(self, inner: RowFile) -> None:
        self._inner = inner
        self.schema = flat_schema(inner.schema)

    def group_rows(self) -> list[int]:
        return self._inner.group_rows()

    def blocks(
        self, rows: int, groups: Sequence[int], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        outer = None
        if columns is not None:
            outer = []
            for name in self._inner.schema.names:
                if any(holds_column(name, column) for column in columns):
                    outer.append(name)
        for block in self._inner.blocks(rows, groups, outer):
            yield flat_rows(block)


class _SpreadRows:
    """A file whose rows hold lists of exposures, as rows of one exposure."""

    def __init__(self, inner: RowFile, how: Impressions, path: str, *, count: bool) -> None:
        self._inner, self._how, self._path = inner, how, path
        with _naming(path):
            self.schema = spread_schema(inner.schema, how)
        self._groups: list[int] | None = None
        if not count:
            return
        # Parquet says how many rows it has, and not how long their lists are
        key = path, file_stamp(path), how
        if key not in _exposures:
            groups = range(len(inner.group_rows()))
            _exposures[key] = [self._count(group) for group in groups]
        self._groups = _exposures[key]

    def group_rows(self) -> list[int]:
        if self._groups is None:
            return [0] * len(self._inner.group_rows())
        return self._groups

    def blocks(
        self, rows: int, groups: Sequence[int], columns: Sequence[str] | None = None
    ) -> Iterator[pa.Table]:
        for block in self._inner.blocks(max(1, rows // USUAL_EXPOSURES), groups):
            with _naming(self._path):
                spread = spread_rows(block, self._how)
            for start in range(0, spread.num_rows, rows):
                yield spread.slice(start, rows)

    def _count(self, group: int) -> int:
        total = 0
        for block in self._inner.blocks(COUNTED_ROWS, [group], self._how.columns):
            with _naming(self._path):
                total += count_exposures(block, self._how)
        return total


@contextmanager
def _naming(file: str) -> Iterator[None]:
    """A mistake that is told in the block names the file."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


# what this process has counted: exposures by row group
_exposures: dict[tuple[str, str, Impressions], list[int]] = {}


@contextmanager
def open_rows(
    file: str,
    form: FileFormat,
    ids: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    *,
    texts: Sequence[str] = (),
    count: bool = False,
) -> Iterator[RowFile]:
    """The file's rows.

    Args:
        ids: columns of ids that are numbers, or that are of CSV numbers if all are.
        columns: the fields that are read of JSON.
        texts: columns whose blocks may be dictionaries, each text once, where Parquet has them so.
        count: `group_rows` is going to be asked for, for which text is read once. Then all of the
            ids of CSV tell what they are, and else those of the first megabyte.

    Raises:
        UserError: not there, not permitted, or not of its format.
    """
    how = form.impressions
    if how is not None and columns is not None:
        columns = [*columns, *how.columns]

    if text_kind(file, form) is None:
        with open_parquet(file) as parquet:
            rows: RowFile = _ParquetRows(parquet, file)
            # rows that we wrote hold one exposure each, and no objects
            ours = LOG_FORM in (rows.schema.metadata or {})
            if form.flatten and not ours:
                rows = _FlatRows(rows)
            if how is not None and not ours:
                yield _SpreadRows(rows, how, file, count=count)
                return

            packed = [name for name in texts if _is_packed(parquet, name)]
            if form.flatten or not packed:
                yield rows
                return
            with open_parquet(file, packed, parquet.metadata) as again:
                yield _ParquetRows(again, file)
        return

    text = _open_text(file, form, tuple(ids), None if columns is None else tuple(columns))
    scanned = _scan_text(file, form, text) if count else 0
    lines = _TextRows(text, scanned)
    inner = _FlatRows(lines) if form.flatten else lines
    yield inner if how is None else _SpreadRows(inner, how, file, count=count)


def _is_packed(file: pq.ParquetFile, name: str) -> bool:
    """True for a column of text that lies in the file as numbers into a dictionary.

    A writer gives its dictionary up where few texts repeat. It is there still, and the pages behind
    it hold the texts themselves, in more bytes than a number takes.
    """
    place = file.schema_arrow.get_field_index(name)
    if place < 0 or file.schema_arrow.field(place).type != pa.string():
        return False

    metadata, rows, behind = file.metadata, 0, 0
    leaf = [metadata.schema.column(at).path for at in range(metadata.num_columns)].index(name)
    for number in range(metadata.num_row_groups):
        chunk = metadata.row_group(number).column(leaf)
        if not chunk.has_dictionary_page:
            return False
        dictionary = chunk.data_page_offset - chunk.dictionary_page_offset
        behind += chunk.total_compressed_size - dictionary
        rows += chunk.num_values
    return behind <= INDEX_BYTES * rows


def _open_text(
    file: str, form: FileFormat, ids: tuple[str, ...], columns: tuple[str, ...] | None
) -> TextFile:
    filesystem, inner, _ = locate(file)
    return TextFile(filesystem, inner, file, form, ids, columns)


# what this process has found of text files: rows, and which of the ids asked for are numbers
_scans: dict[tuple[str, str, FileFormat], tuple[int, dict[str, bool]]] = {}


def _scan_text(file: str, form: FileFormat, text: TextFile) -> int:
    """Rows of a text file, which this process reads once, and its ids as they all are."""
    key = file, file_stamp(file), form
    rows, numbers = _scans.get(key, (None, {}))
    if rows is None or not set(text.id_columns()) <= numbers.keys():
        rows, numbers = text.scan()
        _scans[key] = rows, numbers
    text.take_as_text([name for name, is_number in numbers.items() if not is_number])
    return rows


def read_schema(file: str, form: FileFormat = PLAIN, ids: Sequence[str] = ()) -> pa.Schema:
    with open_rows(file, form, ids, count=bool(ids)) as rows:
        return rows.schema


def count_rows(files: Sequence[str], form: FileFormat = PLAIN) -> int:
    """Rows of all files: of Parquet by its own metadata, of text by reading it."""
    return sum(rows_by_file(files, form).values())


def rows_by_file(
    files: Sequence[str],
    form: FileFormat = PLAIN,
    ids: Sequence[str] = (),
    columns: Sequence[str] | None = None,
) -> dict[str, int]:
    """Rows of each file; `ids` and `columns` as of `open_rows`."""

    def rows_of(file: str) -> int:
        with open_rows(file, form, ids, columns, count=True) as rows:
            return sum(rows.group_rows())

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        return dict(zip(files, pool.map(rows_of, files), strict=True))


def read_table(file: str, form: FileFormat, id_column: str) -> pa.Table:
    """All rows of a side table's file.

    Raises:
        UserError: it cannot be read.
    """
    if text_kind(file, form) is None:
        with open_parquet(file) as parquet, reading_file(file):
            table = parquet.read()
    else:
        table = _open_text(file, form, (id_column,), None).read_all()
    return flat_rows(table) if form.flatten else table
