"""What goes over HTTP for recommended lists: `RecommendRequest` in, `RecommendResponse` out."""

from typing import Annotated, Literal, Self

import numpy as np
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipeline.recommend.filters import Condition, Range
from pipeline.recommend.retriever import ColumnCap, MarginalRelevance, Wish
from serve_app.ids import Id
from serve_app.schemas import Name, Parts, RequestFeatures, StrictModel, TimeMs, UserHead, now_ms

LONGEST_TEXT = 1000
MOST_VALUES = 1000  # of a filter's list
MOST_EXCLUDED = 10_000

WholeNumber = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Text = Annotated[str, Field(max_length=LONGEST_TEXT)]
Scalar = bool | WholeNumber | Number | Text
Bound = WholeNumber | Number | None


class Exclude(StrictModel):
    """Items that a list must not have."""

    seen: bool = Field(default=True, description="items of the user's history")
    items: Parts[Id] = Field(default_factory=list, max_length=MOST_EXCLUDED)


class RangeFilter(StrictModel):
    """Bounds of a number; one that is left out is none."""

    at_least: Bound = None
    above: Bound = None
    at_most: Bound = None
    below: Bound = None

    @model_validator(mode="after")
    def _some_bound(self) -> Self:
        bounds = (self.at_least, self.above, self.at_most, self.below)
        if all(bound is None for bound in bounds):
            raise ValueError("give at_least, above, at_most or below, got none of them")
        return self


def _told_once(value: object, check: ValidatorFunctionWrapHandler) -> object:
    """One message where each kind of condition would have one of its own."""
    try:
        return check(value)
    except ValidationError:
        rule = (
            "must be a value, a list of 1 to {most} values, or a range by at_least, above, at_most "
            "and below, which are numbers; of dates and times ms since 1970"
        )
        raise PydanticCustomError("filter", rule, {"most": MOST_VALUES}) from None


FilterValue = Annotated[list[Scalar], Field(min_length=1, max_length=MOST_VALUES)]
FilterCondition = Annotated[Scalar | FilterValue | RangeFilter, WrapValidator(_told_once)]
Filters = dict[Name, FilterCondition]


class Diversify(StrictModel):
    """How a list is kept from being all of one kind: `mmr`, or `per` with `at_most`."""

    mmr: Annotated[float, Field(ge=0, le=1)] | None = Field(
        default=None,
        description="weight of relevance (lambda) in maximal marginal relevance, against likeness "
        "to the items before; 1 changes nothing",
    )
    per: Name | None = Field(default=None, description="a column of the index, author_id say")
    at_most: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="items of one value of `per`"
    )

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if (self.per is None) != (self.at_most is None):
            raise ValueError("per and at_most belong together, got one of them")
        if (self.mmr is None) == (self.per is None):
            raise ValueError("give mmr, or per with at_most")
        return self

    def rule(self) -> ColumnCap | MarginalRelevance:
        """The same as the pipeline states it."""
        if self.mmr is not None:
            return MarginalRelevance(self.mmr)
        assert self.per is not None and self.at_most is not None
        return ColumnCap(self.per, self.at_most)


class ListOptions(StrictModel):
    """What a recommended list is to be, whoever it is for."""

    n: Annotated[int, Field(ge=1)] = Field(
        default=20, description="most items of the list; at most serve.max_recommended"
    )
    exclude: Exclude = Field(default_factory=Exclude)
    filter: Filters = Field(
        default_factory=dict,
        description="a condition on each named column of the index: a value, a list of values or "
        "a range. An item whose value is unknown fulfils none",
    )
    diversify: Diversify | None = None
    explain: bool = Field(default=False, description="say of each item why it is there")

    def wish(self) -> Wish:
        """The same as the pipeline states it."""
        conditions: dict[str, Condition] = {}
        for name, value in self.filter.items():
            is_range = isinstance(value, RangeFilter)
            conditions[name] = Range(**value.model_dump()) if is_range else value

        return Wish(
            num=self.n,
            exclude_seen=self.exclude.seen,
            exclude_items=np.array(self.exclude.items, np.int64),
            conditions=conditions,
            diversify=None if self.diversify is None else self.diversify.rule(),
        )


