"""Deadlines, admission and /metrics, without Ray."""

import asyncio
import heapq
import json
import logging
import re
from pathlib import Path

import httpx
import numpy as np
import pytest
from prometheus_client import CollectorRegistry, Counter

from serve_app import metrics
from serve_app.columns import RankColumns, RankedColumns
from serve_app.schemas import ModelInfo, Refusal
from serve_app.web import limits
from serve_app.web.api import make_api
from serve_app.web.limits import FEW, MANY, STUCK_S, Admission, Backlog
from serve_app.web.protection import ApiKeys, RateLimit
from serve_app.web.settings import ApiAccess, ApiLimits
from tests.support.exposition import sample
from tests.support.patience import PATIENCE_S
from tests.worlds.web import EVENTS, RANK, Fixed, call, hashed


class Slow(Fixed):
    """Takes its time, and says how many it was told to forget."""

    cancelled = 0

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
        try:
            await asyncio.sleep(self.seconds)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return await super().rank(request)


def test_an_answer_that_does_not_come_is_504_and_its_work_is_cancelled() -> None:
    replica = Slow(60)
    answer = call(make_api(replica, ApiLimits(timeout_s=0.05)), "POST", "/v1/rank", json=RANK)
    assert (answer.status_code, answer.headers["Retry-After"]) == (504, "1")
    assert "0.05 s" in answer.json()["detail"]
    assert replica.cancelled == 1


def test_a_body_that_does_not_come_is_408() -> None:
    async def trickle():
        yield b"{"
        await asyncio.sleep(60)

    answer = call(
        make_api(Fixed(), ApiLimits(timeout_s=0.05)), "POST", "/v1/rank", content=trickle()
    )
    assert answer.status_code == 408


def test_the_wait_is_what_lies_in_flight_over_what_gets_done() -> None:
    now = 0.0
    work = Backlog(0.1 * (FEW - 1), lambda: now)
    assert work.wait_s() == 0
    for _ in range(20):  # one after another, 100 ms each, with pauses that do not count
        now += 5
        begun = work.begin_work(1000)
        now += 0.1
        work.end_work(1000, begun)

    begun = [work.begin_work(1000) for _ in range(FEW)]
    assert work.wait_s() == pytest.approx(0.1 * FEW)
    assert not work.admit_request()

    now += 0.1
    work.end_work(1000, begun.pop())
    assert work.wait_s() == pytest.approx(0.1 * (FEW - 1))
    assert work.admit_request()
    while begun:
        work.end_work(1000, begun.pop())
    assert (work.wait_s(), work.num_in_flight) == (0, 0)


def test_a_few_are_always_admitted_so_that_the_measure_can_recover() -> None:
    now = 0.0
    work = Backlog(0.001, lambda: now)
    begun = work.begin_work(1)
    now += 1000
    work.end_work(1, begun)
    admitted = [work.admit_request() and work.begin_work(1) is not None for _ in range(FEW + 1)]
    assert admitted == [True] * FEW + [False]


def served(
    arrivals: np.ndarray, stalls: dict[float, float] | None = None, lag_s: float = 0.0
) -> np.ndarray:
    """Seconds from each arrival to its answer, NaN where it was refused.

    The server's pass over n requests takes 5 + 7 n ms, the first one after each of `stalls` so
    much longer. What is computed is answered `lag_s` later.
    """
    now = 0.0
    work = Backlog(0.08, lambda: now)
    took, left = np.full(len(arrivals), np.nan), dict(stalls or {})
    waiting: list[tuple[int, float]] = []
    passing = False
    todo: list[tuple[float, int, str, list]] = []  # a heap: when, order, what, whose
    for i, due in enumerate(arrivals):
        heapq.heappush(todo, (due, i, "arrives", [i]))

    while todo:
        now, _, what, whose = heapq.heappop(todo)
        if what == "arrives" and work.admit_request():
            waiting.append((whose[0], work.begin_work(1)))
        elif what == "computed":
            passing = False
            heapq.heappush(todo, (now + lag_s, -1, "answered", whose))
        elif what == "answered":
            for i, begun in whose:
                work.end_work(1, begun)
                took[i] = now - begun

        if waiting and not passing:
            stalled = sum(left.pop(at) for at in list(left) if at <= now)
            done = now + 0.005 + 0.007 * len(waiting) + stalled
            heapq.heappush(todo, (done, -1, "computed", waiting))
            waiting, passing = [], True
    return took


def poisson(rate: float, begin: float, end: float) -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.sort(rng.uniform(begin, end, rng.poisson(rate * (end - begin))))


