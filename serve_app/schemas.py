"""What goes over HTTP: `RankRequest` in, `RankResponse` out. Times are in ms since 1970, UTC."""

import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from pipeline.logs.columns import text_code
from pipeline.schema import WATCH_MS
from serve_app.ids import Id, RequestId

Milliseconds = Annotated[int, Field(ge=0, lt=2**63)]
TimeMs = Annotated[int, Field(ge=0, lt=2**53)]
# The bound makes pydantic read the text as UTF-8, which has no lone surrogates ("\ud800"): they
# would fail between processes, beyond any check.
Name = Annotated[str, Field(min_length=1)]

Part = TypeVar("Part")
# The first part that is wrong ends the check: a million wrong ones would take minutes to tell.
Parts = Annotated[list[Part], Field(fail_fast=True)]


class TextValue(int):
    """The number that stands for a text in a request column, and the text.

    A column of numbers refuses it (`rows.refuse_text_values`).
    """

    text: str

    def __new__(cls, text: str) -> "TextValue":
        made = super().__new__(cls, text_code(text))
        made.text = text
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return TextValue, (self.text,)


def _read_feature(value: Any, read_number: ValidatorFunctionWrapHandler) -> int:
    """The text that the logs have as `TextValue`, or a number."""
    return TextValue(value) if isinstance(value, str) and value else read_number(value)


def own_value(value: int) -> int | str:
    """The value as the client has it."""
    return value.text if isinstance(value, TextValue) else value


# Request columns by name. One that is left out is unknown, which has an embedding of its own.
RequestFeature = Annotated[
    int,
    Field(ge=-(2**31), lt=2**31),
    WrapValidator(_read_feature),
    PlainSerializer(own_value, when_used="json"),
]
RequestFeatures = dict[Name, RequestFeature]
# Numbers that came with an event, by the names of `source.outcome_columns`.
Outcomes = dict[Name, Annotated[float, Field(allow_inf_nan=False)]]

LONGEST_ECHO = 400  # characters of what a client sent that an error repeats


def now_ms() -> int:
    return int(time.time() * 1000)


class StrictModel(BaseModel):
    """A part of a request: a misspelt field, or "5" for 5, is a mistake, said so."""

    model_config = ConfigDict(extra="forbid", strict=True)

    def __reduce__(self) -> tuple[Any, ...]:
        """Between processes as JSON: half of the time that pickling each candidate takes."""
        return type(self).model_validate_json, (self.model_dump_json(exclude_defaults=True),)


class PostedRow(StrictModel):
    """Something that a user was shown, and what came of it."""

    item_id: Id
    event_time: TimeMs
    actions: dict[Name, bool] = Field(
        default_factory=dict,
        description="did the user do it: true or false; an action left out is unknown",
    )
    request_features: RequestFeatures = Field(default_factory=dict)
    watch_ms: Milliseconds | None = None
    outcomes: Outcomes = Field(
        default_factory=dict,
        description="numbers that came with it, such as a price; one left out is unknown",
    )

    def find_outcome(self, name: str) -> float | None:
        """The outcome of this name, None where it is unknown."""
        return self.watch_ms if name == WATCH_MS.name else self.outcomes.get(name)


class HistoryRow(PostedRow):
    """Something that the user was shown before."""

    event_time: TimeMs = Field(description="before request_time_ms; rows may come in any order")
    order_only: bool = Field(
        default=False, description="event_time gives the order of the rows but is no real time"
    )


class Candidate(StrictModel):
    item_id: Id
    request_features: RequestFeatures = Field(
        default_factory=dict, description="override the request's, for this item"
    )


RANK_EXAMPLE = {
    "user_id": 3,
    "request_time_ms": 1_651_766_399_000,
    "request_features": {"tab": 1},
    "candidates": [{"item_id": 10}, {"item_id": 11, "request_features": {"tab": 0}}],
}


def _sent_at(read: Callable[..., "UserHead"], text: tuple[str], time_ms: int) -> "UserHead":
    request = read(*text)
    request.request_time_ms = time_ms
    return request


