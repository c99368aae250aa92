"""Lists as one table: a row per user and item."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa

COLUMNS = pa.schema(
    [
        pa.field("user_id", pa.int64()),
        pa.field("place", pa.int32()),
        pa.field("item_id", pa.int64()),
        pa.field("score", pa.float32()),
        pa.field("retrieval_score", pa.float32()),
        pa.field("source", pa.string()),
    ]
)


class ItemList(Protocol):
    """The K items of a list, the best first."""

    @property
    def item_id(self) -> np.ndarray: ...

    @property
    def score(self) -> np.ndarray: ...

    @property
    def retrieval_score(self) -> np.ndarray: ...

    @property
    def source(self) -> list[str]: ...


def lists_table(user_ids: Sequence[int | None], lists: Sequence[ItemList]) -> pa.Table:
    """The lists one behind the other; `place` 0 is best, an unknown retrieval_score is null.

    user_id   place   item_id   score
    3         0       10        .52
    3         1       11        .31
    8         0       10        .44
    """
    lengths = [len(one.item_id) for one in lists]
    places = [np.arange(length) for length in lengths]
    retrieval = _joined([one.retrieval_score for one in lists])
    sources: list[str] = []
    for one in lists:
        sources += one.source

    columns = [
        pa.array(np.repeat(np.array(user_ids, object), lengths), pa.int64()),
        pa.array(_joined(places).astype(np.int32)),
        pa.array(_joined([one.item_id for one in lists]).astype(np.int64)),
        pa.array(_joined([one.score for one in lists]).astype(np.float32)),
        pa.array(retrieval.astype(np.float32), mask=np.isnan(retrieval)),
        pa.array(sources, pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=COLUMNS)


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0)
