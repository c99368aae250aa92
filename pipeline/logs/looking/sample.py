"""The first rows of an unknown file, with what is needed to read it at all: separator and names."""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

import codecs
import re
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import FileFormat, Impressions, UserError
from pipeline.logs.columns import is_text, plain_values
from pipeline.logs.files import PLAIN, find_files, locate, total_bytes
from pipeline.logs.impressions import is_list, spread_rows
from pipeline.logs.looking.guess import ITEM, plain_name
from pipeline.logs.parquet import count_reasons
from pipeline.logs.rows import open_rows
from pipeline.logs.text_files import CSV_ENDINGS, JSON_ENDINGS, PACKED_ENDINGS, text_kind

SAMPLE_ROWS = 100_000
FIRST_BYTES = 2**16
SEPARATORS = ("\t", "::", ",", ";", "|", "\x01")
MIN_COLUMNS = 2
LABELLED = r"^\S+-[01](\s\S+-[01])*$"  # items that were shown, and if each was clicked
VALUE = re.compile(r"^-?\d+(\.\d+)?$|^\d{4}-\d\d-\d\d")  # no name of a column


@dataclass(frozen=True)
class Sample:
    """Some rows of a place, and how its files are read."""

    path: str
    files: list[str]
    left_out: dict[str, str]
    bytes: int
    format: FileFormat
    rows: pa.Table  # one exposure each, where the files have lists of them
    is_whole: bool  # `rows` are all there are
    request_id: str | None = None  # of lists of exposures, the column that tells them apart


def take_sample(path: str, key: str) -> Sample:
    """The first rows of the files at `path`; `key` is what a message calls it.

    Raises:
        UserError: there is no file, or it is none of Parquet, CSV and JSON lines.
    """
    found = find_files(path)
    form, files = PLAIN, found.files
    if not files:
        form, files = _as_text(list(found.left_out))
    if not files:
        others = f"; left out: {count_reasons(found.left_out)}" if found.left_out else ""
        raise UserError(f"{key}: no Parquet, CSV or JSON lines at {path!r}{others}")
    if form == PLAIN and text_kind(files[0], PLAIN) != "json" and not _is_parquet(files[0]):
        form = guess_format(files[0])

    left_out = {file: why for file, why in found.left_out.items() if file not in files}
    rows, is_whole = _first_rows(files, form)
    if rows.num_rows == 0:
        raise UserError(f"{key}: the files at {path!r} have no rows")
    return Sample(path, files, left_out, total_bytes(files), form, rows, is_whole)


def spread_sample(sample: Sample) -> Sample:
    """The sample with a row for each exposure, where its rows hold lists of them."""
    how = guess_impressions(sample.rows)
    if how is None:
        return sample
    return replace(
        sample,
        format=replace(sample.format, impressions=how),
        rows=spread_rows(sample.rows, how),
        request_id=_distinct_column(sample.rows, how),
    )


def guess_impressions(rows: pa.Table) -> Impressions | None:
    """The lists of exposures in each row; None where there are none.

    N1-0 N2-1 N3-0                text of an item and 0 or 1, as MIND has it
    [{item: 1, clicked: 0}, …]    structs with an item
    [1, 2], [0, 1]                lists of one length in every row, one of items
    """
    lists = {}
    for name in rows.column_names:
        values = plain_values(rows[name]).drop_null()
        if is_text(values.type) and len(values):
            if pc.all(pc.match_substring_regex(values.slice(0, 1000), LABELLED)).as_py():
                return Impressions(columns=(name,), names=("item_id", "clicked"))
        elif is_list(values.type):
            inner = values.type.value_type
            if pa.types.is_struct(inner) and any(ITEM.match(plain_name(f.name)) for f in inner):
                return Impressions(columns=(name,))
            if not pa.types.is_nested(inner):
                lists[name] = pc.list_value_length(rows[name]).fill_null(0).combine_chunks()

    items = [name for name in lists if ITEM.match(plain_name(name))]
    together = [name for name in lists if items and lists[name].equals(lists[items[0]])]
    return Impressions(columns=tuple(together)) if len(together) > 1 else None


