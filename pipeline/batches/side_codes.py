"""Columns of the side tables as codes: a vocabulary, buckets of quantiles or the values of a list,
made from the items or users of the training rows. Code 0 is missing, or not seen in training.
"""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from pipeline.config import ColumnFeature, FeatureConfig, UserError
from pipeline.logs.arrow_errors import reading_file
from pipeline.sequences import store


def published_table(
    sequence_dir: Path, features: FeatureConfig, side: str, id_column: str, seen: np.ndarray
) -> pa.Table:
    """The side table of the published sequences, or ids alone where there is none, with a bare row
    for every id `seen` in training (`with_bare_rows`).
    """
    table = store.read_side_table(sequence_dir, side)
    if table is None:
        table = pa.table({id_column: pa.array(seen, pa.int64())})
    return with_bare_rows(table, features, side, id_column, seen)


def with_bare_rows(
    table: pa.Table, features: FeatureConfig, side: str, id_column: str, seen: np.ndarray
) -> pa.Table:
    """The configured columns of a side table, with a bare row for every id of the training rows
    that it does not list, sorted by id.
    """
    columns = list(features.item if side == "items" else features.user)
    keys = dict.fromkeys(columns, f"features.{side[:-1]}")
    if side == "items" and features.duration_ms_column is not None:
        keys.setdefault(features.duration_ms_column, "features.duration_ms_column")
    for name, key in keys.items():
        if name not in table.column_names:
            raise UserError(
                f"{key}: the {side} table has no column {name!r}; it has {table.column_names}"
            )
    table = table.select([id_column, *keys])
    missing = np.setdiff1d(seen, table[id_column].to_numpy())
    if len(missing):
        bare = pa.table({id_column: pa.array(missing, pa.int64())})
        table = pa.concat_tables([table, bare], promote_options="default")
    return table.sort_by(id_column)


def item_durations(items: pa.Table, name: str | None) -> np.ndarray:
    """float64 [I + 1], ms, 0 for an unknown item or duration; empty where no column is named."""
    if name is None:
        return np.zeros(0)
    try:
        duration = items[name].cast(pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        raise UserError(
            f"features.duration_ms_column: {name!r} is of type {items[name].type}, not a number"
        ) from None
    return np.concatenate([[0.0], np.nan_to_num(duration)])


def side_codes(
    table: pa.Table, id_column: str, columns: dict[str, ColumnFeature], seen: np.ndarray
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """Ids [n], codes int32 [n, columns] and the vocabulary size of each column, values from the ids
    in `seen`.
    """
    ids = table[id_column].to_numpy()
    training = np.isin(ids, seen)
    encoders = {"quantile": quantile_codes, "list": list_codes, "categorical": category_codes}
    codes, sizes = [np.zeros((len(ids), 0), np.int32)], {}
    for name, feature in columns.items():
        key = f"features.{'item' if id_column == 'item_id' else 'user'}.{name}"
        with reading_file(f"{key} ({feature.kind}, of type {table[name].type})"):
            found, sizes[name] = encoders[feature.kind](table[name], training, feature)
        codes.append(found.reshape(len(ids), feature.num_codes))
    return ids, np.concatenate(codes, axis=1), sizes


def category_codes(
    column: pa.ChunkedArray, training: np.ndarray, feature: ColumnFeature
) -> tuple[np.ndarray, int]:
    """int32 [n]: the place of each value among those of the rows where `training` is true, from 1
    on; and the size of the vocabulary, code 0 included.

    lang          en  de  null  fr      the last is not in training
    codes         2   1   0     0       of 3: de 1, en 2
    """
    text = column.cast(pa.large_string())
    values = _vocabulary(text.filter(pa.array(training)), feature.most_values)
    # 0: missing or not seen in training
    codes = pd.Index(values.to_pandas()).get_indexer(text.to_pandas()) + 1
    return codes.astype(np.int32), len(values) + 1


def _vocabulary(text: pa.ChunkedArray, most: int | None) -> pa.ChunkedArray | pa.Array:
    """The different texts in their order; the `most` frequent alone, of equals the first."""
    values = text.unique().drop_null().sort()
    if most is None or len(values) <= most:
        return values
    counts = text.drop_null().to_pandas().value_counts()
    ordered = sorted(counts.items(), key=lambda one: (-one[1], str(one[0])))
    return pa.array(sorted(str(value) for value, _ in ordered[:most]), pa.large_string())


def list_codes(
    column: pa.ChunkedArray, training: np.ndarray, feature: ColumnFeature
) -> tuple[np.ndarray, int]:
    """int32 [n, list_length]: the codes of each row's values, then zeros.

    genres        a|b    b|c|a    null      a, b, c seen: codes 1, 2, 3
    codes         1 2 0  2 3 1    0 0 0     a list_length of 3
    """
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        lists = column.to_pandas().tolist()
    else:
        texts = column.cast(pa.large_string()).to_pylist()
        lists = [None if text is None else text.split(feature.separator) for text in texts]

    # each value once, in its order
    values = np.full((len(lists), feature.list_length), None, object)
    for row, found in enumerate(lists):
        if found is None:
            continue
        texts = dict.fromkeys(str(value).strip() for value in found if value is not None)
        texts.pop("", None)
        kept = list(texts)[: feature.list_length]
        values[row, : len(kept)] = kept

    flat = pa.chunked_array([pa.array(values.ravel().tolist(), pa.large_string())])
    codes, size = category_codes(flat, np.repeat(training, feature.list_length), feature)
    return codes.reshape(values.shape), size


def quantile_codes(
    column: pa.ChunkedArray, training: np.ndarray, feature: ColumnFeature
) -> tuple[np.ndarray, int]:
    """int32 [n]: the bucket of each value by the quantiles of those where `training` is true, from
    1 on; and the number of codes.

    seconds       4  9  null  20        two buckets, their edge is at 9
    codes         1  2  0     2
    """
    if pa.types.is_temporal(column.type):
        width = pa.int32() if column.type.bit_width == 32 else pa.int64()
        column = column.cast(width)
    # nanoseconds since 1970 are more than a float64 tells apart: close enough for a quantile
    values = column.cast(pa.float64(), safe=False).to_numpy()  # null becomes nan
    seen = values[training & ~np.isnan(values)]
    inner = np.linspace(0, 1, feature.buckets + 1)[1:-1]
    edges = np.unique(np.quantile(seen, inner)) if len(seen) else np.zeros(0)
    codes = np.where(np.isnan(values), 0, 1 + np.searchsorted(edges, values, side="right"))
    return codes.astype(np.int32), len(edges) + 2
