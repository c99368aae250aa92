"""The server: its HTTP face in this process, and the whole of it on one real Ray Serve."""

import asyncio
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_limits import sample
from tiny_world import NOT_A_USER, NUM_USERS, publish_sequences, save_tiny_model, tiny_config

from pipeline import tracking
from pipeline.cluster import free_port, ray_cluster
from pipeline.config import CanaryConfig, RunConfig, ServeConfig, UserError
from pipeline.data import store
from pipeline.mlflow_server import mlflow_server
from pipeline.model.artifact import load_model
from serve_app import deployment, load_test, replay
from serve_app.api import Overloaded, Unavailable, make_api
from serve_app.batching import MicroBatcher, TokenBatcher
from serve_app.columns import MEDIA_TYPE, BadBody, RankColumns, RankedColumns
from serve_app.events import SqliteEvents
from serve_app.history import PublishedSequences
from serve_app.ranker import Ranker
from serve_app.rollout import in_share
from serve_app.schemas import ModelInfo, RankHead, RankRequest, Refusal

ROOT = Path(__file__).parent.parent
ONE = {"user_id": 3, "candidates": [{"item_id": 1}]}


# The HTTP face ---------------------------------------------------------------


class InProcess:
    """A replica without Ray."""

    def __init__(self, ranker: Ranker) -> None:
        self.ranker = ranker
        self.failing: Exception | None = None

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        if self.failing:
            raise self.failing
        return self.ranker.refusal(request) or self.ranker.rank([request])[0]

    async def info(self) -> ModelInfo:
        if self.failing:
            raise self.failing
        return self.ranker.info()

    async def deployments(self) -> list[str]:
        return [self.ranker.info().deployment]


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    folder = tmp_path_factory.mktemp("api")
    cfg = tiny_config(folder / "runs")
    publish_sequences(cfg)
    loaded = load_model(save_tiny_model(cfg, folder / "model"))
    sequences = PublishedSequences(cfg.sequence_dir, cfg, folder / "cache")
    return InProcess(Ranker(loaded, sequences, 1, "tiny", ServeConfig()))


def call(replica: InProcess, method: str, path: str, **arguments: object) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(make_api(replica, max_body_bytes=2_000_000))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **arguments)  # pyright: ignore[reportArgumentType]

    return asyncio.run(send())


BAD_BODIES = {  # body -> status, place and value that the answer must name
    "malformed JSON": (b'{"user_id": 3, "candidates": [', 422, ["body", 30], "JSON decode error"),
    "not UTF-8": (b"{\xff}", 400, None, "parsing the body"),
    "nothing": (b"", 422, ["body"], "required"),
    "a list": (b"[1]", 422, ["body"], "dictionary"),
    "nested deeply": (b"[" * 100_000, 400, None, "parsing the body"),
    "a number of 5,000 digits": (b'{"user_id": 1' + b"0" * 5000 + b"}", 400, None, "parsing the body"),
    "NaN": (b'{"user_id": NaN, "candidates": [{"item_id": 1}]}', 422, ["body", "user_id"], "nan"),
    "a lone surrogate": (b'{"user_id": 3, "candidates": [{"item_id": "\\ud800"}]}', 422, None, "ud800"),
    "no candidates": (json.dumps({**ONE, "candidates": []}).encode(), 422, ["body", "candidates"], "at least 1"),
    "10,001 candidates": (
        json.dumps({**ONE, "candidates": [{"item_id": 1}] * 10_001}).encode(),
        422,
        ["body", "candidates"],
        "10001",
    ),
    "candidates missing": (b'{"user_id": 3}', 422, ["body", "candidates"], "required"),
    "first_position without history": (
        json.dumps({**ONE, "first_position": 3}).encode(),
        422,
        ["body"],
        "first_position belongs to history",
    ),
    "no history at all": (b'{"candidates": [{"item_id": 1}]}', 422, ["body"], "got neither"),
    "a misspelt field": (json.dumps({**ONE, "userid": 4}).encode(), 422, ["body", "userid"], "4"),
    "text for a number": (json.dumps({**ONE, "user_id": "3"}).encode(), 422, ["body", "user_id"], "3"),
    "a negative item": (b'{"user_id": 3, "candidates": [{"item_id": -1}]}', 422, None, "-1"),
    "an item beyond int64": (b'{"user_id": 3, "candidates": [{"item_id": 9223372036854775808}]}', 422, None, "9223"),
    "seconds for ms": (
        json.dumps({**ONE, "request_time_ms": 1_651_500_000}).encode(),
        422,
        ["body", "request_time_ms"],
        "1651500000",
    ),
    "an unknown request column": (
        json.dumps({**ONE, "request_features": {"tap": 1}}).encode(),
        422,
        ["body", "request_features"],
        "tap",
    ),
    "an unknown task": (json.dumps({**ONE, "order_by": "is_sold"}).encode(), 422, ["body", "order_by"], "is_sold"),
    "5 MB": (b" " * 5_000_000, 413, ["body"], "5000000 bytes"),
}


