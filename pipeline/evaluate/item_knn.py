"""ItemKNN: items that the same users took. The baseline of a retrieval model.

The score of an item is the sum of its cosines with the items of a user's history, where an item is
the set of the users who took it in the training period. With X, users by items, its columns divided
by the roots of their sums, that is XᵀX h for a history h.

Of a few thousand items XᵀX is made once, and a user's scores are the sum of some of its rows. Of
more items no such matrix is made, and each history goes through X and back.
"""

import warnings

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from pipeline.batches.counts import distinct_values
from pipeline.batches.events import ranges
from pipeline.batches.examples import Examples, UserEvents
from pipeline.batches.features import FeatureMaps
from pipeline.batches.labels import positive_rows
from pipeline.batches.stored import StoredUsers

# PyTorch multiplies two sparse matrices by way of a form that it calls beta
warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta state")

MOST_ITEMS = 2**13  # of which all cosines are held: 256 MB in float32


class ItemKNN:
    """Scores of all items for users by their histories.

    Args:
        user, item: int64 [n] each, who took what in the training period; pairs may repeat.
        bits: of the events that count (`retrieval.positives`).
    """

    def __init__(self, user: np.ndarray, item: np.ndarray, num_items: int, bits: int) -> None:
        self.bits, self.num_items = bits, num_items
        pairs = distinct_values(user * self.num_items + item)
        user, item = np.divmod(pairs, self.num_items)
        taken = np.bincount(item, minlength=self.num_items)

        index = torch.from_numpy(np.stack([user, item]))
        shape = (int(user.max(initial=-1)) + 1, self.num_items)
        scale = torch.from_numpy(1 / np.sqrt(np.maximum(taken, 1))).float()
        self.by_user = torch.sparse_coo_tensor(
            index, scale[index[1]], shape, check_invariants=True
        ).coalesce()

        self.cosines: Tensor | None = None  # [N, N]
        if num_items <= MOST_ITEMS:
            self.cosines = torch.sparse.mm(self.by_user.T, self.by_user).to_dense()

    @classmethod
    def fit(cls, stored: StoredUsers, bits: int, end_ms: int, maps: FeatureMaps) -> "ItemKNN":
        """Of the events that count by `bits` before `end_ms`, the end of the training period."""
        users, items, num_users = [], [], 0
        for part in stored.by_bucket():
            events = part.events
            counts = positive_rows(events.action_mask, events.known_mask, bits)
            rows = np.flatnonzero((part.request_time < end_ms) & counts)
            item = maps.item_rows(events.item_id[rows]) - 1
            users.append(part.row_user[rows][item >= 0] + num_users)
            items.append(item[item >= 0])
            num_users += len(part.user_id)
        return cls(np.concatenate(users), np.concatenate(items), len(maps.item_ids), bits)

    def scores(self, users: UserEvents, examples: Examples, maps: FeatureMaps) -> Tensor:
        """float32 [U, N], by the items of each history that count."""
        rows, offsets = ranges(examples.history_begin, examples.history_end)
        events = users.events
        counts = positive_rows(events.action_mask[rows], events.known_mask[rows], self.bits)
        item = maps.item_rows(events.item_id[rows]) - 1
        owner = np.repeat(np.arange(len(examples)), np.diff(offsets))
        kept = counts & (item >= 0)

        # each item of a history once
        pairs = distinct_values(owner[kept] * self.num_items + item[kept])
        owner, item = np.divmod(pairs, self.num_items)
        if self.cosines is not None:
            begins = torch.from_numpy(np.searchsorted(owner, np.arange(len(examples))))
            return embedding_bag(torch.from_numpy(item), self.cosines, begins, mode="sum")

        history = torch.zeros(self.num_items, len(examples))
        history[torch.from_numpy(item), torch.from_numpy(owner)] = 1
        return torch.sparse.mm(self.by_user.T, torch.sparse.mm(self.by_user, history)).T
