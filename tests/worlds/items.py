"""A catalogue of a few items with columns of every kind, and an index over given vectors."""

import numpy as np
import pyarrow as pa
import torch

from pipeline.batches.events import Events
from pipeline.config import IndexConfig
from pipeline.index.catalogue import Catalogue, make_table
from pipeline.index.exact import ExactIndex
from pipeline.index.folder import LoadedIndex

ACTIONS = ("is_click", "is_follow")
NUM_ITEMS = 8

# ids 10, 20, …; item 80 is not in the item table
ITEM_IDS = 10 * np.arange(1, NUM_ITEMS + 1)
POPULARITY = np.array([5, 9, 1, 9, 0, 2, 7, 3])
FIRST_SEEN = np.array([1.0, 2, 3, 4, 5, 6, 7, 8])
ITEMS = pa.table(
    {
        "item_id": ITEM_IDS[:-1],
        "author": pa.array([1, 1, 2, 2, 3, None, 3]),
        "seconds": pa.array([10.5, 20.0, 30.0, 40.0, None, 60.0, 70.0]),
        "lang": pa.array(["en", "de", "en", None, "fr", "de", "en"]),
        "is_short": pa.array([True, True, False, False, None, False, True]),
        "made": pa.array([1, 2, 3, 4, 5, 6, 7], pa.timestamp("s")),
        "tags": pa.array([[1]] * 7),
    }
)


def make_catalogue(**settings: object) -> Catalogue:
    cfg = IndexConfig(**settings)  # pyright: ignore[reportArgumentType]
    return Catalogue(make_table(ITEM_IDS, POPULARITY, FIRST_SEEN, ITEMS, cfg))


def make_index(vectors: np.ndarray | None, **settings: object) -> LoadedIndex:
    """An index of the catalogue; `vectors` float32 [8, d], None is without a retrieval head."""
    cfg = IndexConfig(**settings)  # pyright: ignore[reportArgumentType]
    catalogue = Catalogue(make_table(ITEM_IDS, POPULARITY, FIRST_SEEN, ITEMS, cfg))
    index = None if vectors is None else ExactIndex(torch.from_numpy(vectors))
    return LoadedIndex(catalogue, index, 1.0, "v", cfg)


def make_history(items: list[int], actions: list[int] | None = None) -> Events:
    """One sequence of these items, with the bits of what was done, all of it known."""
    num = len(items)
    done = np.zeros(num, np.int32) if actions is None else np.array(actions, np.int32)
    return Events(
        offsets=np.array([0, num]),
        item_id=np.array(items, np.int64),
        event_time=np.arange(num),
        order_only=np.zeros(num, bool),
        action_mask=done,
        known_mask=np.full(num, 3, np.int32),
        position=np.arange(num),
        gap_ms=np.zeros(num, np.int64),
        request={},
        outcomes={},
    )
