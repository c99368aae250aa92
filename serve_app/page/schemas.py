"""What the page for people asks a replica, and what it is told.

These routes belong to the page and may change with it; clients use /v1.
"""

from pydantic import BaseModel, Field

from serve_app.ids import Id
from serve_app.schemas import Parts, StrictModel

# Begins the trial_key of whatever the page asks: it looks at lists and serves nobody, so they are
# not in the served log.
TRIAL_KEY = "page-"
MOST_ITEMS = 1000  # of one question


class StartQuestion(StrictModel):
    """What to begin with."""


class UserQuestion(StrictModel):
    """What did this user do lately?"""

    user_id: Id


class ItemsQuestion(StrictModel):
    """What is known of these items?"""

    item_ids: Parts[Id] = Field(min_length=1, max_length=MOST_ITEMS)


Question = StartQuestion | UserQuestion | ItemsQuestion


class ExampleUser(BaseModel):
    """A user to begin with."""

    user_id: int | str
    num_events: int


class PageStart(BaseModel):
    """What the page needs before anybody is chosen."""

    clock_ms: int = Field(description="the page's present")
    is_past: bool = Field(description="the present is the end of the published events")
    users: list[ExampleUser]
    candidates: list[int | str] = Field(description="items to rank: popular ones and others")
    list_length: int = Field(description="of a recommended list")
    trial_keys: dict[str, str] = Field(
        description="role -> a trial_key that it answers: champion, and canary where there is one"
    )


class ItemFacts(BaseModel):
    """What is known of an item before anybody ranks it."""

    item_id: int | str
    title: str | None
    picture: str | None
    is_known: bool = Field(description="seen in training")
    num_shown: int = Field(description="in the training period")
    percentile: float | None = Field(
        description="share of the items that were shown less often, in percent"
    )


class TimelineRow(BaseModel):
    """Something that the user was shown."""

    item_id: int | str
    event_time: int | None = Field(description="null: only the order is known")
    actions: dict[str, bool] = Field(description="those that are known")
    watch_ms: int | None
    request_features: dict[str, int]


class Timeline(BaseModel):
    """The newest rows of a user's history, the oldest first, and the items in them."""

    user_id: int | str
    unknown_user: bool
    num_events: int
    live_events: bool
    rows: list[TimelineRow]
    items: list[ItemFacts]


Shown = PageStart | Timeline | list[ItemFacts]
