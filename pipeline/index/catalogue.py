"""The items of an index: their ids, how popular they are, and their columns for filters.

Rows are in the order of the ids, so that ties by row are ties by id.
"""

# pyarrow makes its compute functions when it is imported
# pyright: reportAttributeAccessIssue=false

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.config import IndexConfig, UserError

ITEM_ID, POPULARITY, RECENCY = "item_id", "popularity", "recency"
ITEM_TEXT = "item_text"  # where item ids are text; item_id has their codes then
OWN_COLUMNS = (ITEM_ID, ITEM_TEXT, POPULARITY, RECENCY)
LARGEST = pa.scalar(2**63 - 1, pa.uint64())  # of int64
PREFIX = "column."  # of the item table's columns, which may have any name

Kind = Literal["integer", "number", "text", "boolean"]


@dataclass(frozen=True, slots=True)
class ItemColumn:
    """One column of N items, in a form that compares fast.

    Text is a place in `words`, which are sorted; null is where `known` is false.
    """

    kind: Kind
    values: np.ndarray  # int64, float64 or bool [N]; of text int32 places
    known: np.ndarray  # bool [N]
    words: tuple[str, ...] = ()

    def value(self, row: int) -> int | float | str | bool | None:
        """The value of one item, None where it is unknown."""
        if not self.known[row]:
            return None
        value = self.values[row].item()
        return self.words[value] if self.kind == "text" else value


class Catalogue:
    """N items in the order of their ids.

    Args:
        table: `item_id` (int64, rising), `popularity` (int64), `recency` (float64, the larger the
            newer), where ids are text `item_text`, and the item table's columns, each under
            `PREFIX` and its name.
    """

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.item_ids = table[ITEM_ID].to_numpy()
        self.popularity = table[POPULARITY].to_numpy()
        self.recency = table[RECENCY].to_numpy()
        self._texts: np.ndarray | None = None
        if ITEM_TEXT in table.column_names:
            self._texts = np.array(table[ITEM_TEXT].to_pylist(), object)

        self.columns: dict[str, ItemColumn] = {}
        for name in table.column_names:
            if name not in OWN_COLUMNS:
                self.columns[name.removeprefix(PREFIX)] = read_column(table[name])

    def __len__(self) -> int:
        return len(self.item_ids)

    @cached_property
    def popular_rows(self) -> np.ndarray:
        """All rows, the most popular first, ties by id, int64 [N]."""
        return np.argsort(-self.popularity, kind="stable")

    def own_ids(self, rows: np.ndarray) -> np.ndarray:
        """The ids of these rows as the logs have them: int64, or objects of text."""
        return self.item_ids[rows] if self._texts is None else self._texts[rows]

    def find_rows(self, item_id: np.ndarray) -> np.ndarray:
        """The rows of these ids that are in the catalogue, each once, rising."""
        wanted = np.unique(item_id)
        place = np.searchsorted(self.item_ids, wanted)
        inside = place < len(self)
        place, wanted = place[inside], wanted[inside]
        return place[self.item_ids[place] == wanted]


def read_column(column: pa.ChunkedArray) -> ItemColumn:
    """The column of a catalogue's table as arrays."""
    known = column.is_valid().to_numpy()
    dtype = column.type
    if pa.types.is_boolean(dtype):
        return ItemColumn("boolean", column.fill_null(False).to_numpy(), known)
    if pa.types.is_integer(dtype):
        return ItemColumn("integer", column.fill_null(0).to_numpy(), known)
    if pa.types.is_floating(dtype):
        values = column.fill_null(float("nan")).to_numpy()
        return ItemColumn("number", values, known & ~np.isnan(values))

    encoded = column.dictionary_encode().unify_dictionaries().combine_chunks()
    assert isinstance(encoded, pa.DictionaryArray)
    words = np.array(encoded.dictionary.to_pylist(), object)
    order = np.argsort(words)
    place = np.empty(len(words) + 1, np.int32)
    place[order] = np.arange(len(words))
    place[-1] = -1  # of what is null
    code = encoded.indices.fill_null(len(words)).to_numpy()
    return ItemColumn("text", place[code], known, tuple(words[order].tolist()))


