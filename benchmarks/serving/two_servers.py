"""Two servers on one machine whose processes are killed in turn: does one ever answer for the
other?
"""

import sqlite3
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serving.second_server import VERSION, second_server
from benchmarks.serving.stage import PROXIES, TRIVIAL, Stage, kill_one
from pipeline.waiting import wait_until
from serve_app.deployment import read_server_id

NUM_ANSWERS = 10_000  # at each address
NUM_CLIENTS = 4  # of each address
OWN_VERSION = 1
KINDS = ("Api", "RankerReplica", *PROXIES)
PAUSE_S = 2.0  # between a kill at one server and the next at the other
BACK_S = 180.0  # until a server answers again
AGAIN_S = 0.05  # after a request without an answer
EVENT_MS = 1_767_500_000_000


@dataclass
class Address:
    """A server's address, and what was answered there."""

    url: str
    serving: Path
    version: int  # of the model
    first_user: int  # of those who post events here
    kill: Callable[[str], bool]
    answers: Counter[str] = field(default_factory=Counter)  # by status, and "none"
    foreign: int = 0
    unnamed: Counter[str] = field(default_factory=Counter)  # answers of a proxy, by status
    killed: Counter[str] = field(default_factory=Counter)  # by kind of process
    lock: threading.Lock = field(default_factory=threading.Lock)

    def note_answer(self, answer: httpx.Response, server_id: str) -> None:
        """Count an answer, and whether another server gave it."""
        status = str(answer.status_code)
        named = answer.headers.get("x-server-id")
        is_foreign = named not in (None, server_id)
        if answer.status_code == 200 and "model_version" in answer.json():
            is_foreign |= answer.json()["model_version"] != self.version

        with self.lock:
            self.answers[status] += 1
            self.foreign += is_foreign
            if named is None:
                self.unnamed[status] += 1

    def note_silence(self) -> None:
        with self.lock:
            self.answers["none"] += 1

    def is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False


def measure(stage: Stage) -> dict[str, Any]:
    """At least `NUM_ANSWERS` good answers at both addresses while everything is killed in turn."""
    num = int(stage.share * NUM_ANSWERS)
    url = stage.deploy(OWN_VERSION, apart=True, **TRIVIAL)
    with second_server(Path(stage.cfg.runs_dir) / "second") as second:
        ours = Address(url, stage.cfg.run_dir / "serving", OWN_VERSION, 10**7, kill_one)
        theirs = Address(second.url, second.serving, VERSION, 2 * 10**7, second.kill_one)
        both = (ours, theirs)
        _ask_while_killing(both, num)

    return {
        "requests": sum(one.answers.total() for one in both),
        "good_answers": [one.answers["200"] for one in both],
        "answers": [dict(sorted(one.answers.items())) for one in both],
        "foreign": sum(one.foreign for one in both),
        "foreign_events": ours_in(ours, theirs) + ours_in(theirs, ours),
        "unnamed": dict(sum((one.unnamed for one in both), Counter())),
        "killed": dict(sum((one.killed for one in both), Counter())),
    }


def ours_in(ours: Address, theirs: Address) -> int:
    """Events of users of the one address in the store of the other."""
    users = (ours.first_user, ours.first_user + 10**7)
    with sqlite3.connect(theirs.serving / "events.sqlite") as connection:
        query = "SELECT COUNT(*) FROM event WHERE user_id >= ? AND user_id < ?"
        return connection.execute(query, users).fetchone()[0]


def _ask_while_killing(both: tuple[Address, Address], num: int) -> None:
    all_killed = threading.Event()
    clients: list[threading.Thread] = []
    for address in both:
        for client in range(NUM_CLIENTS):
            requests = _requests(address, client)
            work = (address, requests, num // NUM_CLIENTS, all_killed)
            clients.append(threading.Thread(target=_ask, args=work))

    ended = threading.Event()
    killer = threading.Thread(target=_kill_in_turn, args=(both, all_killed, ended))
    for thread in (killer, *clients):
        thread.start()
    for thread in clients:
        thread.join()
    ended.set()
    killer.join()


def _requests(address: Address, client: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Path and body of three ranks and a post, again and again."""
    number = client * 10**6
    while True:
        number += 1
        if number % 4:
            yield "/v1/rank", {"user_id": number % 50, "candidates": [{"item_id": 1}]}
        else:
            event = {"item_id": number, "event_time": EVENT_MS + number}
            yield "/v1/events", {"events": [event | {"user_id": address.first_user + number}]}


def _ask(
    address: Address,
    requests: Iterator[tuple[str, dict[str, Any]]],
    num: int,
    all_killed: threading.Event,
) -> None:
    """Send requests one after the other until `num` have an answer of status 200, and every kind of
    process was killed.
    """
    server_id = read_server_id(address.serving)
    answered = 0
    with httpx.Client(base_url=address.url, timeout=10) as client:
        while answered < num or not all_killed.is_set():
            path, body = next(requests)
            try:
                answer = client.post(path, json=body)
            except httpx.HTTPError:
                address.note_silence()
                ok = False
            else:
                address.note_answer(answer, server_id)
                ok = answer.status_code == 200
            answered += ok
            if not ok:
                threading.Event().wait(AGAIN_S)


def _kill_in_turn(
    both: tuple[Address, Address], all_killed: threading.Event, ended: threading.Event
) -> None:
    """Kill one process of one server, then one of the other, until the clients are done; note when
    each kind was killed at both.
    """
    for number, kind in enumerate(cycle(KINDS)):
        if number == len(KINDS):
            all_killed.set()
        for address in both:
            if ended.wait(PAUSE_S):
                return
            _kill_when_ready(address, kind, ended)


def _kill_when_ready(address: Address, kind: str, ended: threading.Event) -> None:
    wait_until(lambda: address.is_ready() or ended.is_set(), f"{address.url} again", BACK_S)
    if address.kill(kind):
        address.killed[kind] += 1
