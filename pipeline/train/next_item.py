"""The loss of a next item: how well the row before it tells it from other items.

rows before the next items → user vectors ─┐
                                           ├→ −log softmax of the next item's score
items of the training period → vectors ────┘
"""

import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps
from pipeline.config import RunConfig
from pipeline.model.encoders.encoder import Encoded
from pipeline.model.ranker import RankingModel
from pipeline.model.retrieval import RetrievalHead
from pipeline.train.log_partition import log_partition

LOSS_NAME = "next_item"


class NextItemLoss:
    """Summed losses and weights of a batch's next items.

    The items are those of the training period, number i with the code i + 1: an item that training
    never saw could only be learned as wrong.
    """

    def __init__(self, cfg: RunConfig, maps: FeatureMaps, device: torch.device | str) -> None:
        self.cfg, self.id_dropout = cfg.retrieval, cfg.features.item_id_dropout
        codes = torch.from_numpy(maps.item_codes)
        seen = codes[codes[:, 0] > 0]
        self.item_codes = seen[seen[:, 0].argsort()].to(device)

    def __call__(
        self, model: RankingModel, encoded: Encoded, batch: SequenceBatch
    ) -> tuple[Tensor, Tensor]:
        """Sum of the losses and sum of the weights, [1] each."""
        head, rows = model.retrieval, encoded.next_rows
        assert head is not None and rows is not None
        assert batch.next_code is not None and batch.next_weight is not None

        # rows of zeros: nothing of the history was left there
        weight = batch.next_weight * (rows != 0).any(1)
        users = head.user_vectors(rows) * head.score_scale
        losses = self._full(head, users, batch.next_code - 1)
        return (losses * weight).sum().view(1), weight.sum().view(1)

    def _full(self, head: RetrievalHead, users: Tensor, item: Tensor) -> Tensor:
        """[P]: against all items; with label smoothing a share of the target is every item's.

        −(1 − s)·score(item) − s·mean score + log Σ exp score
        """
        items = head.item_vectors(self._codes())
        score = (users * items[item]).sum(1)
        smoothing = self.cfg.label_smoothing
        if smoothing > 0:
            score = torch.lerp(score, users @ items.mean(0), smoothing)
        return log_partition(users, items) - score

    def _codes(self) -> Tensor:
        """The items' codes; as in the history, a share of the ids is read as unknown."""
        if self.id_dropout == 0:
            return self.item_codes
        ids, others = self.item_codes[:, :1], self.item_codes[:, 1:]
        dropped = torch.rand(ids.shape, device=ids.device) < self.id_dropout
        return torch.cat([ids.masked_fill(dropped, 0), others], dim=1)
