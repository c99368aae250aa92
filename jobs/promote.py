"""Register a run's model and make it the champion, if its validation passes the gate; exit code 1
if it does not.
"""

import argparse
import sys

from jobs import cli
from pipeline import tracking


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


def run_job(job: cli.Job) -> None:
    with tracking.session(job.cfg) as tracker:
        version = job.options.version
        if version is None:
            version = tracker.register_trained()
        decision = tracker.promote_version(version, job.options.validated_by)

    print(f"version={version} {decision.reason}")
    if not decision.promoted:
        sys.exit(1)


def plan_job(job: cli.Job) -> dict[str, object]:
    cfg = job.cfg
    gate = {"max_ne": cfg.tracking.gate_max_ne, "max_regression": cfg.tracking.gate_max_regression}
    return {**tracking.plan_session(cfg), "gate": gate}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
