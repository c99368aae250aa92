"""Where the logs come from: the user's own files, a public dataset, or a generator."""

import codecs
import dataclasses
import hashlib
import json
import math
import re
import zoneinfo
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from pipeline.config.errors import ConfigError, refuse_secrets, require
from pipeline.config.reading import GCS, S3, parse_time, split_s3
from pipeline.config.setting import describe, setting
from pipeline.config.synthetic import SyntheticConfig
from pipeline.schema import MAX_ACTIONS, RESERVED, TEXT_IDS, WATCH_MS, EventColumns, outcome_column

Unit = Literal["ns", "us", "ms", "s", "min", "h", "d"]  # of time


@dataclass(frozen=True, kw_only=True, slots=True)
class Impressions:
    """Lists of exposures in one row of a log, each of which becomes a row of its own: text such as
    "N1-0 N2-1", lists of structs, or several lists that go together.
    """

    columns: tuple[str, ...] = field(
        metadata=describe("Columns of the lists, of one length in each row.")
    )
    separator: str = setting(" ", doc="Text between two exposures, where they are text.")
    names: tuple[str, ...] = setting(
        (),
        doc="Names for the parts of an exposure that is text: [item_id, clicked] of N1-0. Structs "
        "have the names of their fields; empty: the exposure is one value under the column's name.",
    )
    part_separator: str = setting("-", doc="Text between two parts; the last ones count.")

    def __post_init__(self) -> None:
        key = "source.format.impressions"
        require(len(self.columns) > 0, f"{key}.columns", list(self.columns), "at least one column")
        for name in ("separator", "part_separator"):
            require(getattr(self, name) != "", f"{key}.{name}", "", "a text")
        for name in ("columns", "names"):
            values = getattr(self, name)
            require(len(set(values)) == len(values), f"{key}.{name}", values, "free of repeats")
        one = len(self.columns) == 1 or not self.names
        require(one, f"{key}.names", list(self.names), "empty where there are several columns")


@dataclass(frozen=True, kw_only=True, slots=True)
class FileFormat:
    """What files are that are no Parquet, or whose rows hold lists of exposures. Files that end in
    .csv, .tsv, .json, .jsonl or .ndjson, packed or not, need none of it where the first line of CSV
    names its columns.
    """

    kind: Literal["parquet", "csv", "json"] | None = setting(
        None,
        doc="Kind of the files; json is a JSON object a line. Null: csv where separator or names "
        "are given, else by the endings of the files.",
    )
    separator: str | None = setting(
        None,
        doc='Text between two columns of CSV, such as ";" or "::". Null: a tab in files that end '
        "in .tsv, else a comma.",
    )
    names: tuple[str, ...] = setting(
        (), doc="Names of the columns of CSV without a line of names; empty: the first line."
    )
    quote: str | None = setting(
        None,
        doc='Character around columns of CSV that hold the separator; empty: none. Null: " where '
        "the separator is a comma or a semicolon, else none.",
    )
    decimal: Literal[".", ","] = setting(
        ".", doc='Sign before the decimals of numbers in CSV: "," for 15,99 of a European export.'
    )
    encoding: str = setting("utf8", doc="Encoding of CSV, such as latin-1.")
    flatten: bool = setting(
        False,
        doc="Fields of objects (JSON) and structs (Parquet) are columns of their own: user.id is "
        "the id of user.",
    )
    impressions: Impressions | None = setting(
        None, doc="Lists of exposures in a row of the logs; null where a row is one exposure."
    )

    def __post_init__(self) -> None:
        require(self.separator != "", "source.format.separator", self.separator, "a text")
        one = self.quote is None or len(self.quote) <= 1
        require(one, "source.format.quote", self.quote, "one character, or empty")
        apart = self.decimal == "." or self.separator != self.decimal
        require(apart, "source.format.decimal", self.decimal, "another sign than the separator")
        unique = len(set(self.names)) == len(self.names)
        require(unique, "source.format.names", list(self.names), "free of repeats")
        try:
            codecs.lookup(self.encoding)
        except LookupError:
            require(False, "source.format.encoding", self.encoding, "an encoding such as latin-1")

    @property
    def text_kind(self) -> str | None:
        """csv or json where the format says so, None where it does not."""
        if self.kind in ("csv", "json"):
            return self.kind
        by_options = self.kind is None and (self.separator is not None or bool(self.names))
        return "csv" if by_options else None


