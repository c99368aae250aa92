"""API keys, rate limits and the request log, without Ray."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.config import ConfigError, ServeConfig, UserError
from pipeline.tracking import PinnedModel
from serve_app import deployment, replay
from serve_app.schemas import (
    EventsRequest,
    EventsResponse,
    Problem,
    RankRequest,
    RankResponse,
    Refusal,
    StoreDown,
)
from serve_app.web import rank
from serve_app.web.api import make_api
from serve_app.web.protection import ApiKeys, RateLimit, read_keys
from serve_app.web.settings import ApiAccess, ApiIdentity
from tests.support.exposition import sample
from tests.worlds.tiny import publish_sequences, tiny_config
from tests.worlds.web import EVENTS, RANK, Fixed, call, hashed

KEYS = {"shop": "key-of-the-shop", "app": "key-of-the-app"}


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(
        "# who may ask\n\n" + "".join(f"{hashed(key)}  {name}  # n\n" for name, key in KEYS.items())
    )
    return path


def test_only_who_has_a_key(keys_file: Path) -> None:
    api = make_api(Fixed(), access=ApiAccess(keys=ApiKeys(keys_file)))
    for method, path, body in (
        ("POST", "/v1/rank", RANK),
        ("POST", "/v1/events", EVENTS),
        ("GET", "/v1/model", None),
    ):
        assert call(api, method, path, KEYS["shop"], json=body).status_code == 200
        for wrong in (None, "", "nobody's", KEYS["shop"] + "x", hashed(KEYS["shop"])):
            answer = call(api, method, path, wrong, json=body)
            assert (answer.status_code, answer.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert answer.json()["detail"][0]["loc"] == ["header", "authorization"]
            assert not wrong or wrong not in answer.text

    for path in ("/openapi.json", "/nowhere"):
        assert call(api, "GET", path).status_code == 401
    assert call(api, "POST", "/v1/rank", json=RANK, auth=("shop", KEYS["shop"])).status_code == 401

    assert call(api, "GET", "/healthz").status_code == 200
    ready = {"status": "ready", "model_version": 7, "deployments": ["d"], "failed_deployment": None}
    ready["live_events"] = True
    assert call(api, "GET", "/readyz").json() == ready


def test_without_keys_everybody_may_ask() -> None:
    assert call(make_api(Fixed()), "POST", "/v1/rank", json=RANK).status_code == 200


def test_keys_come_and_go_without_a_restart(
    keys_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keys = ApiKeys(keys_file)
    for text, names in (
        (f"{hashed('new')} fresh\n", {"new": "fresh", KEYS["shop"]: None}),
        # a broken file changes nothing, and is reported
        ("nonsense\n", {"new": "fresh", KEYS["shop"]: None}),
    ):
        staged = keys_file.with_name("staged")
        staged.write_text(text)
        staged.rename(keys_file)
        assert {key: keys.find_name(key) for key in names} == names
    assert "stay valid" in caplog.text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# none\n",
        "key-in-the-clear shop\n",
        hashed("a") + "\n",
        hashed("a")[1:] + " a",
        hashed("") + " shop\n",  # of a variable that was not set: nobody would need a key
    ],
)
def test_broken_files_of_keys(tmp_path: Path, text: str) -> None:
    path = tmp_path / "keys"
    path.write_text(text)
    with pytest.raises(UserError, match=r"serve\.api_keys_file") as caught:
        read_keys(path)
    assert "key-in-the-clear" not in str(caught.value)


def test_a_key_beyond_its_rate_waits_and_others_do_not(keys_file: Path) -> None:
    now = 100.0
    api = make_api(
        Fixed(), access=ApiAccess(keys=ApiKeys(keys_file), rate_limit=RateLimit(0.5, lambda: now))
    )
    asked = [call(api, "GET", "/v1/model", KEYS["shop"]) for _ in range(2)]
    assert [answer.status_code for answer in asked] == [200, 429]
    assert asked[1].headers["Retry-After"] == "2"

    assert call(api, "GET", "/v1/model", KEYS["app"]).status_code == 200
    assert [call(api, "GET", path).status_code for path in ("/healthz", "/readyz") * 3] == [200] * 6

    now += 2
    assert [call(api, "GET", "/v1/model", KEYS["shop"]).status_code for _ in range(2)] == [200, 429]


def test_a_bucket_fills_up_to_one_second_of_requests() -> None:
    now = 0.0
    limit = RateLimit(4, lambda: now)
    assert [limit.wait_s("a") for _ in range(5)] == [0, 0, 0, 0, 0.25]
    now = 1000.0
    assert [limit.wait_s("a") for _ in range(5)] == [0, 0, 0, 0, 0.25]
    now += 0.25
    assert [limit.wait_s("a") for _ in range(2)] == [0, 0.25]


def test_a_line_per_request_without_what_was_sent(
    keys_file: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = make_api(Fixed(), access=ApiAccess(keys=ApiKeys(keys_file)))
    secret = KEYS["app"]
    user = 123_456_789_012_345  # so long that no random id shows it by chance
    with caplog.at_level(logging.INFO, logger="ray.serve.requests"):
        # a random id may hold any digits
        monkeypatch.setattr(rank, "new_request_id", lambda: "answer")
        call(api, "POST", f"/v1/rank?user={user}", secret, json=RANK | {"user_id": user})
        call(api, "POST", "/v1/events", secret, json=EVENTS)
        call(api, "POST", "/v1/rank", secret, json={"user_id": str(user)})
        call(api, "POST", "/v1/rank", str(user), json=RANK)
        call(api, "GET", f"/users/{user}", secret)

    lines = [
        json.loads(record.message)
        for record in caplog.records
        if record.name == "ray.serve.requests"
    ]
    assert all(line.pop("ms") >= 0 for line in lines)
    assert len({line.pop("request_id") for line in lines}) == 5
    assert lines[0].pop("served_as") == "answer"
    assert lines == [
        {"path": "/v1/rank", "status": 200, "key": "app", "num_candidates": 2, "version": 7},
        {"path": "/v1/events", "status": 200, "key": "app", "num_events": 1},
        {"path": "/v1/rank", "status": 422, "key": "app"},
        {"path": "/v1/rank", "status": 401},
        {"path": "other", "status": 404, "key": "app"},
    ]
    assert str(user) not in caplog.text
    assert secret not in caplog.text


BAD_EVENTS = {  # body -> place and value that the answer must name
    "no events": ({"events": []}, ["body", "events"], "at least 1"),
    "a list": ([], ["body"], "dictionary"),
    "no time": (
        {"events": [{"user_id": 1, "item_id": 2}]},
        ["body", "events", 0, "event_time"],
        "required",
    ),
    "a negative item": (
        {"events": [EVENTS["events"][0] | {"item_id": -2}]},
        ["body", "events", 0, "item_id"],
        "-2",
    ),
    "an action of 1": (
        {"events": [EVENTS["events"][0] | {"actions": {"is_click": 1}}]},
        ["body", "events", 0, "actions", "is_click"],
        "boolean",
    ),
    "a negative column": (
        {"events": [EVENTS["events"][0] | {"request_features": {"tab": -1}}]},
        ["body", "events", 0, "request_features", "tab"],
        "-1",
    ),
    "a misspelt field": (
        {"events": [EVENTS["events"][0] | {"time": 5}]},
        ["body", "events", 0, "time"],
        "5",
    ),
    "a request that is no text": (
        {"events": [EVENTS["events"][0] | {"request_id": 77}]},
        ["body", "events", 0, "request_id"],
        "77",
    ),
}


@pytest.mark.parametrize("name", BAD_EVENTS)
def test_bad_events_are_422_and_name_the_field(name: str) -> None:
    body, loc, said = BAD_EVENTS[name]
    answer = call(make_api(Fixed()), "POST", "/v1/events", json=body)
    assert answer.status_code == 422
    assert loc in [entry["loc"] for entry in answer.json()["detail"]]
    assert said in answer.text


def test_an_event_store_that_does_not_answer_is_503() -> None:
    replica = Fixed()
    replica.failing = StoreDown("database or disk is full")
    answer = call(make_api(replica), "POST", "/v1/events", json=EVENTS)
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
    assert "disk" not in answer.text


def test_the_document_is_complete(keys_file: Path) -> None:
    api = make_api(Fixed(), access=ApiAccess(keys=ApiKeys(keys_file)))
    document = call(api, "GET", "/openapi.json", KEYS["app"]).json()
    for path, method in (("/v1/rank", "post"), ("/v1/events", "post"), ("/v1/model", "get")):
        route = document["paths"][path][method]
        assert route["security"] == [{"HTTPBearer": []}]
        expected = {"200", "401", "421", "429", "500", "503", "504"}
        if method == "post":
            expected |= {"400", "408", "413", "422"}
        assert route["responses"].keys() == expected
        for status in expected - {"200"}:
            schema = route["responses"][status]["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Problem"}

    for route in (route for methods in document["paths"].values() for route in methods.values()):
        assert route["summary"], route
        assert route["description"], route

    schemas = document["components"]["schemas"]
    RankRequest.model_validate(schemas["RankRequest"]["examples"][0])
    EventsRequest.model_validate(schemas["EventsRequest"]["examples"][0])
    for model in (RankResponse, EventsResponse, Problem):
        for example in schemas[model.__name__]["examples"]:
            assert model.model_validate(example).model_dump(exclude_unset=True) == example


def test_the_configuration_reaches_the_server(tmp_path: Path, keys_file: Path) -> None:
    cfg = tiny_config(
        tmp_path / "runs", serve={"api_keys_file": str(keys_file), "rate_limit_per_s": 5}
    )
    publish_sequences(cfg)
    model = PinnedModel("http://127.0.0.1:1", "tiny", 3, {})
    filled = deployment.serve_config(
        cfg.serve, deployment.user_config(cfg.folders, cfg.serve, model), 8123, {}
    )
    assert filled["applications"][0]["args"] == {
        "one_process": False,
        "max_body_bytes": 2_000_000,
        "api_keys_file": str(keys_file),
        "rate_limit_per_s": 2.5,  # of each ingress
        "max_wait_ms": 500.0,
        "request_timeout_s": 10.0,
        "body_timeout_s": 2.0,
        "max_candidates": 10_000,
        "max_history": 16_384,
        "max_rank_users": 100,
        "max_recommend_users": 100,
        "hosts": None,
        "page": None,
        "trace_context": False,
        "otlp_endpoint": None,
        "served_log": {
            "folder": str(cfg.run_dir / "serving" / "served"),
            "share": 1.0,
            "histories": False,
            "places": 100,
            "days": 30.0,
            "flush_s": 60.0,
        },
        "server_id": deployment.read_server_id(cfg.run_dir / "serving"),
    }
    assert deployment.plan_serving(cfg.folders, cfg.serve)["api_keys"] == str(keys_file)
    keys_file.unlink()
    with pytest.raises(UserError, match="cannot be read"):
        deployment.plan_serving(cfg.folders, cfg.serve)


def test_a_job_has_a_key_for_its_own_requests(tmp_path: Path, keys_file: Path) -> None:
    key = tmp_path / "key"
    sections = {"api_keys_file": str(keys_file)}
    with pytest.raises(UserError, match=r"serve\.client_key_file"):
        replay.key_header(tiny_config(tmp_path, serve=sections).serve)
    asking = tiny_config(tmp_path, serve=sections | {"client_key_file": str(key)})
    with pytest.raises(UserError, match=r"serve\.client_key_file"):
        replay.key_header(asking.serve)
    key.write_text(KEYS["app"] + "\n")
    assert replay.key_header(asking.serve) == {"Authorization": f"Bearer {KEYS['app']}"}
    assert replay.key_header(tiny_config(tmp_path).serve) == {}


@pytest.mark.parametrize(
    ("key", "value"), [("rate_limit_per_s", 0), ("api_keys_file", ""), ("max_events", 0)]
)
def test_settings_out_of_range(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(ConfigError, match=rf"serve\.{key}.*{value!r}"):
        tiny_config(tmp_path, serve={key: value})


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "127.0.0.1:8000"}, 200),
        ({"Host": "localhost", "Origin": "http://localhost:3000"}, 200),
        ({"Host": "[::1]:8000"}, 200),
        ({"Host": "evil.example"}, 403),
        ({"Host": "127.0.0.1.evil.example:8000"}, 403),
        ({"Host": "127.0.0.1:8000", "Origin": "https://evil.example"}, 403),
        ({"Host": "127.0.0.1:8000", "Origin": "null"}, 403),
    ],
)
def test_pages_of_the_web_do_not_reach_a_keyless_local_server(headers, status: int) -> None:
    local = ServeConfig()
    hosts = deployment._local_names(local)
    assert hosts is not None
    api = make_api(Fixed(), access=ApiAccess(hosts=frozenset(hosts)))
    for path in ("/v1/rank", "/v1/events"):
        body = RANK if path == "/v1/rank" else EVENTS
        answer = call(api, "POST", path, headers=headers, json=body)
        assert answer.status_code == status
    assert "evil" not in answer.text

    # whoever has keys, or an address of the network, has names of its own
    assert deployment._local_names(replace(local, host="0.0.0.0")) is None
    assert deployment._local_names(replace(local, api_keys_file="keys")) is None


def test_a_request_for_another_server_is_refused() -> None:
    """Every answer names its server, those to bad requests and failures too."""

    class Kept(Fixed):
        num_events = 0

        async def append_events(self, request: EventsRequest) -> EventsResponse | Refusal:
            self.num_events += len(request.events)
            return await super().append_events(request)

    replica = Kept()
    api = make_api(replica, identity=ApiIdentity(server_id="a"))
    for headers, status in (({}, 200), ({"X-Server-Id": "a"}, 200), ({"X-Server-Id": "b"}, 421)):
        answer = call(api, "POST", "/v1/events", json=EVENTS, headers=headers)
        assert (answer.status_code, answer.headers["X-Server-Id"]) == (status, "a")
    assert replica.num_events == 2
    assert call(api, "POST", "/v1/rank", json={}).headers["X-Server-Id"] == "a"

    text = call(api, "GET", "/metrics").text
    assert sample(text, "ranking_refused_total", reason="server") == 1
    assert sample(text, "ranking_requests_total", path="/v1/events", status="421") == 1

    nameless = make_api(Fixed())
    answer = call(nameless, "POST", "/v1/events", json=EVENTS, headers={"X-Server-Id": "b"})
    assert (answer.status_code, "X-Server-Id" in answer.headers) == (200, False)


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"serve": {"redis_url": "redis://h/0?password=hunter2"}}, "serve.redis_url"),
        ({"serve": {"redis_url": "redis://:hunter2@h/0"}}, "serve.redis_url"),
        ({"serve": {"served_folder": "s3://me:hunter2@bucket/x"}}, "serve.served_folder"),
        ({"serve": {"served_folder": "s3://b/x?secret_key=hunter2"}}, "serve.served_folder"),
        ({"source": {"path": "s3://b/x?secret_key=hunter2"}}, "source.path"),
        ({"tracking": {"uri": "http://user:hunter2@mlflow:5000"}}, "tracking.uri"),
        ({"tracking": {"uri": "https://hunter2@mlflow"}}, "tracking.uri"),
        ({"tracking": {"uri": "https://mlflow/?token=hunter2"}}, "tracking.uri"),
        ({"serve": {"redis_url": "http://me:hunter2@host"}}, "serve.redis_url"),
        ({"serve": {"redis_url": ["redis://:hunter2@h/0"]}}, "serve.redis_url"),
        ({"serve": {"redis_password": "hunter2"}}, "serve.redis_password"),
        ({"source": {"path": "https://me:hunter2@host/logs"}}, "source.path"),
        ({"source": {"path": "gs://logs/x?X-Goog-Signature=hunter2"}}, "source.path"),
        (
            {"source": {"path": "s3://b/x?endpoint_override=http%3A%2F%2Fme:hunter2%40minio"}},
            "source.path",
        ),
    ],
)
def test_secrets_do_not_enter_the_configuration(tmp_path: Path, section: dict, key: str) -> None:
    with pytest.raises(ConfigError, match=key) as refused:
        tiny_config(tmp_path, **section)
    assert "hunter2" not in str(refused.value)
