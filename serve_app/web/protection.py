"""API keys, rate limits and the request log: ASGI layers around the routes, without Ray."""

import hashlib
import hmac
import json
import logging
import math
import re
import time
import uuid
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pipeline.config import UserError
from serve_app.metrics import IngressMetrics
from serve_app.schemas import Refusal
from serve_app.web.limits import drain_body

# a child of the logger that Serve writes to the replica's file
requests_log = logging.getLogger("ray.serve.requests")
logger = logging.getLogger("ray.serve")

# for load balancers and jobs.deploy, which have no key; the page /docs asks for one itself
OPEN_PATHS = ("/healthz", "/readyz", "/v2/health/live", "/v2/health/ready", "/docs")
# a scraper needs a key, but a rate of its own would blind it when it matters
UNLIMITED_PATHS = ("/metrics",)
LOGGED_PATHS = (
    *("/v1/recommend", "/v1/recommend/batch", "/v1/recommend/arrow"),
    *("/v1/rank", "/v1/rank/arrow", "/v1/rank/batch", "/v1/rank/batch/arrow"),
    *("/v1/events", "/v1/model", "/v2", "/openapi.json"),
    *("/", "/page/start", "/page/user", "/page/items"),
    *UNLIMITED_PATHS,
    *OPEN_PATHS,
)
EMPTY_KEY = hashlib.sha256().hexdigest()  # of a variable that was not set, as a rule
KEY_LINE = re.compile(r"([0-9a-f]{64})\s+(\S+)")
# what layers and routes noted of a request
LOGGED_FIELDS = (
    *("key", "num_candidates", "num_events", "num_users", "version", "served_as"),
    "trace_id",
)
REQUEST_ID = b"x-request-id"
SERVER_ID = b"x-server-id"
SANE_ID = re.compile(rb"[A-Za-z0-9._:=+/-]{1,128}")  # safe in a header and in a line of a log
REFUSALS_LOGGED_PER_S = 5.0
REFUSED_BODY_S = 0.25  # how long a refused client may still send
ANYBODY = "-"  # the name in logs and rate limits where no keys are asked for


class ApiKeys:
    """Names by API key, from a file of one `<sha256> <name>` a line; # begins a comment.

    The file is read again when it changes. A key is a random token, not a password: a plain hash
    is enough.

    Raises:
        UserError: the file cannot be read, or a line is no hash and name.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen = self._file_mark()
        self._names = read_keys(path)

    def find_name(self, key: str) -> str | None:
        """Name of the key's holder, None where nobody has it."""
        self._read_again()
        digest = hashlib.sha256(key.encode()).hexdigest()

        # no early end: every hash is compared, each in constant time
        found = None
        for known, name in self._names.items():
            if hmac.compare_digest(known, digest):
                found = name
        return found

    def _read_again(self) -> None:
        mark = self._file_mark()
        if mark == self._seen:
            return

        self._seen = mark
        try:
            self._names = read_keys(self.path)
        except UserError as error:
            requests_log.error("the keys read before stay valid: %s", error)

    def _file_mark(self) -> tuple[int, int] | None:
        try:
            stat = self.path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_ino


def read_keys(path: Path) -> dict[str, str]:
    """Names by the sha256 of their key.

    Raises:
        UserError: as `ApiKeys`.
    """
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
        if match[1] == EMPTY_KEY:
            raise UserError(
                f"serve.api_keys_file: {path} line {number} is the sha256 of no text at all: "
                "whoever sends no key would be let in"
            )
        names[match[1]] = match[2]

    if not names:
        raise UserError(f"serve.api_keys_file: {path} holds no key")
    return names


