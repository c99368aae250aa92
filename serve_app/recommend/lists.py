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
    role: str = ""  # of the version: champion or canary
    sequences: str = ""  # digest of the published sequences behind the history
    task: str = ""  # whose probability `score` is

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """float32 [K] by task: of the one that the list is ordered by."""
        return {self.task: self.score}

    @property
    def ranker_ms(self) -> float:
        """Of all stages of the list's work."""
        return self.head["took_ms"]

    @property
    def model_version(self) -> int:
        return self.head["model_version"]

    @property
    def request_id(self) -> str:
        """Its name; there once it is on its way to a client."""
        return self.head["request_id"]

    def with_request_id(self, request_id: str) -> "RecommendedList":
        """The same under an id of its own."""
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
