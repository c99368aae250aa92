"""Lists as one table: a row per user and item."""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import pyarrow as pa


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


def lists_table(user_ids: np.ndarray, lists: Sequence[ItemList]) -> pa.Table:
    """The lists one behind the other; `place` 0 is best, an unknown retrieval_score is null.

    user_id   place   item_id   score
    3         0       10        .52
    3         1       11        .31
    8         0       10        .44

    Args:
        user_ids: int64 [B], or text as the logs have it.
    """
    lengths = [len(one.item_id) for one in lists]
    places = [np.arange(length, dtype=np.int32) for length in lengths]
    items = _joined([one.item_id for one in lists], np.int64)
    scores = _joined([one.score for one in lists], np.float32)
    retrieval = _joined([one.retrieval_score for one in lists], np.float32)
    sources: list[str] = []
    for one in lists:
        sources += one.source

    return pa.table(
        {
            "user_id": _id_array(np.repeat(user_ids, lengths)),
            "place": _joined(places, np.int32),
            "item_id": _id_array(items),
            "score": scores,
            "retrieval_score": pa.array(retrieval, mask=np.isnan(retrieval)),
            "source": pa.array(sources, pa.string()),
        }
    )


def _joined(parts: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype)


def _id_array(ids: np.ndarray) -> pa.Array:
    """int64, or string where they are text."""
    return pa.array(ids, pa.string() if ids.dtype == object else pa.int64())