def check_refused(answer: httpx.Response, status: int, loc: list | None, said: str) -> None:
    assert answer.status_code == status, answer.text
    assert said.lower() in answer.text.lower()
    if loc is not None:
        assert loc in [entry["loc"] for entry in answer.json()["detail"]]


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_4xx_and_name_the_field(replica: InProcess, name: str) -> None:
    body, *expected = BAD_BODIES[name]
    check_refused(
        call(replica, "POST", "/v1/rank", content=body, headers={"content-type": "application/json"}), *expected
    )


NUMBERS = st.one_of(st.integers(-2, 70), st.sampled_from([2**31 - 1, 2**53 - 1, 2**63 - 1, 2**63, 1_651_500_000_000]))
TEXTS = st.sampled_from(["is_click", "is_like", "tab", "hour", "\ud800"])
IDS = st.sampled_from([0, 3, 69, NOT_A_USER, 2**63 - 1])
FEATURES = st.dictionaries(st.just("tab"), st.sampled_from([0, 1, -1, 2**31 - 1, -(2**31)]))
ROWS = st.fixed_dictionaries(
    {"item_id": IDS, "event_time": st.sampled_from([0, 1, 1_650_000_000_000, 1_650_000_000_001])},
    optional={
        "actions": st.dictionaries(st.sampled_from(["is_click", "is_like"]), st.booleans()),
        "request_features": FEATURES,
        "order_only": st.booleans(),
    },
)
CANDIDATES = st.fixed_dictionaries({"item_id": IDS}, optional={"request_features": FEATURES})
VALID = st.fixed_dictionaries(
    {"candidates": st.lists(CANDIDATES, min_size=1, max_size=4)},
    optional={
        "request_time_ms": st.sampled_from([1_650_000_000_002, 1_651_500_000_000]),
        "request_features": FEATURES,
        "order_by": st.sampled_from([None, "is_click", "is_like"]),
    },
).flatmap(
    lambda rest: st.one_of(
        st.fixed_dictionaries({"user_id": IDS}),
        st.fixed_dictionaries(
            {"history": st.lists(ROWS, max_size=5)}, optional={"first_position": st.sampled_from([0, 7, 2**31 - 1])}
        ),
    ).map(lambda who: rest | who)
)
ODD = st.none() | st.booleans() | NUMBERS | TEXTS | st.lists(NUMBERS, max_size=2) | st.dictionaries(TEXTS, NUMBERS)
ODD_FIELD = st.dictionaries(st.sampled_from(list(RankRequest.model_fields)), ODD, min_size=1, max_size=1)


@settings(max_examples=100, deadline=None)
@given(body=VALID)
def test_valid_requests_are_answered(replica: InProcess, body: dict) -> None:
    answer = call(replica, "POST", "/v1/rank", json=body)
    assert answer.status_code == 200, answer.text
    assert all(0 <= score <= 1 for scores in answer.json()["scores"].values() for score in scores)


@settings(max_examples=100, deadline=None)
@given(body=st.builds(lambda body, odd: body | odd, VALID, ODD_FIELD))
def test_whatever_comes_is_answered_or_refused(replica: InProcess, body: dict) -> None:
    """An exception of the ranker would pass through this transport: over the wire it would be a 500."""
    content = json.dumps(body).encode()  # in ASCII: a lone surrogate goes through as an escape
    answer = call(replica, "POST", "/v1/rank", content=content, headers={"content-type": "application/json"})
    assert answer.status_code in (200, 400, 422)


