"""Show figures that were made elsewhere, on a GPU say, in the MLflow UI: a run per JSON file, and a
run per line of a JSON Lines file, each once.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from jobs import cli
from pipeline.config import UserError
from pipeline.figures import Figures, read_runs

# what takes seconds to import is imported where it is used, after the settings were read


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path("benchmarks/runs"),
        help="of *.json and *.jsonl, folders in it too",
    )


def run_job(job: cli.Job) -> None:
    from pipeline import tracking

    found = list(read_figures(job.options.folder))
    if not found:
        raise UserError(f"--folder {job.options.folder}: no *.json or *.jsonl there")

    imported = 0
    with tracking.session(job.cfg) as tracker:
        for name, figures in found:
            imported += tracker.import_result(name, figures)
    print(f"imported={imported} known={len(found) - imported}")


def read_figures(folder: Path) -> Iterator[tuple[str, Figures]]:
    """Names of runs and their figures, file by file.

    Raises:
        UserError: a file or a line of it is not a JSON object.
    """
    for path in sorted([*folder.rglob("*.json"), *folder.rglob("*.jsonl")]):
        try:
            if path.suffix == ".json":
                yield path.stem, dict(json.loads(path.read_text()))
                continue
            for number, run in enumerate(read_runs(path)):
                yield f"{path.stem}/{run.get('name', number)}-{run.get('seed', 0)}", run
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path} is not a JSON object of figures") from None


def plan_job(job: cli.Job) -> dict[str, object]:
    from pipeline import tracking

    return tracking.plan_session(job.cfg)


if __name__ == "__main__":
    cli.run(__doc__ or "", run_job, add_options, plan_job)
