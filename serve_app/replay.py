"""Past requests once more, over HTTP: does the server say what the evaluation said?

published sequences → past test requests → evaluation path (examples, collate, model) ↔ POST
/v1/rank
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa

from pipeline.batches.collate import candidates, collate
from pipeline.batches.events import Events
from pipeline.batches.examples import Examples, UserEvents, request_examples, user_events
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import evaluation_batch, split_bounds
from pipeline.batches.stored import StoredUsers
from pipeline.config import RunConfig, ServeConfig, UserError
from pipeline.index.folder import load_indexed
from pipeline.logs.ids import OwnId
from pipeline.model.artifact import LoadedModel
from pipeline.model.inference.quantize import as_served
from pipeline.schema import WATCH_MS, EventColumns
from pipeline.sequences import store
from pipeline.sequences.dictionary import own_ids
from serve_app.ranking.ranker import candidate_probabilities

WARM_UP = 5  # requests sent before the clock counts
TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class PastPeriod:
    """The test period of published sequences, whose requests are sent once more."""

    stored: StoredUsers
    begin_ms: int
    end_ms: int  # behind the last
    max_history: int | None  # rows that the evaluation reads, as `examples.max_history`
    seed: int  # of what is drawn

    @classmethod
    def of_run(cls, cfg: RunConfig) -> "PastPeriod":
        """That of a run, by its own split."""
        stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
        begin_ms, end_ms = split_bounds(cfg.split, "test")
        return cls(stored, begin_ms, end_ms, cfg.examples.max_history, cfg.seed)

    def sample_requests(self, num: int) -> tuple[UserEvents, Examples]:
        """`num` requests, or all there are, from as many buckets in random order as it takes.

        Raises:
            UserError: there is none.
        """
        folder, source, features = self.stored.folder, self.stored.source, self.stored.features
        manifest = self.stored.read_manifest()
        rng = np.random.default_rng(self.seed)

        tables: list[pa.Table] = []
        found = 0
        for index in rng.permutation(len(manifest.buckets)):
            table = store.read_bucket(folder, manifest, int(index))
            tables.append(table)
            of_bucket = user_events(table, source, features)
            found += len(request_examples(of_bucket, self.begin_ms, self.end_ms))
            if found >= num:
                break

        users = user_events(pa.concat_tables(tables), source, features)
        examples = request_examples(users, self.begin_ms, self.end_ms, self.max_history)
        if len(examples) == 0:
            raise UserError("split.t_test: the test period holds no request to replay")
        return users, examples[np.sort(rng.permutation(len(examples))[:num])]


@dataclass(frozen=True, slots=True)
class PastRequest:
    """A request as it would be sent, and what the evaluation path scores for its candidates."""

    body: dict[str, Any]
    scores: np.ndarray  # float32 [C, tasks]


@dataclass(frozen=True, slots=True)
class Report:
    num_requests: int
    max_abs_diff: float  # over all candidates and tasks
    p50_ms: float  # of one client that waits for each answer
    p99_ms: float


def replay(period: PastPeriod, serve: ServeConfig, url: str, model_dir: Path) -> Report:
    """`serve.parity_requests` requests of the period against the server at `url`, which serves the
    model in `model_dir`.

    Half ask by user_id as of their time; half bring their history along, and user_id for the user's
    features.

    Raises:
        UserError: the test period holds no request.
    """
    loaded, _ = load_indexed(model_dir)
    as_served(loaded.model, serve)  # what that costs is the evaluation's to say
    requests = past_requests(period, serve, loaded)

    worst, elapsed_ms = 0.0, []
    with open_client(serve, url) as client:
        for past in requests[:WARM_UP]:
            post_body(client, "/v1/rank", past.body)

        for past in requests:
            answer, took_ms = post_body(client, "/v1/rank", past.body)
            elapsed_ms.append(took_ms)
            served = np.array([answer["scores"][task] for task in loaded.cfg.tasks]).T
            difference = np.abs(served - past.scores).max()
            worst = float(np.maximum(worst, difference))  # keeps a NaN

    p50, p99 = np.percentile(elapsed_ms, [50, 99])
    return Report(len(requests), worst, float(p50), float(p99))


def past_requests(period: PastPeriod, serve: ServeConfig, loaded: LoadedModel) -> list[PastRequest]:
    """A seeded sample of the period's requests, each filled up to `serve.parity_candidates` with
    popular items.
    """
    users, examples = period.sample_requests(serve.parity_requests)
    half = len(examples) // 2
    num_items = serve.parity_candidates

    requests = []
    for i in range(len(examples)):
        one = examples[i : i + 1]
        requests.append(_past(loaded, users, one, num_items, with_history=i >= half))

    use_own_ids([past.body for past in requests], period.stored.folder)
    for past in requests:
        leave_out_long_history(past.body, serve)
    return requests


def leave_out_long_history(body: dict[str, Any], limits: ServeConfig) -> None:
    """Have a rank request bring no history that is more than the server takes; it then reads the
    user's own.
    """
    if "history" not in body:
        return
    too_long = len(body["history"]) > limits.max_history
    if too_long or len(json.dumps(body)) > limits.max_body_bytes:
        del body["history"], body["first_position"]


def use_own_ids(bodies: Sequence[dict[str, Any]], sequence_dir: Path) -> None:
    """Put the ids that clients have in the place of codes, in the bodies of rank requests."""
    manifest = store.read_manifest(sequence_dir)
    rows: list[dict[str, Any]] = []
    for body in bodies:
        rows += [*body.get("candidates", ()), *body.get("history", ())]

    for column, named in (("user_id", bodies), ("item_id", rows)):
        codes = np.array([one[column] for one in named], np.int64)
        texts = own_ids(sequence_dir, manifest, column, codes).to_pylist()
        for one, text in zip(named, texts, strict=True):
            one[column] = text


def _past(
    loaded: LoadedModel, users: UserEvents, one: Examples, num_items: int, *, with_history: bool
) -> PastRequest:
    """The request of one example: its own rows as the evaluation scores them, then popular items at
    its time.
    """
    own = evaluation_batch(users, one, loaded.maps, loaded.cfg)
    scores = candidate_probabilities(loaded.model, own.batch)
    row = int(one.target_begin[0])
    features = _features(users.events, row)

    # what is asked for
    asked = []
    for item, i in zip(own.item_id.tolist(), own.rows.tolist(), strict=True):
        asked.append({"item_id": item, "request_features": _features(users.events, i)})
    fill = _popular(loaded.maps, num_items - len(asked), own.item_id)
    if len(fill):
        scores = np.concatenate([scores, _score_items(loaded, users, one, fill, features)])
        asked += [{"item_id": item} for item in fill.tolist()]

    # by whom, and when
    body: dict[str, Any] = {
        "user_id": int(users.user_id[one.user[0]]),
        "request_time_ms": int(own.event_time[0]),
        "request_features": features,
    }
    if with_history:
        # all that there is: the server reads the newest of them, as the evaluation does
        rows = range(int(users.events.offsets[one.user[0]]), int(one.history_end[0]))
        columns = loaded.cfg.source.events
        body["history"] = [_history_row(users.events, i, columns) for i in rows]
        body["first_position"] = int(users.first_position[one.user[0]])
    return PastRequest(body | {"candidates": asked}, scores)


def _score_items(
    loaded: LoadedModel,
    users: UserEvents,
    one: Examples,
    items: np.ndarray,
    features: dict[str, int],
) -> np.ndarray:
    """`items` after the example's history, at its request's time."""
    history = users.events.take(one.history_begin, one.history_end)
    left_out = one.history_begin - users.events.offsets[one.user]
    request = {}
    for name in users.events.request:
        request[name] = np.full(len(items), features.get(name, -1), np.int32)

    targets = candidates(
        history,
        users.first_position[one.user] + left_out,
        items,
        np.array([0, len(items)]),
        users.request_time[one.target_begin],
        request,
        loaded.maps,
        loaded.cfg.inputs,
    )
    batch = collate(history, targets, users.user_id[one.user], loaded.maps, loaded.cfg.inputs)
    return candidate_probabilities(loaded.model, batch)


def _popular(maps: FeatureMaps, num: int, besides: np.ndarray) -> np.ndarray:
    """The `num` most popular items of the training period that are not in `besides`."""
    items = maps.popular_items(max(num, 0) + len(besides))
    return items[~np.isin(items, besides)][: max(num, 0)]


def _features(events: Events, row: int) -> dict[str, int]:
    return {name: int(column[row]) for name, column in events.request.items() if column[row] >= 0}


def _history_row(events: Events, row: int, columns: EventColumns) -> dict[str, Any]:
    """A row of the history, as a client posts it."""
    action_mask, known_mask = int(events.action_mask[row]), int(events.known_mask[row])
    return {
        "item_id": int(events.item_id[row]),
        "event_time": int(events.event_time[row]),
        "order_only": bool(events.order_only[row]),
        **_outcomes(columns, events, row),
        "actions": dict(_actions(columns.actions, action_mask, known_mask)),
        "request_features": _features(events, row),
    }


def _outcomes(columns: EventColumns, events: Events, row: int) -> dict[str, Any]:
    """`watch_ms` and `outcomes` of a history row, as far as the model reads them."""
    watch_ms, outcomes = None, {}
    for column in columns.outcomes:
        if column.name not in events.outcomes:
            continue
        value = events.outcomes[column.name][row].item()
        if column.is_unknown(value):
            continue
        if column == WATCH_MS:
            watch_ms = value
        else:
            outcomes[column.name] = value
    return {"watch_ms": watch_ms, "outcomes": outcomes}


def _actions(names: Sequence[str], action_mask: int, known_mask: int) -> Iterator[tuple[str, bool]]:
    """The actions that are known of a row, and which of them happened."""
    for bit, name in enumerate(names):
        if known_mask >> bit & 1:
            yield name, bool(action_mask >> bit & 1)


def post_body(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> tuple[dict[str, Any], float]:
    """The answer, and the ms it took; a server with a rate limit is asked again when it says.

    Raises:
        UserError: another answer than 200.
    """
    while True:
        started = time.perf_counter()
        answer = client.post(path, json=body)
        took_ms = (time.perf_counter() - started) * 1000
        if answer.status_code == 200:
            return answer.json(), took_ms
        if answer.status_code != 429:
            raise UserError(
                f"POST {client.base_url}{path} answered {answer.status_code}: {answer.text[:500]}"
            )
        time.sleep(float(answer.headers["Retry-After"]))


def key_header(serve: ServeConfig) -> dict[str, str]:
    """With which a job may ask the server that it started.

    Raises:
        UserError: the server asks for a key, and there is none to be read.
    """
    file = serve.client_key_file
    if file is None:
        if serve.api_keys_file is not None:
            raise UserError(
                "serve.client_key_file must hold a key for this job's own requests: "
                "serve.api_keys_file is set"
            )
        return {}
    try:
        return {"Authorization": f"Bearer {Path(file).read_text().strip()}"}
    except OSError as error:
        raise UserError(f"serve.client_key_file: {file}: {error.strerror}") from None


def open_client(serve: ServeConfig, url: str) -> httpx.Client:
    """A client of the server at `url`, which a job has started: with its key, where it asks for
    one.
    """
    return httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=key_header(serve))


@dataclass(frozen=True, slots=True)
class DemoRequest:
    """A rank request to show, and what its user did to those of the items that were shown next."""

    body: dict[str, Any]
    happened: dict[OwnId, str]  # by item; "" where it was nothing


def demo_request(period: PastPeriod, model_dir: Path, num_items: int) -> DemoRequest:
    """One user's next exposures and popular items, `num_items` in all.

    The user is one with many rows both in the period and before it; the time is that of their first
    row in it. What is popular is said by the model in `model_dir`.

    Raises:
        UserError: the period holds no request.
    """
    maps, source = FeatureMaps.load(model_dir), period.stored.source
    users, row = _busy_user(period.stored, period.begin_ms, period.end_ms)
    events = users.events
    user = int(users.row_user[row])

    # the items to ask for: half of them were shown next
    later = np.arange(row, events.offsets[user + 1])
    _, first = np.unique(events.item_id[later], return_index=True)
    shown = later[np.sort(first)][: num_items // 2]
    items = events.item_id[shown]
    fill = _popular(maps, num_items - len(items), items)

    happened = []
    for i in shown:
        action_mask, known_mask = int(events.action_mask[i]), int(events.known_mask[i])
        actions = _actions(source.actions, action_mask, known_mask)
        happened.append(", ".join(name for name, done in actions if done))

    # of a text the code alone is known, which means nothing to people
    features = _features(events, row)
    for name in source.events.text_request:
        features.pop(name, None)

    body = {
        "user_id": int(users.user_id[user]),
        "request_time_ms": int(events.event_time[row]),
        "request_features": features,
        "candidates": [{"item_id": item} for item in [*items.tolist(), *fill.tolist()]],
    }
    use_own_ids([body], period.stored.folder)

    shown_items = [one["item_id"] for one in body["candidates"][: len(happened)]]
    return DemoRequest(body, dict(zip(shown_items, happened, strict=True)))


def _busy_user(stored: StoredUsers, begin: int, end: int) -> tuple[UserEvents, int]:
    """The users of a bucket, and the first row of the test period, from `begin` to `end` (ms), of
    the busiest user of all buckets.
    """
    best: tuple[UserEvents, int] | None = None
    most = 0

    for users in stored.by_bucket():
        inside = (users.request_time >= begin) & (users.request_time < end)
        rows = np.flatnonzero(inside & ~users.events.order_only)

        owners = users.row_user[rows]
        user, first, num_rows = np.unique(owners, return_index=True, return_counts=True)
        num_before = rows[first] - users.events.offsets[user]
        busy = np.minimum(num_rows, num_before) + 1  # a user without history is better than none
        if busy.max(initial=0) > most:
            most, best = int(busy.max()), (users, int(rows[first[busy.argmax()]]))

    if best is None:
        raise UserError("split.t_test: the test period holds no request to rank for")
    return best


def demo_table(
    demo: DemoRequest, tasks: Sequence[str], serve: ServeConfig, url: str, top: int = 10
) -> str:
    """The request ranked by the server, the `top` best as plain text."""
    body, did = demo.body, demo.happened
    with open_client(serve, url) as client:
        answer, _ = post_body(client, "/v1/rank", body)

    lines = [
        f"user {body['user_id']}, {len(body['candidates'])} candidates, history of "
        f"{answer['history_length']} rows, "
        f"version {answer['model_version']}, ordered by {answer['ordered_by']}",
        f"{'':>4} {'item':>10}" + "".join(f"{task:>18}" for task in tasks) + "  what happened",
    ]
    for rank, place in enumerate(answer["order"][:top], 1):
        item = answer["item_ids"][place]
        scores = "".join(f"{answer['scores'][task][place]:18.4f}" for task in tasks)
        happened = f"shown next: {did[item] or 'nothing'}" if item in did else "popular, not shown"
        lines.append(f"{rank:>4} {item:>10}{scores}  {happened}")
    return "\n".join(lines)