class RateLimit:
    """A token bucket per name.

    It allows `per_s` requests a second, and as many (at least one) at once after a pause.
    """

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_s = per_s
        self.size = max(1.0, per_s)
        self._clock = clock
        self._buckets: dict[str, tuple[float, float]] = {}  # name -> tokens, when counted

    def wait_s(self, name: str) -> float:
        """Take a token and return 0, or return the seconds until there is one."""
        now = self._clock()
        tokens, counted = self._buckets.get(name, (self.size, now))
        tokens = min(self.size, tokens + (now - counted) * self.per_s)

        if tokens < 1:
            self._buckets[name] = (tokens, now)
            return (1 - tokens) / self.per_s

        self._buckets[name] = (tokens - 1, now)
        return 0.0


class Protection:
    """401 without a known key, 429 for a key's requests beyond its rate.

    `open_paths` pass.
    """

    def __init__(
        self,
        app: ASGIApp,
        keys: ApiKeys | None,
        rate_limit: RateLimit | None,
        open_paths: Collection[str] = OPEN_PATHS,
    ) -> None:
        self.app = app
        self.open_paths = open_paths
        self.keys = keys
        self.rate_limit = rate_limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = None
        if scope["type"] == "http" and scope["path"] not in self.open_paths:
            refusal = self._find_refusal(scope)

        if refusal is None:
            await self.app(scope, receive, send)
            return

        # a body that comes with its headers is gone at once; a slow one is not waited for
        await drain_body(receive, REFUSED_BODY_S)
        await refusal(scope, receive, send)

    def _find_refusal(self, scope: Scope) -> JSONResponse | None:
        """The answer to who may not ask; the request log learns the key's name or the reason."""
        state = scope.setdefault("state", {})
        name = ANYBODY
        if self.keys is not None:
            found = self.keys.find_name(_bearer_key(scope))
            if found is None:
                state["refused"] = "key"
                return _answer_unknown_key()
            name = found

        state["key"] = name
        if self.rate_limit is None or scope["path"] in UNLIMITED_PATHS:
            return None

        wait_s = self.rate_limit.wait_s(name)
        if wait_s == 0:
            return None
        state["refused"] = "rate_limit"
        detail = {"detail": "more requests than this key may send"}
        return JSONResponse(detail, 429, {"Retry-After": str(math.ceil(wait_s))})


def _answer_unknown_key() -> JSONResponse:
    problem = {
        "loc": ["header", "authorization"],
        "msg": "Bearer and a known API key",
        "input": "not repeated",
    }
    return JSONResponse({"detail": [problem]}, 401, {"WWW-Authenticate": "Bearer"})


def _bearer_key(scope: Scope) -> str:
    """The key of `Authorization: Bearer <key>`, "" where there is none.

    "" is nobody's key: `read_keys` refuses its hash.
    """
    for name, value in scope["headers"]:
        if name == b"authorization":
            scheme, _, key = value.decode("latin-1").partition(" ")
            return key.strip() if scheme.lower() == "bearer" else ""
    return ""


