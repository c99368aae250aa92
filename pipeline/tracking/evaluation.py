"""An evaluation in the MLflow run of the training that made its model, whoever starts it.

    evaluation folder + metrics → metrics, tags, plots and tables of the run

Numbers of rows are tags: as metrics they would be the longest bars of every chart. Predictions, a
row per candidate, stay where they are unless `tracking.log_predictions` asks for them.
"""

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.config import Outage
from pipeline.tracking.runs import Run, allowed_name, find_active
from pipeline.tracking.server import mlflow_client, one_message

logger = logging.getLogger(__name__)

COUNTS = ("rows", "gauc_users", "gauc_rows")  # metrics that are numbers of rows and users
TABLES = "mlflow.loggedArtifacts"  # tag: the artifacts that MLflow's UI shows as tables
FIGURES = ("*.png", "slices_*.json", "metrics.json")


def log_evaluation(
    uri: str,
    model_dir: Path,
    metrics: Mapping[str, float],
    folder: Path,
    name: str | None = None,
    *,
    with_predictions: bool = False,
) -> str | None:
    """Log an evaluation into the run that the model's record names; returns its id.

    None, with a line in the log, where the model was trained without tracking, its run is not on
    this server, or the server does not answer: the evaluation's own files hold everything.

    Args:
        name: of an evaluation of other rows or settings; it goes before its metrics' keys.
    """
    extra = _made_by(model_dir)
    run_id = extra.get("mlflow_run_id")
    if run_id is None:
        logger.info("the model was trained without tracking: its evaluation is in %s alone", folder)
        return None

    run = Run(uri, run_id)
    try:
        if find_active(mlflow_client(uri), run_id) is None:
            logger.warning(
                "the model's MLflow run %s is not on this server: its evaluation is in %s alone",
                run_id,
                folder,
            )
            return None
        _log_numbers(run, metrics, int(extra.get("steps", 0)), name)
        _log_files(run, folder, name, with_predictions=with_predictions)
    except Outage as error:
        logger.warning("the evaluation is in %s alone, not in MLflow: %s", folder, error)
        return None
    return run_id


def remove_predictions(uri: str, experiment: str) -> int:
    """Remove the predictions that were ever uploaded into runs of an experiment, those of deleted
    runs too; returns how many folders of them there were.

    Raises:
        Outage: MLflow does not answer.
    """
    from mlflow.entities import ViewType

    client = mlflow_client(uri)
    removed = 0
    with one_message():
        found = client.get_experiment_by_name(experiment)
        token = "" if found is not None else None
        while found is not None and token is not None:
            experiments = [found.experiment_id]
            page = client.search_runs(experiments, "", ViewType.ALL, page_token=token or None)
            token = page.token
            for run in page:
                if run.info.artifact_uri is not None:
                    removed += _remove_of_run(uri, run.info.run_id, run.info.artifact_uri)
    return removed


def _remove_of_run(uri: str, run_id: str, artifact_uri: str) -> int:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = mlflow_client(uri)
    removed = 0
    places = ["evaluation"]
    places += [one.path for one in client.list_artifacts(run_id, "evaluation") if one.is_dir]
    for place in places:
        for one in client.list_artifacts(run_id, place):
            if one.is_dir and one.path.endswith("/predictions"):
                files = get_artifact_repository(artifact_uri, tracking_uri=uri)
                files.delete_artifacts(one.path)
                removed += 1
    return removed


def is_tracked(model_dir: Path) -> bool:
    """True where the model's training logged into an MLflow run."""
    return "mlflow_run_id" in _made_by(model_dir)


def _made_by(model_dir: Path) -> dict[str, Any]:
    from pipeline.model.artifact import verified

    return verified(model_dir, "model")["extra"]


def split_counts(metrics: Mapping[str, float]) -> tuple[dict[str, float], dict[str, str]]:
    """The metrics that are defined, and the numbers of rows as tags.

    val/ne/is_click 0.84    a metric
    val/ne/is_hate NaN      neither
    val/rows/is_click 120   a tag
    """
    numbers, counts = {}, {}
    for key, value in metrics.items():
        parts = key.split("/")
        if len(parts) > 1 and parts[1] in COUNTS:
            counts[key] = str(int(value))
        elif math.isfinite(value):
            numbers[key] = value
    return numbers, counts


def _log_numbers(run: Run, metrics: Mapping[str, float], step: int, name: str | None) -> None:
    numbers, counts = split_counts(metrics)
    before = "" if name is None else f"{name}/"
    run.log_metrics({f"{before}{key}": value for key, value in numbers.items()}, step)

    client = mlflow_client(run.uri)
    with one_message():
        for key, value in counts.items():
            client.set_tag(run.run_id, allowed_name(f"{before}{key}"), value)


def _log_files(run: Run, folder: Path, name: str | None, *, with_predictions: bool) -> None:
    place = "evaluation" if name is None else f"evaluation/{name}"
    tables = []
    for pattern in FIGURES:
        for path in sorted(folder.glob(pattern)):
            run.log_artifacts(path, place)
            if path.name.startswith("slices_") and path.suffix == ".json":
                tables.append({"path": f"{place}/{path.name}", "type": "table"})
    if with_predictions:
        run.log_artifacts(folder / "predictions", f"{place}/predictions")

    client = mlflow_client(run.uri)
    with one_message():
        known = json.loads(client.get_run(run.run_id).data.tags.get(TABLES, "[]"))
        new = [table for table in tables if table not in known]
        client.set_tag(run.run_id, TABLES, json.dumps(known + new))