def test_a_stall_refuses_nobody_and_in_an_overload_few_wait_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usual = poisson(20, 0, 60)
    for stall_s in (0.2, 0.4, 0.8):  # in which 4, 8 and 16 come
        stalled = served(usual, {20: stall_s, 40: stall_s})
        assert np.isfinite(stalled).all()
        assert np.nanmax(stalled) < stall_s + 0.2, "what has waited is soon answered"

    calm = np.percentile(served(usual), 99)
    for rate in (160, 280):
        burst = np.concatenate([poisson(20, 0, 10), poisson(rate, 10, 20), poisson(20, 20, 60)])
        took, during = served(burst), (burst >= 10) & (burst < 20)
        assert np.isnan(took[during]).sum() > 500
        assert np.nanpercentile(took[during], 99) < 2 * calm
        # two seconds later it is as if nothing had been
        assert np.isfinite(took[(burst < 10) | (burst > 22)]).all()

    monkeypatch.setattr(limits, "STRICT", 1.0)
    assert np.nanpercentile(served(burst)[during], 99) > 2 * calm


def test_strict_limits_end_with_what_made_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pause = np.concatenate([poisson(280, 0, 10), poisson(20, 12, 60)])
    assert np.isfinite(served(pause)[pause > 12]).all()

    # 1.3 in flight as a rule: two are often there
    slow = np.concatenate([poisson(280, 0, 10), poisson(20, 10, 60)])
    refused = np.isnan(served(slow, lag_s=0.05))[slow > 12].sum()
    monkeypatch.setattr(limits, "STRICT", 1.0)
    assert refused <= np.isnan(served(slow, lag_s=0.05))[slow > 12].sum() + 2


def test_a_stall_is_no_slow_work() -> None:
    now = 0.0
    work = Backlog(0.5, lambda: now)
    for seconds in [0.01] * 100 + [2.0]:
        begun = work.begin_work(1000)
        now += seconds
        work.end_work(1000, begun)
    begun = work.begin_work(1000)
    assert work.wait_s() < 0.02, "not a fiftieth of two seconds more"
    work.end_work(1000, begun)

    # work that has become slow is: after as many answers as count
    for _ in range(50):
        begun = work.begin_work(1000)
        now += 1.0
        work.end_work(1000, begun)
    work.begin_work(1000)
    assert work.wait_s() > 0.5


def test_many_may_wait_in_a_stall_and_few_in_an_outage() -> None:
    now = 0.0
    work = Backlog(0.05, lambda: now)

    def come(num: int) -> list[float]:
        """When the admitted began."""
        return [work.begin_work(1000) for _ in range(num) if work.admit_request()]

    for _ in range(20):
        (begun,) = come(1)
        now += 0.01
        work.end_work(1000, begun)
    inside = come(FEW)
    now += 0.1
    assert not come(1), "a pass may take so long"

    now += 0.4
    inside += come(FEW)
    assert len(inside) == 2 * FEW
    # what has waited is answered, and what comes meanwhile finds room
    for _ in range(4):
        for _ in range(3):
            now += 0.01
            work.end_work(1000, inside.pop(0))
        (begun,) = come(1)
        inside.append(begun)
    for begun in inside:
        now += 0.01
        work.end_work(1000, begun)
    assert work.num_in_flight == 0

    now += 10
    inside = come(FEW)
    now += STUCK_S / 2
    assert len(come(2 * MANY)) <= MANY - FEW
    now += STUCK_S
    assert not come(1) and work.is_stuck()


def test_beyond_what_can_be_done_in_time_the_answer_is_429(
    caplog: pytest.LogCaptureFixture,
) -> None:
    api = make_api(Slow(0.05), ApiLimits(max_wait_s=0.2))
    caplog.set_level(logging.INFO, logger="ray.serve.requests")

    async def load() -> tuple[list[httpx.Response], list[httpx.Response]]:
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(api), base_url="http://test"
        ) as client:
            await client.post("/v1/rank", json=RANK)
            many = await asyncio.gather(*(client.post("/v1/rank", json=RANK) for _ in range(50)))
            return many, [await client.post("/v1/rank", json=RANK)]

    many, later = asyncio.run(load())
    statuses = [answer.status_code for answer in many]
    assert statuses.count(200) >= FEW
    assert statuses.count(429) > 25
    assert later[0].status_code == 200

    logged = [
        json.loads(record.message)["status"]
        for record in caplog.records
        if record.name == "ray.serve.requests"
    ]
    assert logged.count(200) == statuses.count(200) + 2
    assert logged.count(429) < 10

    told = {int(answer.headers["Retry-After"]) for answer in many if answer.status_code == 429}
    assert min(told) >= 1, "whole seconds, more of them on a machine that stood still meanwhile"

    text = call(api, "GET", "/metrics").text
    assert sample(text, "ranking_refused_total", reason="overload") == statuses.count(429)
    assert sample(text, "ranking_requests_in_flight") == 1, "the scrape itself"


