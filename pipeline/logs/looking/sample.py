"""The first rows of an unknown file, with what is needed to read it at all: separator and names."""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

import codecs
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import FileFormat, Impressions, UserError
from pipeline.logs.arrow_errors import reading_file
from pipeline.logs.columns import is_number, is_text, plain_values
from pipeline.logs.files import PLAIN, find_files, locate, total_bytes
from pipeline.logs.flattening import flat_rows
from pipeline.logs.impressions import is_list, spread_rows
from pipeline.logs.looking.guess import ITEM, plain_name
from pipeline.logs.parquet import count_reasons
from pipeline.logs.rows import open_rows
from pipeline.logs.text_files import CSV_ENDINGS, JSON_ENDINGS, PACKED_ENDINGS, text_kind

SAMPLE_ROWS = 100_000
MOST_FILES = 32  # of a file a day fewer would not tell where the newest tenth begins
MOST_PLACES = 8  # groups of a Parquet file, or places of a text file
PLACE_BYTES = 2**20
FIRST_BYTES = 2**16
SEPARATORS = ("\t", "::", ",", ";", "|", "\x01")
MIN_COLUMNS = 2
LABELLED = r"^\S+-[01](\s\S+-[01])*$"  # items that were shown, and if each was clicked
Value = TypeVar("Value")
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
    columns: dict[str, frozenset[str]]  # of each file looked at
    request_id: str | None = None  # of lists of exposures, the column that tells them apart
    as_text: frozenset[str] = frozenset()  # columns that are text in some files, numbers in others


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

    with reading_file(files[0]):
        if form == PLAIN and _is_csv(files[0]):
            form = guess_format(files[0])

    found_rows, is_whole = _first_rows(files, form)
    pieces = [piece for found in found_rows.values() for piece in found]
    rows = _joined(pieces)
    if rows.num_rows == 0:
        raise UserError(f"{key}: the files at {path!r} have no rows")
    return Sample(
        path=path,
        files=files,
        left_out={file: why for file, why in found.left_out.items() if file not in files},
        bytes=total_bytes(files),
        format=form,
        rows=rows,
        is_whole=is_whole,
        as_text=_numbers_beside_text(pieces),
        columns={file: _names_of(found) for file, found in found_rows.items() if found},
    )


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


def flat_sample(sample: Sample) -> Sample:
    """The sample with the fields of its objects as columns."""
    form = replace(sample.format, flatten=True)
    return replace(sample, format=form, rows=flat_rows(sample.rows))


def guess_impressions(rows: pa.Table) -> Impressions | None:
    """The lists of exposures in each row; None where there are none.

    N1-0 N2-1 N3-0                text of an item and 0 or 1, as MIND has it
    [{item: 1, clicked: 0}, …]    structs with an item
    [1, 2], [0, 1]                lists of one length in every row, one of items
    """
    lengths: dict[str, pa.Array] = {}  # of the lists of plain values, by column
    for name in rows.column_names:
        values = plain_values(rows[name]).drop_null()
        if is_text(values.type):
            if _are_labelled(values):
                return Impressions(columns=(name,), names=("item_id", "clicked"))
            continue
        if not is_list(values.type):
            continue

        inner = values.type.value_type
        if pa.types.is_struct(inner) and any(_is_item(field.name) for field in inner):
            return Impressions(columns=(name,))
        if not pa.types.is_nested(inner):
            lengths[name] = pc.list_value_length(rows[name]).fill_null(0).combine_chunks()

    items = [name for name in lengths if _is_item(name)]
    if not items:
        return None
    together = [name for name in lengths if lengths[name].equals(lengths[items[0]])]
    return Impressions(columns=tuple(together)) if len(together) > 1 else None


def _are_labelled(texts: pa.ChunkedArray) -> bool:
    """True if the first of the texts are lists of items with a label each: N1-0 N2-1."""
    if len(texts) == 0:
        return False
    matching = pc.match_substring_regex(texts.slice(0, 1000), LABELLED)
    return pc.all(matching).as_py()


def _is_item(name: str) -> bool:
    """True for what a column of items may be called."""
    return ITEM.match(plain_name(name)) is not None


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


def _is_csv(file: str) -> bool:
    """True for what is no Parquet and no JSON, which say themselves how they are read."""
    return text_kind(file, PLAIN) != "json" and not _is_parquet(file)


