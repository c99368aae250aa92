"""The ranker as the routes see it, and how a route gets at it.

`make_api` keeps one replica and one set of counters in `api.state`. A route names them as
parameters (`replica: RunningReplica`), so a test passes a replica of its own and needs no Ray.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Protocol

from fastapi import Depends, Request

from serve_app.columns import RankColumns, RankedColumns
from serve_app.metrics import IngressMetrics
from serve_app.page.schemas import Question, Shown
from serve_app.recommend.lists import RecommendedList
from serve_app.recommend.schemas import RecommendRequest
from serve_app.schemas import EventsRequest, EventsResponse, ModelInfo, Refusal


class Overloaded(Exception):
    """Too many requests wait already."""


class Unavailable(Exception):
    """No replica answers at the moment."""


class Replica(Protocol):
    """A ranker behind HTTP, in this process or in another.

    Each method may raise `Overloaded` or `Unavailable`.
    """

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal: ...

    async def recommend(
        self, requests: Sequence[RecommendRequest]
    ) -> list[RecommendedList | Refusal]:
        """A list or a refusal for each; may raise `NoIndex`."""
        ...

    async def append_events(self, request: EventsRequest) -> EventsResponse | Refusal: ...

    async def model_info(self) -> ModelInfo: ...

    async def show(self, question: Question) -> Shown | Refusal:
        """What the page for people asks for."""
        ...

    async def deployment_ids(self) -> list[str]:
        """Ids of the updates that the running replicas answer with, each once.

        Empty where a replica does not tell.
        """
        ...

    async def ingress_metrics(self, own: bytes) -> Mapping[str, bytes]:
        """Exposition text of each ingress, by its id; `own` is this one's."""
        ...

    async def replica_metrics(self) -> Mapping[str, bytes]:
        """Exposition text of each replica, by the replica's id."""
        ...


# Coroutines: FastAPI would run plain functions in a thread, a switch for every request.
async def _running_replica(http: Request) -> Replica:
    return http.app.state.replica


async def _request_counts(http: Request) -> IngressMetrics:
    return http.app.state.counts


RunningReplica = Annotated[Replica, Depends(_running_replica)]
RequestCounts = Annotated[IngressMetrics, Depends(_request_counts)]
