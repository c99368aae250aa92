"""What a server's process holds: counted bytes of encoded histories against resident memory, and
file descriptors over changes of version.
"""

import os
import re
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks.serving.stage import TRIVIAL, Stage, replica_pids

NUM_REQUESTS, WARM_UP, ROUNDS = 50_000, 1_000, 10
LONGEST_HISTORY = 256
CACHE_MB = 256  # full after 1,500 of these histories
NUM_SWAPS = 100
BYTES_PER_MB = 2**20
START_MS = 1_767_500_000_000
COUNTED = re.compile(r"^ranking_history_cache_(bytes|entries|evictions_total){.*} (\S+)$", re.M)


def measure_cache(stage: Stage) -> dict[str, Any]:
    """Requests of as many distinct histories, short ones more often than long ones; counted and
    resident bytes after each tenth of them.
    """
    url = stage.deploy(2, settings={"cache_mb": CACHE_MB})
    (pid,) = replica_pids("RankerReplica")
    rng = np.random.default_rng(int.from_bytes(os.urandom(4)))  # histories of this run alone
    num = int(stage.share * NUM_REQUESTS) // ROUNDS
    rows: list[dict[str, float]] = []
    with httpx.Client(base_url=url, timeout=60) as client:
        _ask_distinct(client, rng, min(WARM_UP, num))
        rows.append(_memory(client, pid))
        for _ in range(ROUNDS):
            _ask_distinct(client, rng, num)
            rows.append(_memory(client, pid))

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


def _ask_distinct(client: httpx.Client, rng: np.random.Generator, num: int) -> None:
    """Rank a candidate for `num` users who bring histories of their own."""
    # as many of 1 to 2 rows as of 2 to 4, of 4 to 8 and so on
    lengths = np.exp2(rng.uniform(0, np.log2(LONGEST_HISTORY), num)).astype(int)
    for length in lengths.tolist():
        items = rng.integers(0, 10_000, length).tolist()
        history = []
        for i, item in enumerate(items):
            history.append({"item_id": item, "event_time": START_MS + i})
        body = {"history": history, "candidates": [{"item_id": 1}]}
        client.post("/v1/rank", json=body).raise_for_status()


def _memory(client: httpx.Client, pid: int) -> dict[str, float]:
    """Counted and resident memory of the replica now."""
    found = dict(COUNTED.findall(client.get("/metrics").text))
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
