"""An API over a replica that answers at once, and requests to it."""

import asyncio
import hashlib
import pickle
from collections.abc import Sequence
from typing import TypeVar

import httpx
import numpy as np

from serve_app.columns import RankColumns, RankedColumns
from serve_app.page.schemas import Question, Shown
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import RecommendRequest
from serve_app.schemas import (
    EventsRequest,
    EventsResponse,
    ModelInfo,
    NoIndex,
    Refusal,
)

Sent = TypeVar("Sent")
RANK = {"user_id": 3, "candidates": [{"item_id": 1}, {"item_id": 2}]}
EVENTS = {"events": [{"user_id": 3, "item_id": 5, "event_time": 1_651_500_000_000}]}


class Fixed:
    """A replica that knows nothing."""

    failing: Exception | None = None

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        head = {
            "model_version": 7,
            "request_time_ms": request.head.request_time_ms,
            "ordered_by": "is_click",
        }
        head |= {"unknown_items": 0, "unknown_user": False, "history_length": 0}
        scores = {"is_click": np.full(len(request), 0.5, np.float32)}
        return RankedColumns(head, request.item_id, scores, np.arange(len(request)))

    async def recommend(
        self, requests: Sequence[RecommendRequest]
    ) -> list[RecommendedList | Refusal]:
        raise NoIndex

    async def append_events(self, request: EventsRequest) -> EventsResponse | Refusal:
        if self.failing:
            raise self.failing
        return EventsResponse.of(["accepted"] * len(request.events))

    async def model_info(self) -> ModelInfo:
        return ModelInfo(
            model_name="m",
            model_version=7,
            tasks=[],
            request_features=[],
            actions=[],
            sequences="",
            deployment="d",
        )

    async def show(self, question: Question) -> Shown | Refusal:
        raise NotImplementedError("a server without a page")

    async def deployment_ids(self) -> list[str]:
        return ["d"]

    async def ingress_metrics(self, own: bytes) -> dict[str, bytes]:
        return {"own": own}

    async def replica_metrics(self) -> dict[str, bytes]:
        return {}


def between_processes(request: Sent) -> Sent:
    """The request as a replica behind the ingress gets it."""
    return pickle.loads(pickle.dumps(request))


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def call(
    api,
    method: str,
    path: str,
    key: str | None = None,
    headers: dict[str, str] | None = None,
    **arguments,
) -> httpx.Response:
    headers = dict(headers or {})
    if key is not None:
        headers["Authorization"] = f"Bearer {key}"

    async def send() -> httpx.Response:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(api), base_url="http://test"
        ) as client:
            return await client.request(method, path, headers=headers, **arguments)

    return asyncio.run(send())
