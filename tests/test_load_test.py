"""The load generator: who asks when, and its figures of a server that answers, refuses and keeps
silent.
"""

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import UserError
from serve_app import load_test
from serve_app.load_test import RequestLoad
from tests.worlds.tiny import NUM_USERS, publish_sequences, tiny_config


def test_arrivals_are_seeded_poisson_and_half_warm() -> None:
    load = RequestLoad(rate=20, seconds=600, seed=3)
    asked, again = (load_test.draw_arrivals(load, np.arange(1000)) for _ in range(2))
    for name in ("due_s", "user", "warm"):
        assert getattr(asked, name).tolist() == getattr(again, name).tolist()

    assert len(asked.due_s) == pytest.approx(12_000, abs=500)
    gaps = np.diff(asked.due_s)
    assert gaps.min() >= 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # of an exponential distribution

    assert asked.warm.mean() == pytest.approx(0.5, abs=0.03)
    last: dict[int, float] = {}
    for due, user, warm in zip(
        asked.due_s.tolist(), asked.user.tolist(), asked.warm.tolist(), strict=True
    ):
        assert warm == (due - last.get(user, -np.inf) < 60)
        last[user] = due


def test_more_users_asked_for_than_there_are() -> None:
    asked = load_test.draw_arrivals(RequestLoad(rate=50, seconds=10, warm_share=0), np.arange(5))
    assert asked.warm.mean() > 0.9, "five users cannot all stay cold"


def test_every_answer_is_counted_and_timed_from_when_it_was_due(tmp_path: Path) -> None:
    """A server of a few lines refuses each fifth request, never answers each seventh, and takes
    30 ms for the others.
    """
    cfg = tiny_config(tmp_path / "runs")
    publish_sequences(cfg)
    seen: list[dict] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    int(line.split(b":")[1])
                    for line in head.lower().split(b"\r\n")
                    if b"content-len" in line
                )
                seen.append(json.loads(await reader.readexactly(length)))
                number = len(seen)
                if number % 7 == 0:
                    await asyncio.sleep(60)
                await asyncio.sleep(0.03)

                status, body = "200 OK", '{"model_version": 4}'
                if number % 5 == 0:
                    status, body = "429 No", "{}"
                timing = "Server-Timing: ranker;dur=12.50\r\n"
                lines = f"HTTP/1.1 {status}\r\n{timing}Content-Length: {len(body)}\r\n\r\n"
                writer.write((lines + body).encode())
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the client has gone
        finally:
            writer.close()

    async def main() -> tuple[RequestLoad, load_test.Arrivals, load_test.Answers]:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        host, port = server.sockets[0].getsockname()
        load = RequestLoad(rate=60, seconds=1, candidates=3, timeout_s=0.5)
        users, items = load_test.known_ids(cfg.sequence_dir)
        asked = load_test.draw_arrivals(load, users)
        sent = load_test.request_bodies(load, asked, items)
        answers = await load_test.send_requests(f"http://{host}:{port}", load, asked, sent, {})
        server.close()
        return load, asked, answers

    load, asked, answers = asyncio.run(main())

    # what came
    num = len(asked.due_s)
    assert sorted(body["user_id"] for body in seen) == sorted(asked.user.tolist())
    assert {len(body["candidates"]) for body in seen} == {3}
    assert max(body["user_id"] for body in seen) < NUM_USERS

    # what is said of it
    figures = load_test.summarize_run(load, asked, answers)
    silent, refused = num // 7, num // 5 - num // 35
    assert figures["statuses"] == {"0": silent, "200": num - silent - refused, "429": refused}
    assert figures["failures"] == silent
    assert figures["versions"] == {"4": num - silent - refused}
    assert figures["latency_ms"]["p50"] >= 30
    assert figures["ranker_ms"]["p99"] == 12.5
    assert figures["overhead_ms"]["p50"] == pytest.approx(
        figures["latency_ms"]["p50"] - 12.5, abs=0.02
    )

    load_test.plot_latency(load, asked, answers, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_recommended_lists_are_asked_for_in_their_place() -> None:
    load = RequestLoad(rate=10, seconds=1, recommend=7)
    asked = load_test.draw_arrivals(load, np.arange(5))
    bodies = [json.loads(body) for body in load_test.request_bodies(load, asked, np.arange(3))]
    assert bodies == [{"user_id": user, "n": 7} for user in asked.user.tolist()]
    assert (load.path, RequestLoad(rate=1, seconds=1).path) == ("/v1/recommend", "/v1/rank")
    assert load_test.read_timing("recommender;dur=3.25") == {"recommender": 3.25}


def test_a_burst_and_what_comes_after_it() -> None:
    load = RequestLoad(rate=20, seconds=40, burst=(200, 10, 20))
    asked = load_test.draw_arrivals(load, np.arange(1000))
    during = (asked.due_s >= 10) & (asked.due_s < 20)
    assert during.sum() == pytest.approx(2200, abs=200)
    assert (~during).sum() == pytest.approx(600, abs=100)

    # every other request of the burst is refused, and the first after it are slow
    num = len(asked.due_s)
    status, latency = np.full(num, 200), np.full(num, 10.0)
    status[during & (np.arange(num) % 2 == 0)] = 429
    slow = np.flatnonzero(asked.due_s >= 20)[:30]  # a second and a half of aftermath
    latency[slow] = 100.0
    answers = load_test.Answers(status, latency, latency, np.zeros(num), np.ones(num, int))

    figures = load_test.summarize_run(load, asked, answers)
    assert figures["phases"]["burst"]["refused"] == np.count_nonzero(status == 429)
    assert figures["phases"]["before"]["refused"] == figures["phases"]["after"]["refused"] == 0
    assert figures["recovered_after_s"] == pytest.approx(asked.due_s[slow[-1]] - 20, abs=0.01)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rate": 0}, "--rate.*0"),
        ({"rate": 1e6}, "--rate.*200000"),
        ({"seconds": 1e5}, "--seconds"),
        ({"warm_share": 2}, "--warm-share.*2"),
        ({"timeout_s": 0}, "--timeout-s"),
        ({"burst": (5, 3, 20)}, "--burst"),
    ],
)
def test_loads_are_bounded(settings: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        RequestLoad(**{"rate": 1, "seconds": 10} | settings)
