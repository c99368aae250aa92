"""Score validation and test requests with a trained model: metrics.json, predictions and plots."""

import argparse
from pathlib import Path

from jobs import cli
from pipeline.evaluate import evaluator


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, help="model folder; default: the one that this run trained"
    )
    parser.add_argument(
        "--splits",
        nargs="+",
        choices=["val", "test"],
        default=["val", "test"],
        help="periods to score",
    )


def run_job(job: cli.Job) -> None:
    metrics = evaluator.evaluate_model(
        job.cfg, job.options.model or job.cfg.model_dir, job.options.splits
    )
    for key, value in metrics.items():
        print(f"{key:40} {value:,.4f}")


def plan_job(job: cli.Job) -> dict[str, object]:
    return evaluator.plan_evaluation(job.cfg)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