@dataclass(frozen=True, kw_only=True, slots=True)
class SideTable:
    """A table of users or items: an id column and columns for `features`."""

    path: str = field(
        metadata=describe("File, folder of files, or s3://bucket/prefix, as source.path.")
    )
    id_column: str = field(
        metadata=describe("Column that holds the user_id or item_id of a row, as in the logs.")
    )
    format: FileFormat = field(default_factory=FileFormat)
    repeats: Literal["refuse", "first", "last"] = setting(
        "refuse",
        doc="Rows of one id: the first or the last of them is used, in the order of the files' "
        "paths and of their rows, or the build is refused.",
    )

    def __post_init__(self) -> None:
        require(self.id_column != "", "source.*.id_column", self.id_column, "the name of a column")


@dataclass(frozen=True, kw_only=True, slots=True)
class OutcomeColumn:
    """A number that comes with an event, such as a price paid. It is seen in the history only."""

    type: Literal["float", "int"] = setting("float", doc="Type of the numbers.")
    at_least: float | None = setting(
        0.0,
        doc="Smallest number allowed; a row with a smaller one is quarantined. Null, with floats "
        "alone: any number.",
    )

    def __post_init__(self) -> None:
        self._refuse_ints_below_0()

    def _refuse_ints_below_0(self) -> None:
        """An unknown int is stored as -1."""
        usable = self.type == "float" or (self.at_least is not None and self.at_least >= 0)
        rule = "0 or more where type is int"
        require(usable, "source.outcome_columns.*.at_least", self.at_least, rule)


@dataclass(frozen=True, kw_only=True, slots=True)
class ColumnReading:
    """How a log column is read from a column of your files, where its name alone does not say it.

    In YAML `equals` and `unknown` are one value or a list.
    """

    column: str = field(metadata=describe("Name in your files."))
    unit: Unit | None = setting(
        None,
        doc="Of event_time and watch_ms: unit of the numbers. Null: milliseconds.",
    )
    start: str | None = setting(
        None,
        doc="Of event_time: what the number 0 stands for, ISO 8601 with its UTC offset. Null: the "
        "beginning of 1970, UTC.",
    )
    zone: str | None = setting(
        None,
        doc="Of event_time: zone of dates and times that carry none, such as UTC or Europe/Berlin. "
        "Of the hour that comes twice in autumn the first one is meant.",
    )
    format: str | None = setting(
        None,
        doc='Of event_time: form of times that are text, as strptime has it: "%m/%d/%Y %I:%M:%S '
        '%p", or of dates that are numbers: "%Y%m%d". Null: ISO 8601.',
    )
    clock: str | None = setting(
        None,
        doc="Of event_time: column of the time of day, where `column` holds the date alone. The "
        "two are read as one text with a blank between them; numbers such as 905 need a format, "
        '"%Y%m%d %H%M".',
    )
    equals: tuple[str, ...] = setting((), doc="Of an action: the values that mean yes.")
    at_least: float | None = setting(None, doc="Of an action: numbers from here on mean yes.")
    at_most: float | None = setting(None, doc="Of an action: numbers up to here mean yes.")
    present: bool = setting(
        False, doc="Of an action: any value means yes; null, NaN and '' mean no."
    )
    unknown: tuple[str, ...] = setting(
        (), doc="Of an id, an action, a request column or an outcome: values that mean unknown."
    )
    text: bool = setting(
        False,
        doc="Of a request column: its values are text. The sequences hold a number of 31 bits for "
        "each, requests give the text. Of user_id, item_id or request_id: its numbers are read as "
        "the text of their digits, such as hashes of 64 bits; a column of text needs no word.",
    )

    @classmethod
    def complete_yaml(cls, raw: Any) -> Any:
        """One value of `equals` or `unknown` as a list of texts.

        {column: rating, unknown: -1}    {column: rating, unknown: ["-1"]}
        """
        if not isinstance(raw, dict):
            return raw
        lists = {}
        for key in ("equals", "unknown"):
            if key in raw:
                value = raw[key]
                values = value if isinstance(value, list | tuple) else [value]
                lists[key] = [_as_text(value) for value in values]
        return raw | lists

    @property
    def has_rule(self) -> bool:
        """True if a rule says which values mean yes."""
        bounded = self.at_least is not None or self.at_most is not None
        return bool(self.equals) or bounded or self.present

    def check(self, name: str, role: str) -> None:
        """Refuse what does not fit the log column `name`, which has this role.

        Raises:
            ConfigError: naming the option.
        """
        allowed = {"column"}
        if name == "event_time":
            allowed |= {"unit", "start", "zone", "format", "clock"}
        elif name in TEXT_IDS:
            allowed |= {"unknown", "text"}
        elif role == "action":
            allowed |= {"equals", "at_least", "at_most", "present", "unknown"}
        elif role == "request":
            allowed |= {"unknown", "text"}
        elif role == "outcome":
            allowed |= {"unknown", "unit"} if name == WATCH_MS.name else {"unknown"}

        key = f"source.columns.{name}"
        for option in self.__dataclass_fields__:
            value = getattr(self, option)
            unset = value is None or value is False or value == ()
            rule = f"left out: of {name} there are {sorted(allowed)}"
            require(unset or option in allowed, f"{key}.{option}", value, rule)

        require(bool(self.column), f"{key}.column", self.column, "the name of a column")
        for option in ("at_least", "at_most"):
            value = getattr(self, option)
            require(value is None or math.isfinite(value), f"{key}.{option}", value, "a number")
        bounded = self.at_least is not None or self.at_most is not None
        alone = bool(self.equals) + bounded + self.present <= 1
        rule = "left out beside another rule: equals, at_least and at_most, or present"
        require(alone, f"{key}.equals", list(self.equals), rule)
        self._check_times(key)

    def _check_times(self, key: str) -> None:
        if self.start is not None:
            parse_time(f"{key}.start", self.start)
        numbers = self.unit is not None or self.start is not None
        rule = "left out beside unit and start"
        require(self.clock is None or not numbers, f"{key}.clock", self.clock, rule)
        if self.zone is not None:
            require(_is_zone(self.zone), f"{key}.zone", self.zone, "a zone such as Europe/Berlin")
        if self.format is not None:
            rule = 'a form of strptime such as "%d.%m.%Y %H:%M", each part once'
            require(_is_time_form(self.format), f"{key}.format", self.format, rule)


