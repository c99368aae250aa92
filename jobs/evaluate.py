"""Score validation and test requests with a trained model: metrics.json, predictions, slices and
plots.

The parts of a store are scored by the workers of a Ray cluster where there is one to join
(`ray.address`, or the one that this job was submitted to), in this process otherwise; a large store
gets a local cluster.
"""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from jobs import cli
from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig
from pipeline.evaluate import evaluator
from pipeline.sequences import store

LARGE_STORE = 3_000_000  # rows: a minute of work, against the seconds of a cluster's start


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


def run_job(job: cli.Job) -> None:
    cfg, options = job.cfg, job.options
    model_dir = options.model or cfg.model_dir
    with workers(cfg):
        metrics = evaluator.evaluate_model(cfg, model_dir, options.splits, options.name)

    for key, value in metrics.items():
        print(f"{key:40} {value:,.4f}")


@contextmanager
def workers(cfg: RunConfig) -> Iterator[None]:
    """The Ray cluster to score on, where there is one or the store is large."""
    joins = cfg.ray.address is not None or "RAY_ADDRESS" in os.environ
    if joins or store.read_manifest(cfg.sequence_dir).num_rows >= LARGE_STORE:
        with ray_cluster(cfg.ray, runs_dir=cfg.runs_dir):
            yield
    else:
        yield


def plan_job(job: cli.Job) -> dict[str, object]:
    return evaluator.plan_evaluation(job.cfg)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
