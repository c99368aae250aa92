"""Requests to a running server as users would send them, and the time that each took.

    python -m serve_app.load_test --config configs/demo.yaml --url http://127.0.0.1:8000 \\
        --rate 20 --seconds 60

Open loop: requests leave at seeded Poisson times whether or not earlier ones were answered, and
each is timed from the moment when it was due, so that a server that stalls cannot slow the clock
down. Users are those of the published sequences. A share of the requests is from *warm* users, who
asked within the last minute, the rest from *cold* ones.
"""

import argparse
import asyncio
import json
import platform
import re
import sys
import threading
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from pipeline import config
from pipeline.config import UserError
from pipeline.sequences import store
from pipeline.sequences.dictionary import own_ids
from serve_app.replay import key_header

MOST_REQUESTS = 200_000  # of one run: their bodies are made before the first is sent
MOST_SECONDS = 3600
NO_ANSWER, NOT_SENT = 0, -1  # in the place of an HTTP status
TIMING = re.compile(r"(\w+);dur=([0-9.]+)")
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestLoad:
    """A load to send: how many requests, from when to when, of which users.

    Raises:
        UserError: a setting is out of its range.
    """

    rate: float  # requests/s, mean of a Poisson process
    seconds: float
    candidates: int = 100
    # items of a recommended list: /v1/recommend is asked in the place of /v1/rank
    recommend: int | None = None
    warm_share: float = 0.5  # requests of users who asked within the last `warm_s`
    warm_s: float = 60.0
    timeout_s: float = 10.0  # of one request
    seed: int = 0
    # requests/s that come on top, from when to when in seconds
    burst: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        extra, begin, end = self.burst or (0, 0, 0)
        num_requests = self.rate * self.seconds + extra * (end - begin)
        rate_allowed = self.rate > 0 and num_requests <= MOST_REQUESTS
        burst_allowed = 0 <= begin <= end <= self.seconds and extra >= 0

        rules = {
            "rate": (rate_allowed, f"above 0, and at most {MOST_REQUESTS} requests in all"),
            "seconds": (0 < self.seconds <= MOST_SECONDS, f"above 0, at most {MOST_SECONDS}"),
            "candidates": (self.candidates >= 1, "1 or more"),
            "recommend": (self.recommend is None or self.recommend >= 1, "1 or more"),
            "warm_share": (0 <= self.warm_share <= 1, "between 0 and 1"),
            "timeout_s": (self.timeout_s > 0, "above 0"),
            "burst": (burst_allowed, "RATE:FROM:TO within --seconds"),
        }
        for name, (allowed, rule) in rules.items():
            if not allowed:
                option = name.replace("_", "-")
                raise UserError(f"--{option} must be {rule}, got {getattr(self, name)}")

    @property
    def path(self) -> str:
        """The endpoint that is asked."""
        return "/v1/rank" if self.recommend is None else "/v1/recommend"


@dataclass(frozen=True, slots=True)
class Arrivals:
    """N requests in the order in which they are due."""

    due_s: np.ndarray  # float64 [N] since the start
    user: np.ndarray  # [N], ids
    warm: np.ndarray  # bool [N]


def draw_arrivals(load: RequestLoad, users: np.ndarray) -> Arrivals:
    """Draw the time and the user of each request, the same for the same seed.

    A request meant to be warm is cold while nobody is warm yet, and the other way round.

        users [7, 8], warm_s = 60       due_s   0    1    70   71
                                        user    7    8    7    7
                                        warm    no   no   no   yes
    """
    rng = np.random.default_rng(load.seed)
    due = _draw_times(load, rng)
    num = len(due)

    last = np.full(len(users), -np.inf)  # when each user asked last
    chosen = np.zeros(num, np.int64)
    warm = np.zeros(num, bool)
    for i, now in enumerate(due):
        recent = now - last < load.warm_s
        wants_warm = rng.random() < load.warm_share
        pool = np.flatnonzero(recent == wants_warm)

        if len(pool):
            chosen[i] = pool[rng.integers(len(pool))]
        else:
            chosen[i] = rng.integers(len(users))
        warm[i] = recent[chosen[i]]
        last[chosen[i]] = now
    return Arrivals(due, users[chosen], warm)


