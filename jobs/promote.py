"""Register a run's model and make it the champion, if its validation passes the gate; exit code 1
if it does not.
"""

import argparse
import sys

from jobs import cli
from pipeline.config import RunConfig
from pipeline.tracking import registry
from pipeline.tracking.server import mlflow_server, plan_server


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--version", type=int, help="a number in the registry instead of the run's own model"
    )
    parser.add_argument(
        "--validated-by",
        type=int,
        metavar="VERSION",
        help="for split.refit: a version trained without it is judged",
    )


def main(job: cli.Job) -> None:
    with mlflow_server(job.cfg):
        version = job.options.version
        if version is None:
            version = registry.register_trained(job.cfg)
        decision = registry.promote(job.cfg, version, job.options.validated_by)
    print(f"version={version} {decision.reason}")
    if not decision.promoted:
        sys.exit(1)


def plan(cfg: RunConfig) -> dict[str, object]:
    gate = {"max_ne": cfg.tracking.gate_max_ne, "max_regression": cfg.tracking.gate_max_regression}
    return {**plan_server(cfg), "gate": gate}


if __name__ == "__main__":
    cli.run(__doc__ or "", main, add_options, plan)
