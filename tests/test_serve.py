"""The server's HTTP face in this process, over a ranker without Ray."""

import asyncio
import contextlib
import json
import tomllib
from pathlib import Path

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import version
from pipeline.config import ServeConfig
from pipeline.model.artifact import load_model
from serve_app.columns import MEDIA_TYPE, BadBody, RankColumns, RankedColumns
from serve_app.history.published import PublishedSequences
from serve_app.ranking.ranker import Ranker
from serve_app.schemas import ModelInfo, RankRequest, Refusal
from serve_app.web.api import make_api
from serve_app.web.replica import Overloaded, Unavailable
from tests.support.bad_bodies import BAD_BODIES, ONE, check_refused
from tests.worlds.tiny import NOT_A_USER, publish_sequences, save_tiny_model, tiny_config
from tests.worlds.web import between_processes

ROOT = Path(__file__).parent.parent


class InProcess:
    """A replica without Ray."""

    def __init__(self, ranker: Ranker) -> None:
        self.ranker = ranker
        self.failing: Exception | None = None

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        if self.failing:
            raise self.failing
        request = between_processes(request)
        return self.ranker.find_refusal(request) or self.ranker.rank([request])[0]

    async def model_info(self) -> ModelInfo:
        if self.failing:
            raise self.failing
        return self.ranker.model_info()

    async def deployment_ids(self) -> list[str]:
        return [self.ranker.model_info().deployment]


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory) -> InProcess:
    folder = tmp_path_factory.mktemp("api")
    cfg = tiny_config(folder / "runs")
    publish_sequences(cfg)
    loaded = load_model(save_tiny_model(cfg, folder / "model"))
    sequences = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, folder / "cache")
    return InProcess(Ranker(loaded, sequences, 1, "tiny", ServeConfig()))


def call(replica: InProcess, method: str, path: str, **arguments: object) -> httpx.Response:
    async def send() -> httpx.Response:
        transport = httpx.ASGITransport(make_api(replica))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, **arguments)  # pyright: ignore[reportArgumentType]

    return asyncio.run(send())


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_4xx_and_name_the_field(replica: InProcess, name: str) -> None:
    body, *expected = BAD_BODIES[name]
    check_refused(
        call(
            replica, "POST", "/v1/rank", content=body, headers={"content-type": "application/json"}
        ),
        *expected,
    )


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (ONE, None, "must be sent with content-type: application/json, got none"),
        (ONE, "text/plain", "content-type: application/json, got text/plain"),
        ('{"user_id": 3,', "application/json", "JSON decode error: Expecting property name"),
    ],
)
def test_a_body_that_is_no_json_is_told_why(
    replica: InProcess, body: dict | str, kind: str | None, said: str
) -> None:
    content = (body if isinstance(body, str) else json.dumps(body)).encode()
    headers = {} if kind is None else {"content-type": kind}
    check_refused(
        call(replica, "POST", "/v1/rank", content=content, headers=headers), 422, None, said
    )


NUMBERS = st.one_of(
    st.integers(-2, 70),
    st.sampled_from([2**31 - 1, 2**53 - 1, 2**63 - 1, 2**63, 1_651_500_000_000]),
)
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
            {"history": st.lists(ROWS, max_size=5)},
            optional={"first_position": st.sampled_from([0, 7, 2**31 - 1])},
        ),
    ).map(lambda who: rest | who)
)
ODD = (
    st.none()
    | st.booleans()
    | NUMBERS
    | TEXTS
    | st.lists(NUMBERS, max_size=2)
    | st.dictionaries(TEXTS, NUMBERS)
)
ODD_FIELD = st.dictionaries(
    st.sampled_from(list(RankRequest.model_fields)), ODD, min_size=1, max_size=1
)


@settings(max_examples=100, deadline=None)
@given(body=VALID)
def test_valid_requests_are_answered(replica: InProcess, body: dict) -> None:
    answer = call(replica, "POST", "/v1/rank", json=body)
    assert answer.status_code == 200, answer.text
    assert all(0 <= score <= 1 for scores in answer.json()["scores"].values() for score in scores)


@settings(max_examples=100, deadline=None)
@given(body=st.builds(lambda body, odd: body | odd, VALID, ODD_FIELD))
def test_whatever_comes_is_answered_or_refused(replica: InProcess, body: dict) -> None:
    """An exception of the ranker would pass through this transport: over the wire it would be a
    500.
    """
    content = json.dumps(body).encode()  # in ASCII: a lone surrogate goes through as an escape
    answer = call(
        replica, "POST", "/v1/rank", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code in (200, 400, 422)


def test_an_arrow_body_gets_the_same_answer_as_columns(replica: InProcess) -> None:
    head = {
        "user_id": 3,
        "request_time_ms": 1_651_500_000_000,
        "request_features": {"tab": 2},
        "order_by": "is_like",
    }
    tabs = [0, None, 2, 1]
    asked = [
        {"item_id": i} | ({} if tab is None else {"request_features": {"tab": tab}})
        for i, tab in enumerate(tabs)
    ]
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
    assert rest.pop("request_id") != plain.pop("request_id"), "each answer has its own"
    assert rest == {
        name: value for name, value in plain.items() if name not in ("item_ids", "scores", "order")
    }


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
    "a negative item": (
        arrow_body(pa.table({"item_id": pa.array([-1], pa.int64())}), WHO),
        ["body", "item_id"],
        "-1",
    ),
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


def test_one_version_number(replica: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    number = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert call(replica, "GET", "/openapi.json").json()["info"]["version"] == number
    assert call(replica, "GET", "/v1/model").json()["server_version"] == number

    # without a source tree the installation says it
    monkeypatch.setattr(version, "PYPROJECT", ROOT / "nowhere.toml")
    monkeypatch.setattr(version.metadata, "version", lambda package: f"{package} 9")
    assert version.package_version.__wrapped__() == "ultra-hstu-pipeline 9"
