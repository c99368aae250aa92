"""Which columns of a table of users or items are worth an embedding."""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.logs.columns import is_number, is_text, plain_values
from pipeline.logs.looking.guess import (
    ITEM,
    PANDAS_INDEX,
    USER,
    id_texts,
    may_be_id,
    plain_name,
)
from pipeline.logs.looking.sample import Sample

MOST_CATEGORIES = 5000
UNIQUE = 0.9  # of a column of ids, the share of different ones: a few may be repeated
FEW_NUMBERS = 32  # different whole numbers up to here are categories
WORTH = 0.5  # of a category's values, the share of rows that may be alone with theirs
SHARE_OF_LISTS = 0.2  # of texts that have a | between their parts, as genres have
MOST_FEATURES = 8
ID_NAME = re.compile(r"(^|_)[iI][dD]s?$|[a-z]I[dD]s?$")  # author_id, authorId


@dataclass
class SideGuess:
    """A side table as in `source`, and its columns as in `features`."""

    sample: Sample
    id_column: str
    joined: float  # share of the logs' sampled ids that the sampled table has
    repeated: int = 0  # rows of the sample whose id an earlier one has
    features: dict[str, dict[str, Any]] = field(default_factory=dict)


def guess_side(sample: Sample, side: str, ids: pa.Array, id_name: str) -> SideGuess:
    """The table of `side`, users or items; `ids` are the logs', from their column `id_name`."""
    columns = _columns(sample)
    wanted = set(id_texts(ids))
    pattern = USER if side == "users" else ITEM
    shares: dict[str, float] = {}
    for name in _id_columns(columns):
        shares[name] = len(wanted & set(id_texts(columns[name]))) / max(len(wanted), 1)

    def fitness(name: str) -> tuple[float, bool, bool]:
        return round(shares[name], 2), name == id_name, bool(pattern.match(plain_name(name)))

    best = max(shares, key=fitness, default=next(iter(columns)))
    repeated = len(columns[best]) - pc.count_distinct(columns[best]).as_py()
    guess = SideGuess(sample, best, shares.get(best, 0), repeated)
    for name, column in columns.items():
        kind = _feature(name, column) if name != guess.id_column else None
        if kind is not None and len(guess.features) < MOST_FEATURES:
            guess.features[name] = kind
    return guess


def listed_ids(sample: Sample) -> set[str]:
    """Values of all columns that the table's ids may be in, as texts."""
    columns = _columns(sample)
    listed = set[str]()
    for name in _id_columns(columns):
        listed.update(id_texts(columns[name]))
    return listed


def _columns(sample: Sample) -> dict[str, pa.Array]:
    columns = {}
    for name in sample.rows.column_names:
        if not PANDAS_INDEX.match(name):
            columns[name] = plain_values(sample.rows[name])
    return columns


def _id_columns(columns: Mapping[str, pa.Array]) -> list[str]:
    """Those with another value in nearly every row."""
    found = []
    for name, column in columns.items():
        if pa.types.is_nested(column.type) or not may_be_id(column):
            continue
        if pc.count_distinct(column).as_py() >= UNIQUE * len(column):
            found.append(name)
    return found


def _share_with_bars(column: pa.Array) -> float:
    found = pc.match_substring_regex(column, r"^[^|]+(\|[^|]+)+$")
    return pc.sum(found).as_py() / len(column)


def _feature(name: str, column: pa.Array) -> dict[str, Any] | None:
    """How a column becomes an embedding; None where it is no good for that."""
    kind, known = column.type, column.drop_null()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return None if pa.types.is_nested(kind.value_type) else {"dim": 8, "kind": "list"}
    if len(known) == 0 or pa.types.is_nested(kind):
        return None
    distinct = pc.count_distinct(known).as_py()
    if distinct < 2:
        return None
    worth = distinct <= max(WORTH * len(known), 2)
    if pa.types.is_integer(kind) and distinct > FEW_NUMBERS and ID_NAME.search(name):
        # ids of authors, say: their order means nothing
        return {"dim": 8, "most_values": MOST_CATEGORIES} if worth else None
    if is_number(kind) and not (pa.types.is_integer(kind) and distinct <= FEW_NUMBERS):
        number = known.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        return {"dim": 8, "kind": "quantile"} if np.isfinite(number).any() else None
    if pa.types.is_temporal(kind):
        return {"dim": 8, "kind": "quantile"}
    if is_text(kind) and _share_with_bars(known) > SHARE_OF_LISTS:
        return {"dim": 8, "kind": "list"}
    if distinct > MOST_CATEGORIES or not worth:
        return None
    if is_number(kind) or is_text(kind) or pa.types.is_boolean(kind):
        return {"dim": 8}
    return None
