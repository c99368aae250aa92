"""An ingress that is killed under the reference load: what clients see of it."""

import asyncio
import re
import threading
import time
from typing import Any

import httpx
import numpy as np

from benchmarks.serving.stage import REFERENCE_RATE, Stage, kill_one
from pipeline.waiting import wait_until
from serve_app import load_test

FIRST_KILL_S, KILL_EVERY_S = 5.0, 15.0
NUM_INGRESS = 2
INGRESS = re.compile(r"^ranking_requests_in_flight{", re.M)
START_S = 60.0  # for an ingress in the place of the killed one


def measure(stage: Stage) -> dict[str, Any]:
    """Kill one of two ingresses every `KILL_EVERY_S`; what each kill cost."""
    url = stage.deploy(2, apart=True, settings={"num_ingress": NUM_INGRESS})
    stage.load(url, REFERENCE_RATE, 5)

    load = load_test.RequestLoad(rate=REFERENCE_RATE, seconds=stage.seconds)
    users, items = load_test.known_ids(stage.cfg.sequence_dir)
    asked = load_test.draw_arrivals(load, users)
    bodies = load_test.request_bodies(load, asked, items)

    began = time.perf_counter()
    kills_s: list[float] = []
    ended = threading.Event()
    killer = threading.Thread(target=_kill_in_turn, args=(url, began, kills_s, ended))
    killer.start()
    answers = asyncio.run(load_test.send_requests(url, load, asked, bodies, {}))
    ended.set()
    killer.join()
    return {
        "kills": cost_of_kills(asked.due_s, answers, kills_s),
        "load": {"rate": load.rate, "seconds": load.seconds, "candidates": load.candidates},
        "requests": len(bodies),
        "failures": int(np.count_nonzero(answers.status != 200)),
        "p99_ms": round(float(np.percentile(answers.latency_ms, 99)), 1),
    }


def _kill_in_turn(url: str, began: float, kills_s: list[float], ended: threading.Event) -> None:
    """Kill an ingress, when all are there; notes when, in seconds after `began`."""
    pause_s = FIRST_KILL_S
    while not ended.wait(pause_s):
        wait_until(lambda: _all_are_there(url), "an ingress in the killed one's place", START_S)
        if kill_one("Api"):
            kills_s.append(time.perf_counter() - began)
        pause_s = KILL_EVERY_S


def _all_are_there(url: str) -> bool:
    """True when all ingresses answer each other."""
    found = INGRESS.findall(httpx.get(f"{url}/metrics", timeout=10).text)
    return len(found) == NUM_INGRESS


def cost_of_kills(
    due_s: np.ndarray, answers: load_test.Answers, kills_s: list[float]
) -> list[dict[str, float]]:
    """Of each kill, the requests due from then on until the next one: how many failed, and the
    longest that one took, in seconds.

        kills    1.0       5.0        due   0.5   1.1   2.0   6.0
        cost of        .         .               [1.1   2.0] [6.0]
    """
    rows = []
    ends = [*kills_s[1:], np.inf]
    for begin, end in zip(kills_s, ends, strict=True):
        # what was under way is hit as well
        hit = (due_s + answers.latency_ms / 1000 >= begin) & (due_s < end)
        failed = int(np.count_nonzero(answers.status[hit] != 200))
        longest_s = float(answers.latency_ms[hit].max(initial=0.0)) / 1000
        rows.append({"failed": failed, "longest_s": round(longest_s, 2)})
    return rows
