"""Limits on a body's length, an answer's time and the work that waits: ASGI layers around the
routes.
"""

import asyncio
import contextlib
import json
import math
import time
from collections.abc import Callable
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# paths that a replica works for, by the kind of work: each kind has a backlog of its own
WORK_PATHS = {
    "/v1/rank": "rank",
    "/v1/rank/arrow": "rank",
    "/v1/rank/batch": "rank_many",
    "/v1/rank/batch/arrow": "rank_many",
    "/v1/events": "events",
    "/v1/recommend": "recommend",
    "/v1/recommend/batch": "recommend_many",
    "/v1/recommend/arrow": "recommend_many",
    "/page/start": "page",
    "/page/user": "page",
    "/page/items": "page",
}
LIVE_PATHS = ("/healthz", "/v2/health/live")  # of a process that ends, too
REQUEST_WORK = 1024  # cost of a request apart from its body, in bytes of a body
# requests that may always be in flight: one pass and the batch behind it, however long a pass takes
FEW = 8
# a silence of so many answers' usual time is a stall; a pass over `FEW` takes less in any overload
STALL = 2 * FEW
MANY = 32  # requests that may be in flight in a stall, and until what waited in it is answered
MEMORY = 0.98  # weight of what was measured before, per answer: the last fifty count
RECENT = 0.95  # weight of the requests before, per request: the last twenty count
ENDING_BODY_S = 0.25  # how long a client may still send to a server that ends
QUIET_S = 1.0  # without work: whatever was refused before is no sign any more
STUCK_S = 3.0  # without one good answer while requests wait: no overload, nobody answers
# bodies of the greatest length that one process holds: thousands of clients could each send one
MOST_BODIES = 64
CROWDED_BODY_S = 0.25  # how long a client may still send that there is no room for
STRICT = 1 / 4  # the least that is left of both limits while most are refused


