"""MLflow runs: one per training, with params, metrics, dataset and plots; figures made elsewhere as
runs of their own.

    training → run → registry.py

All of it is called inside a session, but for the methods of `Run`, which know their server.
"""

import hashlib
import json
import logging
import re
import subprocess
import sys
import time
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import config
from pipeline.config import Outage, RunConfig, TrackingConfig
from pipeline.figures import Figures
from pipeline.files import write_atomically
from pipeline.tracking.server import is_absent, mlflow_client, one_message

if typing.TYPE_CHECKING:
    from mlflow import MlflowClient

    from pipeline.sequences.store import Manifest

logger = logging.getLogger(__name__)

MLFLOW_RUN = "mlflow_run.json"  # in a run's folder: which MLflow run its training logs into
PARAMS_PER_REQUEST = 100  # MLflow's own limit
LONGEST_PARAM = 6000  # characters, MLflow's own limit
LONGEST_DIGEST = 36  # characters, MLflow's own limit


@dataclass(frozen=True, slots=True)
class Run:
    """One MLflow run by its id: picklable, so that rank 0 of a training logs into the run that the
    driver made.

    `with run:` ends it: FAILED where the block raises, KILLED where somebody ended the job.
    """

    uri: str
    run_id: str

    def log_metrics(
        self, metrics: Mapping[str, float], step: int, model_id: str | None = None
    ) -> None:
        """All of one step in one request."""
        self.log_history([(step, time.time(), metrics)], model_id)

    def log_history(
        self,
        history: Iterable[tuple[int, float, Mapping[str, float]]],
        model_id: str | None = None,
    ) -> None:
        """Several steps in one request: each its number, when it was, in seconds since 1970, and
        its metrics. MLflow takes 1,000 numbers at once.

        Raises:
            Outage: the server does not answer.
        """
        from mlflow.entities import Metric

        entries = []
        for step, at_seconds, metrics in history:
            for key, value in metrics.items():
                when_ms = int(at_seconds * 1000)
                entries.append(
                    Metric(allowed_name(key), float(value), when_ms, step, model_id=model_id)
                )
        with one_message():
            mlflow_client(self.uri).log_batch(self.run_id, metrics=entries)

    def log_artifacts(self, path: Path, artifact_path: str | None = None) -> None:
        """A file, or everything in a folder."""
        client = mlflow_client(self.uri)
        log = client.log_artifacts if path.is_dir() else client.log_artifact
        with one_message():
            log(self.run_id, str(path), artifact_path)

    def end(self, status: str = "FINISHED") -> None:
        with one_message():
            mlflow_client(self.uri).set_terminated(self.run_id, status)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.end("FINISHED")
            return

        ended_by_somebody = issubclass(kind, KeyboardInterrupt | SystemExit)
        try:
            self.end("KILLED" if ended_by_somebody else "FAILED")
        except Outage as error:  # what the block raised says more
            logger.warning("run %s is not marked as ended: %s", self.run_id, error)


def training_run(cfg: RunConfig, manifest: "Manifest", *, restart: bool = False) -> Run:
    """The MLflow run of this training: a new one, or that of the attempt which it goes on from.

    Its params stay those of the first attempt; the tag `attempt` counts.
    """
    import mlflow

    note = cfg.run_dir / MLFLOW_RUN

    earlier = None if restart else _earlier_run(note, manifest)
    if earlier is None:
        run = start_run(cfg, manifest, {"attempt": "1"})
        write_atomically(note, json.dumps({"run_id": run.run_id}))
        return run

    run_id, attempt = earlier
    client = mlflow_client()
    with one_message():
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "attempt", str(attempt + 1))
    logger.info("attempt %d of MLflow run %s", attempt + 1, run_id)
    return Run(mlflow.get_tracking_uri(), run_id)


def _earlier_run(note: Path, manifest: "Manifest") -> tuple[str, int] | None:
    """Id and attempt of the run that `note` names, if this server has it and it read the same
    sequences.
    """
    from mlflow.exceptions import MlflowException

    if not note.exists():
        return None

    run_id = json.loads(note.read_text())["run_id"]
    try:
        with one_message():
            found = mlflow_client().get_run(run_id)
    except MlflowException as error:
        if is_absent(error):
            return None
        raise

    deleted = found.info.lifecycle_stage != "active"
    if deleted or found.data.tags.get("manifest") != manifest.digest:
        return None
    return run_id, int(found.data.tags.get("attempt", "1"))


