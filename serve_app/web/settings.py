"""What `make_api` is told of the server that it is for."""

from dataclasses import dataclass

from serve_app.web.protection import ApiKeys, RateLimit


@dataclass(frozen=True, kw_only=True)
class ApiLimits:
    """What one request may take; None is as the replica says."""

    max_body_bytes: int = 2_000_000  # HTTP 413 beyond it
    max_wait_s: float = 0.5  # work that may lie before a request; HTTP 429 beyond it
    timeout_s: float = 10.0  # from the first byte to the answer; HTTP 504 beyond it
    body_timeout_s: float = 2.0  # until the body is there; HTTP 408 beyond it
    # lengths of its lists; HTTP 422 beyond them
    max_candidates: int | None = None
    max_history: int | None = None
    max_rank_users: int = 100
    max_recommend_users: int = 100


@dataclass(frozen=True, kw_only=True)
class ApiAccess:
    """Who may ask; by default everybody, as often as they like."""

    keys: ApiKeys | None = None
    rate_limit: RateLimit | None = None  # per key
    hosts: frozenset[str] | None = None  # names that a request may call this server by; None is all


@dataclass(frozen=True, kw_only=True)
class ApiIdentity:
    """Who answers."""

    name: str = "ingress"  # of this ingress, part of the names of files that it writes
    # name of the server, in every answer; a request for another one gets HTTP 421
    server_id: str | None = None
    id_is_sent: bool = False  # as of `RequestLog`
