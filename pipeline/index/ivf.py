"""Approximate search by faiss' inverted lists, for more items than a product per request allows.

The package is an extra: `pip install '.[retrieval]'`.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline.config import UserError
from pipeline.index.exact import ExactIndex

ROWS_PER_LIST = 256  # that k-means looks at
NEVER_FEWER = 16  # lists


def import_faiss() -> Any:
    """faiss, where it is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import faiss
    except ModuleNotFoundError:
        raise UserError(
            "index.ivf_above: the package faiss is not installed: pip install '.[retrieval]'"
        ) from None
    return faiss


def write_lists(vectors: np.ndarray, path: Path) -> None:
    """Cluster `vectors`, float32 [N, d], into 4 √N lists and write faiss' file at `path`."""
    faiss = import_faiss()
    num_items, dim = vectors.shape
    num_lists = max(NEVER_FEWER, int(4 * math.sqrt(num_items)))

    coarse = faiss.IndexFlatIP(dim)
    lists = faiss.IndexIVFFlat(coarse, dim, num_lists, faiss.METRIC_INNER_PRODUCT)
    lists.cp.seed = 0
    lists.cp.max_points_per_centroid = ROWS_PER_LIST
    lists.train(vectors)
    lists.add(vectors)
    faiss.write_index(lists, str(path))


class ListIndex:
    """Inverted lists over `vectors`, of which a search reads `probes`.

    Where a filter leaves few items, these are compared exactly: the lists would hardly meet them.

    Args:
        vectors: float32 [N, d], for products with rows by number.
        path: what `write_lists` made of them.
        probes: lists that a search reads.
        exact_up_to: allowed items of an exact search.
    """

    def __init__(self, vectors: Tensor, path: Path, probes: int, exact_up_to: int) -> None:
        self.vectors = vectors
        self.exact_up_to = exact_up_to
        self._faiss = import_faiss()
        self._lists = self._faiss.read_index(str(path))
        self._probes = probes

    def search(self, query: Tensor, num: int, allowed: np.ndarray) -> np.ndarray:
        """As `VectorIndex.search`; a few of the best may be missed, see `measure_recall`."""
        num_allowed = int(np.count_nonzero(allowed))
        if num_allowed <= self.exact_up_to:
            rows = np.flatnonzero(allowed)
            few = ExactIndex(self.vectors[torch.from_numpy(rows).to(self.vectors.device)])
            return rows[few.search(query, num, np.ones(len(rows), bool))]

        faiss = self._faiss
        # bit i of the map is row i; the selector keeps a pointer to it
        bits = np.packbits(allowed, bitorder="little")
        selector = faiss.IDSelectorBitmap(bits)
        how = faiss.SearchParametersIVF(sel=selector, nprobe=self._probes)
        wanted = query.detach().cpu().numpy()[None]
        scores, rows = self._lists.search(wanted, min(num, num_allowed), params=how)

        found = rows[0] >= 0  # faiss fills up with -1
        scores, rows = scores[0][found], rows[0][found].astype(np.int64)
        return rows[np.lexsort((rows, -scores))]


def measure_recall(index: "ListIndex", queries: Tensor, num: int) -> float:
    """Share of the `num` best items by exact search that `index` finds as well, over `queries`,
    float32 [Q, d].
    """
    exact = ExactIndex(index.vectors)
    everything = np.ones(len(index.vectors), bool)
    found = total = 0
    for query in queries:
        best = exact.search(query, num, everything)
        found += len(np.intersect1d(best, index.search(query, num, everything)))
        total += len(best)
    return found / total