def _draw_times(load: RequestLoad, rng: np.random.Generator) -> np.ndarray:
    """Times of two Poisson processes, the usual load and the burst: float64 [N], rising."""
    extra, begin, end = load.burst or (0.0, 0.0, 0.0)
    usual = rng.uniform(0, load.seconds, rng.poisson(load.rate * load.seconds))
    burst = rng.uniform(begin, end, rng.poisson(extra * (end - begin)))
    return np.sort(np.concatenate([usual, burst]))


def request_bodies(load: RequestLoad, asked: Arrivals, items: np.ndarray) -> list[bytes]:
    """JSON of each request; candidates are drawn from `items`."""
    if load.recommend is not None:
        wanted = [{"user_id": user, "n": load.recommend} for user in asked.user.tolist()]
        return [json.dumps(body).encode() for body in wanted]

    rng = np.random.default_rng([load.seed, 1])
    bodies = []
    for user in asked.user.tolist():
        drawn = rng.choice(items, load.candidates).tolist()
        candidates = [{"item_id": item} for item in drawn]
        bodies.append(json.dumps({"user_id": user, "candidates": candidates}).encode())
    return bodies


@dataclass(frozen=True, slots=True)
class Answers:
    """Answers in the order of `Arrivals`."""

    status: np.ndarray  # int [N], `NO_ANSWER` for none within the time limit
    latency_ms: np.ndarray  # float64 [N], from when the request was due
    # float64 [N], the forward pass that it was part of, as the server says; NaN where unknown
    ranker_ms: np.ndarray
    late_ms: np.ndarray  # float64 [N], how late it left: the generator's own fault
    version: np.ndarray  # int [N], 0 where the answer names none
    # what else the server says of where its time went: `web.rank.HOPS` and total, in ms, by answer
    hops: dict[int, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def not_yet(cls, num: int) -> "Answers":
        """`num` answers that have not come."""
        return cls(
            status=np.full(num, NO_ANSWER),
            latency_ms=np.zeros(num),
            ranker_ms=np.full(num, np.nan),
            late_ms=np.zeros(num),
            version=np.zeros(num, int),
        )


async def send_requests(
    url: str,
    load: RequestLoad,
    asked: Arrivals,
    bodies: list[bytes],
    headers: dict[str, str],
    stop: threading.Event | None = None,
) -> Answers:
    """Send all of `bodies` at their times; what is due after `stop` was set is `NOT_SENT`."""
    answers = Answers.not_yet(len(bodies))
    halt = stop or threading.Event()
    loop = asyncio.get_running_loop()
    session = aiohttp.ClientSession(
        timeout=aiohttp.ClientTimeout(total=load.timeout_s),
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
        headers={"content-type": "application/json", **headers},
    )

    async def send_one(i: int) -> None:
        due = start + asked.due_s[i]
        answers.late_ms[i] = (time.perf_counter() - due) * 1000
        status, text, timing = await _post(session, f"{url}{load.path}", bodies[i])
        answers.latency_ms[i] = (time.perf_counter() - due) * 1000

        answers.status[i] = status
        if status == 200:
            answers.version[i] = json.loads(text)["model_version"]
            hops = read_timing(timing)
            answers.ranker_ms[i] = hops.get("ranker", hops.get("recommender", np.nan))
            answers.hops[i] = hops

    def send_when_due() -> None:
        """Run in a thread: an event loop's timers are up to a millisecond late, a wait is not."""
        for i, due_s in enumerate(asked.due_s):
            elapsed_s = time.perf_counter() - start
            if halt.wait(max(due_s - elapsed_s, 0)):
                answers.status[i:] = NOT_SENT
                return
            loop.call_soon_threadsafe(group.create_task, send_one(i))

    async with session:
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            try:
                await asyncio.to_thread(send_when_due)
            finally:
                halt.set()
    return answers


async def _post(session: aiohttp.ClientSession, url: str, body: bytes) -> tuple[int, bytes, str]:
    """Status, body and Server-Timing of one answer."""
    try:
        async with session.post(url, data=body) as answer:
            text = await answer.read()
    except (aiohttp.ClientError, TimeoutError):
        return NO_ANSWER, b"", ""
    return answer.status, text, answer.headers.get("Server-Timing", "")


def read_timing(server_timing: str) -> dict[str, float]:
    """Milliseconds by name, of a header Server-Timing."""
    return {name: float(ms) for name, ms in TIMING.findall(server_timing)}


# Figures ---------------------------------------------------------------------


def summarize_run(load: RequestLoad, asked: Arrivals, answers: Answers) -> dict[str, Any]:
    """Figures of a run, plain numbers for JSON. Latencies are of answers with status 200."""
    good = answers.status == 200
    refused = answers.status == 429
    overhead_ms = answers.latency_ms - answers.ranker_ms

    figures: dict[str, Any] = {
        "load": asdict(load),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "requests": len(asked.due_s),
        "answered_per_s": round(float(good.sum()) / load.seconds, 2),
        "statuses": _count_values(answers.status),
        "failures": int(np.count_nonzero(~good & ~refused)),
        "versions": _count_values(answers.version[good]),
        "warm_requests": int(asked.warm.sum()),
        "latency_ms": _percentiles(answers.latency_ms[good]),
        "warm_latency_ms": _percentiles(answers.latency_ms[good & asked.warm]),
        "cold_latency_ms": _percentiles(answers.latency_ms[good & ~asked.warm]),
        "ranker_ms": _percentiles(answers.ranker_ms[good]),
        "overhead_ms": _percentiles(overhead_ms[good]),
        "hops_ms": hop_figures(answers),
        "refused_ms": _percentiles(answers.latency_ms[refused]),
        "sent_late_ms": _percentiles(answers.late_ms),
    }
    if load.burst is not None:
        figures |= burst_figures(load.burst, asked, answers)
    return figures


def hop_figures(answers: Answers) -> dict[str, Any]:
    """p50, p95, p99 and maximum of each hop.

    Those of the server are as `web.rank` names them. `late` is the generator's own, before it sent
    a request. `network` is what is left: client, proxy and sockets, there and back.
    """
    by_hop: dict[str, list[float]] = {}
    for i, hops in answers.hops.items():
        if "total" not in hops:
            continue
        late_ms = float(answers.late_ms[i])
        network_ms = float(answers.latency_ms[i]) - late_ms - hops["total"]
        for name, ms in {"late": late_ms, "network": network_ms, **hops}.items():
            by_hop.setdefault(name, []).append(ms)
    return {name: _percentiles(np.array(values)) for name, values in by_hop.items()}


def burst_figures(
    burst: tuple[float, float, float], asked: Arrivals, answers: Answers
) -> dict[str, Any]:
    """Figures before, during and after a burst, and the time until its effects were over.

    `recovered_after_s` counts from the burst's end to the last request that was refused or took
    more than twice the p99 from before.
    """
    _, begin, end = burst
    due_s = asked.due_s
    phases = {
        "before": due_s < begin,
        "after": due_s >= end,
        "burst": (due_s >= begin) & (due_s < end),
    }
    figures = {}
    for name, chosen in phases.items():
        figures[name] = _phase_figures(chosen, asked, answers)

    slow = answers.status != 200
    normal = figures["before"]["latency_ms"]
    if normal:
        slow |= answers.latency_ms > 2 * normal["p99"]

    late = due_s[phases["after"] & slow]
    recovered_s = round(float(late.max() - end), 2) if len(late) else 0.0
    return {"phases": figures, "recovered_after_s": recovered_s}


def _phase_figures(chosen: np.ndarray, asked: Arrivals, answers: Answers) -> dict[str, Any]:
    good = chosen & (answers.status == 200)
    seconds = max(np.ptp(asked.due_s[chosen]), 1)
    return {
        "requests": int(chosen.sum()),
        "refused": int((answers.status[chosen] == 429).sum()),
        "answered_per_s": round(float(good.sum() / seconds), 1),
        "latency_ms": _percentiles(answers.latency_ms[good]),
    }


def _count_values(values: np.ndarray) -> dict[str, int]:
    found, counts = np.unique(values, return_counts=True)
    return {str(value): int(count) for value, count in zip(found, counts, strict=True)}


def _percentiles(values: np.ndarray) -> dict[str, float] | None:
    """p50, p95, p99 and the maximum of the values that are not NaN, None without any."""
    values = values[np.isfinite(values)]
    if not len(values):
        return None

    figures = {}
    for percentile in PERCENTILES:
        figures[f"p{percentile}"] = round(float(np.percentile(values, percentile)), 2)
    figures["max"] = round(float(values.max()), 2)
    return figures


def plot_latency(load: RequestLoad, asked: Arrivals, answers: Answers, path: Path) -> None:
    """Latency over time, and its distribution, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (over_time, distribution) = plt.subplots(1, 2, figsize=(11, 4))
    good = answers.status == 200
    groups = {
        "cold user": good & ~asked.warm,
        "warm user": good & asked.warm,
        "429": answers.status == 429,
    }
    for name, chosen in groups.items():
        if not chosen.any():
            continue

        latency_ms = answers.latency_ms[chosen]
        over_time.plot(asked.due_s[chosen], latency_ms, ".", ms=3, label=name)
        falling = 1 - np.arange(len(latency_ms)) / len(latency_ms)
        distribution.step(np.sort(latency_ms), falling, where="post", label=name)

    over_time.set(xlabel="s", ylabel="ms from when the request was due", yscale="log")
    distribution.set(
        xlabel="ms", ylabel="share of requests that took longer", xscale="log", yscale="log"
    )
    over_time.legend()
    distribution.legend()
    figure.suptitle(f"{load.rate:g} requests/s, {load.candidates} candidates")
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


# The run ---------------------------------------------------------------------


def known_ids(sequence_dir: Path) -> tuple[np.ndarray, np.ndarray]:
    """The users of the published sequences, and the items of their histories without repeats, as
    clients have them: int64, or texts.
    """
    manifest, table = store.read_manifest(sequence_dir), store.read_sequences(sequence_dir)
    chunks = [chunk.flatten().to_numpy() for chunk in table["item_id"].chunks]
    items = np.unique(np.concatenate(chunks))
    users = own_ids(sequence_dir, manifest, "user_id", table["user_id"].to_numpy())
    names = own_ids(sequence_dir, manifest, "item_id", items)
    return users.to_numpy(zero_copy_only=False), names.to_numpy(zero_copy_only=False)


def run_load(
    url: str,
    load: RequestLoad,
    sequence_dir: Path,
    headers: dict[str, str],
    plot_to: Path | None = None,
) -> dict[str, Any]:
    """Send one load to the server at `url`; returns the figures for JSON.

    Raises:
        UserError: nothing is published, or no request at all was answered.
    """
    users, items = known_ids(sequence_dir)
    asked = draw_arrivals(load, users)
    bodies = request_bodies(load, asked, items)

    answers = asyncio.run(send_requests(url, load, asked, bodies, headers))
    if len(answers.status) and not answers.status.any():
        raise UserError(f"--url {url}: none of {len(answers.status)} requests was answered")

    if plot_to is not None:
        plot_latency(load, asked, answers, plot_to)
    return summarize_run(load, asked, answers)


def _burst(text: str) -> tuple[float, float, float]:
    rate, begin, end = (float(part) for part in text.split(":"))  # argparse reports a ValueError
    return rate, begin, end


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serve_app.load_test",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--config", required=True, help="the preset that is served: its sequences name the users"
    )
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--url", required=True)
    parser.add_argument(
        "--rate", type=float, required=True, help="requests/s, mean of a Poisson process"
    )
    parser.add_argument("--seconds", type=float, required=True)
    parser.add_argument(
        "--candidates", type=int, default=100, help="of a request (default %(default)s)"
    )
    parser.add_argument(
        "--recommend",
        type=int,
        metavar="N",
        help="ask /v1/recommend for N items, in the place of /v1/rank with candidates",
    )
    parser.add_argument(
        "--warm-share",
        type=float,
        default=0.5,
        help="of users seen in the last minute (%(default)s)",
    )
    parser.add_argument(
        "--timeout-s", type=float, default=10.0, help="of one request (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--burst", type=_burst, metavar="RATE:FROM:TO", help="requests/s on top, from when to when"
    )
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    parser.add_argument("--plot", type=Path, help="latency over time and its distribution, PNG")
    return parser


def main() -> None:
    options = _parser().parse_args()
    names = [one.name for one in fields(RequestLoad) if one.name != "warm_s"]
    try:
        load = RequestLoad(**{name: getattr(options, name) for name in names})
        cfg = config.load(options.config, options.overrides)
        figures = run_load(options.url, load, cfg.sequence_dir, key_header(cfg.serve), options.plot)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

    text = json.dumps(figures, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
