"""What the columns of unknown logs are likely to be, by their names and values."""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ColumnReading
from pipeline.config.logs import Unit
from pipeline.logs.columns import is_number, is_text, plain_values
from pipeline.logs.ids import id_kind
from pipeline.logs.times import (
    NUMBER,
    PLAUSIBLE_YEARS,
    guess_unit,
    join_clock,
    needs_zone,
    read_times,
)
from pipeline.schema import DAY_MS, LOG_OPTIONAL, RESERVED

USER = re.compile(
    r"^(.*_)?(user|uid|visitor|customer|client|member|reviewer|msno|person|listener|viewer|reader|"
    r"subscriber|player|account|household|shopper|buyer|patron|loyalty|card|cookie|candidate|"
    r"applicant|guest|passenger|student|learner|kunde|nutzer|benutzer|usuario|utilisateur)"
)
ITEM = re.compile(
    r"^(item|product|parent_asin|asin|video|movie|film|track|song|article|news|content|book|ad_?id|"
    r"sku|stock_?code|ean|gtin|upc|isbn|campaign|business|listing|offer|doc|episode|podcast|recipe|"
    r"artikel|produkt|produit|(job|vacancy|clip|post|story|photo|pin|game|course|hotel|property|poi|"
    r"venue|restaurant|artist|deal|coupon|stelle)(_?id)?$)"
)
# what several rows of one visit share: no item, and a user where nobody else is one
VISIT = re.compile(r"^(session|visit|search|query|impression|request|page_?view)(_?id)?$")
# what several rows of one visit to a shop share: neither a user nor an item
BASKET = re.compile(r"^(ticket|order|basket|invoice|receipt|transaction|checkout|bon|beleg)")
QUANTITY = re.compile(r"^(qty|quantity|quantite|units|pieces|menge|anzahl|stueck|cantidad)$")
TIME = re.compile(r"((?<!sen)time|^ts$|(?<!candi)date|^t_|created|_at$|zeit|datum|fecha)")
ORDER = re.compile(r"^(position|order|seq|step|rank|index)$")
EVENT = re.compile(
    r"^(event|action|behavio|feedback|interaction|outcome$|ereignis|aktion)|^(type|status)$"
)
STARS = re.compile(r"(rating|stars?$|score|overall|grade)")
SHARE = re.compile(r"(ratio|percent|pct|completion)")
WATCH = re.compile(
    r"(watch|play|dwell|listen|spent|viewed).*(ms|sec|time|length|duration)|watch_ms"
    r"|^(dwell|time_spent)|(watch|play|dwell|listen)\w*_(s|min|minutes)$"
    r"|^(ms|secs?|seconds|min|minutes|duration)_(watched|played|listened|viewed)"
)
# the unit that a name says
WATCH_UNITS: tuple[tuple[re.Pattern[str], Unit], ...] = (
    (re.compile(r"(^|_)(ms|msecs?|millis|milliseconds)(_|$)"), "ms"),
    (re.compile(r"(^|_)(s|secs?|seconds)(_|$)"), "s"),
    (re.compile(r"(^|_)(min|mins|minutes)(_|$)"), "min"),
)
PRICE = re.compile(r"(price|amount|revenue|cost|preis|prix|precio)")
WATCH_WORDS = {"ms": "milliseconds", "s": "seconds", "min": "minutes"}
REQUEST = re.compile(
    r"^(tab|surface|device|os|platform|page|channel|region|country|browser|slot|is_organic|kanal)"
)
PANDAS_INDEX = re.compile(r"^__index_level_\d+__$")
# those with AM and PM first, and the day before the month where both can be
DATES = ("%d.%m.%Y", "%d/%m/%Y", "%d-%m-%Y", "%m/%d/%Y", "%m-%d-%Y", "%Y/%m/%d", "%Y.%m.%d")
WORDY_DATES = ("%d %b %Y", "%d-%b-%Y", "%b %d, %Y", "%d %B %Y", "%B %d, %Y")
# a time of day in a column of its own
CLOCK = r"^ ?([01]?\d|2[0-3]):[0-5]\d(:\d\d(\.\d+)?)?( ?[AaPp][Mm])?$"
HALF = re.compile(r"( ?)[ap]m$", re.IGNORECASE)
CLOCK_FORM = re.compile(r",?[ T]%[HI].*$")  # that of a time of day after a date
LENGTH = re.compile(r"(duration|length|runtime|elapsed|dauer|laenge|duree)")
CLOCKS = (" %H:%M:%S", " %H:%M:%S.%f", " %H:%M", "", ", %H:%M:%S", ", %H:%M", "T%H:%M:%S")
MOST_ACTIONS, MOST_VALUES = 8, 50
SHARE_OF_STARS = 0.8  # 4 of 5, 8 of 10
LISTED = 0.5  # of a column's values, that a table of users or items has


