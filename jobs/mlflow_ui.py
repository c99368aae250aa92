"""Open the tracking server over past runs until Ctrl-C: parameters, metrics, plots, versions."""

import argparse

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="port of the tracking server")


def run_job(job: cli.Job) -> None:
    from pipeline import tracking

    with tracking.session(job.cfg, job.options.port) as tracker:
        print(f"MLflow: {tracker.server_url}")
        print(f"runs:   {tracker.list_url}")
        cli.wait_for_interrupt()


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline import tracking

    return tracking.plan_session(job.cfg)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
