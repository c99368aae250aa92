"""Show figures that were made elsewhere, on a GPU say, in the MLflow UI: a run per JSON file, each
file once.
"""

import argparse
from pathlib import Path

from jobs import cli
from pipeline import tracking
from pipeline.config import UserError


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, default=Path("benchmarks/runs"), help="of *.json, folders in it too"
    )


def run_job(job: cli.Job) -> None:
    files = sorted(job.options.folder.rglob("*.json"))
    if not files:
        raise UserError(f"--folder {job.options.folder}: no *.json there")

    with tracking.session(job.cfg) as tracker:
        imported = [path for path in files if tracker.import_result(path)]
    print(f"imported={len(imported)} known={len(files) - len(imported)}")


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, tracking.plan_session)
