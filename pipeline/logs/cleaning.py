"""Rows of a source's table as checked LOG rows: names, types and ranges, and a digest of each whole
row.

A row that breaks a rule keeps what can be said of it, gets a `reason` and travels on to the
quarantine; nothing is dropped here. A file that lacks a column or has it in another type is a
`UserError` before any row is read.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa

from pipeline.config import ColumnReading, FileFormat, UserError
from pipeline.logs.arrow_errors import reading_column
from pipeline.logs.columns import (
    as_number,
    is_number,
    is_text,
    plain_values,
    read_column,
    without_views,
)
from pipeline.logs.ids import code_ids, id_kind, is_text_id
from pipeline.logs.times import needs_zone
from pipeline.schema import LOG_KEYS, LOG_REQUIRED, ROW_DIGEST, TEXT_IDS, Column, EventColumns

USER_BUCKET, REASON, SOURCE_ROW = "user_bucket", "reason", "source_row"
SOURCE_FILE = "source_file"
EXTRA_FIELDS = (
    pa.field(USER_BUCKET, pa.int32()),
    pa.field(REASON, pa.string()),  # null: the row is good
    pa.field(SOURCE_ROW, pa.string()),  # of a row with a reason: the source's row, as JSON
    pa.field(SOURCE_FILE, pa.int64()),  # where it came from: the first bits of the file's digest
)
# in the metadata of a file's schema: its columns have LOG's own names and types, as ours do
LOG_FORM = b"log_form"
ROWS_AT_ONCE = 10_000  # bad rows that are Python objects at a time
NULL_BITS = np.uint64(0x9E3779B97F4A7C15)
SEPARATORS = (";", "|", "\t")  # of CSV, beside the comma


@dataclass(frozen=True)
class LogRules:
    """What the builder demands of a row, and where it finds it."""

    columns: dict[str, str]  # LOG column -> name in the files
    events: EventColumns
    earliest_ms: int
    latest_ms: int
    num_buckets: int
    # LOG column -> how it is read, of those of which more than a name is said
    readings: Mapping[str, ColumnReading] = field(default_factory=dict)
    format: FileFormat = field(default_factory=FileFormat)

    @property
    def id_columns(self) -> list[str]:
        """The columns of ids in the files."""
        return [self.columns[name] for name in ("user_id", "item_id", "request_id")]

    @property
    def number_ids(self) -> list[str]:
        """Those of them that hold numbers."""
        names = [name for name in TEXT_IDS if name not in self.events.text_ids]
        return [self.columns[name] for name in names]

    @property
    def text_columns(self) -> list[str]:
        """Those of them that hold text."""
        return [self.columns[name] for name in self.events.text_ids]

    @property
    def named_columns(self) -> list[str]:
        """The columns of the files that LOG is read from."""
        named = [theirs for theirs in self.columns.values() if theirs]
        return list(dict.fromkeys([*named, *self.clock_columns]))

    @property
    def clock_columns(self) -> list[str]:
        """The column of the time of day, where it is apart from the date."""
        reading = self.readings.get("event_time")
        return [] if reading is None or reading.clock is None else [reading.clock]

    @property
    def actions(self) -> tuple[str, ...]:
        return self.events.actions

    @property
    def schema(self) -> pa.Schema:
        """LOG with every optional column, nullable, and the bucket, the reason and the source's
        row.
        """
        fields = [field.with_nullable(True) for field in self.events.log_schema()]
        return pa.schema([*fields, *EXTRA_FIELDS])


def has_log_form(schema: pa.Schema) -> bool:
    """True for a file that we wrote with LOG's own names and types."""
    return LOG_FORM in (schema.metadata or {})


def log_form(events: EventColumns) -> pa.Schema:
    """The schema of such a file; ids that are text are text in it."""
    fields = []
    for column in events.log_columns:
        is_text = column.name in events.text_ids
        fields.append(pa.field(column.name, pa.string() if is_text else column.dtype))
    return pa.schema(fields, metadata={LOG_FORM: b"1"})