RECOMMEND_EXAMPLE = {
    "user_id": 3,
    "n": 2,
    "request_features": {"tab": 1},
    "exclude": {"items": [12]},
    "filter": {"video_type": "NORMAL", "video_duration": {"below": 60_000}},
    "diversify": {"per": "author_id", "at_most": 1},
}


class RecommendRequest(UserHead, ListOptions):
    """Recommend items to a user the server knows (`user_id`) or to somebody whose `history` comes
    along.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [RECOMMEND_EXAMPLE]})


class BatchRequest(StrictModel):
    """Lists for several users; one request that is refused refuses all."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"requests": [RECOMMEND_EXAMPLE]}]})

    requests: Parts[RecommendRequest] = Field(min_length=1)


class ArrowOptions(ListOptions):
    """What the users of an Arrow body have in common."""

    request_time_ms: TimeMs = Field(default_factory=now_ms)
    request_features: RequestFeatures = Field(default_factory=dict)
    order_by: Name | None = None


Source = Literal["model", "followed", "popular"]


class LikeItem(BaseModel):
    """An item of the user's history."""

    item_id: int | str
    cosine: float = Field(description="of its vector and the recommended item's")


class Explanation(BaseModel):
    """Why an item is in a list."""

    sources: list[Source] = Field(description="all that found it")
    scores: dict[str, float] = Field(description="task -> probability")
    popularity: int = Field(description="rows of the item in the index's popular days")
    unknown_item: bool = Field(
        description="not seen in training: known by its columns and the shared unknown id"
    )
    like: list[LikeItem] = Field(
        description="the nearest items of the history by the retrieval head, the nearest first"
    )


class RecommendedItem(BaseModel):
    """One place of a list."""

    item_id: int | str
    score: float = Field(description="probability of `ordered_by` from the ranking model")
    retrieval_score: float | None = Field(
        description="product with the user's vector; null without history or retrieval head"
    )
    source: Source = Field(description="the first of model, followed, popular that found it")
    title: str | None = Field(default=None, description="of index.title_column")
    why: Explanation | None = Field(default=None, description="with explain")


RECOMMEND_ANSWER_EXAMPLE = {
    "request_id": "9f1c4be20a7d5386",
    "model_version": 4,
    "index_version": "5be1a0c2d4f60718",
    "request_time_ms": 1_651_766_399_000,
    "ordered_by": "is_click",
    "unknown_user": False,
    "history_length": 187,
    "num_allowed": 6120,
    "note": None,
    "took_ms": 21.4,
    "items": [
        {"item_id": 10, "score": 0.52, "retrieval_score": 0.71, "source": "model"},
        {"item_id": 11, "score": 0.31, "retrieval_score": 0.12, "source": "popular"},
    ],
}


class RecommendResponse(BaseModel):
    """A list, the best first; equal scores are in the order of the ids."""

    model_config = ConfigDict(
        protected_namespaces=(), json_schema_extra={"examples": [RECOMMEND_ANSWER_EXAMPLE]}
    )

    request_id: str = Field(
        description="names what was served; events that come of it carry it as their request_id"
    )
    model_version: int
    index_version: str
    request_time_ms: int
    ordered_by: str = Field(description="a task; `popularity` for who has no history")
    unknown_user: bool = Field(
        description="neither a published sequence nor an event has user_id: no history"
    )
    history_length: int
    num_allowed: int = Field(description="items that exclusions and filters left")
    note: str | None = Field(description="said of a list that is empty or what is popular")
    took_ms: float = Field(description="of the work for this list, without waiting")
    items: list[RecommendedItem]
    live_events: bool = Field(
        default=True, description="there only where false: the event store did not answer"
    )


class BatchResponse(BaseModel):
    """A list for each request, in their order."""

    lists: list[RecommendResponse]