def start_run(
    cfg: RunConfig,
    manifest: "Manifest",
    tags: Mapping[str, str] | None = None,
    parent: Run | None = None,
) -> Run:
    """One run for one training job: params are the flattened configuration, its dataset the
    published sequences.

    A run with a `parent` is shown below it.
    """
    import mlflow

    below = {} if parent is None else {"mlflow.parentRunId": parent.run_id}

    client = mlflow_client()
    with one_message():
        run = client.create_run(
            _experiment(client, cfg.tracking.experiment),
            run_name=cfg.name,
            tags={
                "manifest": manifest.digest,
                **_code_version(),
                **_ray_job(),
                **below,
                **(tags or {}),
            },
        )
        _log_params(client, run.info.run_id, config.flatten(config.to_dict(cfg)))
        _log_dataset(client, run.info.run_id, cfg.sequence_dir, manifest)
    return Run(mlflow.get_tracking_uri(), run.info.run_id)


# parts of a result that are params, numbers too
MADE_WHERE = ("config", "environment", "machine", "versions")


def import_result(settings: TrackingConfig, name: str, figures: Figures) -> bool:
    """Show figures that were made elsewhere as a run of `<tracking.experiment>-benchmarks`.

    Their numbers are metrics, everything else params; the whole is an artifact. False where the
    same figures have been imported before.
    """
    flat = config.flatten(figures)
    metrics: dict[str, float] = {}
    params: dict[str, Any] = {}
    for key, value in flat.items():
        if _is_figure(key, value):
            metrics[key.removeprefix("metrics.")] = value
        else:
            params[key] = value

    client = mlflow_client()
    digest = hashlib.sha256(json.dumps(figures, sort_keys=True).encode()).hexdigest()
    with one_message():
        experiment = _experiment(client, f"{settings.experiment}-benchmarks")
        if client.search_runs([experiment], f"tags.result_sha256 = '{digest}'", max_results=1):
            return False

        found = client.create_run(experiment, run_name=name, tags={"result_sha256": digest})
        run = Run(client.tracking_uri, found.info.run_id)
        with run:
            _log_params(client, run.run_id, params)
            run.log_metrics(metrics, 0)
            client.log_dict(run.run_id, figures, f"{name}.json")
    return True


def _is_figure(key: str, value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and key.split(".")[0] not in MADE_WHERE
    )


def _experiment(client: "MlflowClient", name: str) -> str:
    found = client.get_experiment_by_name(name)
    return found.experiment_id if found else client.create_experiment(name)


def _log_params(client: "MlflowClient", run_id: str, flat: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(allowed_name(key), str(value)[:LONGEST_PARAM]) for key, value in flat.items()]
    for start in range(0, len(params), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])


def allowed_name(key: str) -> str:
    """MLflow takes letters, digits and `_-.: /` in names; a user's column may hold more."""
    return re.sub(r"[^\w\-.: /]", "_", key)


def _log_dataset(client: "MlflowClient", run_id: str, folder: Path, manifest: "Manifest") -> None:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    dataset = Dataset(
        name="sequences",
        digest=manifest.digest[:LONGEST_DIGEST],
        source_type="local",
        source=json.dumps({"uri": str(folder)}),
        profile=json.dumps({"num_rows": manifest.num_rows, "num_users": manifest.num_users}),
    )
    client.log_inputs(
        run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])]
    )


def _code_version() -> dict[str, str]:
    command = ["git", "-C", str(Path(__file__).parent), "describe"]
    command += ["--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        # an installed package: there is no repository to name
        return {}
    return {"git_sha": found, "mlflow.source.git.commit": found.removesuffix("-dirty")}


def _ray_job() -> dict[str, str]:
    ray = sys.modules.get("ray")  # a run outside Ray must not import it
    if ray is None or not ray.is_initialized():
        return {}
    return {"ray_job_id": ray.get_runtime_context().get_job_id()}