def rules_of_file(schema: pa.Schema, rules: LogRules) -> LogRules:
    """The rules for a file of this schema, whose columns may be LOG's own."""
    if not has_log_form(schema):
        return rules
    return replace(rules, columns={name: name for name in rules.columns}, readings={})


def check_columns(schema: pa.Schema, rules: LogRules, file: str) -> None:
    """The file has the keys, and whatever it has is of a type that can be read as LOG's.

    Raises:
        UserError: naming the column, what was configured and what was found.
    """
    rules = rules_of_file(schema, rules)
    doubled = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if doubled:
        raise UserError(
            f"{file}: several columns are called {doubled[0]!r}; give each its own name"
            f"{_advise_form(schema)}"
        )
    for name in LOG_REQUIRED:
        if rules.columns[name] not in schema.names:
            raise UserError(f"{file}: {_lacks(name, rules, schema)}")
    for clock in rules.clock_columns:
        _check_clock(schema, rules.readings["event_time"], clock, file)

    by_name = {column.name: column for column in rules.events.log_columns}
    for name, theirs in rules.columns.items():
        if theirs not in schema.names:
            continue

        found = plain_type(schema.field(theirs).type)
        wanted = _refused_type(by_name.get(name), theirs, found, rules.readings.get(name))
        if wanted is not None:
            where = f"{theirs!r} (source.columns.{name})" if theirs != name else repr(name)
            raise UserError(f"{file}: column {where} must be {wanted}, found {found}")


def _check_clock(schema: pa.Schema, reading: ColumnReading, clock: str, file: str) -> None:
    """Raises UserError where the time of day is not there, or of no type that can be joined."""
    key = f"source.columns.event_time.clock: {clock}"
    if clock not in schema.names:
        raise UserError(f"{file}: no column {clock!r} ({key}); found {schema.names}")

    found = plain_type(schema.field(clock).type)
    if is_number(found) and reading.format is None:
        raise UserError(
            f"{file}: column {clock!r} ({key}) holds numbers: set source.columns.event_time.format "
            f"to the form of date and time together, such as '%Y%m%d %H%M'"
        )
    if not (is_text(found) or is_number(found) or pa.types.is_time(found)):
        raise UserError(f"{file}: column {clock!r} ({key}) must be a time of day, found {found}")
    date = plain_type(schema.field(reading.column).type)
    if pa.types.is_timestamp(date) and date.tz is not None:
        raise UserError(
            f"{file}: column {reading.column!r} beside {key} must be a date, found {date}"
        )


def check_presence(schemas: Mapping[str, pa.Schema], rules: LogRules) -> dict[str, int]:
    """How many of the files lack a column that others have, by LOG column: it is unknown there.

    Raises:
        UserError: no file at all has a column that the configuration names.
    """
    missing = {}
    for name, theirs in rules.columns.items():
        named = name in rules.events.required or theirs not in (name, "")
        if not named:
            continue

        lacking = []
        for file, schema in schemas.items():
            if rules_of_file(schema, rules).columns[name] not in schema.names:
                lacking.append(file)

        if len(lacking) == len(schemas):
            first = lacking[0]
            raise UserError(f"{first}: {_lacks(name, rules, schemas[first])}")
        if lacking:
            missing[name] = len(lacking)
    return missing


def find_text_ids(schemas: Mapping[str, pa.Schema], rules: LogRules) -> tuple[str, ...]:
    """The ids of TEXT_IDS that are text in these files, or called text in the configuration.

    Raises:
        UserError: one is text in a file and a number in another.
    """
    found = []
    for name in TEXT_IDS:
        types = {}
        for file, schema in schemas.items():
            theirs = rules_of_file(schema, rules).columns[name]
            if theirs in schema.names:
                types[file] = schema.field(theirs).type

        called_text = name in rules.readings and rules.readings[name].text
        if called_text or is_text_id(name, types, rules.columns[name]):
            found.append(name)
    return tuple(found)


