"""Times as people have them: numbers in any unit, dates, local times, text → milliseconds since
1970, UTC.
"""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

from datetime import UTC, datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ColumnReading, parse_time
from pipeline.config.logs import Unit

# milliseconds of a unit; of the small ones, how many make a millisecond
MS_PER_UNIT = {"ms": 1, "s": 1000, "min": 60_000, "h": 3_600_000, "d": 86_400_000}
UNITS_PER_MS = {"us": 1000, "ns": 1_000_000}
FAR_MS = 2**62  # in no range: what would not fit 64 bits
NUMBER = r"^[+-]?\d+(\.\d*)?([eE][+-]?\d+)?$"
OFFSET = r"(Z|z|:\d\d([.,]\d+)?[+-]\d\d(:?\d\d)?)$"  # -01 of a date is none
UTC_WORD = r" ?(UTC|GMT)$"
# of a date alone that was written as a time
MIDNIGHT = r",?[ T](00?:00(:00(\.0+)?)?|12:00(:00)? ?[aA][mM])$"
# numbers of this unit lie between these years, and no other unit's do
PLAUSIBLE_YEARS = (1975, 2100)
UNIT_WORDS = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}


def needs_zone(kind: pa.DataType) -> bool:
    """True for a type whose times say nothing of a zone."""
    return pa.types.is_date(kind) or (pa.types.is_timestamp(kind) and kind.tz is None)


def read_times(values: pa.Array, reading: ColumnReading) -> pa.Array:
    """int64 ms since 1970, UTC; null where there is no time, or none that can be read.

    Whole numbers of small units and timestamps are rounded down to the millisecond, others to the
    nearest. Text that is a number is one of `unit`; text without an offset is of `zone`, and cannot
    be read where none is given. Numbers beside a `format` are read as the text of their digits.
    """
    kind = values.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if pa.types.is_null(kind):
        return pa.nulls(len(values), pa.int64())
    if pa.types.is_timestamp(kind) and kind.tz is not None:
        return values.cast(pa.timestamp("ms", "UTC"), safe=False).cast(pa.int64())
    if needs_zone(kind):
        local = values.cast(pa.timestamp("ms"), safe=False)
        return _in_zone(local, reading.zone)
    if reading.format is not None and not is_text:
        return _from_text(_as_text(values), reading)
    if pa.types.is_integer(kind):
        return _from_integers(values, reading)
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _from_floats(values.cast(pa.float64(), safe=False), reading)
    return _from_text(values.cast(pa.large_string()), reading)


def join_clock(dates: pa.Array, clocks: pa.Array, form: str | None) -> pa.Array:
    """Dates and times of day from two columns as one text; null where either is unknown.

    2026-01-05, 9:05               2026-01-05 09:05
    2026-01-05 00:00:00, 9:05      2026-01-05 09:05
    20260105, 905                  20260105 0905, by the format "%Y%m%d %H%M"
    """
    if pa.types.is_timestamp(dates.type):
        dates = dates.cast(pa.date32(), safe=False)
    date = pc.replace_substring_regex(_as_text(dates), MIDNIGHT, "")
    return pc.binary_join_element_wise(date, _clock_text(clocks, form), pa.scalar(" ", date.type))


def _clock_text(clocks: pa.Array, form: str | None) -> pa.Array:
    """Times of day as text that `form` reads. Seconds that it has no place for stay.

    %H:%M          9:05 is 09:05      09:05:00 of a time is 09:05, 09:05:30 cannot be read
    %H:%M:%S       9:05 is 09:05:00
    %I:%M:%S %p    9:05 pm is 09:05:00 pm
    %H%M           905 is 0905
    """
    form = form or ""
    if pa.types.is_time(clocks.type) and "%f" in form:
        clocks = clocks.cast(pa.time64("us"), safe=False)  # of six digits

    clock = _as_text(clocks)
    if pa.types.is_integer(clocks.type) or pa.types.is_floating(clocks.type):
        return pc.utf8_lpad(clock, 6 if "%S" in form else 4, "0")
    if pa.types.is_time(clocks.type) and form and "%f" not in form:
        clock = pc.replace_substring_regex(clock, r"\.0+$", "")
        if "%S" not in form:
            clock = pc.replace_substring_regex(clock, r"^(\d\d:\d\d):00$", r"\1")

    clock = pc.replace_substring_regex(clock, r"^(\d):", r"0\1:")
    if "%S" in form:
        clock = pc.replace_substring_regex(clock, r"^(\d\d:\d\d)( ?[AaPp][Mm])?$", r"\1:00\2")
    return clock


def _as_text(values: pa.Array) -> pa.Array:
    """20260105.0 is 20260105."""
    if pa.types.is_floating(values.type):
        known = pc.if_else(pc.is_finite(values), values, pa.scalar(None, values.type))
        values = known.cast(pa.int64(), safe=False)
    return pc.utf8_trim_whitespace(values.cast(pa.large_string()))


