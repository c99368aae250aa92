"""Conditions on the columns of items, as requests and jobs state them.

{"author_id": 7, "lang": ["en", "de"], "duration_s": Range(at_least=10, below=60)}
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

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
        FilterError: an unknown column, or a value of another type than the column's.
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
        raise FilterError(("filter", name), rule, bounds)

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
