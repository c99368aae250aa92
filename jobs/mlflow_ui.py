"""Open the tracking server over past runs until Ctrl-C: parameters, metrics, plots, versions."""

import argparse

from jobs import cli
from pipeline import tracking


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="port of the tracking server")


def run_job(job: cli.Job) -> None:
    with tracking.session(job.cfg, job.options.port) as tracker:
        print(f"MLflow: {tracker.server_url}")
        print(f"runs:   {tracker.list_url}")
        cli.wait_for_interrupt()


def plan_job(job: cli.Job) -> dict[str, object]:
    return tracking.plan_session(job.cfg)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
