"""A setting is declared once: its default, the numbers it may be, and a sentence about it.

    lr: float = setting(2e-3, above=0, doc="Learning rate of the dense weights.")

`check_ranges` holds a section against the declared ranges, and docs/reference/configuration.md is
generated from the declarations.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypedDict, TypeVar, Unpack

from pipeline.config.errors import require

T = TypeVar("T")
METADATA_KEY = "setting"


class Range(TypedDict, total=False):
    """Bounds of a number. They hold for each number of a list or mapping; null passes."""

    above: float
    at_least: float
    below: float
    at_most: float
    rule: str  # the range in words, where the bounds alone say too little


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Metadata of a dataclass field: what is known of a setting beside its type and default."""

    doc: str
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    rule: str | None = None

    @property
    def has_range(self) -> bool:
        bounds = self.above, self.at_least, self.below, self.at_most
        return any(bound is not None for bound in bounds)

    def allows(self, number: float) -> bool:
        """True if `number` is inside the bounds. NaN is inside of none."""
        if number != number:  # no call of isnan, which takes no integer beyond the largest float
            return False
        if self.above is not None and number <= self.above:
            return False
        if self.at_least is not None and number < self.at_least:
            return False
        if self.below is not None and number >= self.below:
            return False
        return self.at_most is None or number <= self.at_most

    def range_words(self) -> str:
        """The range as messages and the reference say it: `1 or more`, `in [0, 1)`; "" for none."""
        if self.rule is not None:
            return self.rule

        low = self.above if self.at_least is None else self.at_least
        high = self.below if self.at_most is None else self.at_most
        if high is None or high == math.inf:
            if low is None:
                return ""
            return f"greater than {low:g}" if self.at_least is None else f"{low:g} or more"
        if low is None:
            return f"below {high:g}" if self.at_most is None else f"{high:g} or less"
        if self.at_least is not None and self.at_most is not None:
            return f"between {low:g} and {high:g}"
        opening = "(" if self.at_least is None else "["
        closing = ")" if self.at_most is None else "]"
        return f"in {opening}{low:g}, {high:g}{closing}"


def describe(doc: str, **bounds: Unpack[Range]) -> dict[str, Setting]:
    """Metadata of a field without a default: `path: str = field(metadata=describe("…"))`."""
    return {METADATA_KEY: Setting(doc=doc, **bounds)}


def setting(default: T, *, doc: str, **bounds: Unpack[Range]) -> T:
    """A dataclass field with its default, its range and a sentence that explains it, with the unit.

    A default that is a mapping is copied for each instance.
    """
    metadata = describe(doc, **bounds)
    # typed as the default, as `dataclasses.field` is
    if isinstance(default, dict):
        return typing.cast(T, dataclasses.field(default_factory=default.copy, metadata=metadata))
    return typing.cast(T, dataclasses.field(default=default, metadata=metadata))


def find_setting(field: "dataclasses.Field[Any]") -> Setting | None:
    """The declaration of a field; None for a field that is a section of its own."""
    return field.metadata.get(METADATA_KEY)


def has_default(field: "dataclasses.Field[Any]") -> bool:
    missing = dataclasses.MISSING
    return field.default is not missing or field.default_factory is not missing


def may_be_null(field: "dataclasses.Field[Any]") -> bool:
    return type(None) in typing.get_args(field.type)


def check_ranges(section: Any, path: str) -> None:
    """Hold each setting of `section` against its range; `path` is where it stands in the YAML, ""
    for the top.

    Raises:
        ConfigError: a number outside of its range.
    """
    for field in dataclasses.fields(section):
        declared = find_setting(field)
        if declared is None or not declared.has_range:
            continue

        rule = declared.range_words()
        if may_be_null(field):
            rule += ", or null"
        name = f"{path}.{field.name}" if path else field.name
        for key, number in _numbers(name, getattr(section, field.name)):
            require(declared.allows(number), key, number, rule)


def _numbers(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a setting, each with the key that a message names.

    train.lr        0.1          train.lr 0.1
    train.patience  null
    shares          {a: 1, b: 2} shares.a 1, shares.b 2
    seconds         [5, 9]       seconds[0] 5, seconds[1] 9
    """
    if value is None:
        return
    if isinstance(value, dict):
        for name, number in value.items():
            yield f"{key}.{name}", number
    elif isinstance(value, tuple):
        for index, number in enumerate(value):
            yield f"{key}[{index}]", number
    else:
        yield key, value