def _lacks(name: str, rules: LogRules, schema: pa.Schema) -> str:
    theirs = rules.columns[name]
    found = f"found {schema.names}{_advise_form(schema)}{_advise_flatten(theirs, schema)}"
    if theirs == name:
        return f"no column {theirs!r} for {name}; {found}"
    if name in rules.events.required:
        return f"no column {theirs!r} for {name} (source.columns.{name}: {theirs}); {found}"
    return f"no column {theirs!r}, configured as source.columns.{name}; {found}"


def _advise_form(schema: pa.Schema) -> str:
    """What to set where the names look like those of CSV that was read in another form than its
    own.

    uid;video         one column, with another separator in its name
    7, 31, 2026       numbers in the place of names: the file has no header
    """
    first = schema.names[0] if schema.names else ""
    separators = [sign for sign in SEPARATORS if sign in first]
    if len(schema.names) == 1 and separators:
        sign = separators[0]
        return f": of columns separated by {sign!r} set source.format.separator={sign!r}"
    if any(name.replace(".", "", 1).isdigit() for name in schema.names):
        return ": of files without a header set source.format.names, the names of their columns"
    return ""


def _advise_flatten(theirs: str, schema: pa.Schema) -> str:
    """What to set where the name is that of a field within an object."""
    outer = theirs.partition(".")[0]
    if outer == theirs or outer not in schema.names:
        return ""
    if not pa.types.is_struct(schema.field(outer).type):
        return ""
    return f": {outer!r} holds objects, whose fields source.format.flatten=true makes columns"


def plain_type(found: pa.DataType) -> pa.DataType:
    """The type of the values, without a dictionary or an extension around them."""
    if isinstance(found, pa.BaseExtensionType):
        found = found.storage_type
    return found.value_type if pa.types.is_dictionary(found) else found


def _refused_type(
    column: Column | None, theirs: str, found: pa.DataType, reading: ColumnReading | None
) -> str | None:
    """The types that the column, called `theirs`, may have, None where `found` is one; of no
    column: the digest.
    """
    if column is None:
        return None if pa.types.is_integer(found) else "an integer"
    if pa.types.is_null(found):
        return None if column.role != "key" else f"{column.name}, not a column of nulls"
    if column.name in TEXT_IDS:
        return None if id_kind(found) is not None else "whole numbers or text"
    if column.name == "event_time":
        return _refused_time(found, reading)

    if column.role == "action":
        return _refused_action(column.name, theirs, found, reading)
    if pa.types.is_boolean(column.dtype):
        return None if pa.types.is_boolean(found) else "boolean"
    if column.role == "request":
        return _refused_request(column.name, theirs, found, reading)

    decimal = "a number; of text such as 15,99 set source.format.decimal=','"
    return None if is_number(found) or _is_partly_text(found, reading) else decimal


def _is_partly_text(found: pa.DataType, reading: ColumnReading | None) -> bool:
    """True where values that mean unknown may stand among numbers as text."""
    return is_text(found) and reading is not None and bool(reading.unknown)


def _refused_request(
    name: str, theirs: str, found: pa.DataType, reading: ColumnReading | None
) -> str | None:
    """`_refused_type` of a request column."""
    is_value = is_number(found) or pa.types.is_boolean(found)
    if reading is not None and reading.text:
        return None if is_value or is_text(found) else "text, a number or a boolean"

    options = f"{{column: {theirs}, text: true}}"
    rule = f"an integer; of text set source.columns.{name}={options}"
    return None if is_value or _is_partly_text(found, reading) else rule


def _refused_time(found: pa.DataType, reading: ColumnReading | None) -> str | None:
    """`_refused_type` of event_time."""
    name = "event_time" if reading is None else reading.column
    if needs_zone(found):
        known = reading is not None and reading.zone is not None
        option = f"source.columns.event_time={{column: {name}, zone: UTC}}"
        rule = f"a time with a zone: set {option}, or the zone that it was written in"
        return None if known else rule
    fine = is_number(found) or is_text(found) or pa.types.is_timestamp(found)
    return None if fine else "a number, a timestamp, a date or text"