class UserHead(StrictModel):
    """Whose history a request follows, and as of when.

    The history is that of `user_id` as the server knows it, or the `history` that comes along; with
    both, `user_id` gives the user's features alone.
    """

    user_id: Id | None = None
    history: Parts[HistoryRow] | None = Field(
        default=None,
        description="in the place of what the server knows; without user_id the user's features "
        "are unknown",
    )
    first_position: Annotated[int, Field(ge=0, lt=2**31)] = Field(
        default=0, description="how many rows before `history` were left out of it"
    )
    request_time_ms: TimeMs = Field(
        default_factory=now_ms,
        description="the history is what happened before; a past time asks for past scores",
    )
    request_features: RequestFeatures = Field(default_factory=dict)
    order_by: Name | None = Field(
        default=None, description="the task to order by; default: the model's first"
    )
    trial_key: Annotated[str, Field(min_length=1, max_length=100)] | None = Field(
        default=None,
        description="in the place of user_id where a canary's share is drawn, a session say: the "
        "same key is answered by the same version",
    )

    def __reduce__(self) -> tuple[Any, ...]:
        """As of `StrictModel`, at the time of its arrival. Where that is the default it may be left
        out, and the process that answers would take its own: what is served would be noted at
        another time than the answer says.
        """
        return _sent_at, (*super().__reduce__(), self.request_time_ms)

    @model_validator(mode="after")
    def _some_history(self) -> Self:
        if self.user_id is None and self.history is None:
            raise ValueError("give user_id, history or both, got neither")
        if self.history is None and self.first_position:
            raise ValueError(
                "first_position belongs to history; the server knows that of a user_id"
            )
        return self


class RankHead(UserHead):
    """A rank request without its candidates."""

    top_k: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="answer with the best so many candidates; default: with all"
    )
    explain: bool = Field(
        default=False, description="say of each answered candidate why it has its score"
    )


class RankRequest(RankHead):
    """Score `candidates` for a user the server knows (`user_id`) or for somebody whose `history`
    comes along.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [RANK_EXAMPLE]})

    candidates: Parts[Candidate] = Field(min_length=1)


RANK_ANSWER_EXAMPLE = {
    "request_id": "9f1c4be20a7d5386",
    "model_version": 4,
    "request_time_ms": 1_651_766_399_000,
    "item_ids": [10, 11],
    "scores": {"is_click": [0.31, 0.52], "is_like": [0.02, 0.01]},
    "order": [1, 0],
    "ordered_by": "is_click",
    "unknown_items": 0,
    "unknown_user": False,
    "history_length": 187,
}


class RowEffect(BaseModel):
    """A row of the history, and what it does to a candidate's score."""

    row: int = Field(description="place in the history, 0 is the oldest")
    item_id: int | str | None = Field(
        description="null: a text id that neither the request nor the version's index has"
    )
    event_time: int
    change: float = Field(
        description="the score minus the score without this row: positive where it speaks for the "
        "candidate"
    )


class CandidateRates(BaseModel):
    """One of `features.dense`, as the model reads it for a candidate."""

    rates: dict[str, float] = Field(description="task -> smoothed rate")
    rows: int = Field(description="rows with a known label behind them")


class CandidateReasons(BaseModel):
    """Why a candidate has its score."""

    history: list[RowEffect] = Field(
        description="the five rows whose removal moves the score most, the largest change first"
    )
    rates: dict[str, CandidateRates] = Field(description="name in features.dense -> its rates")
    unknown: list[str] = Field(
        description="what the model did not see in training: item_id, item.NAME of the item table, "
        "request.NAME"
    )


class RankExplanation(BaseModel):
    """Reasons for the scores of `ordered_by`."""

    rows_tried: int = Field(description="newest rows of the history that were left out in turn")
    note: str | None = Field(description="said where that is not the whole history")
    candidates: list[CandidateReasons] = Field(description="follow item_ids")