def _distinct_column(rows: pa.Table, how: Impressions) -> str | None:
    """The first column that has another value in every row."""
    for name in rows.column_names:
        column = rows[name]
        is_id = pa.types.is_integer(column.type) or is_text(column.type)
        if name not in how.columns and is_id and len(column.unique()) == rows.num_rows:
            return name
    return None


def _as_text(others: list[str]) -> tuple[FileFormat, list[str]]:
    """Files of endings that say nothing, read as CSV where they can be."""
    for file in sorted(others):
        name = file.rpartition("/")[2]
        if not name.startswith((".", "_", "README")):
            form = guess_format(file)
            if form.separator is not None or form.names:
                return form, [file]
    return PLAIN, []


def _is_parquet(file: str) -> bool:
    filesystem, inner, _ = locate(file)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        return stream.read(4) in (b"PAR1", b"PARE")


def guess_format(file: str) -> FileFormat:
    """Separator, names and encoding of a CSV file from its first lines.

    196::242::3       separator ::, names column_1, column_2, column_3
    user,item         a comma, and the names of the first line: nothing to set
    """
    filesystem, inner, _ = locate(file)
    packed = inner.lower().endswith(PACKED_ENDINGS)
    with filesystem.open_input_stream(inner, compression="detect" if packed else None) as stream:
        data = stream.read(FIRST_BYTES)
    try:
        of_windows = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        encoding = "utf-16" if of_windows else "utf8"
        text = data.decode(encoding, "strict")
    except UnicodeDecodeError as error:
        cut_off = error.start > len(data) - 4  # within a character
        encoding = "utf8" if cut_off else "latin-1"
        text = data.decode(encoding, "ignore")

    lines = text.splitlines()[:50]
    if len(data) == FIRST_BYTES:
        lines = lines[:-1]
    separator = _guess_separator(lines)
    if separator is None:
        return PLAIN

    first = lines[0].split(separator)
    has_names = len(set(first)) == len(first) and not any(VALUE.match(name) for name in first)
    lower = inner.lower()
    known = any(ending in lower.rpartition("/")[2] for ending in (*CSV_ENDINGS, *JSON_ENDINGS))
    usual = "\t" if ".tsv" in lower else ","
    return FileFormat(
        kind=None if known or not has_names else "csv",
        separator=None if separator == usual and known else separator,
        names=() if has_names else tuple(f"column_{i + 1}" for i in range(len(first))),
        encoding=encoding,
    )


def _guess_separator(lines: list[str]) -> str | None:
    """The one that most often splits every line into as many columns as the first."""
    best: tuple[int, str] | None = None
    for separator in SEPARATORS:
        counts = {line.count(separator) for line in lines if line}
        least = min(counts, default=0)
        if least + 1 >= MIN_COLUMNS and (best is None or least > best[0]):
            best = least, separator
    return None if best is None else best[1]


def _first_rows(files: list[str], form: FileFormat) -> tuple[pa.Table, bool]:
    """Rows of the first file, and of the last where the first has too few."""
    pieces, count = [], 0
    for place, file in enumerate(dict.fromkeys([files[0], files[-1]])):
        with open_rows(file, form, ids=_all_columns(file, form), count=False) as rows:
            groups = range(len(rows.group_rows()))
            for block in rows.blocks(SAMPLE_ROWS, groups):
                typed = _typed(block, rows.schema)
                pieces.append(typed.slice(0, SAMPLE_ROWS - count))
                count += pieces[-1].num_rows
                if count >= SAMPLE_ROWS:
                    return pa.concat_tables(pieces, promote_options="permissive"), False
        if place == 1:
            break
    if not pieces:
        return pa.table({}), True
    return pa.concat_tables(pieces, promote_options="permissive"), len(files) <= len(pieces)


def _all_columns(file: str, form: FileFormat) -> list[str]:
    with open_rows(file, form) as rows:
        return rows.schema.names


def _typed(block: pa.Table, schema: pa.Schema) -> pa.Table:
    """Text with the types that the file's first block shows, where all values have them."""
    for place, field in enumerate(schema):
        try:
            block = block.set_column(place, field.name, block[field.name].cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    return block