def _formats() -> Iterator[str]:
    """Forms of times that are no ISO 8601, in the order in which they are tried."""
    for date in ("%m/%d/%Y", "%d/%m/%Y"):
        yield from (f"{date}{clock}" for clock in (" %I:%M:%S %p", " %I:%M %p"))
    for date in (*DATES, *WORDY_DATES):
        yield from (f"{date}{clock}" for clock in CLOCKS)
    yield from ("%m %d, %Y", "%d/%b/%Y:%H:%M:%S %z", "%a %b %d %H:%M:%S %z %Y", "%Y%m%d")
    yield from ("%Y%m%d%H%M%S", "%Y%m%d %H:%M:%S")


FORMATS = tuple(_formats())


@dataclass
class Guess:
    """How a log is read: as in `source`, and why."""

    columns: dict[str, Any] = field(default_factory=dict)
    actions: dict[str, Any] = field(default_factory=dict)
    request: list[str] = field(default_factory=list)
    outcomes: dict[str, dict[str, Any]] = field(default_factory=dict)  # as outcome_columns
    implicit: bool = False  # no row says that something was shown and not chosen
    roles: dict[str, str] = field(default_factory=dict)  # column of the files -> what it is
    times: pa.Array | None = None  # int64 ms of the sample
    missing: list[str] = field(default_factory=list)  # what no column was found for

    def column_of(self, ours: str) -> str:
        """Name in the files of a column of ours."""
        given = self.columns.get(ours, ours)
        return given["column"] if isinstance(given, dict) else given


def guess_columns(
    rows: pa.Table,
    request_id: str | None = None,
    as_text: Collection[str] = (),
    listed: Mapping[str, Collection[str]] | None = None,
) -> Guess:
    """The columns' meanings from some of the rows.

    Args:
        listed: ids of a side table as texts, by the column of ours that they are of.
        request_id: column that is known to tell apart what was shown together.
        as_text: columns that are text in some files and numbers in others.
    """
    values = {}
    for name in rows.column_names:
        column = plain_values(rows[name])
        if not pa.types.is_nested(column.type) and not PANDAS_INDEX.match(name):
            values[name] = column

    guess = Guess()
    if request_id is not None:
        guess.columns["request_id"] = request_id
        guess.roles[request_id] = "request"
    _guess_time(values, guess)
    _guess_ids(values, guess, as_text, listed or {})
    _guess_actions(values, guess)
    _guess_others(values, guess)
    for name in values:
        if name in (*LOG_OPTIONAL, "row_digest") and name not in guess.columns:
            guess.columns[name] = ""
    return guess


def plain_name(name: str) -> str:
    """A column's name in lower case with single underscores: userID:token as userid."""
    return re.sub(r"[^a-z0-9]+", "_", name.partition(":")[0].lower()).strip("_")


def log_name(text: str, taken: set[str]) -> str:
    """A name of ours for an action or a column that no other has."""
    name = plain_name(text) or "value"
    while name in taken or name in RESERVED:
        name += "_"
    return name


def _left(values: dict[str, pa.Array], guess: Guess) -> list[str]:
    return [name for name in values if name not in guess.roles]


# Time ------------------------------------------------------------------------