def _from_integers(values: pa.Array, reading: ColumnReading) -> pa.Array:
    """unit s, start 1970:   1650000000  ->  1650000000000"""
    absent = values.is_null().to_numpy(zero_copy_only=False)
    number = values.cast(pa.int64(), safe=False).fill_null(0).to_numpy()
    unit = reading.unit or "ms"

    if unit in UNITS_PER_MS:
        time = number // UNITS_PER_MS[unit]
    else:
        factor = MS_PER_UNIT[unit]
        most = FAR_MS // factor
        time = np.clip(number, -most, most) * factor
    if reading.start is not None:
        time = np.clip(time, -FAR_MS, FAR_MS) + _start_ms(reading)
    return pa.array(time, pa.int64(), mask=absent)


def _from_floats(values: pa.Array, reading: ColumnReading) -> pa.Array:
    """NaN is null; infinity is out of every range."""
    number = values.to_numpy(zero_copy_only=False)
    unit = reading.unit or "ms"
    if unit in UNITS_PER_MS:
        number = number / UNITS_PER_MS[unit]
    else:
        number = number * MS_PER_UNIT[unit]

    absent = np.isnan(number)
    inside = np.clip(np.where(absent, 0, number), -FAR_MS, FAR_MS)
    time = np.rint(inside).astype(np.int64)
    if reading.start is not None:
        time = time + _start_ms(reading)
    return pa.array(time, pa.int64(), mask=absent)


def _start_ms(reading: ColumnReading) -> int:
    assert reading.start is not None
    return parse_time("source.columns.event_time.start", reading.start)


def _from_text(values: pa.Array, reading: ColumnReading) -> pa.Array:
    """Numbers, and dates and times by `format` or ISO 8601.

    zone Europe/Berlin
    1650000000000               as it is
    2022-04-15T05:20:00Z        1650000000000
    2022-04-15 05:20:00 UTC     1650000000000
    2022-04-15 07:20:00         1650000000000
    yesterday                   null
    """
    values = pc.utf8_trim_whitespace(values)
    time = np.zeros(len(values), np.int64)
    known = np.zeros(len(values), bool)
    left = values.is_valid().to_numpy(zero_copy_only=False)

    if reading.format is None:
        number = left & _matches(values, NUMBER)
        as_numbers = values.filter(pa.array(number)).cast(pa.float64())
        found = _from_floats(as_numbers, reading)
        time[number] = found.fill_null(0).to_numpy()
        known[number] = found.is_valid().to_numpy(zero_copy_only=False)
        left &= ~number

        values = pc.replace_substring_regex(values, UTC_WORD, "Z")
        absolute = left & _matches(values, OFFSET)
        left &= ~absolute
    else:
        absolute = left if "%z" in reading.format.lower() else np.zeros_like(left)
        left = left & ~absolute

    _parse_into(time, known, values, absolute, reading.format, "UTC")
    if reading.zone is not None:
        _parse_into(time, known, values, left, reading.format, reading.zone)
    return pa.array(time, pa.int64(), mask=~known)


def _matches(values: pa.Array, pattern: str) -> np.ndarray:
    found = pc.match_substring_regex(values, pattern)
    return found.fill_null(False).to_numpy(zero_copy_only=False)


def _parse_into(
    time: np.ndarray,
    known: np.ndarray,
    values: pa.Array,
    rows: np.ndarray,
    form: str | None,
    zone: str,
) -> None:
    """Write the times of the chosen rows in place; text that carries no offset is of `zone`."""
    if not rows.any():
        return
    text = values.filter(pa.array(rows)).to_pandas()
    parsed = pd.to_datetime(text, format=form or "ISO8601", errors="coerce", utc=zone == "UTC")
    readable = parsed.notna().to_numpy()
    if zone == "UTC":
        parsed = parsed.dt.tz_localize(None)

    moment = parsed.to_numpy().astype("datetime64[ms]").astype(np.int64)
    local = pa.array(np.where(readable, moment, 0)).cast(pa.timestamp("ms"))
    time[rows] = _in_zone(local, zone).to_numpy()
    known[rows] = readable


def _in_zone(local: pa.Array, zone: str | None) -> pa.Array:
    """Local times, timestamp[ms], as int64 ms UTC."""
    assert zone is not None, "check_columns asks for it"
    moment = pc.assume_timezone(local, zone, ambiguous="earliest", nonexistent="latest")
    return moment.cast(pa.timestamp("ms", "UTC")).cast(pa.int64())


def guess_unit(numbers: np.ndarray) -> Unit | None:
    """The unit in which all of these are times of our days; None where there is none.

    881250949             s      (1997)
    1650000000123         ms     (2022)
    17                    None
    """
    first, last = (datetime(year, 1, 1, tzinfo=UTC).timestamp() for year in PLAUSIBLE_YEARS)
    if len(numbers) == 0:
        return None
    per_second: dict[Unit, float] = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}
    for unit, factor in per_second.items():
        if first * factor <= numbers.min() and numbers.max() <= last * factor:
            return unit
    return None


def show_time(time_ms: int) -> str:
    """ISO 8601, UTC, to the second; the number where no calendar has it."""
    try:
        return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")
    except (OverflowError, ValueError, OSError):
        return str(time_ms)
