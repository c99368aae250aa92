"""Open the tracking server over past runs until Ctrl-C: parameters, metrics, plots, versions."""

import argparse

from jobs import cli
from pipeline.config import UserError

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="port of the tracking server")


def run_job(job: cli.Job) -> None:
    from pipeline import tracking

    check_port(job.options.port)
    with tracking.session(job.cfg, job.options.port) as tracker:
        print(f"MLflow: {tracker.server_url}")
        print(f"runs:   {tracker.list_url}")
        cli.wait_for_interrupt()


def check_port(port: int) -> None:
    """Raises UserError for a number that is no port."""
    if not 0 < port < 2**16:
        raise UserError(f"--port must be from 1 to {2**16 - 1}, got {port}")


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline import tracking

    check_port(job.options.port)
    return tracking.plan_session(job.cfg)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
