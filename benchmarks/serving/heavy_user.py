"""One user with 50,000 posted events: what do the other users' requests wait for it?

That user's requests come from a process of their own, so that the others' leave in time.
"""

import asyncio
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event, Lock
from typing import Any

import httpx
import numpy as np

from benchmarks.serving.stage import REFERENCE_RATE, Stage
from serve_app import load_test

NUM_EVENTS, EVENTS_TOGETHER = 50_000, 1_000
TURNS, TURN_S = 12, 8.0  # half of the turns without the user
ASKS_EVERY_S = 0.5
PERCENTILES = (50, 95, 99)


def measure(stage: Stage) -> dict[str, Any]:
    """Others' latency in turns with and without that user, who posts an event and ranks."""
    num_events = int(stage.share * NUM_EVENTS)
    url = stage.deploy(2, settings={"max_user_events": 2 * NUM_EVENTS})
    user = 10**8 + int(time.time())  # of this run alone
    start_ms = int(time.time() * 1000) - num_events - 10_000
    post_events(url, user, num_events, start_ms)

    others: dict[str, list[load_test.Answers]] = {"without": [], "with": []}
    with asking_process(url, user) as asking:
        for turn in range(TURNS):
            name = ("without", "with")[turn % 2]
            if name == "with":
                asking.may_ask.set()
            others[name].append(_ask_for_others(stage, url, turn))
            asking.pause()
    own = asking.took_ms

    figures, failures = {}, {}
    for name, turns in others.items():
        latency_ms = np.concatenate([answers.latency_ms for answers in turns])
        status = np.concatenate([answers.status for answers in turns])
        figures[name] = _figures(latency_ms[status == 200])
        failures[name] = int(np.count_nonzero(status != 200))
    return {
        "events": num_events,
        "turns": TURNS,
        "seconds": TURNS * TURN_S,
        "others_ms": figures,
        "others_failures": failures,
        "costs_others_ms": {
            name: round(figures["with"][name] - figures["without"][name], 1)
            for name in figures["with"]
        },
        "own_ms": _figures(np.array(own)),
        "own_requests": len(own),
    }


def post_events(url: str, user: int, num_events: int, start_ms: int) -> None:
    """Post so many events of one user, a thousand at a time."""
    with httpx.Client(base_url=url, timeout=60) as client:
        for begin in range(0, num_events, EVENTS_TOGETHER):
            rows = []
            for i in range(begin, begin + EVENTS_TOGETHER):
                rows.append({"user_id": user, "item_id": i % 10_000, "event_time": start_ms + i})
            answer = client.post("/v1/events", json={"events": rows}).raise_for_status().json()
            assert answer["accepted"] == len(rows), answer


def rank(client: httpx.Client, user: int) -> float:
    """Rank 100 candidates for the user; returns how long it took, in ms."""
    candidates = [{"item_id": item} for item in range(100)]
    started = time.perf_counter()
    answer = client.post("/v1/rank", json={"user_id": user, "candidates": candidates})
    answer.raise_for_status()
    return 1000 * (time.perf_counter() - started)


class Asking:
    """The user's process as this one sees it."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.may_ask, self.ended, self.is_ready = spawn.Event(), spawn.Event(), spawn.Event()
        self.between = spawn.Lock()  # held while a request is under way
        self.took_ms: list[float] = []

    def pause(self) -> None:
        """Return when no request of the user's is under way, and none will be."""
        self.may_ask.clear()
        with self.between:
            pass


@contextmanager
def asking_process(url: str, user: int) -> Iterator[Asking]:
    """A process that ranks for the user whenever it may; its times are there at the end."""
    spawn = multiprocessing.get_context("spawn")
    asking, (receiving, sending) = Asking(), spawn.Pipe(duplex=False)
    arguments = (url, user, asking.may_ask, asking.ended, asking.is_ready, asking.between, sending)
    process = spawn.Process(target=_ask_again, args=arguments, daemon=True)
    process.start()
    try:
        asking.is_ready.wait()
        yield asking
        asking.ended.set()
        asking.took_ms = receiving.recv()
    finally:
        asking.ended.set()
        process.join(timeout=60)


def _ask_again(
    url: str, user: int, may_ask: Event, ended: Event, is_ready: Event, between: Lock, sending: Any
) -> None:
    """Rank for the user every `ASKS_EVERY_S` where it may, with one event more each time."""
    took_ms: list[float] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        rank(client, user)  # what is encoded once is not the matter
        is_ready.set()
        while not ended.wait(ASKS_EVERY_S):
            with between:
                if may_ask.is_set():
                    event = {"user_id": user, "item_id": 1, "event_time": int(time.time() * 1000)}
                    client.post("/v1/events", json={"events": [event]}).raise_for_status()
                    took_ms.append(rank(client, user))
    sending.send(took_ms)


def _ask_for_others(stage: Stage, url: str, turn: int) -> load_test.Answers:
    """Answers to the reference load for the length of a turn."""
    load = load_test.RequestLoad(rate=REFERENCE_RATE, seconds=TURN_S, seed=turn)
    users, items = load_test.known_ids(stage.cfg.sequence_dir)
    asked = load_test.draw_arrivals(load, users)
    bodies = load_test.request_bodies(load, asked, items)
    return asyncio.run(load_test.send_requests(url, load, asked, bodies, {}))


def _figures(values: np.ndarray) -> dict[str, float]:
    figures = {f"p{p}": round(float(np.percentile(values, p)), 1) for p in PERCENTILES}
    return figures | {"max": round(float(values.max()), 1)}
