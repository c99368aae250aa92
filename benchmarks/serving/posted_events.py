"""Events and their later outcomes from several writers while replicas are killed: is every
acknowledged one kept once, with what was added to it?
"""

import json
import os
import signal
import sqlite3
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.stage import TRIVIAL, Stage, replica_pids

NUM_EVENTS, NUM_WRITERS = 100_000, 8
EVENTS_A_USER = 2_500  # below serve.max_user_events
EVENTS_TOGETHER, OUTCOMES_TOGETHER = 10, 50  # in one post
SECONDS_BETWEEN_KILLS = 4.0
AGAIN_S = 0.2  # after an answer that asks to come again
EVENT_MS = 1_767_500_000_000
OUTCOME = "is_click"

EventId = tuple[int, int]  # user and item


@dataclass
class Writer:
    """A client that sends again what got no answer."""

    url: str
    number: int
    first_user: int
    shown: set[EventId] = field(default_factory=set)  # acknowledged
    clicked: set[EventId] = field(default_factory=set)  # acknowledged too
    answers: Counter[str] = field(default_factory=Counter)  # by status or error

    def post_all(self) -> None:
        """Exposures, and after each `OUTCOMES_TOGETHER` of them that each was clicked."""
        with httpx.Client(base_url=self.url, timeout=10) as client:
            for begin in range(0, NUM_EVENTS // NUM_WRITERS, EVENTS_TOGETHER):
                end = begin + EVENTS_TOGETHER
                self.shown |= self._post(client, range(begin, end), {})
                if end % OUTCOMES_TOGETHER == 0:
                    some = range(end - OUTCOMES_TOGETHER, end)
                    self.clicked |= self._post(client, some, {OUTCOME: True})

    def _post(self, client: httpx.Client, items: range, actions: dict[str, bool]) -> set[EventId]:
        """Post events of one user until they are acknowledged."""
        user = self.first_user + NUM_WRITERS * (items.start // EVENTS_A_USER) + self.number
        events = []
        for item in items:
            event = {"user_id": user, "item_id": item, "event_time": EVENT_MS + item}
            events.append(event | {"actions": actions})

        while True:
            try:
                answer = client.post("/v1/events", json={"events": events})
            except httpx.HTTPError as error:
                self.answers[type(error).__name__] += 1
                continue

            self.answers[str(answer.status_code)] += 1
            if answer.status_code == 200:
                refused = answer.json()["over_quota"] + answer.json()["conflict"]
                assert refused == 0, answer.text
                return {(user, item) for item in items}
            assert answer.status_code in (429, 503, 504), answer.text
            time.sleep(AGAIN_S)


def measure(stage: Stage) -> dict[str, Any]:
    """Post all events while a replica is killed every `SECONDS_BETWEEN_KILLS`; what is kept."""
    url = stage.deploy(1, replicas=2, **TRIVIAL)
    first_user = int(time.time()) % 1_000_000 * 1000 + 1_000_000  # users of this run alone
    writers = [Writer(url, number, first_user) for number in range(NUM_WRITERS)]

    ended = threading.Event()
    killed: list[int] = []
    killer = threading.Thread(target=_kill_in_turn, args=(killed, ended))
    threads = [threading.Thread(target=writer.post_all) for writer in writers]
    started = time.perf_counter()
    for thread in (killer, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    took_s = time.perf_counter() - started
    ended.set()
    killer.join()

    shown = set().union(*(writer.shown for writer in writers))
    clicked = set().union(*(writer.clicked for writer in writers))
    answers = sum((writer.answers for writer in writers), Counter())
    path = stage.cfg.run_dir / "serving" / "events.sqlite"
    return {
        **what_is_kept(path, first_user, shown, clicked),
        "replicas_killed": len(killed),
        "seconds": round(took_s, 1),
        "answers": dict(sorted(answers.items())),
    }


def _kill_in_turn(killed: list[int], ended: threading.Event) -> None:
    while not ended.wait(SECONDS_BETWEEN_KILLS):
        for pid in replica_pids("RankerReplica")[:1]:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)


def what_is_kept(
    path: Path, first_user: int, shown: set[EventId], clicked: set[EventId]
) -> dict[str, int]:
    """Counts of the events from `first_user` on in the store, beside those acknowledged.

    acknowledged   (7, 1) shown and clicked, (7, 2) shown
    kept           (7, 1) {}                      1 lost, 1 outcome lost
    """
    with sqlite3.connect(path) as connection:
        query = "SELECT user_id, item_id, actions FROM event WHERE user_id >= ?"
        rows = connection.execute(query, (first_user,)).fetchall()

    kept = [(user, item) for user, item, _ in rows]
    kept_clicks = {(user, item) for user, item, actions in rows if json.loads(actions).get(OUTCOME)}
    return {
        "acknowledged": len(shown),
        "kept": len(kept),
        "acknowledged_and_lost": len(shown - set(kept)),
        "kept_twice": len(kept) - len(set(kept)),
        "outcomes": len(clicked),
        "outcomes_lost": len(clicked - kept_clicks),
    }