def json_reply(
    content: dict[str, Any], status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """Any JSON object as an answer, without a schema."""
    return Response(json.dumps(content), status, headers, media_type="application/json")


async def drain_body(receive: Receive, longest_s: float) -> None:
    """Read what is left of a body, for at most `longest_s`, and keep nothing of it.

    Clients ignore an answer while they are still sending.
    """
    # who is still sending when the time is over may miss the answer
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(longest_s):
            while (await receive()).get("more_body", False):
                pass


class Draining:
    """503 for what comes while the server ends; what it has taken in is answered first.

    Its own health passes. Load balancers see `/readyz` fail and go elsewhere.
    """

    def __init__(self, app: ASGIApp, gate: "Gate") -> None:
        self.app = app
        self.gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in LIVE_PATHS:
            await self.app(scope, receive, send)
            return

        if self.gate.is_closed:
            scope.setdefault("state", {})["refused"] = "unavailable"
            await drain_body(receive, ENDING_BODY_S)
            answer = json_reply({"detail": "the server is ending"}, 503, {"Retry-After": "1"})
            await answer(scope, receive, send)
            return

        self.gate.num_inside += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self.gate.num_inside -= 1


class Gate:
    """What `Draining` lets in, and how much of it is still inside."""

    def __init__(self) -> None:
        self.is_closed = False
        self.num_inside = 0

    async def close_and_wait(self, longest_s: float) -> int:
        """Let nothing in any more; returns how many are inside still, 0 unless time is up."""
        self.is_closed = True
        end = time.monotonic() + longest_s
        while self.num_inside and time.monotonic() < end:
            await asyncio.sleep(0.02)
        return self.num_inside


class TooManyBodies(Exception):
    """The bodies of all requests together are longer than this process wants to hold."""


class BodyLimit:
    """413 for a body of more than `max_bytes`, 408 for one that is not there after `timeout_s`, 429
    where the bodies of all requests together are more than `MOST_BODIES` of the longest.

    A longer body is drained, not stored: clients ignore a response while they are still sending.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self.app = app
        self.max_bytes = max_bytes
        self.timeout_s = timeout_s
        self.num_held = 0  # bytes of the bodies of requests that are not answered yet

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        body = bytearray()
        try:
            await self._answer(scope, receive, send, body)
        finally:
            self.num_held -= len(body)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, body: bytearray) -> None:
        """Answer a request, of which `body` holds what is kept of its body."""
        try:
            async with asyncio.timeout(self.timeout_s):
                size = await self._read_body(receive, body)
        except TimeoutError:
            await late_body(self.timeout_s)(scope, receive, send)
            return
        except TooManyBodies:
            scope.setdefault("state", {})["refused"] = "overload"
            await drain_body(receive, CROWDED_BODY_S)
            answer = {"detail": "too much is being sent"}
            await json_reply(answer, 429, {"Retry-After": "1"})(scope, receive, send)
            return
        if size is None:
            return

        scope.setdefault("state", {})["body_bytes"] = size
        if size > self.max_bytes:
            await self._too_long(size)(scope, receive, send)
            return

        # the routes read the body once more
        pending = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def receive_again() -> Message:
            return pending.pop() if pending else await receive()

        await self.app(scope, receive_again, send)

    async def _read_body(self, receive: Receive, body: bytearray) -> int | None:
        """Read the body, and nothing of one that is too long; its size, None where the client went
        away.

        Raises:
            TooManyBodies: there is no room for it.
        """
        size = 0
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None

            chunk = message.get("body", b"")
            more = message.get("more_body", False)
            size += len(chunk)
            if size > self.max_bytes:
                self.num_held -= len(body)
                body.clear()
                continue

            if self.num_held + len(chunk) > MOST_BODIES * self.max_bytes:
                raise TooManyBodies
            self.num_held += len(chunk)
            body += chunk
        return size

    def _too_long(self, size: int) -> Response:
        problem = {
            "loc": ["body"],
            "msg": f"at most {self.max_bytes} bytes",
            "input": f"{size} bytes",
        }
        return json_reply({"detail": [problem]}, 413)


class Deadline:
    """408 for a body that is not there after `timeout_s`, 504 for an answer that is not.

    The work for a late answer is cancelled.
    """

    def __init__(self, app: ASGIApp, timeout_s: float) -> None:
        self.app = app
        self.timeout_s = timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = False

        async def send_and_note(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        deadline = asyncio.timeout(self.timeout_s)
        try:
            async with deadline:
                await self.app(scope, receive, send_and_note)
        except TimeoutError:
            # one of a replica's own is a failure like others; half an answer cannot be taken back:
            # the connection ends
            if started or not deadline.expired():
                raise
            body_was_read = "body_bytes" in scope.get("state", {})
            answer = late_answer if body_was_read else late_body
            await answer(self.timeout_s)(scope, receive, send)


def late_body(timeout_s: float) -> Response:
    detail = f"the body was not complete within {timeout_s:g} s"
    return json_reply({"detail": detail}, 408, {"Retry-After": "1"})


def late_answer(timeout_s: float) -> Response:
    return json_reply({"detail": f"no answer within {timeout_s:g} s"}, 504, {"Retry-After": "1"})


class Backlog:
    """Work in flight, and an estimate of the time it takes from how fast answers come.

    A request's work is `REQUEST_WORK` plus its body's bytes. Candidates and events are in the
    body, and parsing it before a refusal would cost what the refusal saves.
    """

    def __init__(self, max_wait_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.max_wait_s = max_wait_s
        self._clock = clock
        self.num_in_flight = 0
        self._in_flight = 0.0  # work, in bytes
        self._refused = 0.0  # share of the newest requests

        # decaying sums over the answers so far
        self._done = 0.0  # work, in bytes
        self._busy_s = 0.0
        self._num_done = 0.0  # answers
        self._room = FEW  # requests in flight beyond which the estimate decides
        self._last_done = -math.inf
        self._begun = -math.inf  # the first request since nothing was in flight
        self._last_good = -math.inf

    def wait_s(self) -> float:
        """Estimated time until everything in flight is answered; 0 before the first answer."""
        if not self._done:
            return 0.0
        return self._in_flight * self._busy_s / self._done

    def admit_request(self) -> bool:
        """Decide whether one more request may begin.

        Call it once for each request: the share of refusals is part of the state.

        In a stall nothing is answered, and what comes meanwhile is soon worked off: it waits. In an
        overload answers come as ever, and what waits grows. With each refusal the limits shrink, so
        that what is admitted in an overload waits for little. They follow the share of the refused
        smoothly: strict limits that made for the refusals that keep them strict would outlast the
        overload.
        """
        now = self._clock()
        if not self.num_in_flight and now - self._last_done > QUIET_S:
            self._refused = 0.0
        if self.is_stalled(now):
            self._room = MANY
        elif self.is_stuck():
            self._room = FEW

        share = max((1 - self._refused) ** 2, STRICT)
        few = self.num_in_flight < share * self._room
        admitted = few or self.wait_s() <= share * self.max_wait_s

        self._refused = RECENT * self._refused + (1 - RECENT) * (not admitted)
        return admitted

    def is_stalled(self, now: float) -> bool:
        """Tell whether requests wait and none was answered for longer than any overload makes
        them wait, and not yet for so long that it is an outage.
        """
        silence_s = now - max(self._last_done, self._begun)
        return self.num_in_flight > 0 and silence_s > self._longest_s() and not self.is_stuck()

    def is_stuck(self) -> bool:
        """Tell whether requests wait and none was answered for a while: an outage, no overload."""
        waited_s = self._clock() - max(self._last_good, self._begun)
        return self.num_in_flight > 0 and waited_s > STUCK_S

    def begin_work(self, work: float) -> float:
        """Add a request; returns the time that `end_work` asks for."""
        now = self._clock()
        if not self.num_in_flight:
            self._begun = now
        self.num_in_flight += 1
        self._in_flight += work
        return now

    def end_work(self, work: float, begun: float, *, ok: bool = True) -> None:
        """Take a request out, answered or not; `ok`: by whoever does the work."""
        now = self._clock()
        if ok:
            self._last_good = now
        self.num_in_flight -= 1
        self._in_flight -= work

        # time in which nothing was asked does not count as busy, and a stall is no slow work
        busy_s = min(now - max(begun, self._last_done), self._longest_s())
        self._busy_s = MEMORY * self._busy_s + busy_s
        self._done = MEMORY * self._done + work
        self._num_done = MEMORY * self._num_done + 1
        self._last_done = now
        self._room = max(self._room - 1, FEW)

    def _longest_s(self) -> float:
        """The longest time between two answers that is no stall; infinite before the first."""
        if not self._num_done:
            return math.inf
        return STALL * self._busy_s / self._num_done


class Admission:
    """429 with Retry-After for a request that would wait behind more work than `max_wait_s`.

    503 where nothing that waits is answered at all: that is an outage, and no client is to blame.
    """

    def __init__(self, app: ASGIApp, max_wait_s: float) -> None:
        self.app = app
        self.backlogs: dict[str, Backlog] = {}  # by path; paths of one kind share theirs

        by_kind: dict[str, Backlog] = {}
        for path, kind in WORK_PATHS.items():
            self.backlogs[path] = by_kind.setdefault(kind, Backlog(max_wait_s))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        backlog = self.backlogs.get(scope["path"]) if scope["type"] == "http" else None
        if backlog is None:
            await self.app(scope, receive, send)
            return

        state = scope.setdefault("state", {})
        if not backlog.admit_request():
            await _refuse_work(backlog, state)(scope, receive, send)
            return

        status = 0

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        work = REQUEST_WORK + state.get("body_bytes", 0)
        begun = backlog.begin_work(work)
        try:
            await self.app(scope, receive, send_and_note)
        finally:
            backlog.end_work(work, begun, ok=0 < status < 500)


def _refuse_work(backlog: Backlog, state: dict[str, Any]) -> Response:
    """The answer to a request that is not admitted; the request log learns the reason."""
    if backlog.is_stuck():
        state["refused"] = "unavailable"
        detail = {"detail": "no model answers at the moment"}
        return json_reply(detail, 503, {"Retry-After": "1"})

    state["refused"] = "overload"
    retry = {"Retry-After": str(math.ceil(backlog.wait_s()))}
    return json_reply({"detail": "too much work is waiting"}, 429, retry)
