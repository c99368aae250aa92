"""A file of logs or of a side table, opened by what it is: Parquet, CSV or JSON lines."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.config import FileFormat
from pipeline.logs.arrow_errors import reading_column, reading_file
from pipeline.logs.files import CONNECTIONS, PLAIN, file_stamp, locate, open_parquet
from pipeline.logs.text_files import TextFile, text_kind


class RowFile(Protocol):
    """Rows that are read in blocks, and in groups that two tasks may share."""

    @property
    def schema(self) -> pa.Schema: ...

    def group_rows(self) -> list[int]:
        """Rows of each group."""
        ...

    def blocks(self, rows: int, groups: Sequence[int]) -> Iterator[pa.Table]:
        """The rows of these groups, in tables of at most so many."""
        ...


class _ParquetRows:
    def __init__(self, file: pq.ParquetFile, path: str) -> None:
        self._file, self._path = file, path
        self.schema = file.schema_arrow

    def group_rows(self) -> list[int]:
        groups = range(self._file.metadata.num_row_groups)
        return [self._file.metadata.row_group(group).num_rows for group in groups]

    def blocks(self, rows: int, groups: Sequence[int]) -> Iterator[pa.Table]:
        batches = self._file.iter_batches(rows, row_groups=list(groups), use_threads=False)
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

    def blocks(self, rows: int, groups: Sequence[int]) -> Iterator[pa.Table]:
        if groups:
            yield from self._file.blocks(rows)


@contextmanager
def open_rows(
    file: str,
    form: FileFormat,
    ids: Sequence[str] = (),
    columns: Sequence[str] | None = None,
    *,
    count: bool = False,
) -> Iterator[RowFile]:
    """The file's rows.

    Args:
        ids: columns of ids, which in CSV are numbers or text by what they all are.
        columns: the fields that are read of JSON.
        count: `group_rows` is going to be asked for, for which text is read once.

    Raises:
        UserError: not there, not permitted, or not of its format.
    """
    if text_kind(file, form) is None:
        with open_parquet(file) as parquet:
            yield _ParquetRows(parquet, file)
        return

    text = _open_text(file, form, tuple(ids), None if columns is None else tuple(columns))
    rows = _count_text(file, file_stamp(file), form, text) if count else 0
    yield _TextRows(text, rows)


def _open_text(
    file: str, form: FileFormat, ids: tuple[str, ...], columns: tuple[str, ...] | None
) -> TextFile:
    filesystem, inner, _ = locate(file)
    return TextFile(filesystem, inner, file, form, ids, columns)


_counts: dict[tuple[str, str, FileFormat], int] = {}


def _count_text(file: str, stamp: str, form: FileFormat, text: TextFile) -> int:
    """Rows of a text file, which this process counts once."""
    key = file, stamp, form
    if key not in _counts:
        _counts[key] = text.count_rows()
    return _counts[key]


def read_schema(file: str, form: FileFormat = PLAIN, ids: Sequence[str] = ()) -> pa.Schema:
    with open_rows(file, form, ids) as rows:
        return rows.schema


def count_rows(files: Sequence[str], form: FileFormat = PLAIN) -> int:
    """Rows of all files: of Parquet by its own metadata, of text by reading it."""
    return sum(rows_by_file(files, form).values())


def rows_by_file(files: Sequence[str], form: FileFormat = PLAIN) -> dict[str, int]:
    """Rows of each file."""

    def rows_of(file: str) -> int:
        with open_rows(file, form, count=True) as rows:
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
            return parquet.read()
    return _open_text(file, form, (id_column,), None).read_all()
