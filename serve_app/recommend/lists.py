"""The answer to a recommend request as columns, on its way from a replica to a client."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from serve_app.recommend.schemas import Explanation, RecommendedItem, RecommendResponse


@dataclass(frozen=True, slots=True)
class RecommendedList:
    """The K items of a list, the best first."""

    head: dict[str, Any]  # the fields of `RecommendResponse` that are not per item
    item_id: np.ndarray  # int64 [K], or text
    score: np.ndarray  # float32 [K]
    retrieval_score: np.ndarray  # float32 [K], nan where there is none
    source: list[str]
    title: list[str | None] | None = None
    why: list[Explanation] | None = None

    @property
    def model_version(self) -> int:
        return self.head["model_version"]

    def with_request_id(self, request_id: str) -> "RecommendedList":
        """The same under the id of the HTTP request that it answers."""
        return replace(self, head={"request_id": request_id} | self.head)

    def response(self) -> RecommendResponse:
        """The answer as an object of the HTTP API."""
        return RecommendResponse.model_construct(**self.head, items=list(self._items()))

    def _items(self):
        for place, item_id in enumerate(self.item_id.tolist()):
            retrieval = float(self.retrieval_score[place])
            fields: dict[str, Any] = {
                "item_id": item_id,
                "score": float(self.score[place]),
                "retrieval_score": None if np.isnan(retrieval) else retrieval,
                "source": self.source[place],
            }
            # fields that are not asked for are left out
            if self.title is not None:
                fields["title"] = self.title[place]
            if self.why is not None:
                fields["why"] = self.why[place]
            yield RecommendedItem.model_construct(**fields)
