"""JSON as clients send it, read with a bound on what an object may name.

What is wrong with a body is told field by field, so a body that is wrong in every name would cost
far more than a right one: seconds in which the ingress answers nobody.
"""

import json
from typing import Any

from serve_app.schemas import Refusal

MOST_NAMES = 256  # of one object; also of the features that the candidates of a request name


class BadJson(ValueError):
    """An object that names something twice, or too much: what, and why."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.msg)
        self.refusal = refusal


def read_json(text: bytes) -> Any:
    """The value that the text says.

    Raises:
        BadJson: an object names something twice, of which the last would win unseen, or more than
        `MOST_NAMES`.
        ValueError: no JSON.
        RecursionError: nested too deeply.
    """
    return json.loads(text, object_pairs_hook=_read_object)


def _read_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(pairs) > MOST_NAMES:
        raise BadJson(Refusal.of(["body"], f"at most {MOST_NAMES} names in an object", len(pairs)))
    if len(found) < len(pairs):
        raise BadJson(Refusal.of(["body"], "no name twice in an object", _find_twice(pairs)))
    return found


def _find_twice(pairs: list[tuple[str, Any]]) -> str:
    seen: set[str] = set()
    for name, _ in pairs:
        if name in seen:
            return name
        seen.add(name)
    raise AssertionError("no name is there twice")
