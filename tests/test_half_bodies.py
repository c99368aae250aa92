"""Bodies that do not come to an end, over real sockets."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import uvicorn

from pipeline.cluster import free_port
from serve_app import deployment
from serve_app.web.api import make_api
from serve_app.web.protection import ApiKeys
from serve_app.web.settings import ApiAccess, ApiLimits
from tests.support.exposition import sample
from tests.worlds.web import RANK, Fixed, call, hashed

NUM_HALF = 256  # as many as once stopped a server
BODY = json.dumps(RANK).encode()


@asynccontextmanager
async def listening(api) -> AsyncIterator[int]:
    """The port of a server in this process."""
    port = free_port()
    server = uvicorn.Server(uvicorn.Config(api, "127.0.0.1", port, log_config=None))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)

    yield port
    server.should_exit = True
    await task


async def send_rank(port: int, body: bytes, key: str | None) -> int:
    """The status of an answer; `body` may be less than the headers promise."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    lines = ["POST /v1/rank HTTP/1.1", "Host: 127.0.0.1", f"Content-Length: {len(BODY)}"]
    lines += ["Content-Type: application/json"]
    if key is not None:
        lines += [f"Authorization: Bearer {key}"]
    writer.write("\r\n".join([*lines, "", ""]).encode() + body)
    await writer.drain()

    status = int((await reader.readline()).split()[1])
    writer.close()
    return status


@pytest.mark.parametrize(("key", "expected"), [("secret", 408), (None, 401)])
def test_half_sent_bodies_delay_nobody_and_are_cut(
    key: str | None, expected: int, tmp_path: Path
) -> None:
    (tmp_path / "keys").write_text(f"{hashed('secret')} shop\n")
    body_timeout_s = 8.0
    api = make_api(
        Fixed(),
        ApiLimits(timeout_s=300, body_timeout_s=body_timeout_s),
        access=ApiAccess(keys=ApiKeys(tmp_path / "keys")),
    )

    async def scenario() -> tuple[list[int], float]:
        async with listening(api) as port:
            begun = time.monotonic()
            half = [asyncio.create_task(send_rank(port, BODY[:1], key)) for _ in range(NUM_HALF)]
            while not all_are_waiting() and not any(task.done() for task in half):
                await asyncio.sleep(0.01)

            assert await send_rank(port, BODY, "secret") == 200
            if expected == 408:
                assert not any(task.done() for task in half), "before a half-sent one was cut"

            statuses = list(await asyncio.gather(*half))
            return statuses, time.monotonic() - begun

    def all_are_waiting() -> bool:
        return api.state.counts.in_flight._value.get() == NUM_HALF

    statuses, took_s = asyncio.run(asyncio.wait_for(scenario(), 120))
    assert statuses == [expected] * NUM_HALF
    if expected == 401:
        assert took_s < body_timeout_s, "nobody waits for the body of a stranger"
    text = call(api, "GET", "/metrics", "secret").text
    assert sample(text, "ranking_requests_total", path="/v1/rank", status=str(expected)) == NUM_HALF


def test_a_whole_body_without_a_key_is_read_before_the_answer() -> None:
    """Else its client, still sending, would see a broken connection in place of a 401."""
    sizes = []

    async def chunks() -> AsyncIterator[bytes]:
        for size in (10, 20, 30):
            sizes.append(size)
            yield b" " * size

    class NoKeys(ApiKeys):
        def __init__(self) -> None:
            pass

        def find_name(self, key: str) -> str | None:
            return None

    answer = call(
        make_api(Fixed(), access=ApiAccess(keys=NoKeys())), "POST", "/v1/rank", content=chunks()
    )
    assert answer.status_code == 401
    assert sizes == [10, 20, 30]


def test_serve_lets_more_requests_in_than_a_client_can_hold_half_open() -> None:
    (application,) = deployment.read_template()["applications"]
    ingress = application["deployments"][0]
    assert ingress["max_ongoing_requests"] >= 4 * NUM_HALF