def _guess_time(values: dict[str, pa.Array], guess: Guess) -> None:
    """The column whose values are times, one with the name of a time first; an order, else."""
    found: list[tuple[bool, bool, int, str, dict[str, Any]]] = []
    for name, column in values.items():
        option = time_option(name, column)
        if option is not None:
            named = bool(TIME.search(plain_name(name)))
            is_fine = not pa.types.is_date(column.type)
            found.append((named, is_fine, -len(found), name, option))
    if not found:
        for name, column in values.items():
            counted = TIME.search(plain_name(name)) or ORDER.search(plain_name(name))
            if counted and is_number(column.type):
                order: dict[str, Any] = {"unit": "s", "start": "2020-01-01T00:00:00+00:00"}
                found.append((True, True, -len(found), name, order))
    if not found:
        guess.missing.append("event_time")
        return

    *_, name, option = max(found, key=lambda one: one[:3])
    guess.times = read_times(values[name], ColumnReading(column=name, **option))
    beside = _with_clock(name, option, guess.times, values)
    if beside is not None:
        option, guess.times = beside
        guess.roles[option["clock"]] = "time of day"

    guess.columns["event_time"] = {"column": name, **option} if option else name
    guess.roles[name] = "time" + (f", {_words(option)}" if option else "")


def _with_clock(
    name: str, option: dict[str, Any], times: pa.Array, values: dict[str, pa.Array]
) -> tuple[dict[str, Any], pa.Array] | None:
    """The option with the column of the time of day, and the times with it, where all of them are
    the beginnings of days; None where no such column can be read beside them.
    """
    known = times.drop_null().to_numpy()
    if "zone" not in option or len(known) == 0 or (known % DAY_MS).any():
        return None

    for clock in values:
        if not _is_clock(clock, values[clock]):
            continue
        for form in _joined_forms(option.get("format"), _clock_form(values[clock])):
            with_clock: dict[str, Any] = {"clock": clock, **option}
            if form is not None:
                with_clock["format"] = form
            reading = ColumnReading(column=name, **with_clock)
            joined = join_clock(values[name], values[clock], reading.format)
            found = read_times(joined, reading)
            if found.null_count - joined.null_count <= 0.01 * len(found):
                return with_clock, found
    return None


def _joined_forms(date: str | None, clock: str) -> list[str | None]:
    """Forms of a date of a form, None for ISO 8601, with a time of day; none where the date's own
    has a time that cannot be taken away.

    %d.%m.%Y, " %H:%M"       %d.%m.%Y %H:%M
    None,     " %H:%M"       None
    None,     " %I:%M %p"    %Y-%m-%d %I:%M %p, as ISO 8601 has no halves of a day
    %d/%m/%Y, " %I:%M %p"    %m/%d/%Y %I:%M %p first: who writes AM and PM writes the month first
    """
    has_halves = "%p" in clock
    if date is None:
        return ["%Y-%m-%d" + clock] if has_halves else [None]

    day = CLOCK_FORM.sub("", date)
    if "%H" in day:  # without a blank before it
        return []
    days = ["%m/%d/%Y", day] if has_halves and day == "%d/%m/%Y" else [day]
    return [day + clock for day in days]


def _is_clock(name: str, column: pa.Array) -> bool:
    """True for times of day, and no durations."""
    column, plain = column.drop_null(), plain_name(name)
    if len(column) == 0 or LENGTH.search(plain) or WATCH.search(plain):
        return False
    if not is_text(column.type):
        return pa.types.is_time(column.type)
    return pc.all(pc.match_substring_regex(column.slice(0, 1000), CLOCK)).as_py()


def _clock_form(clocks: pa.Array) -> str:
    """The form of the times of day, after a blank.

    9:05, 21:05            %H:%M
    9:05 AM, 9:05:07 PM    %I:%M:%S %p
    """
    some = [str(clock) for clock in clocks.drop_null().slice(0, 1000).to_pylist()]
    found = [HALF.search(clock) for clock in some]
    halves = [half.group(1) for half in found if half is not None]
    hour, half = ("%I", f"{halves[0]}%p") if halves else ("%H", "")

    if not any(clock.count(":") == 2 for clock in some):
        return f" {hour}:%M{half}"
    # Python writes a time's fraction where it has one
    has_fraction = any if pa.types.is_time(clocks.type) else all
    fraction = ".%f" if has_fraction("." in clock for clock in some) else ""
    return f" {hour}:%M:%S{fraction}{half}"


def _words(option: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in option.items())