def _is_parquet(file: str) -> bool:
    """True for a file that begins as Parquet does, whatever its name."""
    filesystem, inner, _ = locate(file)
    with filesystem.open_input_stream(inner, compression=None) as stream:
        return stream.read(4) in (b"PAR1", b"PARE")


def guess_format(file: str) -> FileFormat:
    """Separator, names and encoding of a CSV file from its first lines.

    196::242::3       separator ::, names column_1, column_2, column_3
    user,item         a comma, and the names of the first line: nothing to set
    """
    _, inner, _ = locate(file)
    encoding, lines = _first_lines(file)
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
        decimal="," if separator != "," and _has_decimal_commas(lines, separator) else ".",
        names=() if has_names else tuple(f"column_{i + 1}" for i in range(len(first))),
        encoding=encoding,
    )


def _first_lines(file: str) -> tuple[str, list[str]]:
    """The encoding that the file seems to be in, and up to 50 whole lines from its beginning."""
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
        lines = lines[:-1]  # the last one may go on
    return encoding, lines


def _has_decimal_commas(lines: list[str], separator: str) -> bool:
    """True for columns such as 15,99, and none such as 15.99."""
    cells: list[str] = []
    for line in lines:
        cells += [cell.strip().strip('"') for cell in line.split(separator)]
    commas = any(re.fullmatch(r"-?\d+,\d+", cell) for cell in cells)
    return commas and not any(re.fullmatch(r"-?\d+\.\d+", cell) for cell in cells)


def _guess_separator(lines: list[str]) -> str | None:
    """The one that most often splits every row into as many columns as the first."""
    best: tuple[int, str] | None = None
    unquoted = _without_quoted(lines)
    for separator in SEPARATORS:
        rows = unquoted if separator in (",", ";") else lines
        counts = {row.count(separator) for row in rows if row}
        least = min(counts, default=0)
        if least + 1 >= MIN_COLUMNS and (best is None or least > best[0]):
            best = least, separator
    return None if best is None else best[1]


def _without_quoted(lines: list[str]) -> list[str]:
    """The rows without what stands in quotes, which may go on over several lines.

    7;"clear, and        7;;9
    simple";9
    """
    text, quote, _ = re.sub(r'"[^"]*"', "", "\n".join(lines)).partition('"')
    rows = text.split("\n")
    return rows[:-1] if quote else rows  # the last one ends within quotes


def _names_of(pieces: list[pa.Table]) -> frozenset[str]:
    names = set[str]()
    for piece in pieces:
        names |= set(piece.column_names)
    return frozenset(names)


def _first_rows(files: list[str], form: FileFormat) -> tuple[dict[str, list[pa.Table]], bool]:
    """The first rows of some files, the first and the last among them, and True if they are all
    there are.
    """
    chosen = _spread_over(files, MOST_FILES)
    most = SAMPLE_ROWS // len(chosen)

    found: dict[str, list[pa.Table]] = {}
    is_whole = len(chosen) == len(files)
    for file in chosen:
        found[file], all_of_it = _some_rows(file, form, most)
        is_whole &= all_of_it
    return found, is_whole


def _spread_over(values: Sequence[Value], most: int) -> list[Value]:
    """At most so many of the values, the first and the last among them.

    values   a b c d e     most = 3
    chosen   a   c   e
    """
    places = np.unique(np.linspace(0, len(values) - 1, most).astype(int))
    return [values[place] for place in places]


