"""Times that are read in a wrong way, told before a build from the first rows of a few files."""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import ColumnReading, UserError
from pipeline.logs.cleaning import LogRules, rules_of_file
from pipeline.logs.columns import is_number, is_text, time_values
from pipeline.logs.rows import open_rows
from pipeline.logs.times import UNIT_WORDS, guess_unit, read_times, show_time
from pipeline.schema import DAY_MS

SAMPLE_FILES, SAMPLE_ROWS = 3, 1000
EXAMPLES = 3


def check_times(files: Sequence[str], rules: LogRules) -> None:
    """Go on unless every time among the first rows is unreadable or out of range: then not the
    rows are wrong but the way they are read.

    Raises:
        UserError: with three of the values, what they are read as, and the setting that mends it.
    """
    reading = rules.readings.get("event_time", ColumnReading(column=rules.columns["event_time"]))
    samples = []
    for file in _spread(files):
        sample = first_rows(file, rules)
        if sample is not None:
            samples.append((file, sample))

    problems = []
    for file, values in samples:
        time = read_times(values, reading)
        problem = _find_problem(values, time, reading, rules)
        if problem is None:
            return
        problems.append(f"{file}: {problem}")
    if problems:
        raise UserError(problems[0])


def _spread(files: Sequence[str]) -> list[str]:
    """The first file, the last, and one in the middle."""
    places = np.linspace(0, len(files) - 1, min(SAMPLE_FILES, len(files)))
    return [files[int(place)] for place in places]


def first_rows(file: str, rules: LogRules) -> pa.Array | None:
    """The times among a file's first rows; None of a file that we wrote, or without any."""
    name = rules.columns["event_time"]
    reading = rules.readings.get("event_time", ColumnReading(column=name))
    with open_rows(file, rules.format, columns=[name, *rules.clock_columns]) as rows:
        if rules_of_file(rows.schema, rules) is not rules:
            return None
        for block in rows.blocks(SAMPLE_ROWS, [0]):
            values = time_values(block, reading).drop_null()
            return values if len(values) else None
    return None


def _find_problem(
    values: pa.Array, time: pa.Array, reading: ColumnReading, rules: LogRules
) -> str | None:
    """What is wrong with all of the values, in words; None where one is fine."""
    examples = ", ".join(map(str, values.slice(0, EXAMPLES).to_pylist()))
    columns = f"column {reading.column!r}"
    if reading.clock is not None:
        columns += f" and column {reading.clock!r}"
    holds = f"{columns} for event_time holds {examples}"

    known = time.drop_null().to_numpy()
    if len(known) == 0:
        return f"{holds}: no time can be read. {_advice_for_text(values, reading)}"

    early, late = known.max() < rules.earliest_ms, known.min() > rules.latest_ms
    if not early and not late:
        return None

    bound = "before sequences.earliest_time" if early else "after the latest time"
    limit = show_time(rules.earliest_ms if early else rules.latest_ms)
    read_as = f"read as {_way(values, reading)} that is {show_time(int(known[0]))}"
    return f"{holds}; {read_as}, {bound} ({limit}). {_advice(values, known, reading, rules)}"


def _way(values: pa.Array, reading: ColumnReading) -> str:
    if not is_number(values.type):
        return "it stands"
    unit = reading.unit or "ms"
    return UNIT_WORDS.get(unit, unit)


def _option_of(reading: ColumnReading) -> str:
    """The beginning of the setting that reads the times in another way."""
    clock = f"clock: {reading.clock}, " if reading.clock is not None else ""
    return f"source.columns.event_time={{column: {reading.column}, {clock}"


def _advice_for_text(values: pa.Array, reading: ColumnReading) -> str:
    """Text without an offset where no zone is given, or of another form."""
    option = _option_of(reading)
    if reading.zone is None:
        local = ColumnReading(column=reading.column, format=reading.format, zone="UTC")
        if read_times(values, local).null_count < len(values):
            return f"It carries no offset: set {option}zone: UTC}}, or its own zone"
    return f"Set {option}format: '%d.%m.%Y %H:%M'}} as strptime has it; else ISO 8601 is read"


def _advice(values: pa.Array, known: np.ndarray, reading: ColumnReading, rules: LogRules) -> str:
    """The setting that puts the values in range."""
    numbers = np.zeros(0)
    if is_number(values.type):
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    elif is_text(values.type) and reading.format is None:
        numbers = _numbers_of_text(values)

    unit = guess_unit(numbers[np.isfinite(numbers)])
    option = _option_of(reading)
    if unit is None and len(numbers) and numbers.min() >= 0 and known.max() < 50 * 365 * DAY_MS:
        return (
            f"They count from another start, or are only an order: set {option}unit: s, start: "
            '"2020-01-01T00:00:00+00:00"} with the unit and the time that 0 stands for'
        )

    if unit is not None and (unit != (reading.unit or "ms") or reading.start is not None):
        as_unit = ColumnReading(column=reading.column, unit=unit)
        looks = f"It looks like {UNIT_WORDS[unit]}: set {option}unit: {unit}}}"
        known = read_times(pa.array(numbers), as_unit).drop_null().to_numpy()
        if known.min() >= rules.earliest_ms:
            return looks
        return f"{looks} and {_earlier(known)}"

    if known.min() < rules.earliest_ms:
        return f"If that is right set {_earlier(known)}"
    return "If that is right set sequences.latest_time"


def _earlier(known: np.ndarray) -> str:
    """A year's beginning before all of the times, as the setting."""
    moment = show_time(int(known.min()) - 365 * DAY_MS)
    return f"sequences.earliest_time={moment[:4]}-01-01T00:00:00+00:00"


def _numbers_of_text(values: pa.Array) -> np.ndarray:
    """The values as numbers; none where one is not."""
    try:
        return pc.utf8_trim_whitespace(values).cast(pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        return np.zeros(0)
