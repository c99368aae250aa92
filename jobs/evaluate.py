"""Score validation and test requests with a trained model: metrics.json, predictions, slices and
plots. They go into the MLflow run of the training, too.

The parts of a store are scored by threads of this process. Those of a large store go to the workers
of a Ray cluster: the one to join (`ray.address`, or the one that this job was submitted to), or a
local one.
"""

import argparse
from pathlib import Path

from jobs import cli

# what takes seconds to import is imported where it is used, after the settings were read


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
    parser.add_argument(
        "--as",
        dest="name",
        metavar="NAME",
        help="score other rows or under other settings than the model's own evaluation: the files "
        "go to evaluation/NAME, and the model's metrics.json stays",
    )
    parser.add_argument(
        "--no-tracking", action="store_true", help="leave the model's MLflow run as it is"
    )


def run_job(job: cli.Job) -> None:
    from pipeline import tracking
    from pipeline.evaluate import evaluator
    from pipeline.evaluate.spread import evaluation_cluster

    cfg, options = job.cfg, job.options
    model_dir = options.model or cfg.model_dir
    with evaluation_cluster(cfg.ray, cfg.runs_dir, cfg.sequence_dir):
        metrics = evaluator.evaluate_model(cfg, model_dir, options.splits, options.name)
    if not options.no_tracking and tracking.is_tracked(model_dir):
        name = evaluator.evaluation_name(cfg.evaluate, options.name)
        folder = evaluator.evaluation_folder(cfg.run_dir, cfg.evaluate, options.name)
        with tracking.session(cfg) as tracker:
            tracker.log_evaluation(model_dir, metrics, folder, name)

    for key, value in metrics.items():
        print(f"{key:40} {value:,.{0 if is_count(key) else 4}f}")


def is_count(key: str) -> bool:
    """True for a metric that counts rows or users: val/rows/is_click, test/gauc_users/is_click."""
    return any(part.rpartition("_")[2] in ("rows", "users") for part in key.split("/"))


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline.batches.stored import StoredUsers
    from pipeline.evaluate import evaluator

    cfg = job.cfg
    stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
    counts = evaluator.plan_evaluation(stored, cfg.split, cfg.examples.max_history)
    return {"model": str(cfg.model_dir), "sequences": str(cfg.sequence_dir), **counts}


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
