"""Judge a canary by what users did: rates of each task by version, of failures too, and their
difference with an interval that may be read every day.

It reads the served log and the posted events, writes `report/verdict.html` and `.json`, and logs
the figures to MLflow. With `--promote-if TASK` the canary becomes champion if it is better at TASK,
worse at none, not slower than it may be and not failing more; exit code 1 if not (yet)."""

import argparse
import math
import sys

from jobs import cli
from pipeline.config import CanaryConfig, UserError

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--canary", type=int, help="its version; default: serve.canary.version")
    parser.add_argument("--promote-if", metavar="TASK", help="make it champion if TASK is better")
    parser.add_argument(
        "--max-slower",
        type=float,
        default=0.5,
        help="by how much the p99 of its passes may exceed the champion's, as a share",
    )


def run_job(job: cli.Job) -> None:
    from pipeline import tracking
    from serve_app.feedback.trial import judge_canary, log_verdict, promote_canary
    from serve_app.feedback.verdict import verdict_lines

    cfg, task = job.cfg, job.options.promote_if
    version = find_canary(cfg.serve.canary, job.options.canary)
    check_options(job)

    verdict = judge_canary(cfg.serve, cfg.tasks, cfg.run_dir, version, job.options.max_slower)
    print("\n".join(verdict_lines(verdict)))

    with tracking.session(cfg) as tracker:
        log_verdict(tracker, verdict)
        if task is None:
            return
        decision = promote_canary(tracker, verdict, task, cli.rows_at_hand(cfg))
    print(f"version={version} {decision.reason}")
    if not decision.promoted:
        sys.exit(1)


def find_canary(canary: CanaryConfig | None, given: int | None) -> int:
    """The version on trial."""
    if given is not None:
        return given
    if canary is None:
        raise UserError("which version is on trial? give --canary, or set serve.canary")
    return canary.version


def check_options(job: cli.Job) -> None:
    """Raises UserError for a task that there is not, or a limit that is no number of 0 or more: no
    p99 is above what is not a number.
    """
    cli.require_task(job.cfg.tasks, job.options.promote_if)
    max_slower = job.options.max_slower
    if not 0 <= max_slower < math.inf:
        raise UserError(f"--max-slower must be 0 or more, got {max_slower:g}")


def plan_job(job: cli.Job) -> dict[str, object]:
    from serve_app.deployment import served_folder

    check_options(job)
    version = find_canary(job.cfg.serve.canary, job.options.canary)
    return {"canary": version, "reads": served_folder(job.cfg.serve, job.cfg.run_dir)}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