def _refused_action(
    name: str, theirs: str, found: pa.DataType, reading: ColumnReading | None
) -> str | None:
    """`_refused_type` of an action, by its rule."""
    number, text, flag = is_number(found), is_text(found), pa.types.is_boolean(found)
    if reading is None or not reading.has_rule:
        rule = "an integer, boolean or float of 0 and 1"
        if text:
            rule += ", or have a rule, the value that means yes: "
            rule += f"source.actions={{{name}: {{column: {theirs}, equals: VALUE}}}}"
        return None if number or flag else rule

    if reading.present:
        return None
    if reading.equals:
        words = [value for value in reading.equals if as_number(value) is None]
        if number and words:
            return f"text, to equal {words[0]!r}"
        return None if number or text or flag else "a number, text or boolean"
    return None if number or text else "a number, to be held against at_least and at_most"


def normalise(
    block: pa.Table,
    rules: LogRules,
    source_file: int = 0,
    pairs: dict[str, list[pa.RecordBatch]] | None = None,
) -> pa.Table:
    """A block of one source file's rows, in any order, as `rules.schema`.

    `pairs`, by LOG column, takes the codes and ids of the block where ids are text.
    """
    rules = rules_of_file(block.schema, rules)
    block = without_views(block)
    ids = code_ids(block, rules.columns, rules.readings, rules.events.text_ids)
    if pairs is not None:
        for name, found in ids.pairs.items():
            pairs.setdefault(name, []).append(found)

    columns: dict[str, pa.Array] = {}
    unreadable: dict[str, np.ndarray] = {}
    for column in rules.events.log_columns:
        name = column.name
        if name in ids.codes:
            columns[name], unreadable[name] = ids.codes[name], ids.unreadable[name]
            continue
        with reading_column(rules.columns[name]):
            read = read_column(block, column, rules.readings.get(name, rules.columns[name]))
        columns[name] = read.values
        if read.unreadable is not None:
            unreadable[name] = read.unreadable

    theirs = rules.columns[ROW_DIGEST]
    if theirs in block.column_names:
        digest = block[theirs].fill_null(0).to_numpy().astype(np.uint64)
    else:
        digest = row_digest(ids.rows)

    bad, reasons, columns = _check_values(columns, unreadable, rules)

    # bad rows as they came, for the quarantine
    source_rows: list[str] = []
    for some in np.array_split(bad, len(bad) // ROWS_AT_ONCE + 1):
        rows = block.take(pa.array(some)).to_pylist()
        source_rows += [json.dumps(row, default=str, sort_keys=True) for row in rows]

    user = columns["user_id"]
    bucket = user_bucket(user.fill_null(0).to_numpy(), rules.num_buckets)
    # a bad row may have no user
    bucket[bad] = (digest[bad] % np.uint64(rules.num_buckets)).astype(np.int32)

    columns |= {
        ROW_DIGEST: pa.array(digest),
        USER_BUCKET: pa.array(bucket),
        REASON: _texts_at(bad, reasons, block.num_rows),
        SOURCE_ROW: _texts_at(bad, source_rows, block.num_rows),
        SOURCE_FILE: pa.array(np.full(block.num_rows, source_file)),
    }
    return pa.table([columns[name] for name in rules.schema.names], schema=rules.schema)


def _texts_at(rows: np.ndarray, texts: Sequence[str], num_rows: int) -> pa.Array:
    """string [num_rows]: the texts in these rows, null in all others."""
    if len(rows) == 0:
        return pa.nulls(num_rows, pa.string())
    found = np.full(num_rows, None, object)
    found[rows] = texts
    return pa.array(found, pa.string())


def _check_values(
    columns: dict[str, pa.Array], unreadable: Mapping[str, np.ndarray], rules: LogRules
) -> tuple[np.ndarray, list[str], dict[str, pa.Array]]:
    """The rows that break a rule, the first rule that each of them breaks, and the columns in LOG's
    types.

        user_id   7  null  7  -1        bad      1 2 3
        click     1   1    2   2        reasons  null_user_id, click_not_0_1, negative_user_id
    """
    reasons = ["none"]
    code = np.zeros(len(columns["user_id"]), np.int16)  # of each row, an index into them
    broken_values: dict[str, np.ndarray] = {}

    def demand(name: str, broken: np.ndarray, why: str) -> None:
        if broken.any():
            code[broken & (code == 0)] = len(reasons)
            reasons.append(why)
            broken_values[name] = broken

    # what is read at all, and there
    value = {name: _filled_with_0(column) for name, column in columns.items()}
    for name, broken in unreadable.items():
        demand(name, broken, f"{name}_unreadable")
    for name in LOG_REQUIRED:
        if columns[name].null_count:
            demand(name, columns[name].is_null().to_numpy(zero_copy_only=False), f"null_{name}")

    # in its range
    ids = [column for column in LOG_KEYS if column.at_least is not None]
    for column in (*ids, *rules.events.outcomes):
        if column.is_float:
            demand(column.name, np.isinf(value[column.name]), f"{column.name}_infinite")
        if column.at_least is not None:
            too_small = _where_known(columns[column.name], value[column.name] < column.at_least)
            demand(column.name, too_small, _below(column))

    time = value["event_time"]
    too_early = _where_known(columns["event_time"], time < rules.earliest_ms)
    demand("event_time", too_early, "event_time_before_range")
    demand("event_time", time > rules.latest_ms, "event_time_in_future")

    for name in rules.actions:
        demand(name, (value[name] != 0) & (value[name] != 1), f"{name}_not_0_1")

    tops = {column.name: column.at_most for column in rules.events.request_columns}
    tops["known_mask"] = (1 << len(rules.actions)) - 1
    for name, top in tops.items():
        demand(name, (value[name] < 0) | (value[name] > top), f"{name}_out_of_range")

    types = {column.name: column.dtype for column in rules.events.log_columns}
    typed = {}
    for name, column in columns.items():
        typed[name] = _typed(column, value[name], broken_values.get(name), types[name])

    bad = np.flatnonzero(code)
    return bad, [reasons[number] for number in code[bad]], typed


def _where_known(column: pa.Array, found: np.ndarray) -> np.ndarray:
    """bool [rows]: `found`, and the row has a value."""
    if column.null_count == 0:
        return found
    return found & column.is_valid().to_numpy(zero_copy_only=False)


def _filled_with_0(column: pa.Array) -> np.ndarray:
    """The column's values, 0 in the place of null."""
    if column.null_count == 0:
        return column.to_numpy(zero_copy_only=False)
    zero = pa.scalar(0).cast(column.type)
    return column.fill_null(zero).to_numpy(zero_copy_only=False)


def _below(column: Column) -> str:
    """The reason of a row whose value is below the column's bound."""
    if column.at_least == 0:
        return f"negative_{column.name}"
    return f"{column.name}_below_{column.at_least:g}"


def _typed(
    column: pa.Array, value: np.ndarray, broken: np.ndarray | None, dtype: pa.DataType
) -> pa.Array:
    """The column in LOG's type; a value that broke its rule and might not fit is null."""
    if broken is None or dtype in (pa.int64(), pa.float64()):
        return column.cast(dtype)

    absent = column.is_null().to_numpy(zero_copy_only=False) | broken
    return pa.array(np.where(absent, 0, value), mask=absent).cast(dtype)


def unit_hint(reason: str, event_times: Sequence[int], rules: LogRules) -> str:
    """What the times of quarantined rows look like, where another unit would put them all in range;
    else "".
    """
    units = {
        "event_time_before_range": {"seconds": 1e3},
        "event_time_in_future": {"microseconds": 1e-3, "nanoseconds": 1e-6},
    }
    if not event_times:
        return ""
    for unit, factor in units.get(reason, {}).items():
        earliest, latest = min(event_times) * factor, max(event_times) * factor
        if rules.earliest_ms <= earliest and latest <= rules.latest_ms:
            return f"event_time looks like {unit}, it must be in milliseconds since 1970, UTC"
    return ""


def user_bucket(user_id: np.ndarray, num_buckets: int) -> np.ndarray:
    """Bucket of each user: splitmix64's last steps, the same on every machine and for good."""
    return (mix(user_id.astype(np.uint64)) % np.uint64(num_buckets)).astype(np.int32)


def row_digest(table: pa.Table) -> np.ndarray:
    """uint64 per row over all columns by name: equal rows agree, whatever the order of the columns
    or the files.

        user  item  digest
        3     7     a
        7     3     b
        3     7     a
    """
    digest = np.zeros(table.num_rows, np.uint64)
    for name in sorted(table.column_names):
        with reading_column(name):
            bits = _bits(plain_values(table[name]))
            of_column = mix(bits + _hash(name))
            digest = mix(digest ^ of_column)
    return digest


def _bits(column: pa.Array) -> np.ndarray:
    """uint64 per value that equal values share, whatever the width of their type."""
    kind = column.type
    if pa.types.is_null(kind):
        return np.full(len(column), NULL_BITS)
    if pa.types.is_dictionary(kind):
        return _bits(column.cast(kind.value_type))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        bits = _list_bits(column)
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        wide = pa.uint64() if kind == pa.uint64() else pa.int64()
        bits = column.cast(wide).fill_null(0).to_numpy().view(np.uint64)
    elif pa.types.is_floating(kind):
        bits = column.cast(pa.float64()).fill_null(0).to_numpy().view(np.uint64)
    elif pa.types.is_temporal(kind):
        width = pa.int32() if kind.bit_width == 32 else pa.int64()
        bits = column.cast(width).cast(pa.int64()).fill_null(0).to_numpy().view(np.uint64)
    elif pa.types.is_nested(kind):
        bits = np.array([_hash(repr(value)) for value in column.to_pylist()], np.uint64)
    else:  # strings, bytes, decimals: each distinct value once
        coded = column.dictionary_encode()
        hashes = [_hash(repr(value)) for value in coded.dictionary.to_pylist()]
        values = np.array(hashes or [0], np.uint64)  # of nulls alone there is none
        bits = values[coded.indices.fill_null(0).to_numpy()]

    if column.null_count == 0:
        return bits
    valid = column.is_valid().to_numpy(zero_copy_only=False)
    return np.where(valid, bits, NULL_BITS)


def _list_bits(column: pa.Array) -> np.ndarray:
    """uint64 per list, from its values, their places and how many they are.

    lists    [7 8] [] [8 7]
    begins    0    2   2         ends  2 2 4
    owner     0 0      2 2
    place     0 1      0 1       so that [7 8] and [8 7] differ
    """
    lengths = column.value_lengths().fill_null(0).to_numpy().astype(np.int64)
    ends = np.cumsum(lengths)
    begins = ends - lengths
    owner = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(owner)) - begins[owner]
    values = mix(_bits(column.flatten()) + mix(place.astype(np.uint64)))

    # sums wrap around, and so do their differences
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(values, dtype=np.uint64)])
    of_list = sums[ends] - sums[begins]
    return mix(of_list + lengths.astype(np.uint64))


def mix(h: np.ndarray) -> np.ndarray:
    """splitmix64's last steps: uint64 to uint64, one to one."""
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        h = h ^ (h >> np.uint64(shift))
        h *= np.uint64(factor)
    return h ^ (h >> np.uint64(31))


def _hash(text: str) -> np.uint64:
    """The first 64 bits of the text's BLAKE2b, the same in every process."""
    return np.frombuffer(hashlib.blake2b(text.encode(), digest_size=8).digest(), np.uint64)[0]
