"""The MLflow run that a training logs into, as a note in its folder: read without MLflow."""

import json
from pathlib import Path

MLFLOW_RUN = "mlflow_run.json"  # in a run's folder: which MLflow run its training logs into


def noted_run(run_dir: Path) -> str | None:
    """Id of the MLflow run that the training in this folder logs into; None where none is tracked.

    It asks no server.
    """
    note = run_dir / MLFLOW_RUN
    return json.loads(note.read_text())["run_id"] if note.exists() else None
