"""Past requests as recommend requests, over HTTP and offline: are the lists the same?

past test requests → `OfflineRecommender` ↔ POST /v1/recommend
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.batches.examples import Examples, UserEvents
from pipeline.config import ServeConfig
from pipeline.index.histories import PastRows
from pipeline.logs.ids import OwnId
from pipeline.recommend.everybody import load_recommender
from pipeline.recommend.offline import Audience, UserList
from pipeline.recommend.retriever import Wish
from serve_app.replay import (
    DemoRequest,
    PastPeriod,
    open_client,
    post_body,
    use_own_ids,
)

PATH = "/v1/recommend"
SHOWN = 10  # items of a list


@dataclass(frozen=True, slots=True)
class ListReport:
    num_requests: int
    num_equal: int  # the same items in the same order
    max_abs_diff: float  # of the scores, place by place
    p50_ms: float  # of one client that waits for each answer
    p99_ms: float


def replay_lists(period: PastPeriod, serve: ServeConfig, url: str, model_dir: Path) -> ListReport:
    """`serve.parity_requests` requests of the period against the server at `url`, which serves the
    version in `model_dir`.

    Raises:
        UserError: the version has no index, or the test period holds no request.
    """
    recommender = load_recommender(serve, model_dir)
    users, examples = period.sample_requests(serve.parity_requests)
    audience = past_audience(users, examples, serve.max_history)
    wish = Wish(num=min(SHOWN, serve.max_recommended))
    by_default = recommender.loaded.cfg.tasks[0]  # the order of a request that names no task
    lists = recommender.recommend(audience, wish, by_default)

    bodies = []
    for number in range(len(lists)):
        bodies.append(request_body(audience, number) | {"n": wish.num})
    use_own_ids(bodies, period.stored.folder)

    num_equal, worst, elapsed_ms = 0, 0.0, []
    with open_client(serve, url) as client:
        for body, expected in zip(bodies, lists, strict=True):
            answer, took_ms = post_body(client, PATH, body)
            elapsed_ms.append(took_ms)
            num_equal += served_items(answer) == expected.item_id.tolist()
            worst = float(np.maximum(worst, score_difference(answer, expected)))  # keeps a NaN

    p50, p99 = np.percentile(elapsed_ms, [50, 99])
    return ListReport(len(lists), num_equal, worst, float(p50), float(p99))


def past_audience(users: UserEvents, examples: Examples, max_history: int) -> Audience:
    """The users of past requests, as of each one's time and with its request columns."""
    begin = np.maximum(examples.history_begin, examples.history_end - max_history)
    left_out = begin - users.events.offsets[examples.user]
    first_position = users.first_position[examples.user] + left_out
    first = examples.target_begin
    return Audience(
        user_id=users.user_id[examples.user],
        time_ms=users.request_time[first],
        past=PastRows(users.events.take(begin, examples.history_end), first_position),
        features={name: column[first] for name, column in users.events.request.items()},
    )


def request_body(audience: Audience, number: int) -> dict[str, Any]:
    """One user's request as it would be sent."""
    features = {}
    for name, column in audience.features.items():
        if column[number] >= 0:
            features[name] = int(column[number])
    return {
        "user_id": int(audience.user_id[number]),
        "request_time_ms": int(audience.time_ms[number]),
        "request_features": features,
    }


def served_items(answer: dict[str, Any]) -> list[int | str]:
    return [item["item_id"] for item in answer["items"]]


def score_difference(answer: dict[str, Any], expected: UserList) -> float:
    """The largest difference of a place's score; infinite where the lists are not of one length."""
    scores = np.array([item["score"] for item in answer["items"]])
    if len(scores) != len(expected.score):
        return np.inf
    return float(np.abs(scores - expected.score).max(initial=0.0))


def demo_list(demo: DemoRequest, serve: ServeConfig, url: str, top: int = SHOWN) -> str:
    """The list that the server recommends to the user of the request, as plain text."""
    body = dict(demo.body)
    del body["candidates"]
    body["n"] = min(top, serve.max_recommended)
    with open_client(serve, url) as client:
        answer, _ = post_body(client, PATH, body)

    lines = [
        f"recommended to user {body['user_id']}: the best of {answer['num_allowed']} items that "
        f"were not seen, index {answer['index_version']}",
        f"{'':>4} {'item':>10}{'score':>10}{'retrieval':>11}  {'source':10}what happened",
    ]
    for place, item in enumerate(answer["items"], 1):
        lines.append(f"{place:>4} {_item_line(item, demo.happened)}".rstrip())
    return "\n".join(lines)


def _item_line(item: dict[str, Any], did: Mapping[OwnId, str]) -> str:
    """An item of the answer, and what the user `did` with it where it was shown next."""
    product = item["retrieval_score"]
    shown = f"{'-':>11}" if product is None else f"{product:11.4f}"

    happened = ""
    if item["item_id"] in did:
        happened = f"shown next: {did[item['item_id']] or 'nothing'}"
    title = item.get("title") or ""
    return (
        f"{item['item_id']:>10}{item['score']:10.4f}{shown}  {item['source']:10}{happened}  {title}"
    )