def _some_rows(file: str, form: FileFormat, most: int) -> tuple[list[pa.Table], bool]:
    """At most so many rows of a file, from its beginning to its end, and True if these are all."""
    kind = text_kind(file, form)
    excerpt = None if kind is None else _excerpt(file, form, most)
    if excerpt is not None:
        with tempfile.TemporaryDirectory() as folder:
            short = Path(folder) / Path(file).name
            short.write_bytes(excerpt)
            try:
                pieces, _ = _some_rows(str(short), replace(form, kind=kind), most)
                return pieces, False
            except UserError:  # a place within a quoted value: the beginning is enough to go by
                pass

    pieces = []
    with open_rows(file, form, ids=_possible_ids(file, form), count=False) as rows:
        groups = list(range(len(rows.group_rows())))
        chosen = _spread_over(groups, MOST_PLACES)
        is_whole = len(chosen) == len(groups)
        of_group = max(1, most // max(len(chosen), 1))

        for group in chosen:
            count = 0
            # a row more than is taken tells that the group goes on
            for block in rows.blocks(of_group + 1, [group]):
                block = _without_names(block)
                pieces.append(_typed(block, rows.schema).slice(0, of_group - count))
                count += block.num_rows
                if count > of_group:
                    is_whole = False
                    break
    return pieces, is_whole


def _excerpt(file: str, form: FileFormat, most: int) -> bytes | None:
    """About so many lines from some places of a large text file, its line of names first; None
    where it is small, packed, or has no lines of single bytes.
    """
    filesystem, inner, _ = locate(file)
    size = filesystem.get_file_info(inner).size
    packed = inner.lower().endswith(PACKED_ENDINGS)
    if packed or size < 2 * MOST_PLACES * PLACE_BYTES or form.encoding not in ("utf8", "latin-1"):
        return None

    most_lines = most // MOST_PLACES  # of a place
    places = np.linspace(0, size - PLACE_BYTES, MOST_PLACES).astype(int)
    with filesystem.open_input_file(inner) as stream:
        whole = stream.read(PLACE_BYTES).split(b"\n")[:-1]
        lines = whole[:most_lines]
        for place in places[1:].tolist():
            stream.seek(place)
            # the first and the last are parts of lines
            whole = stream.read(PLACE_BYTES).split(b"\n")[1:-1]
            lines += whole[:most_lines]
    return b"\n".join(lines) + b"\n"


def _without_names(block: pa.Table) -> pa.Table:
    """The block without lines of names that come again, as where exports were joined."""
    is_names = np.ones(block.num_rows, bool)
    compared = False
    for name in block.column_names:
        if is_text(block.schema.field(name).type):
            equal = pc.equal(block[name], name).fill_null(False)
            is_names &= equal.to_numpy()
            compared = True
    return block.filter(pa.array(~is_names)) if compared and is_names.any() else block


def _joined(pieces: list[pa.Table]) -> pa.Table:
    """One table, empty of no pieces. A column that is text in some files and something else in
    others is text.

    true, false | 1, 0     1, 0, 1, 0
    7 | "A7"               "7", "A7"
    """
    kinds: dict[str, list[pa.DataType]] = {}
    for piece in pieces:
        for field in piece.schema:
            kinds.setdefault(field.name, []).append(field.type)

    aligned = list(pieces) or [pa.table({})]
    for name, found in kinds.items():
        alone = [pa.schema({name: kind}) for kind in found]
        try:
            pa.unify_schemas(alone, promote_options="permissive")
        except (pa.ArrowInvalid, pa.ArrowTypeError):
            common = pa.int64() if all(map(_is_count, found)) else pa.string()
            aligned = [_with_type(piece, name, common) for piece in aligned]
    return pa.concat_tables(aligned, promote_options="permissive")


def _numbers_beside_text(pieces: list[pa.Table]) -> frozenset[str]:
    """The columns that are text in some of the files and numbers in others."""
    texts, numbers = set[str](), set[str]()
    for piece in pieces:
        for field in piece.schema:
            if is_text(field.type):
                texts.add(field.name)
            elif is_number(field.type):
                numbers.add(field.name)
    return frozenset(texts & numbers)


def _is_count(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_boolean(kind)


def _with_type(piece: pa.Table, name: str, kind: pa.DataType) -> pa.Table:
    place = piece.schema.get_field_index(name)
    if place < 0:
        return piece
    values = plain_values(piece[name])
    if pa.types.is_nested(values.type):
        return piece.remove_column(place)  # beside a file where it is no object or list
    return piece.set_column(place, name, values.cast(kind))


def _possible_ids(file: str, form: FileFormat) -> list[str]:
    """The columns that may hold ids: of CSV not those of numbers with decimals. In JSON any number
    may be whole.
    """
    with open_rows(file, form) as rows:
        if text_kind(file, form) == "json":
            return rows.schema.names
        fields = [field for field in rows.schema if not pa.types.is_floating(field.type)]
    return [field.name for field in fields]


def _typed(block: pa.Table, schema: pa.Schema) -> pa.Table:
    """Text with the types that the file's first block shows, where all values have them."""
    for place, field in enumerate(schema):
        try:
            block = block.set_column(place, field.name, block[field.name].cast(field.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    return block
