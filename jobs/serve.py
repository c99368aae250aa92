"""Serve the champion until Ctrl-C or SIGTERM, on a Ray cluster and an MLflow server of this job's
own.

What is in flight when it is asked to end is answered first. It ends with exit code 1 when its
cluster dies, so that a supervisor starts it again. Where MLflow does not answer it serves the
champion that it served last. Where there is a screen it opens the page for people. Logs are kept
under runs/NAME/serving/logs."""

import argparse
import json
import logging
import os
import shlex
import sys
import webbrowser
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs import cli
from pipeline.config import Outage, RunConfig, ServeConfig

if TYPE_CHECKING:
    from pipeline.tracking import PinnedModel

# what takes seconds to import is imported where it is used, after the settings were read

logger = logging.getLogger(__name__)


def run_job(job: cli.Job) -> None:
    from pipeline.cluster import lost_processes, ray_cluster
    from serve_app import deployment, replay

    cfg = job.cfg
    # mistakes are told before MLflow and Ray are started
    deployment.plan_serving(cfg.folders, cfg.serve)
    with ExitStack() as stack:
        champion, mlflow_url = find_champion(cfg, stack)
        logs = deployment.make_serving_folder(cfg.run_dir) / "logs"
        cluster = stack.enter_context(
            ray_cluster(cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True, keep_logs=logs)
        )

        try:
            url = deployment.deploy_model(cfg.folders, cfg.serve, cluster.dashboard_url, champion)
            period = replay.PastPeriod.of_run(cfg)
            demo = replay.demo_request(period, cfg.model_dir, cfg.serve.demo_candidates)
            print_start(cfg.serve, cfg.run_dir, champion, url, mlflow_url, demo.body)
            if deployment.has_page(cfg.serve) and not job.options.no_browser:
                open_page(url)
            cli.wait_for_interrupt(require_cluster)
        finally:
            if not lost_processes():
                deployment.end_server(cfg.serve)


def find_champion(cfg: RunConfig, stack: ExitStack) -> "tuple[PinnedModel, str]":
    """The champion and where MLflow is; without MLflow what was served last."""

    from pipeline import tracking
    from serve_app import deployment

    try:
        tracker = stack.enter_context(tracking.session(cfg))
        return tracker.find_champion(), tracker.server_url
    except Outage as error:  # at its start, or of what is behind it
        champion = deployment.recall_champion(cfg.runs_dir, cfg.model_name)
        if champion is None:
            raise
        logger.warning("serving version %d, as the last time: %s", champion.version, error)
        return champion, "does not answer"


def require_cluster() -> None:
    """Raise where the cluster of this job has lost a process that it cannot live without."""

    from pipeline.cluster import lost_processes

    lost = lost_processes()
    if lost:
        raise Outage(f"the server is gone: its Ray cluster has lost {', '.join(lost)}")


def print_start(
    serve: ServeConfig,
    run_dir: Path,
    champion: "PinnedModel",
    url: str,
    mlflow_url: str,
    body: dict[str, Any],
) -> None:
    """Addresses, and a rank request to begin with, of the first candidates of `body`."""

    from serve_app import deployment

    print(f"{champion.name} version {champion.version} answers at {url} (interactive: {url}/docs)")
    if deployment.has_page(serve):
        print(f"a page to look at: {url}/")
    print(f"MLflow: {mlflow_url}")
    print(f"logs: {run_dir / 'serving' / 'logs'}")
    print(open_ports())

    few = body | {"candidates": body["candidates"][:5]}
    key = ' -H "Authorization: Bearer $API_KEY"' if serve.api_keys_file else ""
    sent = shlex.quote(json.dumps(few))
    print(f"curl -s {url}/v1/rank{key} -H 'content-type: application/json' -d {sent}")


def open_ports() -> str:
    """What listens on all addresses whatever `serve.host` says: Ray has no setting for it."""
    from pipeline.cluster import HAPROXY_METRICS_PORT, HAPROXY_STATS_PORT

    ports = []
    for name, key in (("statistics", HAPROXY_STATS_PORT), ("metrics", HAPROXY_METRICS_PORT)):
        if key in os.environ:  # of a cluster of our own
            ports.append(f"HAProxy's {name} on port {os.environ[key]}")
    return (
        f"open on all addresses of this machine: {', '.join([*ports, 'ports of Ray itself'])}. "
        "Where others reach it, a firewall closes all but the server's (docs/operate/security.md)"
    )


def open_page(url: str) -> None:
    """Show the page in a browser, where there is a screen to show it on."""
    has_screen = sys.platform in ("darwin", "win32")
    if has_screen or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        webbrowser.open(url)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-browser", action="store_true", help="do not open the page in a browser"
    )


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline import tracking
    from serve_app import deployment

    planned = deployment.plan_serving(job.cfg.folders, job.cfg.serve)
    return {**tracking.plan_session(job.cfg), **planned}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
