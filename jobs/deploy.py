"""Serve the champion on a running Ray cluster, or move its server to a new champion without failing
a request.

The cluster is `ray.address`, or the one that this job was submitted to. `jobs.serve` starts one of
its own. With `--rayservice FILE` nothing is sent: KubeRay's manifest in FILE is printed with the
champion in it, for `kubectl apply`."""

import argparse
import os
from pathlib import Path

from jobs import cli
from pipeline.config import RayConfig, UserError

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rayservice",
        type=Path,
        metavar="FILE",
        help="print this manifest, filled, and send nothing",
    )


def run_job(job: cli.Job) -> None:
    from pipeline import tracking
    from pipeline.cluster import ray_cluster
    from serve_app import deployment

    cfg, manifest = job.cfg, job.options.rayservice
    # mistakes and a cluster that is not there are told before MLflow is started
    if manifest is None:
        _require_cluster(cfg.ray)
    deployment.plan_serving(cfg.folders, cfg.serve)

    with tracking.session(cfg) as tracker:
        champion = tracker.find_champion()
        if manifest is not None:
            print(deployment.fill_rayservice(cfg.folders, cfg.serve, manifest, champion), end="")
            return

        with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir) as cluster:
            url = deployment.deploy_model(cfg.folders, cfg.serve, cluster.dashboard_url, champion)
    print(f"url={url} version={champion.version}")


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline import tracking
    from serve_app import deployment

    cfg = job.cfg
    _require_cluster(cfg.ray)
    planned = deployment.plan_serving(cfg.folders, cfg.serve)
    return {**tracking.plan_session(cfg), **planned}


def _require_cluster(cfg: RayConfig) -> None:
    """Refuse a cluster that nobody names, or at whose address nothing listens."""
    from pipeline.cluster import require_listening

    address = cfg.address or os.environ.get("RAY_ADDRESS")
    if address is None:
        raise UserError(
            "ray.address: no cluster to deploy to; set it, submit this job with `ray job submit`, "
            "or use jobs.serve, which starts a server of its own"
        )
    require_listening(address)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
