"""Live events in Redis, for servers on several machines: the same face as the SQLite log.

One hash per user, `<prefix>:events:<user_id>`, with a field `<event_time>:<item_id>` per event.
HSETNX makes an event count once whoever sends it, MULTI makes a request's events visible together.
What is added to an event later goes in by WATCH: from the value that was read, or not at all.
"""

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import redis
import redis.backoff
import redis.retry
from redis.connection import AbstractConnection

from pipeline.config import UserError
from pipeline.schema import EventColumns
from serve_app.history.merging import merge_postings
from serve_app.history.rows import event_columns
from serve_app.ids import id_text, read_id, read_request_id, request_text
from serve_app.schemas import END_OF_TIME, Event, EventKey, EventStatus, StoreDown

logger = logging.getLogger("ray.serve")

TIMEOUT_S = 5.0  # of connecting and of one answer
TRIES = 3  # of one command, over a connection that broke; appending the same twice is harmless
SAFE = {"appendonly": "yes", "appendfsync": "always", "maxmemory-policy": "noeviction"}
MERGE_TRIES = 100  # of adding to an event, while others write to the same user's
REMOVE_UNCHANGED = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
return redis.call('HDEL', KEYS[1], ARGV[1])
"""
SCAN = 1000  # keys of one step of `users`


class RedisEvents:
    """An `EventLog` in a Redis server (6.2 or later) that writes before it answers.

    With `may_be_down` a server that does not answer yet is looked at before the first event.

    Raises:
        UserError: nothing answers at `url`, or the server's settings would lose what was
        acknowledged.
    """

    def __init__(
        self,
        url: str,
        prefix: str,
        password_file: Path | None = None,
        *,
        may_be_down: bool = False,
    ) -> None:
        self.prefix = prefix
        self.is_checked = False  # it answered at the start, and keeps what it acknowledges
        # connections that were made, and those of them whose server was looked at: after each of
        # its starts it may have other settings
        self._num_made = self._num_checked = 0

        password = None if password_file is None else _read(password_file)
        retry = redis.retry.Retry(redis.backoff.ExponentialBackoff(cap=0.5, base=0.05), TRIES)
        try:
            self._client = redis.Redis.from_url(
                url,
                socket_timeout=TIMEOUT_S,
                socket_connect_timeout=TIMEOUT_S,
                health_check_interval=30,
                retry=retry,
                retry_on_error=[redis.ConnectionError, redis.TimeoutError],
                decode_responses=True,
                password=password,
                redis_connect_func=self._note_connection,
            )
            self._check_new_connections()
        except (redis.RedisError, ValueError) as error:
            is_silent = isinstance(error, redis.ConnectionError | redis.TimeoutError)
            says_no = isinstance(error, redis.AuthenticationError)
            if not may_be_down or says_no or not is_silent:
                raise UserError(f"serve.redis_url: no usable Redis at {url}: {error}") from None
            logger.error("serve.redis_url: Redis at %s does not answer yet: %s", url, error)

    def append(self, events: Sequence[Event]) -> list[EventStatus]:
        if not events:
            return []

        self._require_safe()
        values = [_value(event) for event in events]
        with _store_errors(), self._client.pipeline(transaction=True) as pipe:
            for event, value in zip(events, values, strict=True):
                key, field = self._key(event.user_id), _field(event)
                pipe.hsetnx(key, field, value)
                pipe.hget(key, field)
            answers = pipe.execute()

        # two answers for each event: was it new, and what is kept
        were_new, are_kept = answers[::2], answers[1::2]
        statuses: list[EventStatus] = []
        for event, value, new, kept in zip(events, values, were_new, are_kept, strict=True):
            if new:
                statuses.append("accepted")
            elif kept == value:
                statuses.append("already_there")
            else:
                statuses.append(self._merge(event))

        # it may have been started anew, with other settings, since it was looked at
        self._require_safe()
        return statuses

    def _note_connection(self, connection: AbstractConnection) -> None:
        # with a ping of its own, a server that hangs would be pinged within pings, without end
        connection.on_connect_check_health(check_health=False)
        self._num_made += 1

    def _check_new_connections(self) -> None:
        """Look at the settings of the server, if a connection to it was made since the last look.

        Raises:
            ValueError: it would lose what it acknowledges.
        """
        made = self._num_made
        if self.is_checked and self._num_checked == made:
            return
        _check_settings(self._client)
        self._num_checked = made  # one that the look itself needed is looked at next time
        self.is_checked = True

    def _require_safe(self) -> None:
        """Go on only if the server keeps what it acknowledges.

        Raises:
            StoreDown: it does not answer, or would lose it.
        """
        with _store_errors():
            try:
                self._check_new_connections()
            except ValueError as error:
                raise StoreDown(f"serve.redis_url: {error}") from None

    def _merge(self, event: Event) -> EventStatus:
        """Add what this posting of an event says to what is kept of it."""
        key, field = self._key(event.user_id), _field(event)
        with _store_errors(), self._client.pipeline(transaction=True) as pipe:
            for _ in range(MERGE_TRIES):
                pipe.watch(key)
                kept: str | None = pipe.hget(key, field)  # pyright: ignore[reportAssignmentType]
                merged: Event | None = event  # None kept: forgotten meanwhile
                if kept is not None:
                    merged = merge_postings(_event(event.user_id, field, kept), event)
                if merged is None:
                    return "conflict"

                new = _value(merged)
                if new == kept:
                    return "already_there"

                pipe.multi()
                pipe.hset(key, field, new)
                try:
                    pipe.execute()
                    return "accepted" if kept is None else "merged"
                except redis.WatchError:  # somebody else wrote to this user's events
                    continue
        raise StoreDown("too many others write to the events of this user: send it again")

    def of_user(self, user_id: int) -> list[Event]:
        with _store_errors():
            found = self._client.hgetall(self._key(user_id))
        return [_event(user_id, field, value) for field, value in found.items()]  # pyright: ignore

    def newest_of_user(
        self, user_id: int, before_ms: int, most: int, columns: EventColumns
    ) -> dict[str, np.ndarray]:
        keys = sorted(self.keys_of_user(user_id, before_ms), reverse=True)
        # all of one time, or none: their order is not that of their keys
        if len(keys) > most:
            since_ms = keys[most - 1][0]
            keys = [key for key in keys if key[0] >= since_ms]

        fields = [f"{event_time}:{item_id}" for event_time, item_id in keys]
        events: list[Event] = []
        for begin in range(0, len(fields), SCAN):
            asked = fields[begin : begin + SCAN]
            with _store_errors():
                found = self._client.hmget(self._key(user_id), asked)

            for field, value in zip(asked, found, strict=True):  # pyright: ignore
                if value is not None:  # forgotten meanwhile
                    events.append(_event(user_id, field, value))  # pyright: ignore
        return event_columns(events, columns) if events else {}

    def keys_of_user(self, user_id: int, before_ms: int = END_OF_TIME) -> list[EventKey]:
        with _store_errors():
            fields = self._client.hkeys(self._key(user_id))
        keys = [_read_field(field) for field in fields]  # pyright: ignore
        return [key for key in keys if key[0] < before_ms]

    def count_events(self, user_ids: Sequence[int]) -> list[int]:
        with _store_errors(), self._client.pipeline(transaction=False) as pipe:
            for user in user_ids:
                pipe.hlen(self._key(user))
            return pipe.execute()

    def count_before(self, user_id: int, before_ms: int) -> int:
        return len(self.keys_of_user(user_id, before_ms))

    def users(self) -> Iterator[int]:
        """All who have events, each once."""
        seen: set[int] = set()  # a scan may name a key twice
        with _store_errors():
            mine = f"{_as_pattern(self.prefix)}:events:*"
            for key in self._client.scan_iter(match=mine, count=SCAN):
                user = int(key.rpartition(":")[2])
                if user not in seen:
                    seen.add(user)
                    yield user

    def remove(self, events: Sequence[Event]) -> int:
        """Forget those that are still as given; returns how many there were."""
        if not events:
            return 0

        with _store_errors(), self._client.pipeline(transaction=True) as pipe:
            for event in events:
                key, field = self._key(event.user_id), _field(event)
                pipe.eval(REMOVE_UNCHANGED, 1, key, field, _value(event))
            return sum(pipe.execute())

    def forget(self, user_ids: Iterable[int]) -> int:
        removed, users = 0, list(user_ids)
        with _store_errors():
            for user in users:
                with self._client.pipeline(transaction=True) as pipe:
                    pipe.hlen(self._key(user))
                    pipe.delete(self._key(user))
                    had, _ = pipe.execute()
                    removed += had

            try:
                # the append-only file has what was added until it is written anew
                self._client.bgrewriteaof()
            except redis.ResponseError as error:
                # one is under way, or a managed server does not let anybody ask
                logger.warning(
                    "Redis does not rewrite its append-only file now (%s): ask it for BGREWRITEAOF",
                    error,
                )
        return removed

    def _key(self, user_id: int) -> str:
        return f"{self.prefix}:events:{user_id}"


def _check_settings(client: redis.Redis) -> None:
    get: Callable[[str], dict[str, str]] = client.config_get  # pyright: ignore[reportAssignmentType]
    try:
        found = {name: get(name).get(name) for name in SAFE}
    except redis.ResponseError as error:  # a managed server may not let anybody ask
        client.ping()
        logger.warning("Redis does not say how it keeps data (%s): it must have %s", error, SAFE)
        return

    wrong, needed = {}, {}
    for name, value in SAFE.items():
        if found[name] != value:
            wrong[name], needed[name] = found[name], value
    if wrong:
        raise ValueError(f"it has {wrong} where acknowledged events need {needed}")


@contextmanager
def _store_errors() -> Iterator[None]:
    try:
        yield
    except redis.RedisError as error:
        raise StoreDown(f"{type(error).__name__}: {error}") from error


def _read(password_file: Path) -> str:
    try:
        return password_file.read_text().strip()
    except OSError as error:
        raise UserError(f"serve.redis_password_file: {password_file}: {error.strerror}") from None


def _as_pattern(text: str) -> str:
    """The pattern of Redis that the text alone matches: of `shop[eu]` it would read a set."""
    return re.sub(r"([\\*?\[\]^-])", r"\\\1", text)


def _field(event: Event) -> str:
    return f"{event.event_time}:{int(event.item_id)}"


def _read_field(field: str) -> EventKey:
    event_time, _, item_id = field.partition(":")
    return int(event_time), int(item_id)


def _value(event: Event) -> str:
    """What is kept of an event, so that the same event gives the same text.

    always           [request_id, watch_ms, actions, request_features]
    with outcomes    [..., outcomes]                where it has some
    with texts       [..., outcomes, [user, item, request]]    where ids are text
    """
    request_id = None if event.request_id is None else int(event.request_id)
    value: list[Any] = [request_id, event.watch_ms, event.actions, event.request_features]
    texts = [id_text(event.user_id), id_text(event.item_id), request_text(event.request_id)]
    with_texts = any(text is not None for text in texts)

    if event.outcomes or with_texts:
        value.append(event.outcomes)
    if with_texts:
        value.append(texts)
    return json.dumps(value, sort_keys=True)


def _event(user_id: int, field: str, value: str) -> Event:
    """The event that `_field` and `_value` keep."""
    event_time, item_id = _read_field(field)
    request_id, watch_ms, actions, features, *more = json.loads(value)
    outcomes = more[0] if more else {}
    texts = more[1] if len(more) > 1 else [None] * 3
    user_text, item_text, text_of_request = texts

    return Event.model_construct(
        user_id=read_id(user_id, user_text),
        item_id=read_id(item_id, item_text),
        event_time=event_time,
        actions=actions,
        request_features=features,
        request_id=read_request_id(request_id, text_of_request),
        watch_ms=watch_ms,
        outcomes=outcomes,
    )