def time_option(name: str, column: pa.Array) -> dict[str, Any] | None:
    """The options with which the values are times of our days; None where they are none."""
    column = column.drop_null().slice(0, 1000)
    kind = column.type
    if len(column) == 0:
        return None
    if needs_zone(kind):
        return {"zone": "UTC"}
    if pa.types.is_timestamp(kind):
        return {}
    if is_number(kind):
        number = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        number = number[np.isfinite(number) & (number > 0)]
        unit = guess_unit(number)
        if unit is None and _are_days(name, column, number):
            return {"format": "%Y%m%d", "zone": "UTC"}
        return {} if unit == "ms" else None if unit is None else {"unit": unit}
    if not is_text(kind):
        return None

    # numbers as text may be ids or counts
    trimmed = pc.utf8_trim_whitespace(column)
    if pc.all(pc.match_substring_regex(trimmed, NUMBER)).as_py():
        return time_option(name, trimmed.cast(pa.float64()))
    options: list[dict[str, Any]] = [{}, {"zone": "UTC"}]
    for form in FORMATS:
        zone = {} if "%z" in form else {"zone": "UTC"}
        options.append({"format": form, **zone})
    for option in options:
        times = read_times(column, ColumnReading(column=name, **option))
        if times.null_count <= 0.01 * len(times):
            return option
    return None


def _are_days(name: str, column: pa.Array, number: np.ndarray) -> bool:
    """True for whole numbers such as 20260105, in a column with the name of a time."""
    if not TIME.search(plain_name(name)) or not len(number):
        return False
    first, last = (year * 10_000 for year in PLAUSIBLE_YEARS)
    if number.min() < first or number.max() >= last or (number != np.floor(number)).any():
        return False
    reading = ColumnReading(column=name, format="%Y%m%d", zone="UTC")
    return read_times(column, reading).null_count == 0


# Ids -------------------------------------------------------------------------


def _guess_ids(
    values: dict[str, pa.Array],
    guess: Guess,
    as_text: Collection[str],
    listed: Mapping[str, Collection[str]],
) -> None:
    """By the ids of a side table, then by name; without either the first column with fewer values
    than rows is the user, and the one with the most values of the others the item.
    """
    patterns = {"user_id": USER, "item_id": ITEM}
    # first what a table tells, so that no guess takes its column
    for ours in sorted(patterns, key=lambda ours: ours not in listed):
        choice = _listed_column(values, guess, listed[ours], ours) if ours in listed else None
        choice = choice or _named_column(values, guess, patterns[ours])
        choice = choice or _by_values(values, guess, ours)
        if choice is None:
            guess.missing.append(ours)
            continue

        guess.roles[choice] = "user" if ours == "user_id" else "item"
        option = _id_option(values[choice])
        if choice in as_text:
            option["text"] = True
        if option.get("text"):
            guess.roles[choice] += ", its digits as text"
        if option:
            guess.columns[ours] = {"column": choice, **option}
        elif choice != ours:
            guess.columns[ours] = choice


def _listed_column(
    values: dict[str, pa.Array], guess: Guess, listed: Collection[str], ours: str
) -> str | None:
    """The column most of whose values are ids of a table; of several, as small numbers are in any
    table, one that is called so, and none that is called otherwise.
    """
    mine, other = (USER, ITEM) if ours == "user_id" else (ITEM, USER)
    found: list[tuple[bool, float, int, str]] = []
    for name in _left(values, guess):
        plain = plain_name(name)
        if not may_be_id(values[name]) or other.match(plain):
            continue
        ids = set(id_texts(values[name]))
        share = len(ids.intersection(listed)) / max(len(ids), 1)
        if share >= LISTED and len(ids) > MOST_ACTIONS:
            found.append((bool(mine.match(plain)), share, -len(found), name))
    return max(found)[-1] if found else None


def _named_column(
    values: dict[str, pa.Array], guess: Guess, pattern: re.Pattern[str]
) -> str | None:
    """The first column that is called so, one of ids before others."""
    named = []
    for name in _left(values, guess):
        field_name = name.rpartition(".")[2]  # of an object
        called = pattern.match(plain_name(name)) or pattern.match(plain_name(field_name))
        if called and may_be_id(values[name]):
            named.append(name)
    exact = [name for name in named if re.search(r"id$|asin$", plain_name(name))]
    return next(iter(exact or named), None)


