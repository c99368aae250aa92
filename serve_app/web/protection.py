"""Who may ask, how often, and one log line per request: ASGI layers around the routes, without Ray."""

import hashlib
import hmac
import json
import logging
import math
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config import UserError
from serve_app.metrics import IngressMetrics

# a child of the logger that Serve writes to the replica's file
requests_log = logging.getLogger("ray.serve.requests")

OPEN_PATHS = ("/healthz", "/readyz")  # for load balancers and jobs.deploy, which have no key
# a scraper needs a key, but a rate of its own would blind it when it matters
UNLIMITED_PATHS = ("/metrics",)
LOGGED_PATHS = (
    *("/v1/rank", "/v1/rank/arrow", "/v1/events", "/v1/model", "/docs", "/openapi.json"),
    *UNLIMITED_PATHS,
    *OPEN_PATHS,
)
KEY_LINE = re.compile(r"([0-9a-f]{64})\s+(\S+)")
REFUSALS_LOGGED_PER_S = 5.0
ANYBODY = "-"  # the name in logs and rate limits where no keys are asked for


class ApiKeys:
    """The sha256 of each key and its name, one `<hash> <name>` a line; # begins a comment. Read
    again when it changes.

    A key is a random token, not a password: a plain hash is enough.

    Raises:
        UserError: the file cannot be read, or a line is no hash and name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = self._mark()
        self._names = read_keys(path)

    def name(self, key: str) -> str | None:
        """Whose key it is, None for nobody's. All hashes are compared, each in constant time."""
        self._refresh()
        digest = hashlib.sha256(key.encode()).hexdigest()
        found = [name for known, name in self._names.items() if hmac.compare_digest(known, digest)]
        return found[0] if found else None

    def _refresh(self) -> None:
        mark = self._mark()
        if mark == self._seen:
            return
        self._seen = mark
        try:
            self._names = read_keys(self.path)
        except UserError as error:
            requests_log.error("the keys read before stay valid: %s", error)

    def _mark(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino


def read_keys(path: Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"serve.api_keys_file: {path} cannot be read: {error}") from None
    names: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = KEY_LINE.fullmatch(text)
        if match is None:  # the line is not repeated: it may be a key in the clear
            raise UserError(
                f"serve.api_keys_file: {path} line {number} must be a sha256 in hex and a name"
            )
        names[match[1]] = match[2]
    if not names:
        raise UserError(f"serve.api_keys_file: {path} holds no key")
    return names


class RateLimit:
    """A token bucket per name: `per_s` requests a second, and as many (at least one) at once after
    a pause.
    """

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s, self.size, self._clock = per_s, max(1.0, per_s), clock
        self._buckets: dict[str, tuple[float, float]] = {}  # name -> tokens, when counted

    def wait_s(self, name: str) -> float:
        """0 and one token fewer, or how long until there is one."""
        now = self._clock()
        tokens, counted = self._buckets.get(name, (self.size, now))
        tokens = min(self.size, tokens + (now - counted) * self.per_s)
        allowed = tokens >= 1
        self._buckets[name] = (tokens - allowed, now)
        return 0.0 if allowed else (1 - tokens) / self.per_s


class Protection:
    """401 without a known key, 429 for a key's requests beyond its rate; `OPEN_PATHS` pass."""

    def __init__(self, app: ASGIApp, keys: ApiKeys | None, rate_limit: RateLimit | None) -> None:
        self.app, self.keys, self.rate_limit = app, keys, rate_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in OPEN_PATHS:
            await self.app(scope, receive, send)
            return
        name = ANYBODY if self.keys is None else self.keys.name(_bearer(scope))
        state = scope.setdefault("state", {})
        if name is None:
            state["refused"] = "key"
            detail = [
                {
                    "loc": ["header", "authorization"],
                    "msg": "Bearer and a known API key",
                    "input": "not repeated",
                }
            ]
            await JSONResponse({"detail": detail}, 401, {"WWW-Authenticate": "Bearer"})(
                scope, receive, send
            )
            return
        state["key"] = name
        limit = None if scope["path"] in UNLIMITED_PATHS else self.rate_limit
        wait = 0.0 if limit is None else limit.wait_s(name)
        if wait > 0:
            state["refused"] = "rate_limit"
            answer = {"detail": "more requests than this key may send"}
            await JSONResponse(answer, 429, {"Retry-After": str(math.ceil(wait))})(
                scope, receive, send
            )
            return
        await self.app(scope, receive, send)


def _bearer(scope: Scope) -> str:
    """The key of `Authorization: Bearer <key>`, "" where there is none: no hash in the file is that
    of "".
    """
    header = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
    scheme, _, key = header.decode("latin-1").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else ""


class RequestLog:
    """One JSON line and one count per request: nothing that a client sent but which route it asked."""

    def __init__(self, app: ASGIApp, metrics: IngressMetrics) -> None:
        self.app, self.metrics = app, metrics
        self.refusals, self.not_logged = RateLimit(REFUSALS_LOGGED_PER_S), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        # 0: the client went away, or an exception on its way out
        started, status = time.perf_counter(), 0
        known = scope.setdefault("state", {})
        self.metrics.in_flight.inc()

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watch)
        finally:
            path = scope["path"] if scope["path"] in LOGGED_PATHS else "other"
            took_s = time.perf_counter() - started
            self._count(path, status, took_s, known)
            line = {"path": path, "status": status, "ms": round(took_s * 1000, 2)}
            line |= {
                name: known[name]
                for name in ("key", "num_candidates", "num_events", "version")
                if name in known
            }
            self._log(line, refused=status == 429)

    def _log(self, line: dict[str, Any], *, refused: bool) -> None:
        """In an overload few of the refusals: writing a line takes longer than refusing."""
        if refused and self.refusals.wait_s("") > 0:
            self.not_logged += 1
            return
        if refused and self.not_logged:
            line["refusals_not_logged"] = self.not_logged
            self.not_logged = 0
        requests_log.info(json.dumps(line))

    def _count(self, path: str, status: int, took_s: float, known: dict[str, Any]) -> None:
        self.metrics.in_flight.dec()
        self.metrics.requests.labels(path, status, known.get("version", "")).inc()
        self.metrics.seconds.labels(path).observe(took_s)
        if "refused" in known:
            self.metrics.refused.labels(known["refused"]).inc()
