"""Where the time of a request goes: each hop from the client's socket to the forward pass and back.

The server says of every answer what it took (`Server-Timing`, `serve_app.web.rank.HOPS`); the rest
of what the client has waited is sockets and proxies. A route that does nothing, asked through the
proxy and at the ingress' own port, tells these apart.
"""

import os
from typing import Any

import httpx

from benchmarks.serving.stage import REFERENCE_RATE, Stage, paced_ms
from pipeline.cluster import REPLICA_PORTS


def measure(stage: Stage) -> dict[str, Any]:
    """The reference load by hops, with the ingress in the ranker's process and apart."""
    figures: dict[str, Any] = {}
    for name, apart in (("together", False), ("apart", True)):
        url = stage.deploy(2, apart=apart)
        stage.load(url, REFERENCE_RATE, 5)
        loaded = stage.load(url, REFERENCE_RATE, stage.seconds)
        kept = ("load", "requests", "failures", "overhead_ms", "hops_ms", "others_cores")
        figures[name] = {key: loaded[key] for key in kept}
        figures[name]["route_without_work_ms"] = {
            "through the proxy": paced_ms(f"{url}/healthz"),
            "at the ingress": paced_ms(f"{find_ingress()}/healthz"),
        }
    return figures


def find_ingress() -> str:
    """Address of an ingress without the proxy before it."""
    first = int(os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT"])
    for port in range(first, first + REPLICA_PORTS):
        address = f"http://127.0.0.1:{port}"
        try:
            if httpx.get(f"{address}/healthz").status_code == 200:
                return address
        except httpx.HTTPError:
            continue
    raise LookupError("no ingress listens on the ports of this cluster")