def test_a_refusal_is_503_where_nothing_is_answered_at_all() -> None:
    now = 0.0
    work = Backlog(0.001, lambda: now)
    for ok in (True, False, False):
        begun = work.begin_work(1)
        now += 1
        work.end_work(1, begun, ok=ok)
    for _ in range(FEW):
        assert work.admit_request()
        work.begin_work(1)

    assert not work.admit_request()
    assert not work.is_stuck(), "these have just come"
    now += 2 * STUCK_S
    assert work.is_stuck()

    class Gone(Fixed):
        async def rank(self, request: RankColumns) -> RankedColumns | Refusal:
            await asyncio.sleep(PATIENCE_S)
            raise AssertionError("nobody waits so long")

    async def load() -> list[int]:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            await client.get("/healthz")  # builds the layers
            asked = [asyncio.create_task(client.post("/v1/rank", json=RANK)) for _ in range(FEW)]
            backlog = admission(api).backlogs["/v1/rank"]
            while backlog.num_in_flight < FEW:
                await asyncio.sleep(0.01)
            backlog._begun -= 2 * STUCK_S
            backlog._done, backlog._busy_s = 1.0, 1.0
            refused = await client.post("/v1/rank", json=RANK)
            for task in asked:
                task.cancel()
            return [refused.status_code]

    api = make_api(Gone())
    assert asyncio.run(load()) == [503]
    text = call(api, "GET", "/metrics").text
    assert sample(text, "ranking_refused_total", reason="unavailable") == 1


def admission(api) -> Admission:
    """The layer of an API that has been asked something."""
    layer = api.middleware_stack
    while not isinstance(layer, Admission):
        layer = layer.app
    return layer


def test_requests_are_counted_by_status_and_version(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"{hashed('secret')} shop\n")
    now = 0.0
    api = make_api(
        Fixed(), access=ApiAccess(keys=ApiKeys(keys), rate_limit=RateLimit(3, lambda: now))
    )
    statuses = [call(api, "POST", "/v1/rank", "secret", json=RANK).status_code for _ in range(2)]
    statuses += [call(api, "POST", "/v1/events", "secret", json=EVENTS).status_code]
    statuses += [
        call(api, "POST", "/v1/rank", key, json=RANK).status_code for key in ("secret", "wrong")
    ]
    assert statuses == [200, 200, 200, 429, 401]

    assert call(api, "GET", "/metrics").status_code == 401
    # a key without any rate left may still scrape
    text = call(api, "GET", "/metrics", "secret").text
    assert sample(text, "ranking_requests_total", path="/v1/rank", status="200", version="7") == 2
    assert sample(text, "ranking_requests_total", path="/v1/rank", status="429") == 1
    assert sample(text, "ranking_request_seconds_count", path="/v1/rank") == 4
    assert sample(text, "ranking_refused_total", reason="rate_limit") == 1
    assert sample(text, "ranking_refused_total", reason="key") == 2
    assert sample(text, "ranking_events_total", status="accepted") == 1


def test_the_page_holds_every_replica() -> None:
    texts = {}
    for replica, number in (("one", 3), ("two", 4)):
        counts = metrics.ReplicaMetrics()
        counts.requests.labels("7", "champion").inc(number)
        counts.seconds.labels("7", "champion").observe(0.02)
        texts[replica] = metrics.exposition_text(counts.registry)

    ingresses = {}
    for ingress, number in (("left", 5), ("right", 6)):
        own = CollectorRegistry()
        Counter("mine", "of the ingress", registry=own).inc(number)
        ingresses[ingress] = metrics.exposition_text(own)

    text = metrics.metrics_page(ingresses, texts).decode()
    assert sample(text, "mine_total", ingress="right") == 6
    assert sample(text, "mine_total") == 11
    assert text.count("# TYPE mine_total") == 1
    assert sample(text, "ranking_ranker_requests_total", replica="two", version="7") == 4
    assert sample(text, "ranking_ranker_requests_total") == 7
    assert sample(text, "ranking_ranker_seconds_bucket", le="0.025", replica="one") == 1
    names = re.findall(r"^# TYPE (\S+)", text, re.MULTILINE)
    assert len(names) == len(set(names)), "a family must come once"


def test_who_asks_for_readiness_together_asks_the_replicas_once() -> None:
    """Nobody needs a key for it: a flood is no flood of the replicas."""

    class Counting(Fixed):
        num_asked = 0

        async def model_info(self) -> ModelInfo:
            self.num_asked += 1
            await asyncio.sleep(0.01)
            return await super().model_info()

    replica = Counting()
    api = make_api(replica)

    async def ask() -> list[int]:
        transport = httpx.ASGITransport(api)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            # one that goes away takes the answer from nobody
            gone = asyncio.create_task(client.get("/readyz"))
            await asyncio.sleep(0)
            answers = [asyncio.create_task(client.get("/readyz")) for _ in range(50)]
            while replica.num_asked == 0:
                await asyncio.sleep(0)
            gone.cancel()
            return [(await answer).status_code for answer in answers]

    assert asyncio.run(ask()) == [200] * 50
    assert replica.num_asked <= 2
    assert call(api, "GET", "/readyz").status_code == 200, "and is asked again later"
    assert replica.num_asked >= 2