def id_texts(column: pa.Array) -> list[str]:
    """The different values as text; whole numbers without decimals, as ids are."""
    if pa.types.is_floating(column.type):
        column = column.filter(pc.is_finite(column))
        if pc.all(pc.equal(pc.floor(column), column)).as_py():
            column = column.cast(pa.int64(), safe=False)
    return [str(value) for value in column.drop_null().unique().to_pylist()]


def _id_option(column: pa.Array) -> dict[str, Any]:
    """How numbers are read that are no ids of 63 bits.

    7, -1            {unknown: -1}: nobody
    7, -2^62, 2^63   {text: true}: hashes
    """
    if not is_number(column.type):
        return {}
    number = column.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    number = number[np.isfinite(number)]
    outside = number[(number < 0) | (number >= 2.0**63)]
    if not len(outside):
        return {}
    return {"unknown": -1} if set(outside.tolist()) == {-1.0} else {"text": True}


def may_be_id(column: pa.Array) -> bool:
    """True for values that ids can be: no flags, and no numbers with a fraction."""
    kind = column.type
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        number = column.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        number = number[np.isfinite(number)]
        whole = len(number) > 0 and bool((number == np.floor(number)).all())
        return whole and not _is_flag(column)
    return id_kind(kind) is not None and not _is_flag(column)


def _by_values(values: dict[str, pa.Array], guess: Guess, ours: str) -> str | None:
    """A column whose name says nothing of another meaning."""
    other = USER if ours == "item_id" else ITEM
    meanings = [other, TIME, EVENT, STARS, SHARE, WATCH, PRICE, BASKET, QUANTITY]
    found = []
    for name in _left(values, guess):
        column, plain = values[name], plain_name(name)
        if not may_be_id(column) or any(pattern.search(plain) for pattern in meanings):
            continue
        distinct, rows = pc.count_distinct(column).as_py(), len(column)
        if rows <= 2 * MOST_ACTIONS or not MOST_ACTIONS < distinct <= rows * 0.95:
            continue
        found.append((bool(VISIT.match(plain)), -distinct, name))
    if ours == "user_id":
        # a session, where nothing else can be one
        return min(found, key=lambda one: one[0])[-1] if found else None
    items = [one for one in found if not one[0]]
    return min(items)[-1] if items else None


def _is_flag(column: pa.Array) -> bool:
    """True for values of 0 and 1, true and false, with -1 or null for unknown."""
    kind = column.type
    if pa.types.is_boolean(kind):
        return True
    if not is_number(kind):
        return False
    number = column.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    distinct = set(np.unique(number[~np.isnan(number)]).tolist())
    return distinct <= {-1.0, 0.0, 1.0} and len(distinct) > 0


def _is_text_flag(column: pa.Array) -> bool:
    """True for the texts 0 and 1, as parts of a longer text are."""
    if not is_text(column.type):
        return False
    distinct = set(column.drop_null().unique().to_pylist())
    return bool(distinct) and distinct <= {"0", "1"}


# Actions ---------------------------------------------------------------------


def _guess_actions(values: dict[str, pa.Array], guess: Guess) -> None:
    """Columns of 0 and 1, an event type, stars, shares; else every row is one action."""
    taken: set[str] = set()
    for name in _left(values, guess):
        column, plain = values[name], plain_name(name)
        if EVENT.match(plain) or (name.startswith("column_") and _are_words(column)):
            _add_event_type(name, column, guess, taken)
        elif _is_text_flag(column):
            ours = log_name(name, taken)
            guess.actions[ours] = {"column": name, "equals": 1}
            guess.roles[name] = f"action {ours}"
        elif _is_flag(column) and not REQUEST.match(plain_name(name.rpartition(".")[2])):
            ours = log_name(name, taken)
            number = column.cast(pa.float64(), safe=False) if is_number(column.type) else None
            option: dict[str, Any] = {"column": name}
            if number is not None and pc.any(pc.equal(number, -1)).as_py():
                option["unknown"] = -1
            guess.actions[ours] = None if ours == name and len(option) == 1 else option
            guess.roles[name] = f"action {ours}"
        elif (STARS.search(plain) or SHARE.search(plain)) and is_number(column.type):
            top = pc.max(column).as_py()
            if top is None or top <= 0:
                continue
            share = SHARE_OF_STARS if STARS.search(plain) else 0.5
            ours = log_name("liked" if STARS.search(plain) else "long", taken)
            bound = round(float(top) * share, 2)
            guess.actions[ours] = {"column": name, "at_least": bound}
            guess.roles[name] = f"action {ours}: from {bound:g} on, of {float(top):g}"
        taken |= set(guess.actions)

    guess.implicit = all(_is_always(values, rule) for rule in guess.actions.values())
    if not guess.actions:
        _add_only_action(values, guess)


