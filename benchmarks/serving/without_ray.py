"""The server's own code without Ray Serve: the HTTP application in uvicorn, the ranker in threads
of the same process.

    python -m benchmarks.serving.without_ray --set runs_dir=FOLDER        → prints its address

Routes, checks, limits, JSON, batching, caches, event store and passes are those of the product;
Serve's proxy and its processes are not there. For machines without Ray, and to look into the
server's process. Serves an untrained model over the sequences that are published in FOLDER.
"""

import argparse
import logging
import socket
from collections.abc import Callable, Mapping

import uvicorn
import uvloop

from benchmarks.serving.stage import PRESET, untrained
from pipeline import config
from pipeline.config import RunConfig
from serve_app import deployment
from serve_app.app import Ranking
from serve_app.feedback.served_log import ServedLogSettings
from serve_app.metrics import exposition_text
from serve_app.web.api import make_api
from serve_app.web.settings import ApiIdentity, ApiLimits

NAME = "alone"  # of the one process, in its metrics


class LoneServer(Ranking):
    """The replica and its ingress in a process that Ray does not know."""

    async def deployment_ids(self) -> list[str]:
        return [self.deployment]

    async def ingress_metrics(self, own: bytes) -> Mapping[str, bytes]:
        return {NAME: own}

    async def replica_metrics(self) -> Mapping[str, bytes]:
        return {NAME: exposition_text(self.counts.registry)}


async def run_server(cfg: RunConfig, started: Callable[[str], None]) -> None:
    """Serve an untrained model of `cfg`; `started` gets the address, once it is loaded and warm."""
    server = LoneServer()
    await server.reconfigure(
        deployment.user_config(cfg.folders, cfg.serve, untrained(cfg, version=1))
    )
    settings = cfg.serve
    served_log = deployment.served_log_arguments(settings, str(cfg.run_dir / "serving"))
    api = make_api(
        server,
        ApiLimits(
            max_body_bytes=settings.max_body_bytes,
            max_wait_s=settings.max_wait_ms / 1000,
            timeout_s=settings.request_timeout_s,
        ),
        identity=ApiIdentity(name=NAME),
        served_log=None if served_log is None else ServedLogSettings(**served_log),
    )

    with socket.create_server((settings.host, settings.port)) as listener:
        host, port = listener.getsockname()[:2]
        started(f"http://{host}:{port}")
        options = uvicorn.Config(api, http="httptools", log_level="warning")
        await uvicorn.Server(options).serve(sockets=[listener])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default=str(PRESET))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    cfg = config.load(options.config, options.set)
    uvloop.run(run_server(cfg, lambda url: print(url, flush=True)))


if __name__ == "__main__":
    main()
