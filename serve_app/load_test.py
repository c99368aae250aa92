"""Requests to a running server as users would send them, and how long each took.

    python -m serve_app.load_test --config configs/demo.yaml --url http://127.0.0.1:8000 --rate 20
    --seconds 60

Open loop: requests leave at seeded Poisson times whether or not earlier ones were answered, and
each is timed from the moment when it was due, so that a server that stalls cannot slow the clock
down. Users are those of the published sequences; a share of the requests is from *warm* ones, who
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np

from pipeline import config
from pipeline.config import RunConfig, UserError
from pipeline.sequences import store
from serve_app.replay import key_header

MOST_REQUESTS = 200_000  # of one run: their bodies are made before the first is sent
MOST_SECONDS = 3600
NO_ANSWER, NOT_SENT = 0, -1  # in the place of an HTTP status
TIMING = re.compile(r"ranker;dur=([0-9.]+)")
PERCENTILES = (50, 95, 99)


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """What is sent."""

    rate: float  # requests/s, mean of a Poisson process
    seconds: float
    candidates: int = 100
    warm_share: float = 0.5  # requests of users who asked within the last `warm_s`
    warm_s: float = 60.0
    timeout_s: float = 10.0  # of one request
    seed: int = 0
    # requests/s that come on top, from when to when in seconds
    burst: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        extra, begin, end = self.burst or (0, 0, 0)
        num = self.rate * self.seconds + extra * (end - begin)
        rules = {
            "rate": (
                self.rate > 0 and num <= MOST_REQUESTS,
                f"above 0, and at most {MOST_REQUESTS} requests in all",
            ),
            "seconds": (0 < self.seconds <= MOST_SECONDS, f"above 0, at most {MOST_SECONDS}"),
            "candidates": (self.candidates >= 1, "1 or more"),
            "warm_share": (0 <= self.warm_share <= 1, "between 0 and 1"),
            "timeout_s": (self.timeout_s > 0, "above 0"),
            "burst": (
                0 <= begin <= end <= self.seconds and extra >= 0,
                "RATE:FROM:TO within --seconds",
            ),
        }
        for name, (allowed, rule) in rules.items():
            if not allowed:
                raise UserError(
                    f"--{name.replace('_', '-')} must be {rule}, got {getattr(self, name)}"
                )


@dataclass(frozen=True, slots=True)
class Arrivals:
    """N requests in the order in which they are due."""

    due_s: np.ndarray  # float64 [N] since the start
    user: np.ndarray  # int64 [N]
    warm: np.ndarray  # bool [N]


def arrivals(load: Load, users: np.ndarray) -> Arrivals:
    """Who asks when. A request meant to be warm is cold while nobody is warm yet, and the other way
    round.
    """
    rng = np.random.default_rng(load.seed)
    extra, begin, end = load.burst or (0.0, 0.0, 0.0)
    times = rng.uniform(0, load.seconds, rng.poisson(load.rate * load.seconds))
    due = np.sort(
        np.concatenate([times, rng.uniform(begin, end, rng.poisson(extra * (end - begin)))])
    )
    num = len(due)
    last = np.full(len(users), -np.inf)
    chosen, warm = np.zeros(num, np.int64), np.zeros(num, bool)
    for i, now in enumerate(due):
        recent = now - last < load.warm_s
        pool = np.flatnonzero(recent == (rng.random() < load.warm_share))
        chosen[i] = pool[rng.integers(len(pool))] if len(pool) else rng.integers(len(users))
        warm[i] = recent[chosen[i]]
        last[chosen[i]] = now
    return Arrivals(due, users[chosen], warm)


def bodies(load: Load, asked: Arrivals, items: np.ndarray) -> list[bytes]:
    rng = np.random.default_rng([load.seed, 1])
    return [
        json.dumps(
            {
                "user_id": user,
                "candidates": [{"item_id": i} for i in rng.choice(items, load.candidates).tolist()],
            }
        ).encode()
        for user in asked.user.tolist()
    ]


@dataclass(frozen=True, slots=True)
class Answers:
    """What came back, in the order of `Arrivals`."""

    status: np.ndarray  # int [N], `NO_ANSWER` for none within the time limit
    latency_ms: np.ndarray  # float64 [N], from when the request was due
    # float64 [N], the forward pass that it was part of, as the server says; NaN where unknown
    ranker_ms: np.ndarray
    late_ms: np.ndarray  # float64 [N], how late it left: the generator's own fault
    version: np.ndarray  # int [N], 0 where the answer names none


async def send(
    url: str,
    load: Load,
    asked: Arrivals,
    sent: list[bytes],
    headers: dict[str, str],
    stop: threading.Event | None = None,
) -> Answers:
    """All of `sent` at their times; what is due after `stop` was set is `NOT_SENT`."""
    num = len(sent)
    answers = Answers(
        np.zeros(num, int), np.zeros(num), np.full(num, np.nan), np.zeros(num), np.zeros(num, int)
    )
    halt, loop = stop or threading.Event(), asyncio.get_running_loop()
    headers = {"content-type": "application/json", **headers}
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=60)
    async with aiohttp.ClientSession(
        timeout=timeout, connector=connector, headers=headers
    ) as session:

        async def one(i: int) -> None:
            answers.late_ms[i] = (time.perf_counter() - start - asked.due_s[i]) * 1000
            try:
                async with session.post(f"{url}/v1/rank", data=sent[i]) as answer:
                    body = await answer.read()
                    answers.status[i] = answer.status
            except (aiohttp.ClientError, TimeoutError):
                body = b""
            answers.latency_ms[i] = (time.perf_counter() - start - asked.due_s[i]) * 1000
            if answers.status[i] == 200:
                answers.version[i] = json.loads(body)["model_version"]
                if took := TIMING.search(answer.headers.get("Server-Timing", "")):
                    answers.ranker_ms[i] = float(took[1])

        def leave() -> None:
            """In a thread of its own: an event loop's timers are up to a millisecond late, a wait
            is not.
            """
            for i in range(num):
                if halt.wait(max(asked.due_s[i] - (time.perf_counter() - start), 0)):
                    answers.status[i:] = NOT_SENT
                    return
                loop.call_soon_threadsafe(group.create_task, one(i))

        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            try:
                await asyncio.to_thread(leave)
            finally:
                halt.set()
    return answers


def summary(load: Load, asked: Arrivals, answers: Answers) -> dict[str, Any]:
    """The figures of a run, plain numbers for JSON."""
    good = answers.status == 200
    statuses, counts = np.unique(answers.status, return_counts=True)
    overhead = answers.latency_ms - answers.ranker_ms
    versions, per_version = np.unique(answers.version[good], return_counts=True)
    return {
        "load": asdict(load),
        "machine": f"{platform.processor() or platform.machine()}, {platform.system()}",
        "requests": len(asked.due_s),
        "answered_per_s": round(float(good.sum()) / load.seconds, 2),
        "statuses": {
            str(status): int(count) for status, count in zip(statuses, counts, strict=True)
        },
        "failures": int(np.count_nonzero(~good & (answers.status != 429))),
        "versions": {
            str(version): int(count) for version, count in zip(versions, per_version, strict=True)
        },
        "warm_requests": int(asked.warm.sum()),
        "latency_ms": _percentiles(answers.latency_ms[good]),
        "warm_latency_ms": _percentiles(answers.latency_ms[good & asked.warm]),
        "cold_latency_ms": _percentiles(answers.latency_ms[good & ~asked.warm]),
        "ranker_ms": _percentiles(answers.ranker_ms[good]),
        "overhead_ms": _percentiles(overhead[good]),
        "refused_ms": _percentiles(answers.latency_ms[answers.status == 429]),
        "sent_late_ms": _percentiles(answers.late_ms),
    } | (burst_figures(load, asked, answers) if load.burst else {})


def burst_figures(load: Load, asked: Arrivals, answers: Answers) -> dict[str, Any]:
    """Before, during and after a burst, and how long after its end a request was last refused or
    slow.
    """
    assert load.burst is not None
    _, begin, end = load.burst
    good = answers.status == 200
    phases = {"before": asked.due_s < begin, "after": asked.due_s >= end}
    phases["burst"] = ~phases["before"] & ~phases["after"]
    figures = {
        name: {
            "requests": int(chosen.sum()),
            "refused": int((answers.status[chosen] == 429).sum()),
            "answered_per_s": round(
                float((good & chosen).sum() / max(np.ptp(asked.due_s[chosen]), 1)), 1
            ),
            "latency_ms": _percentiles(answers.latency_ms[good & chosen]),
        }
        for name, chosen in phases.items()
    }
    normal = figures["before"]["latency_ms"]
    slow = ~good | (answers.latency_ms > 2 * normal["p99"]) if normal else ~good
    late = asked.due_s[phases["after"] & slow]
    return {
        "phases": figures,
        "recovered_after_s": round(float(late.max() - end), 2) if len(late) else 0.0,
    }


def _percentiles(values: np.ndarray) -> dict[str, float] | None:
    values = values[np.isfinite(values)]
    if not len(values):
        return None
    found = np.percentile(values, PERCENTILES)
    named = {f"p{p}": round(float(value), 2) for p, value in zip(PERCENTILES, found, strict=True)}
    return named | {"max": round(float(values.max()), 2)}


def plot(load: Load, asked: Arrivals, answers: Answers, path: Path) -> None:
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
        over_time.plot(asked.due_s[chosen], answers.latency_ms[chosen], ".", ms=3, label=name)
        falling = 1 - np.arange(chosen.sum()) / chosen.sum()
        distribution.step(np.sort(answers.latency_ms[chosen]), falling, where="post", label=name)
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


def known_ids(cfg: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    """The users of the published sequences and the items of their histories."""
    table = store.read_sequences(cfg.sequence_dir)
    items = np.unique(
        np.concatenate([chunk.flatten().to_numpy() for chunk in table["item_id"].chunks])
    )
    return table["user_id"].to_numpy(), items


def run(cfg: RunConfig, url: str, load: Load, plot_to: Path | None = None) -> dict[str, Any]:
    """One load against the server at `url`; returns what the JSON holds.

    Raises:
        UserError: nothing is published, or no request at all was answered.
    """
    users, items = known_ids(cfg)
    asked = arrivals(load, users)
    answers = asyncio.run(send(url, load, asked, bodies(load, asked, items), key_header(cfg)))
    if len(answers.status) and not answers.status.any():
        raise UserError(f"--url {url}: none of {len(answers.status)} requests was answered")
    if plot_to is not None:
        plot(load, asked, answers, plot_to)
    return summary(load, asked, answers)


def _burst(text: str) -> tuple[float, float, float]:
    rate, begin, end = (float(part) for part in text.split(":"))  # argparse reports a ValueError
    return rate, begin, end


def main() -> None:
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
    options = parser.parse_args()
    names = ("rate", "seconds", "candidates", "warm_share", "timeout_s", "seed", "burst")
    try:
        load = Load(**{name: getattr(options, name) for name in names})
        figures = run(
            config.load(options.config, options.overrides), options.url, load, options.plot
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    text = json.dumps(figures, indent=1)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