def _is_always(values: dict[str, pa.Array], rule: dict[str, Any] | None) -> bool:
    """True for an action of an event type that is the only one, as in a log of plays."""
    if rule is None or "equals" not in rule:
        return False
    return pc.count_distinct(values[rule["column"]]).as_py() == 1


def _add_only_action(values: dict[str, pa.Array], guess: Guess) -> None:
    """Every row is one action, but for quantities below 0: what came back was not bought."""
    for name in _left(values, guess):
        column = values[name]
        is_quantity = QUANTITY.match(plain_name(name)) and is_number(column.type)
        if is_quantity and pc.any(pc.less(column, 0)).as_py():
            least = 1 if pa.types.is_integer(column.type) else 1e-6
            guess.actions["bought"] = {"column": name, "at_least": least}
            guess.roles[name] = "action bought: those above 0"
            return

    # no good row is without a user
    user = guess.column_of("user_id")
    if guess.roles.get(user, "").startswith("user"):
        guess.actions["happened"] = {"column": user, "present": True}


def _are_words(column: pa.Array) -> bool:
    """True for a few different short words, as a column without a name has for its actions."""
    if not is_text(column.type) or pc.count_distinct(column).as_py() > MOST_ACTIONS:
        return False
    return bool(pc.all(pc.match_substring_regex(column, r"^[A-Za-z_ -]{1,20}$")).as_py())


def _add_event_type(name: str, column: pa.Array, guess: Guess, taken: set[str]) -> None:
    counts = column.drop_null().value_counts()
    if not 1 <= len(counts) <= MOST_VALUES:
        return
    ordered = sorted(counts.to_pylist(), key=lambda one: -one["counts"])[:MOST_ACTIONS]
    for one in ordered:
        ours = log_name(str(one["values"]), taken | set(guess.actions))
        guess.actions[ours] = {"column": name, "equals": one["values"]}
    guess.roles[name] = f"event type: {', '.join(str(one['values']) for one in ordered)}"


# The rest --------------------------------------------------------------------


def _guess_others(values: dict[str, pa.Array], guess: Guess) -> None:
    """Request columns, watch time and prices."""
    taken = set(guess.actions)
    for name in _left(values, guess):
        column, plain = values[name], plain_name(name)
        leaf = plain_name(name.rpartition(".")[2])  # of the field of an object
        if WATCH.search(plain) and is_number(column.type) and "watch_ms" not in guess.columns:
            unit = _watch_unit(leaf, column)
            guess.columns["watch_ms"] = name if unit == "ms" else {"column": name, "unit": unit}
            guess.roles[name] = f"watch time, {WATCH_WORDS[unit]}"
        elif PRICE.search(plain) and is_number(column.type):
            ours = log_name(name, taken)
            # a refund is no bad row
            has_negative = pc.any(pc.less(column, 0)).as_py()
            guess.outcomes[ours] = {"at_least": None} if has_negative else {}
            if ours != name:
                guess.columns[ours] = name
            guess.roles[name] = "outcome"
        elif REQUEST.match(leaf) and pc.count_distinct(column).as_py() <= MOST_VALUES:
            ours = log_name(name, taken)
            guess.request.append(ours)
            if is_text(column.type):
                guess.columns[ours] = {"column": name, "text": True}
            elif ours != name:
                guess.columns[ours] = name
            guess.roles[name] = "request column"


def _watch_unit(name: str, column: pa.Array) -> Unit:
    """The unit that the name says, else the one in which most values are less than a quarter of an
    hour: seconds of small numbers.
    """
    for pattern, unit in WATCH_UNITS:
        if pattern.search(name):
            return unit
    number = column.drop_null().cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    return "s" if len(number) > 0 and np.nanmedian(number) < 1000 else "ms"