def _as_text(value: Any) -> str:
    """A YAML scalar as the text that stands in a file: true, 1, 4.5."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _is_time_form(form: str) -> bool:
    """True for a form that reads what it writes."""
    moment = datetime(2026, 1, 5, 9, 5, tzinfo=UTC)
    try:
        datetime.strptime(moment.strftime(form), form)
    except (ValueError, re.error):  # the latter of a part that stands there twice
        return False
    return True


def _is_zone(zone: str) -> bool:
    try:
        zoneinfo.ZoneInfo(zone)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError):
        return False
    return True


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """Where the logs are and what their columns are called."""

    kind: Literal["parquet", "kuairand", "synthetic"] = setting(
        "parquet",
        doc="Kind of logs: files of your own, the public dataset KuaiRand, or generated ones.",
    )
    path: str | None = setting(
        None,
        doc="Parquet, CSV or JSON-lines file, folder of files, pattern such as logs/*.csv, or "
        "s3://bucket/prefix (docs/guide/data.md); the dataset's folder for kuairand; unused for "
        "synthetic.",
    )
    format: FileFormat = field(default_factory=FileFormat)
    columns: dict[str, str | ColumnReading] = setting(
        {},
        doc="Our name of a log column: its name in your files, for those that differ, or how it is "
        "read: {column: ts, unit: s}. An optional column whose name your files have must be named "
        "here: by its own name to be read, by '' not to be.",
    )
    actions: tuple[str, ...] = setting(
        ("is_click",),
        doc="What a user did: columns of 0 and 1, null where unknown. The order gives the bits of "
        "the action mask. Or a mapping, {bought: {column: event_type, equals: purchase}}, which is "
        "the list of its names, and of each an entry in source.columns.",
    )
    request_columns: tuple[str, ...] = setting(
        (),
        doc="Columns of small integers, booleans or text that are known when a request is made, "
        "such as a tab.",
    )
    outcome_columns: dict[str, OutcomeColumn] = setting(
        {},
        doc="Columns of numbers that come with an event, beside watch_ms: a price, a dwell time. "
        "History rows carry them, candidates do not.",
    )
    users: SideTable | None = setting(None, doc="Table of users; null where there is none.")
    items: SideTable | None = setting(None, doc="Table of items; null where there is none.")
    order_only_end_is_real: bool = setting(
        False,
        doc="The last order_only row of a user carries a real time, not just an order; true for "
        "KuaiRand.",
    )
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    @classmethod
    def complete_yaml(cls, raw: Any) -> Any:
        """Actions that are a mapping as their names, and `columns` that say how they are read.

        actions: {bought: {column: event_type, equals: purchase}}

        actions: [bought]
        columns: {bought: {column: event_type, equals: purchase}}

        Raises:
            ConfigError: `columns` speaks of such an action too, or the kind is a form of files.
        """
        if isinstance(raw, dict) and raw.get("kind") in ("csv", "tsv", "json", "jsonl"):
            raise ConfigError(
                "source.kind must be parquet for files of your own, of CSV and JSON lines too: "
                f"source.format says how they are read, got {raw['kind']!r}"
            )
        if not isinstance(raw, dict) or not isinstance(raw.get("actions"), dict):
            return raw

        columns = dict(raw.get("columns") or {})
        for name, reading in raw["actions"].items():
            if name in columns:
                raise ConfigError(f"source.columns.{name}: source.actions.{name} says it already")
            if reading is not None:
                columns[name] = reading
        return raw | {"actions": list(raw["actions"]), "columns": columns}

    def __post_init__(self) -> None:
        self._refuse_actions_that_do_not_fit_the_mask()
        self._refuse_repeated_columns()
        self._refuse_missing_path()
        self._refuse_unreadable_paths()
        self._refuse_impressions_of_side_tables()
        self._refuse_readings_of_other_columns()

    def _refuse_actions_that_do_not_fit_the_mask(self) -> None:
        require(len(self.actions) > 0, "source.actions", self.actions, "at least one action column")

        most = f"at most {MAX_ACTIONS} action columns"
        require(len(self.actions) <= MAX_ACTIONS, "source.actions", self.actions, most)

    def _refuse_repeated_columns(self) -> None:
        names = [*self.actions, *self.request_columns]
        require(
            len(set(names)) == len(names),
            "source.actions + source.request_columns",
            names,
            "free of repeats",
        )
        for name in names:
            free = name not in RESERVED
            rule = "free of names that LOG has for something else (docs/guide/data.md)"
            require(free, "source.actions + source.request_columns", name, rule)
        for name in self.outcome_columns:
            free = name not in RESERVED and name not in names
            require(free, "source.outcome_columns", name, "a name that no other column has")

    def _refuse_missing_path(self) -> None:
        if self.kind != "synthetic":
            rule = f"a path when source.kind is {self.kind}"
            require(self.path is not None, "source.path", self.path, rule)

    def _refuse_unreadable_paths(self) -> None:
        paths = {"source.path": self.path}
        if self.users is not None:
            paths["source.users.path"] = self.users.path
        if self.items is not None:
            paths["source.items.path"] = self.items.path

        for key, path in paths.items():
            require(path != "", key, path, "a path")
            if path is None or "://" not in path:
                continue
            refuse_secrets(key, path)
            rule = "a path of the file system, s3://bucket/prefix or gs://bucket/prefix"
            require(path.startswith((S3, GCS)), key, path, rule)
            if path.startswith(S3):
                split_s3(key, path)

    def _refuse_impressions_of_side_tables(self) -> None:
        for key, table in (("users", self.users), ("items", self.items)):
            given = table.format.impressions if table is not None else None
            require(given is None, f"source.{key}.format.impressions", given, "left out")

    def _refuse_readings_of_other_columns(self) -> None:
        roles = {column.name: column.role for column in self.events.log_columns}
        for name, reading in self.readings.items():
            rule = f"one of the log's columns {list(roles)}"
            require(name in roles, "source.columns", name, rule)
            reading.check(name, roles[name])

    @property
    def readings(self) -> dict[str, ColumnReading]:
        """The log columns of which more than the name is said."""
        found = {}
        for name, given in self.columns.items():
            if isinstance(given, ColumnReading):
                found[name] = given
        return found

    def column_name(self, name: str) -> str:
        """The log column's name in the files, "" where it is not to be read."""
        given = self.columns.get(name, name)
        return given.column if isinstance(given, ColumnReading) else given

    @property
    def events(self) -> EventColumns:
        """All columns of this source's events."""
        declared = []
        for name, column in self.outcome_columns.items():
            declared.append(outcome_column(name, column.type, column.at_least))
        readings = self.readings
        text_request = []
        for name in self.request_columns:
            if name in readings and readings[name].text:
                text_request.append(name)
        return EventColumns(
            self.actions, self.request_columns, tuple(declared), text_request=tuple(text_request)
        )

    @property
    def data_name(self) -> str:
        """Names where the data comes from, in letters that a registry takes: the end of its path,
        or its kind, and a digest of the whole.

            data/own_logs/log     own_logs-log-4f5a26
            generated logs        synthetic-0c9a71
        """
        if self.path is None:
            settings = dataclasses.asdict(self.synthetic)
            given = {name: value for name, value in settings.items() if value is not None}
            made_by = json.dumps(given, sort_keys=True)
            place, readable = made_by, self.kind
        else:
            place = self.path.partition("?")[0].rstrip("/")
            readable = "-".join(place.removeprefix(S3).split("/")[-2:])

        digest = hashlib.sha256(f"{self.kind} {place}".encode()).hexdigest()[:6]
        return f"{re.sub(r'[^A-Za-z0-9_.-]+', '_', readable).strip('_.-')}-{digest}"

    @property
    def items_known(self) -> bool:
        """True if there is a table of items; KuaiRand and the generator bring their own."""
        return self.items is not None or self.kind != "parquet"

    @property
    def users_known(self) -> bool:
        """True if there is a table of users; KuaiRand and the generator bring their own."""
        return self.users is not None or self.kind != "parquet"
