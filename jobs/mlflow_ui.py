"""Open the tracking server over past runs until Ctrl-C: parameters, metrics, plots, model versions."""

import argparse

from jobs import cli
from pipeline.tracking.server import mlflow_server, plan_server


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--port", type=int, default=5000, help="port of the tracking server")


def main(job: cli.Job) -> None:
    with mlflow_server(job.cfg, job.options.port) as uri:
        print(f"MLflow: {uri}")
        cli.wait_for_interrupt()


if __name__ == "__main__":
    cli.run(__doc__ or "", main, add_options, plan_server)