def test_an_arrow_body_gets_the_same_answer_as_columns(replica: InProcess) -> None:
    head = {"user_id": 3, "request_time_ms": 1_651_500_000_000, "request_features": {"tab": 2}, "order_by": "is_like"}
    tabs = [0, None, 2, 1]
    asked = [{"item_id": i} | ({} if tab is None else {"request_features": {"tab": tab}}) for i, tab in enumerate(tabs)]
    plain = call(replica, "POST", "/v1/rank", json=head | {"candidates": asked}).json()
    columns = {"item_id": pa.array(range(4), pa.int64()), "tab": pa.array(tabs, pa.int32())}
    answer = call(replica, "POST", "/v1/rank/arrow", content=arrow_body(pa.table(columns), head))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == MEDIA_TYPE
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table["item_id"].to_pylist() == plain["item_ids"]
    for task, scores in plain["scores"].items():
        np.testing.assert_allclose(table[f"score.{task}"].to_numpy(), scores, atol=1e-6)
    place = table["place"].to_numpy()
    assert np.argsort(place).tolist() == plain["order"]
    rest = json.loads(table.schema.metadata[b"rank"])
    assert rest == {name: value for name, value in plain.items() if name not in ("item_ids", "scores", "order")}


def arrow_body(table: pa.Table, head: dict | None, **options: object) -> bytes:
    table = table.replace_schema_metadata(None if head is None else {"rank": json.dumps(head)})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


ITEMS = pa.table({"item_id": pa.array([1, 2], pa.int64())})
NAMED_TWICE = pa.Table.from_arrays([ITEMS["item_id"], ITEMS["item_id"]], ["item_id", "item_id"])
WORDS = pa.table({"item_id": pa.array(["1"]).dictionary_encode()})
WHO = {"user_id": 3}
BAD_ARROW = {  # body -> place and value that the answer must name
    "nothing": (b"", ["body"], "0 bytes"),
    "JSON": (json.dumps(ONE).encode(), ["body"], "Arrow IPC stream"),
    "cut off": (arrow_body(ITEMS, WHO)[:-30], ["body"], "Arrow IPC stream"),
    "no head": (arrow_body(ITEMS, None), ["body", "rank"], "missing"),
    "neither user nor history": (arrow_body(ITEMS, {}), ["body", "rank"], "neither"),
    "a misspelt field": (arrow_body(ITEMS, WHO | {"userid": 4}), ["body", "rank", "userid"], "4"),
    "no items": (arrow_body(ITEMS[:0], WHO), ["body", "item_id"], "at least one"),
    "no column of items": (arrow_body(ITEMS.rename_columns(["item"]), WHO), ["body"], "item_id"),
    "a name twice": (arrow_body(NAMED_TWICE, WHO), ["body"], "twice"),
    "floats": (arrow_body(pa.table({"item_id": [1.0]}), WHO), ["body", "item_id"], "double"),
    "a dictionary": (arrow_body(WORDS, WHO), ["body"], "dictionary"),
    "a null item": (
        arrow_body(pa.table({"item_id": pa.array([1, None], pa.int64())}), WHO),
        ["body", "item_id"],
        "null",
    ),
    "a negative item": (arrow_body(pa.table({"item_id": pa.array([-1], pa.int64())}), WHO), ["body", "item_id"], "-1"),
    "compressed": (arrow_body(ITEMS, WHO, compression="zstd"), ["body"], "uncompressed"),
    "an unknown feature": (
        arrow_body(ITEMS.append_column("tap", pa.array([1, 2], pa.int32())), WHO),
        ["body", "candidates", "request_features"],
        "tap",
    ),
}


@pytest.mark.parametrize("name", BAD_ARROW)
def test_bad_arrow_bodies_are_422_and_name_the_place(replica: InProcess, name: str) -> None:
    body, *expected = BAD_ARROW[name]
    check_refused(call(replica, "POST", "/v1/rank/arrow", content=body), 422, *expected)


def test_an_arrow_body_with_flipped_bytes_is_read_or_refused() -> None:
    rng = np.random.default_rng(0)
    body = arrow_body(ITEMS.append_column("tab", pa.array([1, None], pa.int32())), WHO)
    num_read = 0
    for _ in range(3000):
        flipped = bytearray(body)
        for place in rng.integers(0, len(body), 2):
            flipped[place] = rng.integers(0, 256)
        with contextlib.suppress(BadBody):
            num_read += len(RankColumns.from_arrow(bytes(flipped))) > 0
    assert 0 < num_read < 3000