class RankResponse(BaseModel):
    """`item_ids` and each list of `scores` follow the request's candidates; `order` lists their
    places, best first.

    With `top_k` they hold the best candidates alone, best first, and `order` counts them.
    """

    model_config = ConfigDict(
        protected_namespaces=(), json_schema_extra={"examples": [RANK_ANSWER_EXAMPLE]}
    )

    request_id: str = Field(
        description="names what was served; events that come of it carry it as their request_id"
    )
    model_version: int
    request_time_ms: int
    item_ids: list[int | str] = Field(description="as the request has them")
    scores: dict[str, list[float]] = Field(description="task -> probability of each candidate")
    order: list[int] = Field(
        description="by falling score of `ordered_by`; equal scores keep the request's order"
    )
    candidates: list[int] | None = Field(
        default=None,
        description="there only with top_k: which of the request's candidates item_ids are",
    )
    ordered_by: str
    unknown_items: int = Field(
        description="candidates not seen in training: scored from the shared unknown row"
    )
    unknown_user: bool = Field(
        description="neither a published sequence nor an event has user_id: no history"
    )
    history_length: int
    live_events: bool = Field(
        default=True,
        description="there only where false: the event store did not answer, and the history is "
        "what was published",
    )
    explanation: RankExplanation | None = Field(default=None, description="there only with explain")


EVENT_EXAMPLE = {
    "user_id": 3,
    "item_id": 10,
    "event_time": 1_651_766_399_000,
    "actions": {"is_click": True, "is_like": False},
    "request_features": {"tab": 1},
    "request_id": "9f1c4be20a7d5386",
    "watch_ms": 5300,
}


class Event(PostedRow):
    """Something that the user was shown, and what came of it. (user_id, item_id, event_time) names
    it.
    """

    user_id: Id
    request_features: dict[Name, Annotated[RequestFeature, Field(ge=0, lt=2**31)]] = Field(
        default_factory=dict
    )
    request_id: RequestId | None = Field(
        default=None,
        description="of the answer that showed it, or a name of your own for what was shown "
        "together; default: what has the same event_time",
    )


class EventsRequest(StrictModel):
    """Events in any order. Sending one again adds what was not known of it: an exposure may be
    posted when it happens, its outcome later.
    """

    model_config = ConfigDict(json_schema_extra={"examples": [{"events": [EVENT_EXAMPLE]}]})

    events: Parts[Event] = Field(min_length=1)


EventStatus = Literal["accepted", "merged", "already_there", "conflict", "over_quota"]
END_OF_TIME = 2**62  # ms, after any event
EventKey = tuple[int, int]  # event_time and item_id: one user's event


EVENTS_ANSWER_EXAMPLE = {
    "accepted": 1,
    "merged": 0,
    "already_there": 1,
    "conflict": 0,
    "over_quota": 0,
    "status": ["accepted", "already_there"],
}


class EventsResponse(BaseModel):
    """All of the events are on disk, or were before; but for those that are `over_quota`."""

    model_config = ConfigDict(json_schema_extra={"examples": [EVENTS_ANSWER_EXAMPLE]})

    accepted: int
    merged: int = Field(
        default=0,
        description="known before, and now with more: an action that was unknown or false, a "
        "larger number",
    )
    already_there: int = Field(
        description="sent before with all that it says, or part of the published sequences"
    )
    conflict: int = Field(
        description="sent before with another request column or request_id, which stay"
    )
    over_quota: int = Field(
        default=0,
        description="not kept: the server has as many events of this user as it takes between "
        "two publications",
    )
    status: list[EventStatus] = Field(description="of each event of the request")

    @classmethod
    def of(cls, status: list[EventStatus]) -> "EventsResponse":
        count = status.count
        return cls(
            accepted=count("accepted"),
            merged=count("merged"),
            already_there=count("already_there"),
            conflict=count("conflict"),
            over_quota=count("over_quota"),
            status=status,
        )


class Refusal(BaseModel):
    """A request that this model cannot answer: HTTP 422 naming the field and the value."""

    loc: list[str | int]
    msg: str
    input: str

    @classmethod
    def of(cls, loc: Sequence[str | int], msg: str, value: object) -> "Refusal":
        """What a client sent may be long, or no valid text (lone surrogates): it is repeated in
        part and in ASCII.
        """
        places = [part if isinstance(part, int) else _ascii(part) for part in loc]
        return cls(
            loc=places,
            msg=_ascii(msg),
            input=_ascii(value if isinstance(value, str) else repr(value)),
        )


