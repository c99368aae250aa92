"""The event log in Redis, against a real redis-server of this test's own."""

import multiprocessing
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.cluster import free_port
from pipeline.config import ConfigError, UserError
from pipeline.files import folder_digests
from pipeline.tracking import PinnedModel
from serve_app import deployment
from serve_app.columns import RankColumns, RankedColumns
from serve_app.history import redis_events
from serve_app.history.live import LiveHistory
from serve_app.history.published import PublishedSequences, histories
from serve_app.history.sqlite_events import SqliteEvents
from serve_app.metrics import ReplicaMetrics
from serve_app.ranking.rollout import load_rollout, open_events
from serve_app.schemas import Event, EventsRequest, EventsResponse, RankRequest, StoreDown
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config

redis = pytest.importorskip("redis", reason="the extra [redis] is not installed")
SERVER = shutil.which("redis-server")
if SERVER is None and "CI" not in os.environ:  # in CI its absence fails the tests
    pytest.skip("redis-server is not installed", allow_module_level=True)

START = 1_651_500_000_000
DURABLE = ("--appendonly", "yes", "--appendfsync", "always")


class Server:
    """A redis-server on a port of its own that can be killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        assert SERVER is not None, "redis-server is not installed: apt-get install redis-server"
        self.port = free_port()
        self.command = [
            SERVER,
            "--port",
            str(self.port),
            "--bind",
            "127.0.0.1",
            "--dir",
            str(folder),
            "--save",
            "",
        ]
        self.command += options
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL)
        client = redis.Redis(port=self.port)
        for _ in range(200):
            try:
                client.ping()
                return
            except redis.AuthenticationError:
                return
            except redis.ConnectionError:
                assert self.process.poll() is None, "redis-server ended"
                time.sleep(0.02)
        raise AssertionError("redis-server does not answer")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(10)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path, *DURABLE)
    yield server
    server.kill()


def log_of(server: Server, folder: Path, **settings: str):
    return open_events(
        tiny_config(folder, serve={"redis_url": server.url, **settings}).serve, folder
    )


def event(user: int, item: int, time_ms: int = START, **values: object) -> Event:
    return Event(user_id=user, item_id=item, event_time=time_ms, **values)  # pyright: ignore[reportArgumentType]


def test_an_event_is_kept_once_with_all_it_says(server: Server, tmp_path: Path) -> None:
    log, other = log_of(server, tmp_path), log_of(server, tmp_path)
    full = event(
        1, 2, actions={"is_click": True}, request_features={"tab": 3}, request_id="7", watch_ms=9
    )
    assert log.append([full, event(1, 3), event(2, 2)]) == ["accepted"] * 3
    less, another_tab = event(1, 2, watch_ms=1), event(1, 2, request_features={"tab": 4})
    assert other.append([full, less, another_tab, event(1, 2, START + 1)]) == [
        "already_there",
        "already_there",
        "conflict",
        "accepted",
    ]
    kept = sorted(log.of_user(1), key=lambda e: (e.event_time, e.item_id))
    assert kept == [full, event(1, 3), event(1, 2, START + 1)]
    assert log.of_user(3) == []
    assert log.append([]) == []
    assert log_of(server, tmp_path, redis_prefix="another").of_user(1) == []


def test_any_prefix_finds_its_own_users(server: Server, tmp_path: Path) -> None:
    """Redis reads a prefix with brackets as a pattern of others."""
    prefixes = ("shop[eu]", "shop?", "shop*", "a\\b", "shope")
    logs = [log_of(server, tmp_path, redis_prefix=prefix) for prefix in prefixes]
    for number, log in enumerate(logs):
        log.append([event(number, 1)])
    assert [list(log.users()) for log in logs] == [[0], [1], [2], [3], [4]]


def test_forgotten_events_are_in_no_file(server: Server, tmp_path: Path) -> None:
    log = log_of(server, tmp_path)
    log.append([event(user, 987_654_000 + user, START + i) for user in (1, 2) for i in range(9)])
    assert log.forget([1, 5]) == 9
    assert log.forget([1]) == 0
    assert (log.of_user(1), len(log.of_user(2))) == ([], 9)
    for _ in range(600):  # Redis writes its file anew in the background
        left = b"".join(file.read_bytes() for file in tmp_path.rglob("appendonly.aof.*"))
        if b"987654001" not in left:
            break
        time.sleep(0.1)
    assert b"987654001" not in left
    assert b"987654002" in left


def test_a_history_is_the_same_over_either_log(server: Server, tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "runs")
    table = publish_sequences(cfg)
    published = PublishedSequences(cfg.sequence_dir, cfg.source, cfg.features, tmp_path / "cache")
    logs = (log_of(server, tmp_path), SqliteEvents(tmp_path / "events.sqlite"))
    one, other = (LiveHistory(published, log, cfg.sequences, max_events=100) for log in logs)
    rng = np.random.default_rng(0)
    times = np.concatenate([row.as_py() for row in table["event_time"]])
    for _ in range(20):
        events = [
            event(
                int(rng.integers(30)),
                int(rng.integers(60)),
                int(rng.choice(times)),
                actions={"is_click": True},
            )
            for _ in range(5)
        ]
        assert one.append(events) == other.append(events)
    for user in range(30):
        found, expected = one.sequence(user), other.sequence(user)
        assert (found is None) == (expected is None)
        if found is not None and expected is not None:
            assert found.equals(expected)
            as_of = np.array([times.min(), int(np.median(times)), times.max() + 1])
            cut, same = (
                histories([row] * 3, as_of, cfg.source, cfg.features, 100).events
                for row in (found, expected)
            )
            assert cut.item_id.tolist() == same.item_id.tolist()
            assert cut.offsets.tolist() == same.offsets.tolist()


def _write(url: str, folder: Path, writer: int, num: int) -> None:
    log = open_events(tiny_config(folder, serve={"redis_url": url}).serve, folder)
    for i in range(num):
        log.append([event(writer, i), event(100, i)])


def test_writers_of_several_machines_at_once(server: Server, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    writers = [
        context.Process(target=_write, args=(server.url, tmp_path, writer, 50))
        for writer in range(4)
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(30)
        assert writer.exitcode == 0
    log = log_of(server, tmp_path)
    assert [len(log.of_user(user)) for user in (0, 1, 2, 3, 100)] == [50] * 5


def test_a_killed_server_loses_nothing_acknowledged(server: Server, tmp_path: Path) -> None:
    log = log_of(server, tmp_path)
    assert log.append([event(1, item) for item in range(20)]) == ["accepted"] * 20
    server.kill()
    with pytest.raises(StoreDown):
        log.append([event(1, 20)])
    with pytest.raises(StoreDown):
        log.of_user(1)
    server.start()
    assert {e.item_id for e in log.of_user(1)} == set(range(20))  # over a new connection
    assert log.append([event(1, 19), event(1, 20)]) == ["already_there", "accepted"]


def test_a_server_that_comes_back_with_other_settings_acknowledges_nothing(
    server: Server, tmp_path: Path
) -> None:
    log = log_of(server, tmp_path)
    assert log.append([event(1, 2)]) == ["accepted"]
    server.kill()

    # no write meets the outage: the client connects anew by itself
    server.command = [*server.command[: -len(DURABLE)], "--appendonly", "no"]
    server.start()
    for _ in range(2):
        with pytest.raises(StoreDown, match="appendonly"):
            log.append([event(1, 3)])
    assert log.of_user(2) == []  # reading is no harm

    server.kill()
    server.command = [*server.command[:-2], *DURABLE]
    server.start()
    assert log.append([event(1, 3)]) == ["accepted"]
    assert {one.item_id for one in log.of_user(1)} == {2, 3}


def test_a_server_that_takes_connections_and_does_not_answer_is_given_up(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that pings within the ping of a new connection never comes back."""
    monkeypatch.setattr(redis_events, "TIMEOUT_S", 0.05)
    server.process.send_signal(signal.SIGSTOP)
    log = redis_events.RedisEvents(server.url, "hung", may_be_down=True)
    assert not log.is_checked
    with pytest.raises(StoreDown, match="Timeout"):
        log.append([event(1, 2)])