def test_other_methods_and_paths(replica: InProcess) -> None:
    assert call(replica, "GET", "/v1/rank").status_code == 405
    assert call(replica, "POST", "/v2/rank", json=ONE).status_code == 404


def test_no_model_and_too_many_requests(replica: InProcess) -> None:
    try:
        replica.failing = Unavailable()
        assert call(replica, "GET", "/readyz").status_code == 503
        assert call(replica, "GET", "/healthz").status_code == 200
        assert call(replica, "POST", "/v1/rank", json=ONE).status_code == 503
        replica.failing = Overloaded()
        answer = call(replica, "POST", "/v1/rank", json=ONE)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
    finally:
        replica.failing = None


def test_the_documented_schema_is_the_request(replica: InProcess) -> None:
    schemas = call(replica, "GET", "/openapi.json").json()["components"]["schemas"]
    assert schemas["RankRequest"]["properties"].keys() == RankRequest.model_fields.keys()
    assert {"RankResponse", "Candidate", "HistoryRow", "ModelInfo"} <= schemas.keys()


# Requests together -----------------------------------------------------------


def test_what_waits_goes_together_and_every_answer_finds_its_request() -> None:
    batches: list[list[int]] = []

    def work(items: list[int]) -> list[int]:
        batches.append(items)
        time.sleep(0.05)
        return [item * 10 for item in items]

    async def main() -> list[int]:
        batcher = MicroBatcher(work, max_together=4)
        return await asyncio.gather(*(batcher(i) for i in range(10)))

    assert asyncio.run(main()) == [i * 10 for i in range(10)]
    assert max(map(len, batches)) == 4
    assert len(batches) < 10


def test_a_batch_that_fails_fails_its_own_requests_only() -> None:
    def work(items: list[int]) -> list[int]:
        if 0 in items:
            raise ValueError("zero")
        return items

    async def main() -> list[int | BaseException]:
        batcher = MicroBatcher(work, max_together=1)
        return await asyncio.gather(*(batcher(i) for i in range(3)), return_exceptions=True)

    failed, *others = asyncio.run(main())
    assert isinstance(failed, ValueError)
    assert others == [1, 2]


def test_what_nobody_waits_for_any_more_is_not_begun() -> None:
    begun: list[int] = []

    def work(items: list[int]) -> list[int]:
        begun.extend(items)
        time.sleep(0.1)
        return items

    async def main() -> list[int]:
        batcher = MicroBatcher(work, max_together=2)
        first = asyncio.create_task(batcher(0))
        await asyncio.sleep(0.03)
        waiting = [asyncio.create_task(batcher(i)) for i in (1, 2, 3, 4)]
        await asyncio.sleep(0)
        for task in waiting[:3]:
            task.cancel()
        return [await first, await waiting[3]]

    assert asyncio.run(main()) == [0, 4]
    assert begun == [0, 4]


@dataclass
class Length:
    """A job of so many tokens, and of a bucket by their number's size."""

    tokens: int
    num_tokens: int = 0

    def __post_init__(self) -> None:
        self.num_tokens = self.tokens

    @property
    def bucket(self) -> int:
        return self.tokens.bit_length()


def passes_of(lengths: list[int], max_tokens: int, late: list[int] | None = None) -> tuple[list[list[int]], list[int]]:
    """The passes that requests of these lengths form, all there from the start but the `late`, and the answers."""
    passes: list[list[int]] = []
    everybody_came = threading.Event()

    def work(jobs: list[Length]) -> list[int]:
        passes.append([job.tokens for job in jobs])
        assert everybody_came.wait(30)
        if any(job.tokens == 13 for job in jobs):
            raise ValueError("thirteen")
        return [job.tokens * 10 for job in jobs]

    async def main() -> list[int]:
        batcher = TokenBatcher(Length, work, lambda: max_tokens)
        waiting = [asyncio.create_task(batcher(n)) for n in lengths]
        while not passes:
            await asyncio.sleep(0.001)
        waiting += [asyncio.create_task(batcher(n)) for n in late or []]
        await asyncio.sleep(0)
        everybody_came.set()
        return await asyncio.gather(*waiting, return_exceptions=True)  # pyright: ignore[reportReturnType]

    return passes, asyncio.run(main())


