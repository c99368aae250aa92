"""Unknown logs and side tables, printed for people: every column, with examples and what it is
likely to be.
"""

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from pipeline.config import UserError
from pipeline.logs.columns import plain_values
from pipeline.logs.looking.guess import Guess, guess_columns
from pipeline.logs.looking.sample import Sample, flat_sample, spread_sample, take_sample
from pipeline.logs.looking.side import MOST_FEATURES, SideGuess, guess_side, listed_ids
from pipeline.logs.times import show_time
from pipeline.schema import LOG_REQUIRED

EXAMPLES, WIDEST = 3, 44
SPARSE = 0.5  # of the ids that a side table has: below it is worth a word


def look_at_logs(path: str, tables: Mapping[str, Sample]) -> tuple[Sample, Guess]:
    """Rows of the logs at `path`, printed, and what their columns are likely to be; the `tables` of
    users and items tell whose ids are whose.

    Raises:
        UserError: nothing can be read, or no user, item or time is found.
    """
    listed = {f"{key[:-1]}_id": listed_ids(table) for key, table in tables.items()}
    logs, guess = _guess_fields(spread_sample(take_sample(path, "PATH")), listed)
    _print_logs(logs, guess)
    if guess.missing:
        raise UserError(
            f"no column of {path} looks like {' or '.join(guess.missing)}: copy "
            f"configs/own_logs.yaml and name it in source.columns"
        )
    return logs, guess


def _guess_fields(logs: Sample, listed: Mapping[str, set[str]]) -> tuple[Sample, Guess]:
    """The logs' columns; the fields of objects are columns where one of them means something."""
    flat = flat_sample(logs)
    guess = guess_columns(flat.rows, logs.request_id, logs.as_text, listed)
    if set(guess.roles) <= set(logs.rows.column_names):
        return logs, guess
    return flat, guess


def look_at_side(key: str, sample: Sample, logs: Sample, guess: Guess) -> SideGuess:
    """The table of `key`, users or items, printed, and which of its columns fit."""
    ours = f"{key[:-1]}_id"
    theirs = guess.column_of(ours)
    side = guess_side(sample, key, plain_values(logs.rows[theirs]), theirs)

    roles = {side.id_column: "id"}
    for name, kind in side.features.items():
        roles[name] = _kind_words(kind)
    print(f"\n{key}: {_describe_place(sample)}")
    _print_columns(sample.rows, roles)

    if len(side.features) == MOST_FEATURES:
        print(f"the first {MOST_FEATURES} columns that are fit are taken: features.{key[:-1]}")
    if side.repeated:
        print(f"{side.repeated:,} rows have an id that another has: the last one counts (repeats)")
    print(f"{side.joined:.0%} of the logs' ids are in {side.id_column!r}", end="")
    print(": is it the right table and column?" if side.joined < SPARSE else "")
    return side


def _kind_words(kind: dict[str, Any]) -> str:
    """A feature in words, from its settings."""
    if "most_values" in kind:
        return "category, the most frequent"
    words = {"quantile": "number, by quantiles", "list": "list"}
    return words.get(kind.get("kind", "categorical"), "category")


def _describe_place(sample: Sample) -> str:
    size = f"{sample.bytes / 2**20:,.1f} MB"
    rows = f"{sample.rows.num_rows:,} rows" + ("" if sample.is_whole else " looked at")
    left = f", {len(sample.left_out)} left out" if sample.left_out else ""
    files = "1 file" if len(sample.files) == 1 else f"{len(sample.files)} files"
    return f"{files}, {size}{left}, {rows}"


def _print_logs(logs: Sample, guess: Guess) -> None:
    print(f"logs: {_describe_place(logs)}")
    if logs.format.impressions is not None:
        columns = ", ".join(logs.format.impressions.columns)
        print(f"a row holds a list of exposures in {columns}; below, a row for each of them")
    _print_columns(logs.rows, guess.roles)

    if guess.times is not None and len(known := guess.times.drop_null()):
        first, last = min(known.to_pylist()), max(known.to_pylist())
        print(f"times from {show_time(first)} to {show_time(last)}")
    for ours in ("user_id", "item_id"):
        theirs = guess.column_of(ours)
        if theirs in logs.rows.column_names:
            print(f"{len(logs.rows[theirs].unique()):,} different {theirs}")

    for ours in LOG_REQUIRED:
        if file := _file_without(logs, guess.column_of(ours)):
            print(f"{file} has no column {guess.column_of(ours)!r}, for which a build refuses it:")
            print("name the files of the logs alone, by their folder or a pattern")
            break

    if guess.implicit:
        print(
            "no row says what was shown and not chosen: other items are drawn beside each that was "
            "(examples.negatives)"
        )


def _file_without(logs: Sample, column: str) -> str | None:
    """The first file looked at that lacks a column, or the object that holds it, which others
    have.
    """
    outer = column.partition(".")[0]
    lacking = [file for file, names in logs.columns.items() if not names & {column, outer}]
    return lacking[0] if 0 < len(lacking) < len(logs.columns) else None


def first_values(column: pa.Array) -> list[Any]:
    """The first different values of a column; of lists, which cannot be told apart, the first."""
    known = column.drop_null()
    if not pa.types.is_nested(known.type):
        known = known.unique()
    return known[:EXAMPLES].to_pylist()


def _print_columns(rows: pa.Table, roles: dict[str, str]) -> None:
    """A line per column: name, type, nulls, different values, examples, what it is taken for."""
    lines = [("column", "type", "null", "different", "examples", "taken for")]
    for name in rows.column_names:
        column = plain_values(rows[name])
        different = "" if pa.types.is_nested(column.type) else f"{len(column.unique()):,}"
        null = f"{column.null_count / max(len(column), 1):.0%}"
        examples = " ".join(", ".join(map(str, first_values(column))).split())  # of one line
        if len(examples) > WIDEST:
            examples = examples[: WIDEST - 1] + "…"
        lines.append((name, str(column.type), null, different, examples, roles.get(name, "")))

    widths = [max(map(len, cells)) for cells in zip(*lines, strict=True)]
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        print("  " + "  ".join(cells).rstrip())
