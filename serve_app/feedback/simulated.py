"""People who do not exist: they ask a server for lists and click, so that the loop can be watched.

    a visit: user, time → POST /v1/recommend (or /v1/rank) → clicks → POST /v1/events

What they like cannot be read from the logs: one item in five is in fashion from the first visit on,
whoever asks. A model that learns from what was served puts more of those into its lists. Each of
them acts as often as the user does in the logs, so that what a model has learned of a user holds.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from pipeline.config import UserError
from pipeline.logs.ids import OwnId, id_code
from pipeline.schema import EventColumns
from serve_app.feedback.served_log import read_served
from serve_app.replay import post_body

SHOWN = 10  # items of an answer
ONE_IN = 5  # items is in fashion
MOST_LIKELY = 0.95  # chance of a click on what is in fashion, at most
GAIN = 3.0  # how much more it is clicked than items in the logs are
PRIOR_ROWS = 20  # of all users, that count beside a user's own
POLL_S = 0.5


@dataclass(slots=True)
class Visits:
    """What came of them."""

    answers: int = 0
    shown: int = 0
    in_fashion: int = 0  # of those shown
    clicks: int = 0

    @property
    def fashion_share(self) -> float:
        """Share of what was shown that is in fashion: .2 by chance."""
        return self.in_fashion / max(self.shown, 1)


@dataclass(frozen=True, slots=True)
class Crowd:
    """Who visits, and what they may see and do."""

    users: np.ndarray  # [U], ids as clients have them
    items: np.ndarray
    rates: dict[str, np.ndarray]  # [U], of each action in the logs; the first is the click
    by_rank: bool = False  # they ask for an order of chance items: the version has no index

    def rates_of(self, user: int) -> dict[str, float]:
        """Those of the user at this place of `users`."""
        return {name: float(rates[user]) for name, rates in self.rates.items()}


def click_chance(item: OwnId, click_rate: float) -> float:
    """The chance that a shown item is clicked by a user with this rate of clicks: over all items
    that rate again.
    """
    in_fashion = min(GAIN * click_rate, MOST_LIKELY)
    if is_in_fashion(item):
        return in_fashion
    return (ONE_IN * click_rate - in_fashion) / (ONE_IN - 1)


def action_rates(
    table: pa.Table, columns: EventColumns, actions: Sequence[str]
) -> dict[str, np.ndarray]:
    """Share of each user's rows that have an action, of the SEQUENCE rows where it is known,
    float64 [U] for each action; `PRIOR_ROWS` rows with the rate of all users count beside them.
    """
    known = table["known_mask"].combine_chunks()
    num_rows = known.value_lengths().to_numpy(zero_copy_only=False)
    user_of_row = np.repeat(np.arange(table.num_rows), num_rows)
    known_bits = known.flatten().to_numpy()
    done_bits = table["action_mask"].combine_chunks().flatten().to_numpy()

    rates = {}
    for name in actions:
        bit = columns.actions.index(name)
        num_known = np.bincount(user_of_row, known_bits >> bit & 1, table.num_rows)
        num_done = np.bincount(user_of_row, done_bits >> bit & 1, table.num_rows)
        of_all = num_done.sum() / max(num_known.sum(), 1)
        rates[name] = (num_done + PRIOR_ROWS * of_all) / (num_known + PRIOR_ROWS)
    return rates


def is_in_fashion(item: OwnId) -> bool:
    """True for one item in five, by its id alone."""
    return id_code(item) % ONE_IN == 0


def visit_server(
    client: httpx.Client,
    crowd: Crowd,
    times_ms: np.ndarray,
    rng: np.random.Generator,
    *,
    posts: bool = True,
) -> tuple[Visits, set[str]]:
    """A visit at each of the times, which ascend; returns what came of them and the answers' names.

    Without `posts` nobody does anything: the lists are looked at alone.

    Raises:
        UserError: the server refuses something.
    """
    visits, names = Visits(), set()
    for asked_at in times_ms.tolist():
        place = int(rng.integers(len(crowd.users)))
        user = crowd.users[place].item()
        request_id, shown = _ask_items(client, crowd, user, asked_at, rng)
        names.add(request_id)
        visits.answers += 1
        visits.shown += len(shown)
        visits.in_fashion += sum(map(is_in_fashion, shown))
        if not posts:
            continue

        events = list(_click_items(shown, crowd.rates_of(place), rng))
        for event in events:
            event |= {"user_id": user, "event_time": asked_at, "request_id": request_id}
        visits.clicks += len(events)
        if events:
            post_body(client, "/v1/events", {"events": events})
    return visits, names


def _ask_items(
    client: httpx.Client, crowd: Crowd, user: OwnId, asked_at: int, rng: np.random.Generator
) -> tuple[str, list[OwnId]]:
    """The answer's name, and the items that it shows."""
    body: dict[str, Any] = {"user_id": user, "request_time_ms": asked_at}
    if not crowd.by_rank:
        answer, _ = post_body(client, "/v1/recommend", body | {"n": SHOWN})
        return answer["request_id"], [item["item_id"] for item in answer["items"]]

    num = min(3 * SHOWN, len(crowd.items))
    drawn = rng.choice(crowd.items, num, replace=False).tolist()
    body["candidates"] = [{"item_id": item} for item in drawn]
    answer, _ = post_body(client, "/v1/rank", body)
    return answer["request_id"], [answer["item_ids"][row] for row in answer["order"][:SHOWN]]


def _click_items(
    shown: list[OwnId], rates: dict[str, float], rng: np.random.Generator
) -> Iterator[dict[str, Any]]:
    """An event for each item that is clicked; nothing is said of the others."""
    click, *further = rates
    for item in shown:
        if rng.random() >= click_chance(item, rates[click]):
            continue

        # after a click, so that over all rows it is as often as in the logs
        did = {click: True}
        for name in further:
            did[name] = bool(rng.random() < rates[name] / rates[click])
        yield {"item_id": item, "actions": did}


def wait_for_rows(folder: str, names: set[str], longest_s: float) -> None:
    """Return when the served log has a row of each of these answers.

    Raises:
        UserError: it has not in time.
    """
    ends = time.monotonic() + longest_s
    while missing := names - set(read_served(folder, ["request_id"])["request_id"].to_pylist()):
        if time.monotonic() > ends:
            raise UserError(f"{folder}: {len(missing)} of {len(names)} answers are not written")
        time.sleep(POLL_S)