def test_passes_hold_like_lengths_up_to_so_many_tokens_and_the_oldest_first() -> None:
    passes, answers = passes_of([5, 100, 6, 120, 7, 4, 90], max_tokens=220)
    assert passes == [[5, 6, 7, 4], [100, 120], [90]]
    assert answers == [50, 1000, 60, 1200, 70, 40, 900]
    passes, _ = passes_of([300, 5], max_tokens=220)
    assert passes == [[300], [5]], "what is longer than a pass may be goes alone"


def test_what_comes_during_a_pass_joins_its_like() -> None:
    passes, _ = passes_of([100, 5, 110], max_tokens=120, late=[6, 101])
    assert passes == [[100], [5, 6], [110], [101]]


def test_a_pass_that_fails_fails_its_own_requests_only() -> None:
    passes, answers = passes_of([13, 14, 100], max_tokens=1000)
    assert passes == [[13, 14], [100]]
    assert [type(answer) for answer in answers] == [ValueError, ValueError, int]

    async def main() -> list[int | BaseException]:
        batcher = TokenBatcher(lambda n: Length(10 // n), lambda jobs: [0] * len(jobs), lambda: 100)
        return await asyncio.gather(*(batcher(n) for n in (0, 2)), return_exceptions=True)

    failed, answered = asyncio.run(main())
    assert isinstance(failed, ZeroDivisionError)
    assert answered == 0


# The configuration file ------------------------------------------------------


def test_the_configuration_passes_rays_checks_and_has_no_unknown_keys(tmp_path: Path) -> None:
    from ray.serve.schema import DeploymentSchema, HTTPOptionsSchema, ServeApplicationSchema, ServeDeploySchema

    cfg = tiny_config(tmp_path)
    publish_sequences(cfg)
    model = tracking.PinnedModel("http://127.0.0.1:1", "tiny", 3, {"config.json": "0" * 64})
    wanted = deployment.user_config(cfg, model)
    for filled in (
        deployment.template(),
        deployment.serve_config(cfg, wanted, 8123, {"working_dir": f"local://{ROOT}"}),
    ):
        ServeDeploySchema.model_validate(filled)
        assert filled.keys() <= ServeDeploySchema.model_fields.keys()
        assert filled["http_options"].keys() <= HTTPOptionsSchema.model_fields.keys()
        for application in filled["applications"]:
            assert application.keys() <= ServeApplicationSchema.model_fields.keys()
            for entry in application["deployments"]:
                assert entry.keys() <= DeploymentSchema.model_fields.keys()
    assert filled["http_options"]["port"] == 8123
    assert filled["applications"][0]["deployments"][1]["user_config"]["model"]["version"] == 3
    json.dumps(filled)


# A real server ---------------------------------------------------------------


@dataclass
class Served:
    cfg: RunConfig
    url: str
    dashboard_url: str
    versions: list[int]
    folders: list[Path]
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=self.url, timeout=30, headers=replay.key_header(self.cfg))


@pytest.fixture(scope="module")
def server(local_ray: None, mlflow_runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two registered versions, the first of them champion and serving to who has a key."""
    from ray import serve

    folder = tmp_path_factory.mktemp("models")
    hashes, key = folder / "keys.sha256", folder / "key"
    key.write_text("a-key")
    hashes.write_text(f"{hashlib.sha256(b'a-key').hexdigest()} tests\n")
    protection = {"port": 0, "num_replicas": 2, "api_keys_file": str(hashes), "client_key_file": str(key)}
    cfg = tiny_config(mlflow_runs, name="served", tracking={"model_name": "served"}, serve=protection)
    publish_sequences(cfg)
    folders = [save_tiny_model(cfg, folder / str(seed), seed, 0.9 - seed / 10) for seed in (0, 1)]
    with mlflow_server(cfg), ray_cluster(cfg.ray, runs_dir=cfg.runs_dir) as cluster:
        versions = []
        for model in folders:
            with tracking.start_run(cfg, store.read_manifest(cfg.sequence_dir)) as run:
                versions.append(tracking.register(cfg, run, model))
        tracking.promote(cfg, versions[0])
        url = deployment.deploy(cfg, cluster.dashboard_url, tracking.champion(cfg))
        yield Served(cfg, url, cluster.dashboard_url, versions, folders)
        serve.shutdown()


@pytest.fixture
def served(server: Served) -> Served:
    """The server with every replica answering as the champion, whatever the test before did to them."""
    wait_until(lambda: loaded(server) == {"champion": server.cfg.serve.num_replicas})
    return server


def loaded(server: Served) -> dict[str, float]:
    """By role, how many replicas have a version in it."""
    page = server.client.get("/metrics").text
    roles = {role: sample(page, "ranking_model", role=role) for role in ("champion", "canary", "shadow")}
    return {role: number for role, number in roles.items() if number > 0}


def wait_until(done: Callable[[], bool]) -> None:
    """A replica that was killed may take a busy machine half a minute to replace."""
    for _ in range(600):
        if done():
            return
        time.sleep(0.1)
    raise AssertionError("not within a minute")


@pytest.mark.cluster
def test_it_answers_with_the_champion(served: Served) -> None:
    info = served.client.get("/v1/model").json()
    assert (info["model_name"], info["model_version"]) == ("served", served.versions[0])
    assert served.client.get("/healthz").json() == {"status": "ok"}
    ready = {"status": "ready", "model_version": served.versions[0], "failed_deployment": None}
    assert served.client.get("/readyz").json() == ready | {"deployments": [info["deployment"]]}
    assert served.client.get("/docs").status_code == 200
    assert httpx.get(f"{served.url}/healthz").status_code == 200
    assert httpx.post(f"{served.url}/v1/rank", json=ONE).status_code == 401


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["malformed JSON", "no candidates", "10,001 candidates", "5 MB", "no history at all"])
def test_bad_bodies_over_the_wire(served: Served, name: str) -> None:
    body, *expected = BAD_BODIES[name]
    check_refused(served.client.post("/v1/rank", content=body, headers={"content-type": "application/json"}), *expected)
    assert served.client.post("/v1/rank", json=ONE).status_code == 200


@pytest.mark.cluster
def test_unknown_user_and_items(served: Served) -> None:
    asked = {"user_id": NOT_A_USER, "candidates": [{"item_id": 1}, {"item_id": 10**12}]}
    answer = served.client.post("/v1/rank", json=asked).json()
    assert answer["unknown_user"]
    assert answer["unknown_items"] == 1
    assert len(answer["scores"]["is_like"]) == 2


@pytest.mark.cluster
def test_an_event_is_part_of_the_next_rank(served: Served) -> None:
    event = {"user_id": NOT_A_USER + 1, "item_id": 5, "event_time": 1_651_500_000_000, "actions": {"is_click": True}}
    asked = {"user_id": event["user_id"], "candidates": [{"item_id": 1}]}
    before = served.client.post("/v1/rank", json=asked).json()
    statuses = [served.client.post("/v1/events", json={"events": [event]}).json()["status"] for _ in range(2)]
    assert statuses == [["accepted"], ["already_there"]]
    after = served.client.post("/v1/rank", json=asked).json()
    assert [(a["unknown_user"], a["history_length"]) for a in (before, after)] == [(True, 0), (False, 1)]
    assert after["scores"] != before["scores"]
    earlier = asked | {"request_time_ms": event["event_time"]}
    assert served.client.post("/v1/rank", json=earlier).json()["history_length"] == 0
    wrong = served.client.post("/v1/events", json={"events": [event | {"actions": {"is_sold": True}}]})
    check_refused(wrong, 422, ["body", "events", 0, "actions"], "is_sold")


@pytest.mark.cluster
def test_a_handle_inside_the_cluster_gets_the_same_answer(served: Served) -> None:
    import ray

    asked = ONE | {"request_time_ms": 1_651_500_000_000}
    over_http = served.client.post("/v1/rank", json=asked).json()
    head = RankHead(user_id=3, request_time_ms=1_651_500_000_000)

    @ray.remote
    class Caller:
        async def ask(self, request: RankColumns) -> RankedColumns:
            from ray import serve

            return await serve.get_deployment_handle("RankerReplica", deployment.APPLICATION).rank.remote(request)

    answer = ray.get(Caller.remote().ask.remote(RankColumns(head, np.array([1]), {})))
    assert answer.response().model_dump() == over_http


@pytest.mark.cluster
def test_the_most_candidates_allowed(served: Served) -> None:
    asked = {"user_id": 3, "candidates": [{"item_id": i} for i in range(10_000)]}
    answer = served.client.post("/v1/rank", json=asked)
    assert answer.status_code == 200
    assert sorted(answer.json()["order"]) == list(range(10_000))


@pytest.mark.cluster
def test_offline_and_http_agree(served: Served) -> None:
    report = replay.replay(served.cfg, served.url, served.folders[0])
    assert report.num_requests > 15
    assert report.max_abs_diff <= 1e-5
    other = replay.replay(served.cfg, served.url, served.folders[1])
    assert other.max_abs_diff > 1e-2, "another model's scores must not pass"


class Load:
    """Open-loop requests of all users at 20 a second while the block runs."""

    def __init__(self, served: Served, most_seconds: float) -> None:
        self.load = load_test.Load(rate=20, seconds=most_seconds, candidates=5, timeout_s=30)
        users, items = load_test.known_ids(served.cfg)
        self.asked = load_test.arrivals(self.load, users)
        bodies = load_test.bodies(self.load, self.asked, items)
        headers = dict(replay.key_header(served.cfg))
        self.sending = threading.Thread(target=self._send, args=(served.url, bodies, headers))
        self.stop = threading.Event()

    def _send(self, url: str, bodies: list[bytes], headers: dict[str, str]) -> None:
        self.answers = asyncio.run(load_test.send(url, self.load, self.asked, bodies, headers, self.stop))

    def __enter__(self) -> "Load":
        self.sending.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.sending.join()


def replica_pids() -> list[int]:
    from ray.util.state import list_actors

    name = "ServeReplica:ranking:RankerReplica"
    return [a.pid for a in list_actors(filters=[("class_name", "=", name), ("state", "=", "ALIVE")])]


@pytest.mark.cluster
def test_promote_roll_back_and_a_replica_killed_under_load(served: Served) -> None:
    """No request fails, each answer names its version, and the versions follow the deployments."""
    first, second = served.versions
    with Load(served, most_seconds=90) as load:
        time.sleep(1)
        assert tracking.promote(served.cfg, second).promoted
        assert deployment.deploy(served.cfg, served.dashboard_url, tracking.champion(served.cfg)) == served.url
        pids = replica_pids()
        assert len(pids) == served.cfg.serve.num_replicas
        os.kill(pids[0], signal.SIGKILL)
        time.sleep(2)
        assert tracking.rollback(served.cfg) == first
        deployment.deploy(served.cfg, served.dashboard_url, tracking.champion(served.cfg))
        time.sleep(1)
    sent = load.answers.status != load_test.NOT_SENT
    assert sent.sum() > 40
    assert load.answers.status[sent].tolist() == [200] * sent.sum()
    versions = load.answers.version[sent].tolist()
    assert (versions[0], versions[-1]) == (first, first)
    assert set(versions) == {first, second}
    assert served.client.post("/v1/rank", json=ONE).json()["model_version"] == first


@pytest.mark.cluster
def test_events_posted_while_a_replica_is_killed_are_there_once(served: Served) -> None:
    """Four writers, who send again what got no answer; `benchmarks.serving` does it with 100,000 events."""
    num_posts, together, first_user = 40, 10, NOT_A_USER + 100
    began = threading.Barrier(5)

    def write(writer: int) -> set[tuple[int, int]]:
        acknowledged: set[tuple[int, int]] = set()
        began.wait()
        with httpx.Client(base_url=served.url, timeout=10, headers=served.client.headers) as client:
            for post in range(num_posts):
                sent = {(first_user + writer, post * together + i) for i in range(together)}
                rows = [{"user_id": user, "item_id": i, "event_time": 1_651_500_000_000 + i} for user, i in sent]
                while (answer := client.post("/v1/events", json={"events": rows})).status_code != 200:
                    assert answer.status_code in (429, 503, 504), answer.text
                    time.sleep(0.1)
                acknowledged |= sent
        return acknowledged

    with ThreadPoolExecutor(4) as pool:
        writing = [pool.submit(write, writer) for writer in range(4)]
        began.wait()
        time.sleep(0.1)
        os.kill(replica_pids()[0], signal.SIGKILL)
        acknowledged = set().union(*(done.result() for done in writing))
    log = SqliteEvents(served.cfg.run_dir / "serving" / "events.sqlite")
    kept = [(e.user_id, e.item_id) for writer in range(4) for e in log.of_user(first_user + writer)]
    assert len(kept) == len(set(kept)) == len(acknowledged) == 4 * num_posts * together
    assert set(kept) == acknowledged


@pytest.mark.cluster
def test_a_canary_and_a_shadow_by_configuration(served: Served) -> None:
    first, second = served.versions
    users = range(NUM_USERS)
    ask = lambda user: served.client.post("/v1/rank", json=ONE | {"user_id": user}).json()["model_version"]
    trial = replace(served.cfg.serve, canary=CanaryConfig(version=second, share=0.4), shadow=second)
    replicas = served.cfg.serve.num_replicas
    try:
        deployment.deploy(replace(served.cfg, serve=trial), served.dashboard_url, tracking.champion(served.cfg))
        assert loaded(served) == {"champion": replicas, "canary": replicas, "shadow": replicas}
        expected = [second if in_share(user, second, 0.4) else first for user in users]
        assert set(expected) == {first, second}
        assert [ask(user) for user in users] == expected
        info = served.client.get("/v1/model").json()
        assert (info["canary_version"], info["canary_share"], info["shadow_version"]) == (second, 0.4, second)
        page = lambda: served.client.get("/metrics").text
        answered = sample(page(), "ranking_ranker_requests_total", version=str(second), role="canary")
        assert answered >= expected.count(second)
        wait_until(lambda: sample(page(), "ranking_shadow_score_change_count") >= NUM_USERS)
    finally:  # what other tests expect
        deployment.deploy(served.cfg, served.dashboard_url, tracking.champion(served.cfg))
    assert {ask(user) for user in users} == {first}


@pytest.mark.cluster
def test_metrics_of_the_ingress_and_of_every_replica(served: Served) -> None:
    assert httpx.get(f"{served.url}/metrics").status_code == 401
    rank_all = lambda: [served.client.post("/v1/rank", json=ONE | {"user_id": user}) for user in range(NUM_USERS)]
    rank_all()
    before = served.client.get("/metrics").text
    rank_all()
    text = served.client.get("/metrics").text
    missed = [sample(page, "ranking_history_cache_misses_total") for page in (before, text)]
    assert missed[0] == missed[1], "a user's second request goes where the first has left the encoded history"
    for name in ("ranking_requests_total", "ranking_ranker_requests_total"):
        labels = {"path": "/v1/rank"} if name == "ranking_requests_total" else {}
        assert sample(text, name, **labels) - sample(before, name, **labels) == NUM_USERS, name
    assert sample(text, "ranking_history_cache_misses_total") > 0


@pytest.mark.cluster
def test_a_version_that_does_not_load_leaves_the_old_one(served: Served) -> None:
    broken = replace(tracking.champion(served.cfg), sha256={"model.safetensors": "0" * 64})
    with pytest.raises(UserError, match="sha256"):
        deployment.deploy(served.cfg, served.dashboard_url, broken)
    with pytest.raises(UserError, match=r"did not load.*goes on answering"):  # where only the replicas see it
        deployment.update(served.cfg, served.dashboard_url, deployment.user_config(served.cfg, broken))
    assert served.client.post("/v1/rank", json=ONE).status_code == 200


def run_job(name: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"jobs.{name}", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)


@pytest.mark.cluster
def test_no_champion(mlflow_runs: Path, tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"runs_dir: {mlflow_runs}\ntracking: {{model_name: nobody}}\n")
    done = run_job("serve", "--config", str(preset))
    assert done.returncode == 2, done.stderr
    assert "no champion: no version of nobody has the alias 'champion'" in done.stderr


def test_mlflow_down(tmp_path: Path) -> None:
    preset = tmp_path / "preset.yaml"
    uri = f"http://127.0.0.1:{free_port()}"
    preset.write_text(f"runs_dir: {tmp_path}/runs\ntracking: {{uri: '{uri}'}}\n")
    done = run_job("promote", "--config", str(preset))
    assert done.returncode == 2, done.stderr
    assert f"no MLflow server answers at '{uri}'" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    preset = tmp_path / "preset.yaml"
    preset.write_text(f"runs_dir: {tmp_path}/runs\n")
    done = run_job("deploy", "--config", str(preset))
    assert done.returncode == 2, done.stderr
    assert "ray.address" in done.stderr
