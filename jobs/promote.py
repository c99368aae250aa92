"""Register a run's model and make it the champion, if its validation passes the gate; exit code 1
if it does not. With `--register-only` it is registered for a trial (serve.canary, serve.shadow).

Where the two were validated on different rows, they are scored anew on those of this run.
"""

import argparse
import sys

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument(
        "--version", type=int, help="a number in the registry instead of the run's own model"
    )
    choice.add_argument(
        "--register-only",
        action="store_true",
        help="register the run's own model and leave the champion",
    )
    parser.add_argument(
        "--validated-by",
        type=int,
        metavar="VERSION",
        help="for split.refit: a version trained without it is judged",
    )
    parser.add_argument(
        "--force-first",
        action="store_true",
        help="promote a first champion that does not beat the item's smoothed rate; the registry "
        "says so",
    )


def run_job(job: cli.Job) -> None:
    from pipeline import tracking

    cfg, options = job.cfg, job.options
    if options.version is None:  # a mistake is told before MLflow is started
        tracking.require_evaluated(cfg.model_dir)

    with tracking.session(cfg) as tracker:
        version = options.version
        if version is None:
            version = tracker.register_trained()
        if options.register_only:
            print(f"version={version} registered")
            return

        decision = tracker.promote_version(
            version,
            options.validated_by,
            rows=cli.rows_at_hand(cfg),
            force_first=options.force_first,
        )

    print(f"version={version} {decision.reason}")
    if not decision.promoted:
        sys.exit(1)


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline import tracking

    cfg = job.cfg
    if job.options.version is None:
        tracking.require_evaluated(cfg.model_dir)
    gate = {"max_ne": cfg.tracking.gate_max_ne, "max_regression": cfg.tracking.gate_max_regression}
    return {**tracking.plan_session(cfg), "gate": gate}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