def make_table(
    item_ids: np.ndarray,
    popularity: np.ndarray,
    recency: np.ndarray,
    items: pa.Table | None,
    cfg: IndexConfig,
    texts: pa.Array | None = None,
) -> pa.Table:
    """The table of a `Catalogue`.

    An item that the item table does not list has null columns.

    Args:
        item_ids: int64 [N], rising.
        items: the published item table, None where there is none.
        texts: the ids as the logs have them, where they are text.

    Raises:
        UserError: a configured column is missing, or of a type that a filter cannot compare.
    """
    arrays: dict[str, pa.Array | pa.ChunkedArray] = {
        ITEM_ID: pa.array(item_ids, pa.int64()),
        POPULARITY: pa.array(popularity, pa.int64()),
        RECENCY: pa.array(recency, pa.float64()),
    }
    if texts is not None:
        arrays[ITEM_TEXT] = texts
    names = wanted_columns(items, cfg)
    if items is None or not names:
        return pa.table(arrays)

    # the row of each item in the item table, which is sorted by id, null where it has none
    listed = items[ITEM_ID].to_numpy()
    place = np.minimum(np.searchsorted(listed, item_ids), len(listed) - 1)
    row = pa.array(place, mask=listed[place] != item_ids)
    for name in names:
        column = _plain_type(items[name])
        assert column is not None, "wanted_columns has looked at its type"
        arrays[PREFIX + name] = column.take(row)
    return pa.table(arrays)


def wanted_columns(items: pa.Table | None, cfg: IndexConfig) -> list[str]:
    """Names of the item table's columns that travel with the index.

    Raises:
        UserError: a configured column is missing, or of a type that a filter cannot compare.
    """
    known = [] if items is None else [name for name in items.column_names if name != ITEM_ID]
    needed = {"index.title_column": cfg.title_column}
    if cfg.followed is not None:
        needed["index.followed.author_column"] = cfg.followed.author_column
        needed["index.followed.time_column"] = cfg.followed.time_column
    for name in cfg.columns or ():
        needed[f"index.columns: {name}"] = name

    for key, name in needed.items():
        if name is not None and name not in known:
            raise UserError(f"{key}: the item table has no column {name!r}; it has {known}")

    if items is None or items.num_rows == 0:
        return []
    if cfg.columns is None:
        return [name for name in known if _plain_type(items[name]) is not None]

    chosen = dict.fromkeys(name for name in needed.values() if name is not None)
    for name in chosen:
        if _plain_type(items[name].slice(0, 0)) is None:
            raise UserError(
                f"index.columns: {name!r} of the item table is of type {items[name].type}; a "
                "filter compares numbers, text, times, and true and false"
            )
    return list(chosen)


def _plain_type(column: pa.ChunkedArray) -> pa.ChunkedArray | None:
    """The column as int64, float64, bool or text; times as ms since 1970, whole numbers beyond 63
    bits as text. None: none of these.
    """
    dtype = column.type
    if pa.types.is_dictionary(dtype):
        column = column.cast(dtype.value_type)
        dtype = column.type

    if pa.types.is_boolean(dtype):
        return column
    if pa.types.is_uint64(dtype) and pc.any(pc.greater(column, LARGEST)).as_py():
        return column.cast(pa.large_string())  # hashes, compared digit by digit
    if pa.types.is_integer(dtype):
        return column.cast(pa.int64())
    if pa.types.is_floating(dtype) or pa.types.is_decimal(dtype):
        return column.cast(pa.float64())
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype):
        return column.cast(pa.large_string())
    if pa.types.is_timestamp(dtype) or pa.types.is_date(dtype):
        # what is finer than a millisecond is left out
        return column.cast(pa.timestamp("ms"), safe=False).cast(pa.int64())
    return None
