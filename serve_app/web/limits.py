"""How long a body may be, how long an answer may take, how much work may wait: ASGI layers around
the routes.
"""

import asyncio
import json
import math
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# what a replica works for
WORK_PATHS = {"/v1/rank": "rank", "/v1/rank/arrow": "rank", "/v1/events": "events"}
REQUEST_WORK = 1024  # what a request costs apart from its body, in bytes of a body
# requests that may always be in flight: one pass and the batch behind it, however long a pass takes
FEW = 8
MEMORY = 0.98  # weight of what was measured before, per answer: the last fifty count
RECENT = 0.95  # weight of the requests before, per request: the last twenty count
QUIET_S = 1.0  # without work: whatever was refused before is no sign any more
STRICT = 1 / 4  # the least that is left of both limits while most are refused


class BodyLimit:
    """413 for a body of more than `max_bytes`, read to its end but not kept: who is still sending
    hears no answer.
    """

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app, self.max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        body, size, more = bytearray(), 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= self.max_bytes:
                body += chunk
        scope.setdefault("state", {})["body_bytes"] = size
        if size > self.max_bytes:
            detail = [
                {
                    "loc": ["body"],
                    "msg": f"at most {self.max_bytes} bytes",
                    "input": f"{size} bytes",
                }
            ]
            await reply({"detail": detail}, 413)(scope, receive, send)
            return
        pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, replay, send)


class Deadline:
    """408 for a body that is not there after `timeout_s`, 504 for an answer that is not: its work
    is cancelled.
    """

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self.app, self.timeout_s = app, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            async with asyncio.timeout(self.timeout_s):
                await self.app(scope, receive, watch)
        except TimeoutError:
            if started:  # half an answer cannot be taken back: the connection ends
                raise
            read = "body_bytes" in scope.get("state", {})
            status, text = (504, "no answer") if read else (408, "the body was not complete")
            problem = reply(
                {"detail": f"{text} within {self.timeout_s:g} s"}, status, {"Retry-After": "1"}
            )
            await problem(scope, receive, send)


class Load:
    """How long the work in flight would take, from how fast answers come.

    A request counts as `REQUEST_WORK` and its body's bytes: candidates and events are in the body,
    and reading them before a refusal would cost what the refusal saves.
    """

    def __init__(self, max_wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_wait_s, self._clock = max_wait_s, clock
        self.num_in_flight = 0
        self._in_flight = self._done = self._busy_s = 0.0
        self._last_done = -math.inf
        self._refused = 0.0  # share of the newest requests

    def wait_s(self) -> float:
        """Until everything in flight is answered, as far as one can tell."""
        return self._in_flight * self._busy_s / self._done if self._done else 0.0

    def admits(self) -> bool:
        """Whether one more may begin. To be asked once for each that comes: the answers are
        remembered.

        A stall and an overload look alike at first, and both meet limits that let much wait. With
        each refusal they shrink, so that what is admitted in an overload waits for little; a stall
        ends before they have shrunk by much. They follow the share of the refused smoothly: strict
        limits that made for the refusals that keep them strict would outlast the overload.
        """
        if not self.num_in_flight and self._clock() - self._last_done > QUIET_S:
            self._refused = 0.0
        share = max((1 - self._refused) ** 2, STRICT)
        admitted = self.num_in_flight < share * FEW or self.wait_s() <= share * self.max_wait_s
        self._refused = RECENT * self._refused + (1 - RECENT) * (not admitted)
        return admitted

    def begin(self, work: float) -> float:
        self.num_in_flight += 1
        self._in_flight += work
        return self._clock()

    def end(self, work: float, begun: float) -> None:
        now = self._clock()
        self.num_in_flight -= 1
        self._in_flight -= work
        self._done = MEMORY * self._done + work
        self._busy_s = (
            MEMORY * self._busy_s + now - max(begun, self._last_done)
        )  # time in which nothing was asked is out
        self._last_done = now


class Admission:
    """429 with Retry-After for a request that would wait behind more than `serve.max_wait_ms` of
    work.
    """

    def __init__(self, app: ASGIApp, max_wait_s: float) -> None:
        self.app = app
        kinds = {kind: Load(max_wait_s) for kind in WORK_PATHS.values()}
        self.work = {path: kinds[kind] for path, kind in WORK_PATHS.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = self.work.get(scope["path"]) if scope["type"] == "http" else None
        if work is None:
            await self.app(scope, receive, send)
            return
        state = scope.setdefault("state", {})
        if not work.admits():
            state["refused"] = "overload"
            retry = {"Retry-After": str(math.ceil(work.wait_s()))}
            await reply({"detail": "too much work is waiting"}, 429, retry)(scope, receive, send)
            return
        size = REQUEST_WORK + state.get("body_bytes", 0)
        begun = work.begin(size)
        try:
            await self.app(scope, receive, send)
        finally:
            work.end(size, begun)


def reply(
    content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    return Response(json.dumps(content), status, headers, media_type="application/json")
