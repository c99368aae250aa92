"""A world of text ids, from its logs to what clients, files and jobs are told; and one whose
request column is text, up to the page.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import expect

from jobs.forget_user import read_users
from pipeline.batches.features import fit_features
from pipeline.batches.stored import StoredUsers
from pipeline.config import ExposureConfig, RunConfig, UserError
from pipeline.evaluate.comparison import item_rate_logits, metric_of, read_scores
from pipeline.evaluate.evaluator import evaluate_model
from pipeline.index.folder import load_index
from pipeline.logs.columns import text_code
from pipeline.logs.ids import id_code
from pipeline.model.artifact import load_model
from pipeline.sequences import build, store
from pipeline.sequences.dictionary import read_dictionary
from pipeline.sequences.quality.drift import compare_profiles, count_profile
from pipeline.sequences.upkeep import maintenance
from pipeline.sequences.workers import Workers
from pipeline.train.warm_start import start_from
from serve_app import load_test, replay
from serve_app.columns import MEDIA_TYPE, RankColumns
from serve_app.feedback.exposures import ServedAnswers
from serve_app.feedback.served_log import ServedLogSettings
from serve_app.history.export import export_events, prune_events
from serve_app.history.live import LiveHistory
from serve_app.history.published import PublishedSequences
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.metrics import ReplicaMetrics
from serve_app.ranking.ranker import Ranker
from serve_app.ranking.rollout import CHAMPION, Rollout
from serve_app.schemas import Event, RankRequest
from serve_app.web.api import make_api
from serve_app.web.page.routes import PageSettings
from serve_app.web.settings import ApiLimits
from tests.support.browser import Visit, listening, running_browser
from tests.worlds.recommender import LIMITS, Served
from tests.worlds.tiny import DAY_MS, index_model, save_tiny_model, tiny_config
from tests.worlds.web import call

NUM_USERS, NUM_ITEMS, ROWS = 20, 30, 400
TABS = ("home", "search", "für dich")


def user_name(number: int) -> str:
    return f"ü-{number:03}"


def item_name(number: int) -> str:
    return f"sku {number}"


@contextmanager
def workers_here(*_: object) -> Iterator[Workers]:
    """Buckets are built in this process."""
    yield lambda _, function, items, memory_bytes=0: [function(item) for item in items]


@pytest.fixture(autouse=True, scope="module")
def in_this_process() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "workers", workers_here)
        patch.setattr(maintenance, "workers", workers_here)
        yield


def publish_world(folder: Path, *, text: bool, text_tab: bool = False) -> RunConfig:
    """The same events with ids that are text, or the numbers that they are made of; the same of the
    request column.
    """
    source = {
        "kind": "parquet",
        "path": str(folder / "logs"),
        "actions": ["is_click", "is_like"],
        "request_columns": ["tab"],
        "users": {"path": str(folder / "users.parquet"), "id_column": "name"},
    }
    if text_tab:
        source["columns"] = {"tab": {"column": "tab", "text": True}}
    retrieval = {"enabled": True, "dim": 4}
    cfg = tiny_config(
        folder / "runs",
        source=source,
        retrieval=retrieval,
        train={"max_targets_per_sequence": 6},
        serve={"port": 0, "parity_requests": 6, "parity_candidates": 8, "demo_candidates": 6},
    )
    users, items = np.arange(NUM_USERS).tolist(), np.arange(NUM_ITEMS).tolist()
    names = {"user_id": users, "item_id": items}
    if text:
        names = {"user_id": list(map(user_name, users)), "item_id": list(map(item_name, items))}

    rng = np.random.default_rng(5)
    columns = {
        "user_id": [names["user_id"][i] for i in rng.integers(NUM_USERS, size=ROWS)],
        "item_id": [names["item_id"][i] for i in rng.integers(NUM_ITEMS, size=ROWS)],
        "event_time": cfg.split.val_ms - 3 * DAY_MS + rng.permutation(ROWS) * (6 * DAY_MS // ROWS),
        "is_click": rng.integers(2, size=ROWS),
        "is_like": rng.integers(2, size=ROWS),
        "tab": rng.integers(3, size=ROWS),
    }
    if text_tab:
        columns["tab"] = [TABS[tab] for tab in columns["tab"]]
    (folder / "logs").mkdir(parents=True)
    pq.write_table(pa.table(columns), folder / "logs" / "0.parquet")
    cities = {"name": names["user_id"], "city": [f"city {i % 3}" for i in users]}
    pq.write_table(pa.table(cities), folder / "users.parquet")
    build.build_sequences(cfg)
    save_tiny_model(cfg, cfg.model_dir)
    return cfg


class TextServed(Served):
    """The world as a replica serves it."""

    def __init__(self, cfg: RunConfig, folder: Path) -> None:
        self.cfg = cfg
        self.table = store.read_sequences(cfg.sequence_dir)
        self.counts = ReplicaMetrics()
        self.log = SqliteEvents(folder / "events.sqlite")
        loaded = load_model(cfg.model_dir)
        published = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, folder / "cache")
        history = LiveHistory(published, self.log, cfg.sequences, max_events=100)
        index_model(cfg, cfg.model_dir)
        index = load_index(loaded, cfg.model_dir)
        self.ranker = Ranker(loaded, history, 1, "text", LIMITS, index)
        self.rollout = Rollout({CHAMPION: self.ranker}, {CHAMPION: ""}, 0.0, self.counts)
        self.counts.loaded.roles = self.rollout.rankers


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TextServed:
    folder = tmp_path_factory.mktemp("text")
    return TextServed(publish_world(folder, text=True), folder)


@pytest.fixture(scope="module")
def api(world: TextServed):
    return make_api(world, ApiLimits(max_body_bytes=100_000, max_recommend_users=6))


def now(world: TextServed) -> int:
    """A time after all rows."""
    return store.read_manifest(world.cfg.sequence_dir).last_event_ms + 1000


# The model -------------------------------------------------------------------


def test_the_model_sees_what_it_sees_of_numbers(world: TextServed, tmp_path: Path) -> None:
    """Up to the codes: features of users, counts of items, rates."""
    numbers, texts = fit_features(publish_world(tmp_path, text=False)), world.ranker.maps
    assert (numbers.text_ids, texts.text_ids) == ((), ("user_id", "item_id"))
    for user in range(NUM_USERS):
        code = np.array([id_code(user_name(user))])
        mine = texts.user_codes[texts.user_rows(code)]
        assert mine.tolist() == numbers.user_codes[numbers.user_rows(np.array([user]))].tolist()
    for item in range(NUM_ITEMS):
        code = np.array([id_code(item_name(item))])
        mine = texts.item_count[texts.item_rows(code)]
        assert mine.tolist() == numbers.item_count[numbers.item_rows(np.array([item]))].tolist()
    assert texts.base_rates == numbers.base_rates
    assert texts.vocab_sizes == numbers.vocab_sizes


def test_a_model_of_numbers_does_not_meet_sequences_of_text(
    world: TextServed, tmp_path: Path
) -> None:
    cfg = publish_world(tmp_path, text=False)
    columns = store.read_manifest(world.cfg.sequence_dir).events
    message = "user_id: the model was trained on ids that are integers, .* have text: train again"
    with pytest.raises(UserError, match=message):
        load_model(cfg.model_dir).maps.refuse_other_ids(columns, world.cfg.sequence_dir)
    with pytest.raises(UserError, match="user_id: the model was trained on ids that are text"):
        start_from(cfg, world.cfg.model_dir)

    # nor are their items compared
    profiles = []
    for folder in (cfg.sequence_dir, world.cfg.sequence_dir):
        profiles.append(count_profile(folder, store.read_manifest(folder)))
    with pytest.raises(UserError, match=r"item_id: numbers in version .*, text in"):
        compare_profiles(*profiles, cfg.drift)


# HTTP ------------------------------------------------------------------------


def test_ranking_by_text(world: TextServed, api) -> None:
    names = [item_name(3), "never seen", item_name(7)]
    body = {"user_id": user_name(4), "request_time_ms": now(world)}
    body["candidates"] = [{"item_id": name} for name in names]
    answer = call(api, "POST", "/v1/rank", json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found["item_ids"] == names
    assert (found["unknown_items"], found["unknown_user"]) == (1, False)
    assert found["history_length"] > 0

    unknown = call(api, "POST", "/v1/rank", json=body | {"user_id": "nobody"}).json()
    assert (unknown["unknown_user"], unknown["history_length"]) == (True, 0)

    # the same as columns
    table = pa.table({"item_id": names}).replace_schema_metadata(
        {"rank": json.dumps({"user_id": user_name(4), "request_time_ms": now(world)})}
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = sink.getvalue().to_pybytes()
    answer = call(api, "POST", "/v1/rank/arrow", content=content)
    assert answer.headers["content-type"] == MEDIA_TYPE, answer.text
    scores = pa.ipc.open_stream(answer.content).read_all()
    assert scores["item_id"].to_pylist() == names
    np.testing.assert_allclose(scores["score.is_click"], found["scores"]["is_click"], atol=1e-6)


ROW = {"event_time": 1_651_500_000_000, "item_id": item_name(1)}
RANK = {"user_id": user_name(1), "candidates": [{"item_id": item_name(1)}]}
EVENT = {"user_id": user_name(1), **ROW}


@pytest.mark.parametrize(
    ("path", "body", "loc", "value"),
    [
        ("rank", RANK | {"user_id": 7}, ["user_id"], "7"),
        ("rank", RANK | {"candidates": [{"item_id": 7}]}, ["candidates", 0, "item_id"], "7"),
        (
            "rank",
            RANK | {"candidates": [*RANK["candidates"], {"item_id": 7}]},
            ["candidates", 1, "item_id"],
            "7",
        ),
        ("rank", RANK | {"history": [ROW | {"item_id": 7}]}, ["history", 0, "item_id"], "7"),
        ("rank", RANK | {"user_id": ""}, ["user_id"], ""),
        ("rank", RANK | {"user_id": "x" * 513}, ["user_id"], "x" * 400),
        ("events", {"events": [EVENT, EVENT | {"user_id": 7}]}, ["events", 1, "user_id"], "7"),
        ("events", {"events": [EVENT | {"item_id": 7}]}, ["events", 0, "item_id"], "7"),
        ("recommend", {"user_id": 7}, ["user_id"], "7"),
        (
            "recommend",
            {"user_id": user_name(1), "exclude": {"items": [7]}},
            ["exclude", "items", 0],
            "7",
        ),
    ],
)
def test_the_other_kind_of_id_is_named(api, path: str, body: dict, loc: list, value: str) -> None:
    answer = call(api, "POST", f"/v1/{path}", json=body)
    assert answer.status_code == 422, answer.text
    first = answer.json()["detail"][0]
    assert (first["loc"], first["input"]) == (["body", *loc], value)
    assert "text" in first["msg"] or "an integer" in first["msg"]


def test_recommended_items_have_their_names(world: TextServed, api) -> None:
    body = {"user_id": user_name(2), "request_time_ms": now(world), "n": 5}
    first = call(api, "POST", "/v1/recommend", json=body).json()["items"]
    names = [item["item_id"] for item in first]
    assert set(names) <= {item_name(number) for number in range(NUM_ITEMS)}

    without = body | {"exclude": {"items": names[:1]}}
    again = call(api, "POST", "/v1/recommend", json=without).json()["items"]
    assert names[0] not in [item["item_id"] for item in again]


def test_what_a_server_has_is_said(api) -> None:
    info = call(api, "GET", "/v1/model").json()
    assert info["text_ids"] == ["user_id", "item_id"]
    assert (info["request_features"], info["text_features"]) == (["tab"], [])


def test_the_page_shows_and_sends_the_text_of_a_request_column(tmp_path: Path) -> None:
    """Of the logs it has codes alone, which it sends and does not show."""
    world = TextServed(publish_world(tmp_path, text=True, text_tab=True), tmp_path)
    api = make_api(
        world, ApiLimits(max_body_bytes=100_000, max_wait_s=60, timeout_s=60), page=PageSettings()
    )
    assert call(api, "GET", "/v1/model").json()["text_features"] == ["tab"]
    codes = {text_code(tab) for tab in TABS}

    with listening(api) as url, running_browser() as browser:
        here = Visit(browser)
        here.page.goto(url)
        news, box = here.page.locator("#news"), here.page.locator("[data-feature=tab]")
        expect(news).to_contain_text("items ranked in")
        expect(box).to_have_attribute("type", "text")
        expect(box).to_have_attribute("placeholder", "as then")
        expect(box).to_have_value("")
        assert here.posted("/v1/rank")[-1]["request_features"]["tab"] in codes

        # what is typed goes along, also with the event, and is shown again with it
        box.fill("für dich")
        box.press("Enter")
        expect(news).to_contain_text("Now:")
        assert here.posted("/v1/rank")[-1]["request_features"] == {"tab": "für dich"}
        here.page.locator(".items > li").first.get_by_role("button", name="click").click()
        expect(news).to_contain_text("Event kept in")
        (event,) = here.posted("/v1/events")[-1]["events"]
        assert event["request_features"] == {"tab": "für dich"}
        expect(box).to_have_value("für dich")

        # an empty box sends nothing
        box.fill("")
        box.press("Enter")
        expect(news).to_contain_text("Now:")
        assert here.posted("/v1/rank")[-1]["request_features"] == {}
        here.close()


# Jobs ------------------------------------------------------------------------


def test_predictions_name_users_and_items(world: TextServed) -> None:
    metrics = evaluate_model(world.cfg, world.cfg.model_dir)
    file = world.cfg.run_dir / "evaluation" / "predictions" / "test.parquet"
    found = pq.read_table(file, columns=["user_id", "item_id"]).to_pydict()
    assert set(found["user_id"]) <= set(map(user_name, range(NUM_USERS)))
    assert set(found["item_id"]) <= set(map(item_name, range(NUM_ITEMS)))

    # a comparison finds the items' rates by these names: those that the evaluation measured
    rows = read_scores({"text": world.cfg.run_dir}, "test")
    cfg = world.cfg
    stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
    rates = item_rate_logits(stored, cfg.split, rows)
    for number, task in enumerate(rows.tasks):
        known = rows.known(task)
        labels = rows.labels[known, number] > 0
        ne = metric_of("ne", rates[known, number], labels, rows.user_id[known])
        assert ne == pytest.approx(metrics[f"test/baseline_ne/{task}"])


def test_replayed_requests_are_those_of_clients(world: TextServed) -> None:
    cfg, period = world.cfg, replay.PastPeriod.of_run(world.cfg)
    for past in replay.past_requests(period, cfg.serve, load_model(cfg.model_dir)):
        request = RankColumns.of(RankRequest.model_validate(past.body))
        assert request.item_text is not None
        assert world.ranker.find_refusal(request) is None
        (answer,) = world.ranker.rank([request])
        served = np.array([answer.scores[task] for task in world.cfg.tasks]).T
        np.testing.assert_allclose(served, past.scores, atol=1e-6)

    demo = replay.demo_request(period, cfg.model_dir, cfg.serve.demo_candidates)
    assert demo.body["user_id"] in set(map(user_name, range(NUM_USERS)))
    assert set(demo.happened) <= {one["item_id"] for one in demo.body["candidates"]}
    users, items = load_test.known_ids(world.cfg.sequence_dir)
    assert (users[0][:2], items[0][:4]) == ("ü-", "sku ")


def test_posted_exported_built_pruned_and_forgotten(tmp_path: Path) -> None:
    world = TextServed(publish_world(tmp_path, text=True), tmp_path)
    api, cfg = make_api(world, ApiLimits(max_body_bytes=100_000)), world.cfg
    when = now(world)
    new = {"user_id": "new user", "item_id": "new item", "event_time": when, "request_id": "r 3"}
    known = new | {"user_id": user_name(3), "item_id": item_name(3)}
    answer = call(api, "POST", "/v1/events", json={"events": [new, known]})
    assert answer.json()["accepted"] == 2, answer.text
    body = RANK | {"user_id": "new user", "request_time_ms": when + 1}
    assert call(api, "POST", "/v1/rank", json=body).json()["history_length"] == 1
    assert [event.model_dump()["user_id"] for event in world.log.of_user(id_code("new user"))] == [
        "new user"
    ]

    # the users' own ids in the exported file, once
    done = export_events(cfg.source, cfg.sequences, cfg.run_dir, world.log)
    assert (done.num_events, done.refused) == (2, {})
    rows = pq.read_table(done.path).to_pydict()
    assert set(rows["user_id"]) == {"new user", user_name(3)}
    assert set(rows["item_id"]) == {"new item", item_name(3)}
    assert rows["request_id"] == [id_code("r 3")] * 2, "as these logs number them"
    assert export_events(cfg.source, cfg.sequences, cfg.run_dir, world.log).num_events == 0

    manifest = build.build_sequences(cfg, append=True)
    _, items = read_dictionary(cfg.sequence_dir, manifest, "item_id")
    assert "new item" in items.to_pylist()
    assert manifest.num_rows == ROWS + 2
    assert prune_events(cfg.sequence_dir, cfg.sequences, world.log) == 2

    # deletion by name
    call(api, "POST", "/v1/events", json={"events": [new | {"event_time": when + 5}]})
    (tmp_path / "ids.txt").write_text(f"{user_name(3)}\n")
    given = read_users(["new user"], str(tmp_path / "ids.txt"), text=True)
    users = np.array(sorted(given), np.int64)
    removed = maintenance.forget_users(cfg, users)
    assert (removed["sequences"] > 2, removed["ids"], removed["live_logs"]) == (True, 2, 2)
    assert world.log.forget(users.tolist()) == 1
    left = store.read_manifest(cfg.sequence_dir)
    _, names = read_dictionary(cfg.sequence_dir, left, "user_id")
    assert {"new user", user_name(3)} & set(names.to_pylist()) == set()


def test_what_is_of_users_is_its_owners_alone(world: TextServed) -> None:
    """Each file by its own mode, or as its folder may not be entered by others."""
    call(
        make_api(world, ApiLimits(max_body_bytes=100_000)),
        "POST",
        "/v1/events",
        json={"events": [EVENT]},
    )
    evaluate_model(world.cfg, world.cfg.model_dir)
    folder = world.cfg.run_dir.parent.parent
    open_to_others = []
    for path in [
        *world.cfg.run_dir.rglob("*"),
        *folder.glob("events.sqlite*"),
        *folder.glob("cache/*"),
    ]:
        inside = [path.parent, *path.parent.parents][: len(path.relative_to(folder).parts)]
        is_closed = any(one.stat().st_mode & 0o077 == 0 for one in (path, *inside))
        if path.is_file() and not is_closed:
            open_to_others.append(path.name)
    assert open_to_others == []


def test_what_was_served_goes_into_the_logs_by_name(world: TextServed, tmp_path: Path) -> None:
    """Ranked candidates and recommended lists, over HTTP."""
    settings = ServedLogSettings(folder=str(tmp_path / "served"))
    api = make_api(
        world, ApiLimits(max_body_bytes=100_000, max_recommend_users=6), served_log=settings
    )
    who = {"user_id": user_name(1), "request_time_ms": now(world), "request_features": {"tab": 1}}
    items = [{"item_id": item_name(number)} for number in (4, 5)]
    answers = [call(api, "POST", "/v1/rank", json=who | {"candidates": items}).json()]
    asked = [who | {"user_id": user_name(user), "n": 3} for user in (2, 3)]
    found = call(api, "POST", "/v1/recommend/batch", json={"requests": asked}).json()["lists"]
    answers += found
    api.state.served.close()

    log = SqliteEvents(tmp_path / "events.sqlite")
    wanted = ExposureConfig(places=3, wait_h=0.0, max_age_s=1e12)
    served = ServedAnswers(str(tmp_path / "served"), wanted)
    folder = tmp_path / "run"
    shutil.copytree(world.cfg.sequence_dir, folder / "sequences")
    done = export_events(world.cfg.source, world.cfg.sequences, folder, log, served)
    assert done.left_out == {}
    assert done.path is not None

    rows = pq.read_table(done.path).to_pylist()
    expected = {(user_name(1), item_name(4)), (user_name(1), item_name(5))}
    for user, one in zip((2, 3), found, strict=True):
        assert len(one["items"]) == 3
        expected |= {(user_name(user), item["item_id"]) for item in one["items"]}
    assert {(row["user_id"], row["item_id"]) for row in rows} == expected
    assert {row["request_id"] for row in rows} == {id_code(one["request_id"]) for one in answers}
    assert {(row["tab"], row["is_click"], row["is_like"]) for row in rows} == {(1, 0, 0)}


def test_ids_to_forget_are_read_as_the_logs_have_them(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("17 18\n19\n")
    ids = str(tmp_path / "ids.txt")
    first, second = f"line 1 of {ids}", f"line 2 of {ids}"
    numbers = {7: "--user '7'", 17: first, 18: first, 19: second}
    assert read_users(["7"], ids, text=False) == numbers
    assert read_users([], ids, text=True) == {id_code("17 18"): first, id_code("19"): second}
    with pytest.raises(UserError, match=r"must be an integer from 0 to .*, got 'x'"):
        read_users(["x"], None, text=False)


def test_redis_has_the_same_words_for_an_event() -> None:
    """What it keeps of one, and reads again."""
    redis_events = pytest.importorskip("serve_app.history.redis_events")
    raw = {"event_time": 5, "actions": {"is_click": True}}
    for ids in (
        {"user_id": "007", "item_id": "a:b", "request_id": "s"},
        {"user_id": 7, "item_id": 8},
    ):
        event = Event.model_validate(raw | ids)
        field, value = redis_events._field(event), redis_events._value(event)
        again = redis_events._event(int(event.user_id), field, value)
        assert again.model_dump() == event.model_dump()


def test_an_event_keeps_its_texts(tmp_path: Path) -> None:
    """In a file of events, where the codes are its keys; and beside one that has numbers."""
    log = SqliteEvents(tmp_path / "events.sqlite")
    raw = {"event_time": 5, "actions": {}, "request_id": "session 7"}
    text = Event.model_validate(raw | {"user_id": "007", "item_id": "a:b"})
    number = Event.model_validate(raw | {"user_id": 7, "item_id": 8, "request_id": "9"})
    assert log.append([text, number, text]) == ["accepted", "accepted", "already_there"]
    assert [event.model_dump() for event in log.of_user(id_code("007"))] == [text.model_dump()]
    assert [event.model_dump() for event in log.of_user(7)] == [number.model_dump()]
    assert text.model_dump()["request_id"] == "session 7"
