"""Show figures that were made elsewhere, on a GPU say, in the MLflow UI: a run per JSON file, each
file once.
"""

import argparse
from pathlib import Path

from jobs import cli
from pipeline.config import UserError
from pipeline.tracking import runs
from pipeline.tracking.server import mlflow_server, plan_server


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder", type=Path, default=Path("benchmarks/runs"), help="of *.json, folders in it too"
    )


def main(job: cli.Job) -> None:
    files = sorted(job.options.folder.rglob("*.json"))
    if not files:
        raise UserError(f"--folder {job.options.folder}: no *.json there")
    with mlflow_server(job.cfg):
        imported = [path for path in files if runs.import_result(job.cfg, path)]
    print(f"imported={len(imported)} known={len(files) - len(imported)}")


if __name__ == "__main__":
    cli.run(__doc__ or "", main, add_options, plan_server)