class RankBatchRequest(StrictModel):
    """Candidates of several users, each with a history and a time of their own."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"requests": [RANK_EXAMPLE]}]})

    requests: Parts[RankRequest] = Field(min_length=1)


class RefusedRow(BaseModel):
    """One of several requests that has no answer, while others have."""

    row: int = Field(description="which of the requests, 0 is the first")
    status: int = Field(description="the HTTP status that it would have had alone")
    detail: list[Refusal] | str


class RankBatchResponse(BaseModel):
    """An answer for each request, in their order; null for those that are `refused`."""

    answers: list[RankResponse | None]
    refused: list[RefusedRow]


PROBLEM_EXAMPLES = [
    {
        "detail": [
            {
                "loc": ["body", "candidates", 0, "item_id"],
                "msg": "must be an integer, as item_id is in the published sequences",
                "input": "x",
            }
        ]
    },
    {"detail": "too much work is waiting"},
]


class Problem(BaseModel):
    """Every answer that is not 200."""

    model_config = ConfigDict(json_schema_extra={"examples": PROBLEM_EXAMPLES})

    detail: list[Refusal] | str


class Ready(BaseModel):
    """A model answers. The ids are those of `ModelInfo`: `jobs.deploy` waits for its own without a
    key.

    `deployments` are those of all replicas, each once: more than one while an update loads, none
    where a replica does not tell in time.
    """

    model_config = ConfigDict(protected_namespaces=())

    status: Literal["ready"] = "ready"
    model_version: int
    deployments: list[str]
    failed_deployment: str | None
    live_events: bool = Field(
        default=True, description="false: the event store does not answer, ranking goes on"
    )


def _ascii(text: str) -> str:
    return text.encode("ascii", "backslashreplace").decode()[:LONGEST_ECHO]


class IndexInfo(BaseModel):
    """The items that the version can recommend."""

    version: str = Field(description="digest of the index's files")
    items: int
    columns: dict[str, str] = Field(
        description="name -> integer, number, text or boolean: what filters and caps may name"
    )
    search: Literal["exact", "ivf", "none"] = Field(
        description="none: the model has no retrieval head, and recommends what is popular"
    )
    dimensions: int = Field(description="of an item's vector; 0 without a retrieval head")
    recall: float = Field(
        description="share of the 100 best items that a search finds, of a sample of users"
    )


class FeatureInfo(BaseModel):
    """One thing that the model reads."""

    name: str = Field(
        description="item_id, or a name behind what has it: item.NAME, user.NAME and request.NAME "
        "are columns, history.NAME an outcome of history rows, rates.NAME what was counted"
    )
    kind: Literal["categorical", "quantile", "list", "buckets", "rates"] = Field(
        description="buckets: of numbers between fixed edges; rates: smoothed, one a task"
    )
    num_values: int | None = Field(
        default=None,
        description="values, buckets of values, that the model tells apart; others are unknown",
    )
    by: list[str] = Field(
        default_factory=list, description="of rates: columns in which the counted rows agree"
    )


class ModelInfo(BaseModel):
    """What is answering now."""

    model_config = ConfigDict(protected_namespaces=())

    model_name: str
    model_version: int
    tasks: list[str]
    request_features: list[str]
    text_features: list[str] = Field(
        default_factory=list,
        description="of request_features, those that are text; the others are integers",
    )
    actions: list[str]
    features: list[FeatureInfo] = Field(
        default_factory=list, description="all that the model reads"
    )
    text_ids: list[str] = Field(
        default_factory=list,
        description="of user_id and item_id, those that are text; the others are integers",
    )
    sequences: str = Field(description="digest of the published sequences behind user_id")
    server_version: str = Field(default="", description="of the software that answers")
    deployment: str = Field(default="", description="id of the update that made it answer")
    failed_deployment: str | None = Field(
        default=None, description="id of a later update that did not load"
    )
    failure: str | None = Field(
        default=None, description="why it did not; what answered before goes on"
    )
    canary_version: int | None = Field(
        default=None, description="answers some users in place of model_version"
    )
    canary_share: float | None = Field(
        default=None, description="how many of the users, the same ones each time"
    )
    shadow_version: int | None = Field(
        default=None, description="ranks copies of the requests and answers none"
    )
    live_events: bool = Field(
        default=True, description="did the event store answer the newest look-up"
    )
    index: IndexInfo | None = Field(
        default=None, description="of /v1/recommend; null: the version was registered without one"
    )


class NoIndex(Exception):
    """The version that answers was registered without an item index."""


class StoreDown(Exception):
    """The event store does not answer at the moment; nothing was acknowledged."""
