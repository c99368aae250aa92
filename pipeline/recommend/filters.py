"""Conditions on the columns of items, as requests and jobs state them.

{"author_id": 7, "lang": ["en", "de"], "duration_s": Range(at_least=10, below=60)}
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import numpy as np

from pipeline.index.catalogue import Catalogue, ItemColumn

Scalar = int | float | str | bool
ACCEPTED: dict[str, tuple[type, ...]] = {
    "integer": (int,),
    "number": (int, float),
    "text": (str,),
    "boolean": (bool,),
}


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number; None is no bound."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def given(self) -> dict[str, float]:
        """The bounds that there are, as a request states them."""
        return {name: bound for name, bound in asdict(self).items() if bound is not None}

    def has_room(self) -> bool:
        """False where no number can lie between the bounds."""
        low, above = _or(self.at_least, -math.inf), _or(self.above, -math.inf)
        high, below = _or(self.at_most, math.inf), _or(self.below, math.inf)
        return low <= high and low < below and above < high and above < below

    def of_whole_numbers(self) -> "Range":
        """The same whole numbers by `at_least` and `at_most` alone.

        above 3, below 6    at_least 4, at_most 5
        """
        lows: list[int] = []
        if self.at_least is not None:
            lows.append(math.ceil(self.at_least))
        if self.above is not None:
            lows.append(math.floor(self.above) + 1)

        highs: list[int] = []
        if self.at_most is not None:
            highs.append(math.floor(self.at_most))
        if self.below is not None:
            highs.append(math.ceil(self.below) - 1)
        return Range(at_least=max(lows, default=None), at_most=min(highs, default=None))


def _or(bound: float | None, otherwise: float) -> float:
    return otherwise if bound is None else bound


Condition = Scalar | list[Scalar] | Range


class FilterError(ValueError):
    """A part of a wish that the items' columns cannot answer.

    Args:
        field: where it stands in the wish: `("filter", "lang")`, `("diversify", "per")`.
    """

    def __init__(self, field: tuple[str, ...], rule: str, value: object) -> None:
        super().__init__(f"{'.'.join(field)} must be {rule}, got {value!r}")
        self.field = field
        self.rule = rule
        self.value = value


def filter_items(catalogue: Catalogue, conditions: Mapping[str, Condition]) -> np.ndarray:
    """bool [N]: the items for which all conditions hold. An unknown value fulfils none.

    Raises:
        FilterError: an unknown column, a value of another type than the column's, or a range that
            no value of it can lie in.
    """
    allowed = np.ones(len(catalogue), bool)
    for name, condition in conditions.items():
        column = find_column(catalogue, name, ("filter", name))
        allowed &= column.known & _holds(column, name, condition)
    return allowed


def find_column(catalogue: Catalogue, name: str, field: tuple[str, ...]) -> ItemColumn:
    """Raises FilterError, of the wish's `field`, for a name that the index has no column of."""
    if name not in catalogue.columns:
        raise FilterError(field, f"one of the index's columns {list(catalogue.columns)}", name)
    return catalogue.columns[name]


def refuse_empty_ranges(conditions: Mapping[str, Condition]) -> None:
    """Raises FilterError for bounds that no number lies in, whatever the column."""
    for name, condition in conditions.items():
        if isinstance(condition, Range) and not condition.has_room():
            raise _empty_range(name, condition, "number")


def _empty_range(name: str, bounds: Range, kind: str) -> FilterError:
    return FilterError(("filter", name), f"a range that some {kind} lies in", bounds.given())


def _holds(column: ItemColumn, name: str, condition: Condition) -> np.ndarray:
    if isinstance(condition, Range):
        return _in_range(column, name, condition)
    if isinstance(condition, list):
        return np.isin(column.values, _places(column, name, condition))
    return np.isin(column.values, _places(column, name, [condition]))


def _places(column: ItemColumn, name: str, wanted: list[Scalar]) -> np.ndarray:
    """The wanted values as `column.values` holds them; words that no item has are left out."""
    for value in wanted:
        # True is an int to Python
        is_bool = isinstance(value, bool)
        fits = isinstance(value, ACCEPTED[column.kind]) and is_bool == (column.kind == "boolean")
        if not fits:
            article = "an" if column.kind == "integer" else "a"
            words = "true or false" if column.kind == "boolean" else f"{article} {column.kind}"
            raise FilterError(("filter", name), f"{words}, as the column is", value)

    if column.kind != "text":
        return np.array(wanted, column.values.dtype)

    # words are sorted, and may be as many as there are items
    places = []
    for word in map(str, wanted):
        place = bisect_left(column.words, word)
        if place < len(column.words) and column.words[place] == word:
            places.append(place)
    return np.array(places, column.values.dtype)


def _in_range(column: ItemColumn, name: str, bounds: Range) -> np.ndarray:
    if column.kind not in ("integer", "number"):
        rule = f"a value or a list of values: the column is {column.kind}, which has no range"
        raise FilterError(("filter", name), rule, bounds.given())

    reached = bounds.of_whole_numbers() if column.kind == "integer" else bounds
    if not reached.has_room():
        raise _empty_range(name, bounds, column.kind)

    values = column.values
    inside = np.ones(len(values), bool)
    if bounds.at_least is not None:
        inside &= values >= bounds.at_least
    if bounds.above is not None:
        inside &= values > bounds.above
    if bounds.at_most is not None:
        inside &= values <= bounds.at_most
    if bounds.below is not None:
        inside &= values < bounds.below
    return inside