class LocalHosts:
    """403 for a request that a page of the web had a browser send to a server of this machine.

    Such a server needs no key from whoever is on the machine, and a browser is. A name that was
    bound anew to 127.0.0.1 (DNS rebinding) shows in `Host`, a foreign page in `Origin`.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None) -> None:
        self.app = app
        self.hosts = hosts  # None: every name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        foreign = self._find_foreign(scope) if scope["type"] == "http" else None
        if foreign is None:
            await self.app(scope, receive, send)
            return

        scope.setdefault("state", {})["refused"] = "host"
        rule = "a name of this machine; others need a server with keys (serve.api_keys_file)"
        problem = Refusal.of(["header", foreign], rule, "not repeated")
        await drain_body(receive, REFUSED_BODY_S)
        answer = JSONResponse({"detail": [problem.model_dump()]}, 403)
        await answer(scope, receive, send)

    def _find_foreign(self, scope: Scope) -> str | None:
        """The header that names another machine; a client that sends neither is no browser."""
        if self.hosts is None:
            return None
        for name, value in scope["headers"]:
            text = value.decode("latin-1")
            if name == b"host" and _host_of(f"//{text}") not in self.hosts:
                return "host"
            if name == b"origin" and _host_of(text) not in self.hosts:
                return "origin"
        return None


def _host_of(url: str) -> str | None:
    """The name of a machine, None where the text is no address: "//[" say."""
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


class Addressee:
    """421 for a request that names another server than this one in `X-Server-Id`.

    Every answer names its server in that header. A client that sends the name back is sure that
    nothing of it is ranked or kept elsewhere, whoever has got the port meanwhile.
    """

    def __init__(self, app: ASGIApp, server_id: str | None) -> None:
        self.app = app
        self.server_id = server_id  # None: it has no name, and nobody is refused

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.server_id is None or scope["type"] != "http" or not self._is_foreign(scope):
            await self.app(scope, receive, send)
            return

        scope.setdefault("state", {})["refused"] = "server"
        await drain_body(receive, REFUSED_BODY_S)
        answer = JSONResponse({"detail": "the request is for another server"}, 421)
        await answer(scope, receive, send)

    def _is_foreign(self, scope: Scope) -> bool:
        for name, value in scope["headers"]:
            if name == SERVER_ID:
                return value.decode("latin-1") != self.server_id
        return False


class RequestLog:
    """One JSON line, one count and one id per request; 500 for an exception that nothing expected.

    The id is the client's `X-Request-Id` where it is a sane token, else a new one. The answer's
    header, the line and the traceback of a failure carry it. Nothing else that a client sent is
    logged but the route.

    Args:
        app: what is inside.
        metrics: of this ingress.
        id_is_sent: whether a layer outside sends back the id of the request's header, as Ray
            Serve's does.
        server_id: name of this server, in the header `X-Server-Id` of every answer; None: none.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: IngressMetrics,
        id_is_sent: bool = False,
        server_id: str | None = None,
    ) -> None:
        self.app = app
        self.metrics = metrics
        self.own_headers = [] if server_id is None else [(SERVER_ID, server_id.encode())]
        self.id_is_sent = id_is_sent
        self.refusals = RateLimit(REFUSALS_LOGGED_PER_S)
        self.not_logged = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        started = time.perf_counter()
        status = 0  # stays: the client went away
        known = scope.setdefault("state", {})
        known["started"] = started
        known["request_id"], is_of_client = _find_request_id(scope)
        sends_id = not (self.id_is_sent and is_of_client)
        self.metrics.in_flight.inc()

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *self.own_headers]
                if sends_id:
                    headers.append((REQUEST_ID, known["request_id"].encode()))
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self.app(scope, receive, send_and_note)
        except ClientDisconnect:
            status = 0
        except Exception:
            logger.exception("request %s failed", known["request_id"])
            half_sent = status != 0
            status = 500
            if half_sent:  # half an answer cannot be taken back: the connection ends
                raise
            await _answer_failed()(scope, receive, send_and_note)
        finally:
            self._note(scope["path"], status, time.perf_counter() - started, known)

    def _note(self, path: str, status: int, took_s: float, known: dict[str, Any]) -> None:
        """Count and log a request that is over."""
        if path not in LOGGED_PATHS:
            path = "other"
        self._count(path, status, took_s, known)

        line = {"path": path, "status": status, "ms": round(took_s * 1000, 2)}
        line["request_id"] = known["request_id"]
        for name in LOGGED_FIELDS:
            if name in known:
                line[name] = known[name]
        self._log(line, refused=status == 429)

    def _log(self, line: dict[str, Any], *, refused: bool) -> None:
        """Write `line`; in an overload few of the refusals: a line costs more than a refusal."""
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


def _find_request_id(scope: Scope) -> tuple[str, bool]:
    """The request's id, and whether the client gave it."""
    for name, value in scope["headers"]:
        if name == REQUEST_ID and SANE_ID.fullmatch(value):
            return value.decode(), True
    return uuid.uuid4().hex, False


def _answer_failed() -> JSONResponse:
    return JSONResponse({"detail": "the server failed on this request"}, 500)
