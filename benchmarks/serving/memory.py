"""What a server's process holds: counted bytes of encoded histories against resident memory, and
file descriptors over changes of version.
"""

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import numpy as np

from benchmarks.serving.stage import TRIVIAL, Stage, replica_pids

NUM_REQUESTS, WARM_UP, ROUNDS = 50_000, 1_000, 10
NUM_CLIENTS = 8  # as many as are never refused, whose histories share passes
LONGEST_HISTORY = 256
CACHE_MB = 1024  # the default, full after some 6,000 of these histories
NUM_SWAPS = 100
BYTES_PER_MB = 2**20
START_MS = 1_767_500_000_000
COUNTED = re.compile(r"^ranking_history_cache_(bytes|entries|evictions_total){.*} (\S+)$", re.M)


def measure_cache(stage: Stage) -> dict[str, Any]:
    """Requests of as many distinct histories from several clients, short histories more often than
    long ones; counted and resident bytes after each tenth of them.
    """
    url = stage.deploy(2, settings={"cache_mb": CACHE_MB, "max_wait_ms": 10_000})
    (pid,) = replica_pids("RankerReplica")
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))  # histories of this run alone
    num = int(stage.share * NUM_REQUESTS) // ROUNDS

    rows: list[dict[str, float]] = []
    for num_asked in (min(WARM_UP, num), *[num] * ROUNDS):
        asyncio.run(_ask_distinct(url, rng, num_asked))
        rows.append(_memory(url, pid))

    first, last = rows[0], rows[-1]
    counted_mb = last["counted_mb"] - first["counted_mb"]
    resident_mb = last["resident_mb"] - first["resident_mb"]
    return {
        "requests": ROUNDS * num,
        "cache_mb": CACHE_MB,
        "counted_mb": round(counted_mb, 1),
        "resident_mb": round(resident_mb, 1),
        "resident_over_counted": round(resident_mb / counted_mb, 3),
        "rows": rows,
    }


def measure_swaps(stage: Stage) -> dict[str, Any]:
    """Two versions in turns; file descriptors and memory after each tenth of the swaps."""
    num = int(stage.share * NUM_SWAPS)
    stage.deploy(1, **TRIVIAL)
    stage.deploy(3, **TRIVIAL)
    (pid,) = replica_pids("RankerReplica")
    descriptors = [_num_descriptors(pid)]
    resident = [_resident_mb(pid)]
    for number in range(num):
        stage.deploy((1, 3)[number % 2], **TRIVIAL)
        if (number + 1) % max(num // 10, 1) == 0:
            descriptors.append(_num_descriptors(pid))
            resident.append(_resident_mb(pid))
    assert replica_pids("RankerReplica") == [pid], "the process stays"
    return {"swaps": num, "descriptors": descriptors, "resident_mb": resident}


async def _ask_distinct(url: str, rng: np.random.Generator, num: int) -> None:
    """Rank a candidate for `num` users who bring histories of their own."""
    bodies = _distinct_bodies(rng, num)

    async def ask_in_turn(session: aiohttp.ClientSession) -> None:
        for body in bodies:  # all clients take from the same
            async with session.post(f"{url}/v1/rank", data=body) as answer:
                answer.raise_for_status()
                await answer.read()

    json_type = {"content-type": "application/json"}
    async with aiohttp.ClientSession(headers=json_type) as session:
        await asyncio.gather(*(ask_in_turn(session) for _ in range(NUM_CLIENTS)))


def _distinct_bodies(rng: np.random.Generator, num: int) -> Iterator[bytes]:
    """Requests whose histories have as many of 1 to 2 rows as of 2 to 4, of 4 to 8 and so on."""
    lengths = np.exp2(rng.uniform(0, np.log2(LONGEST_HISTORY), num)).astype(int)
    for length in lengths.tolist():
        items = rng.integers(0, 10_000, length).tolist()
        history = []
        for i, item in enumerate(items):
            history.append({"item_id": item, "event_time": START_MS + i})
        yield json.dumps({"history": history, "candidates": [{"item_id": 1}]}).encode()


def _memory(url: str, pid: int) -> dict[str, float]:
    """Counted and resident memory of the replica now."""
    found = dict(COUNTED.findall(httpx.get(f"{url}/metrics", timeout=60).text))
    return {
        "counted_mb": round(float(found["bytes"]) / BYTES_PER_MB, 1),
        "resident_mb": _resident_mb(pid),
        "entries": float(found["entries"]),
        "evictions": float(found["evictions_total"]),
    }


def _resident_mb(pid: int) -> float:
    """Anonymous memory: mapped files, such as the published sequences, are the machine's."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    assert found is not None
    return round(int(found[1]) / 1024, 1)


def _num_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
