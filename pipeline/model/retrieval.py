"""The retrieval head: vectors of users and of items, whose product is the score.

    encoder's row of a user's newest event ─▶ `user_vectors` ─┐
                                                              ├─▶ score of every item
    codes of an item's id and columns ─────▶ `item_vectors` ──┘

The encoder is the ranking model's, and so are the tables that items are looked up in. With
`retrieval.score: cosine` the vectors have length 1, so that their inner product is the cosine and
orders items as the score does.
"""

import torch
from torch import Tensor, nn

from pipeline.config import FeatureConfig, ModelConfig, RetrievalConfig
from pipeline.model.tokens import ContentEncoder

NORM_EPS = 1e-6  # lower bound of the length that a vector is divided by


class RetrievalHead(nn.Module):
    """Linear maps of encoder rows and of items to vectors of `retrieval.dim` numbers.

    Args:
        width: of an encoder's row.
        content: the token encoder's part that embeds items; it stays the token encoder's.
    """

    def __init__(
        self,
        cfg: RetrievalConfig,
        features: FeatureConfig,
        model: ModelConfig,
        width: int,
        content: ContentEncoder,
    ) -> None:
        super().__init__()
        self.cfg = cfg
        self.num_request = len(features.request)
        # not registered: a weight has one name in a checkpoint
        self._content = [content]

        item_width = model.d_model
        if cfg.item_tower == "linear":
            columns = features.item.values()
            item_width = features.item_id_dim + sum(column.dim for column in columns)
        self.user = nn.Linear(width, cfg.dim)
        self.item = nn.Linear(item_width, cfg.dim)

    def user_vectors(self, rows: Tensor) -> Tensor:
        """float32 [n, dim], from rows [n, width] such as `Encoded.last_history_row`.

        A user without history has a row of zeros, whose vector says nothing.
        """
        return self._finish(self.user(rows.to(self.user.weight.dtype)))

    def item_vectors(self, item_codes: Tensor) -> Tensor:
        """float32 [n, dim], from int32 [n, 1 + item columns]: rows of `FeatureMaps.item_codes`.

        An item that training never saw has the code 0 in the place of its id, and the vector of its
        columns.
        """
        content = self._content[0]
        if self.cfg.item_tower == "linear":
            rows = content.item_features(item_codes)
        else:
            unknown = item_codes.new_zeros(len(item_codes), self.num_request)
            rows = content(item_codes, unknown)
        return self._finish(self.item(rows.to(self.item.weight.dtype)))

    def _finish(self, vectors: Tensor) -> Tensor:
        if self.cfg.score == "dot":
            return vectors
        length = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
        return vectors / length.clamp(min=NORM_EPS)

    @property
    def score_scale(self) -> float:
        """Factor from inner products of the vectors to scores."""
        return 1 / self.cfg.temperature if self.cfg.score == "cosine" else 1.0
