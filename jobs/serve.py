"""Serve the champion until Ctrl-C, on a Ray cluster and an MLflow server of this job's own."""

import json
import shlex

from jobs import cli
from pipeline import tracking
from pipeline.cluster import ray_cluster
from serve_app import deployment, replay


def run_job(job: cli.Job) -> None:
    cfg = job.cfg
    with tracking.session(cfg) as tracker:
        champion = tracker.find_champion()
        logs = cfg.run_dir / "serving" / "logs"
        with ray_cluster(
            cfg.ray, runs_dir=cfg.runs_dir, include_dashboard=True, keep_logs=logs
        ) as cluster:
            url = deployment.deploy_model(cfg, cluster.dashboard_url, champion)
            print(
                f"{champion.name} version {champion.version} answers at {url} (interactive: "
                f"{url}/docs)"
            )
            print(f"MLflow: {tracker.server_url}")

            # a request to begin with
            body, _ = replay.demo_request(cfg)
            body["candidates"] = body["candidates"][:5]
            key = ' -H "Authorization: Bearer $API_KEY"' if cfg.serve.api_keys_file else ""
            sent = shlex.quote(json.dumps(body))
            print(f"curl -s {url}/v1/rank{key} -H 'content-type: application/json' -d {sent}")

            cli.wait_for_interrupt()


def plan_job(job: cli.Job) -> dict[str, object]:
    return {**tracking.plan_session(job.cfg), **deployment.plan_serving(job.cfg)}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, plan=plan_job)