@pytest.mark.parametrize(
    "options", [(), ("--appendonly", "yes"), (*DURABLE, "--maxmemory-policy", "allkeys-lru")]
)
def test_a_server_that_may_lose_events_is_refused(tmp_path: Path, options: tuple[str, ...]) -> None:
    server = Server(tmp_path, *options)
    try:
        with pytest.raises(UserError, match=r"serve\.redis_url.*(append|maxmemory)"):
            log_of(server, tmp_path)
    finally:
        server.kill()


def test_the_password_comes_from_a_file(tmp_path: Path) -> None:
    server = Server(tmp_path, *DURABLE, "--requirepass", "open-sesame")
    password = tmp_path / "password"
    try:
        with pytest.raises(UserError, match=r"serve\.redis_password_file"):
            log_of(server, tmp_path, redis_password_file=str(password))
        password.write_text("wrong\n")
        with pytest.raises(UserError, match=r"serve\.redis_url") as caught:
            log_of(server, tmp_path, redis_password_file=str(password))
        assert "wrong" not in str(caught.value)
        password.write_text("open-sesame\n")
        assert log_of(server, tmp_path, redis_password_file=str(password)).append(
            [event(1, 1)]
        ) == ["accepted"]
    finally:
        server.kill()


def test_a_replica_that_starts_in_an_outage_ranks_and_takes_events_after_it(
    server: Server, tmp_path: Path
) -> None:
    """As one does that was there before; a wrong password is no outage."""
    cfg = tiny_config(tmp_path / "runs", serve={"redis_url": server.url})
    publish_sequences(cfg)
    folder = save_tiny_model(cfg, tmp_path / "model")
    version = PinnedModel("", "tiny", 1, folder_digests(folder))
    shutil.copytree(folder, deployment.cache_folder(cfg.runs_dir) / version.folder_name)
    wanted = deployment.user_config(cfg.folders, cfg.serve, version)
    server.kill()

    rollout = load_rollout(wanted, ReplicaMetrics())
    assert not rollout.model_info().live_events
    asked = RankRequest.model_validate({"user_id": 3, "candidates": [{"item_id": 1}]})
    (answer,) = rollout.rank([RankColumns.of(asked)])
    assert isinstance(answer, RankedColumns)
    assert not answer.live_events
    sent = EventsRequest(events=[event(3, 1)])
    with pytest.raises(StoreDown):
        rollout.append_events([sent])

    # with the address of nobody an update is refused
    nobody = replace(cfg.serve, redis_url=f"redis://127.0.0.1:{free_port()}")
    update = deployment.user_config(cfg.folders, nobody, version)
    with pytest.raises(UserError, match="no usable Redis"):
        load_rollout(update, ReplicaMetrics(), rollout)

    # it comes back, first as one that would lose them
    durable, server.command = server.command, server.command[: -len(DURABLE)]
    server.start()
    with pytest.raises(StoreDown, match="appendonly"):
        rollout.append_events([sent])
    server.kill()
    server.command = durable
    server.start()
    (kept,) = rollout.append_events([sent])
    assert isinstance(kept, EventsResponse)
    assert kept.status == ["accepted"]


def test_nothing_answers(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"serve\.redis_url: no usable Redis"):
        open_events(
            tiny_config(tmp_path, serve={"redis_url": f"redis://127.0.0.1:{free_port()}"}).serve,
            tmp_path,
        )


@pytest.mark.parametrize("url", ["http://host", "redis://user:secret@host:6379"])
def test_urls_that_the_configuration_refuses(tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match=r"serve\.redis_url") as caught:
        tiny_config(tmp_path, serve={"redis_url": url})
    assert "secret" not in str(caught.value)
