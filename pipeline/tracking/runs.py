"""MLflow runs: one per training, with params, metrics, dataset and plots; figures made elsewhere as
runs of their own.

    training → run → registry.py

All of it is called inside a session, but for the methods of `Run`, which know their server.
"""

import hashlib
import json
import logging
import re
import tempfile
import time
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline import config
from pipeline.config import (
    ModelConfig,
    Outage,
    RunConfig,
    SplitConfig,
    TrackingConfig,
    UserError,
)
from pipeline.figures import Figures
from pipeline.files import write_atomically
from pipeline.run_note import MLFLOW_RUN
from pipeline.tracking.columns import VIEW_TAG, view_state, view_url
from pipeline.tracking.provenance import provenance_tags
from pipeline.tracking.server import is_absent, mlflow_client, one_message

if typing.TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

    from pipeline.sequences.store import Manifest

logger = logging.getLogger(__name__)

END_NOTE = "mlflow_end.json"  # in a run's folder: how its MLflow run ended, if that is to be told
PARAMS_PER_REQUEST = 100  # MLflow's own limit
# of an experiment: without it MLflow opens its pages for agents (Traces, Sessions, Judges)
EXPERIMENT_KIND = ("mlflow.experimentKind", "custom_model_development")
CONFIG = "config.yaml"  # artifact: the whole configuration
RUN_NAME = "run"  # tag: the configuration's name, which several runs may share
PARAM_SECTIONS = ("source", "sequences", "split", "model", "features", "retrieval", "train")
WHOLE_SECTIONS = ("split", "model")  # shown at their defaults too
MOST_PARAMS = 80
MOST_CHANGES = 3  # in a run's name
LONGEST_CHANGE = 60  # characters
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
    end_note: str | None = None  # file that says how it ended, until the tracker knows

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

    def set_tags(self, tags: Mapping[str, str]) -> None:
        client = mlflow_client(self.uri)
        with one_message():
            for key, value in tags.items():
                client.set_tag(self.run_id, key, value)

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
        status = "KILLED" if ended_by_somebody else "FAILED"
        # before it is told: `ray job stop` ends a server of the job's own in the same moment, and
        # kills this process seconds later
        if self.end_note is not None:
            note = {"run_id": self.run_id, "status": status}
            write_atomically(Path(self.end_note), json.dumps(note))
        try:
            self.end(status)
        except Outage as error:  # what the block raised says more
            logger.warning("run %s is marked as ended by the next job: %s", self.run_id, error)
            return
        if self.end_note is not None:
            Path(self.end_note).unlink(missing_ok=True)  # another job may have told it, too


def tell_ends(runs_dir: Path) -> None:
    """Mark the runs as ended whose jobs could not do it themselves.

    Raises:
        Outage: the server does not answer.
    """
    from mlflow.exceptions import MlflowException

    for path in runs_dir.glob(f"*/{END_NOTE}"):
        try:
            note = json.loads(path.read_text())
        except FileNotFoundError:  # another job has told it
            continue
        try:
            with one_message():
                mlflow_client().set_terminated(note["run_id"], note["status"])
        except MlflowException as error:
            if not is_absent(error):
                raise
        path.unlink(missing_ok=True)


def training_run(
    cfg: RunConfig,
    manifest: "Manifest",
    *,
    restart: bool = False,
    parent: Run | None = None,
    drawn: Mapping[str, Any] | None = None,
) -> Run:
    """The MLflow run of this training: a new one, or that of the attempt which it goes on from.

    Its params stay those of the first attempt; the tag `attempt` counts. `parent` and `drawn` are
    as in `start_run`.
    """
    import mlflow

    note, end_note = cfg.run_dir / MLFLOW_RUN, cfg.run_dir / END_NOTE
    end_note.unlink(missing_ok=True)

    earlier = None if restart else _earlier_run(note, manifest)
    if earlier is None:
        run = start_run(cfg, manifest, {"attempt": "1"}, parent, drawn)
        write_atomically(note, json.dumps({"run_id": run.run_id}))
        return replace(run, end_note=str(end_note))

    run_id, attempt = earlier
    client = mlflow_client()
    with one_message():
        client.update_run(run_id, status="RUNNING")
        client.set_tag(run_id, "attempt", str(attempt + 1))
    logger.info("attempt %d of MLflow run %s", attempt + 1, run_id)
    return Run(mlflow.get_tracking_uri(), run_id, str(end_note))


def _earlier_run(note: Path, manifest: "Manifest") -> tuple[str, int] | None:
    """Id and attempt of the run that `note` names, if this server has it and it read the same
    sequences.
    """
    if not note.exists():
        return None

    run_id = json.loads(note.read_text())["run_id"]
    found = find_active(mlflow_client(), run_id)
    if found is None or found.data.tags.get("manifest") != manifest.digest:
        return None
    return run_id, int(found.data.tags.get("attempt", "1"))


def find_active(client: "MlflowClient", run_id: str) -> "MlflowRun | None":
    """The run of this id; None where it was deleted, or the server has never heard of it: it is
    another one, or has an older database.
    """
    from mlflow.exceptions import MlflowException

    try:
        with one_message():
            found = client.get_run(run_id)
    except MlflowException as error:
        if is_absent(error):
            return None
        raise
    return found if found.info.lifecycle_stage == "active" else None


def start_run(
    cfg: RunConfig,
    manifest: "Manifest",
    tags: Mapping[str, str] | None = None,
    parent: Run | None = None,
    drawn: Mapping[str, Any] | None = None,
) -> Run:
    """One run for one training job: params are the flattened configuration, its dataset the
    published sequences.

    A run with a `parent` is shown below it. The whole configuration is its artifact config.yaml;
    params are what the run used of it, and the settings `drawn` for it, which name it.
    """
    import mlflow

    below = {} if parent is None else {"mlflow.parentRunId": parent.run_id}
    counts = {"rows": str(manifest.num_rows), "users": str(manifest.num_users)}
    params = run_params(cfg) | dict(drawn or {})

    client = mlflow_client()
    with one_message():
        experiment = _experiment(client, cfg.tracking.experiment, cfg.tasks)
        if drawn is not None:
            name = name_by_change(cfg.name, {}, drawn)
        elif parent is None and (earlier := _last_of_name(client, experiment, cfg.name)):
            name = name_by_change(cfg.name, earlier, params)
        else:
            name = cfg.name
        run = client.create_run(
            experiment,
            run_name=name,
            tags={
                RUN_NAME: cfg.name,
                "manifest": manifest.digest,
                "mlflow.note.content": describe_run(cfg.model, cfg.tasks, cfg.split, manifest),
                **provenance_tags(),
                **counts,
                **below,
                **(tags or {}),
            },
        )
        run_id = run.info.run_id
        _log_params(client, run_id, params)
        _log_dataset(client, run_id, cfg.sequence_dir, manifest)
        client.log_text(run_id, yaml.safe_dump(config.to_dict(cfg), sort_keys=False), CONFIG)
    return Run(mlflow.get_tracking_uri(), run_id)


def _last_of_name(client: "MlflowClient", experiment: str, name: str) -> Mapping[str, str] | None:
    """Params of the newest run of this configuration's name."""
    quote = '"' if "'" in name else "'"
    wanted = f"tags.{RUN_NAME} = {quote}{name}{quote}"
    found = client.search_runs(
        [experiment], wanted, max_results=1, order_by=["attributes.start_time DESC"]
    )
    return found[0].data.params if found else None


def name_by_change(name: str, earlier: Mapping[str, str], params: Mapping[str, Any]) -> str:
    """The name with what has changed since the run before it: `demo · train.lr=0.01`."""
    changes = []
    for key, value in params.items():
        if earlier.get(allowed_name(key)) != str(value)[:LONGEST_PARAM]:
            changes.append(f"{key}={value}")
    if not changes:
        return f"{name} · again"
    shown = ", ".join(change[:LONGEST_CHANGE] for change in changes[:MOST_CHANGES])
    more = len(changes) - MOST_CHANGES
    return f"{name} · {shown}" + (f" and {more} more" if more > 0 else "")


def run_params(cfg: RunConfig) -> dict[str, Any]:
    """What tells trainings apart: model, split and the settings that are not at their default, at
    most `MOST_PARAMS`. Settings of the server, of checks and of machines say nothing of a training.

    A mapping of columns is one param, in JSON.
    """
    raw, defaults = config.to_dict(cfg), config.to_dict(RunConfig())
    params: dict[str, Any] = {"name": cfg.name, "seed": cfg.seed, "tasks": ", ".join(cfg.tasks)}
    for section in PARAM_SECTIONS:
        if section == "retrieval" and not cfg.retrieval.enabled:
            continue
        for key, value in raw[section].items():
            is_default = value == defaults[section].get(key)
            if value in (None, [], {}) or (is_default and section not in WHOLE_SECTIONS):
                continue
            if key == "synthetic" and cfg.source.kind != "synthetic":
                continue
            params[f"{section}.{key}"] = value

    params["model.num_layers"] = _depths(cfg.model)
    for key, value in params.items():
        if isinstance(value, dict | list):
            params[key] = json.dumps(value)
    return dict(list(params.items())[:MOST_PARAMS])


def _depths(model: ModelConfig) -> str:
    """Number of layers; of a mixture those of each transducer, as `2 + 2`."""
    stacks = [*model.channels.values()] or [model]
    return " + ".join(str(stack.num_layers) for stack in stacks)


def describe_run(
    model: ModelConfig, tasks: Sequence[str], split: SplitConfig, manifest: "Manifest"
) -> str:
    """A sentence or two of Markdown, which MLflow shows above everything else."""
    return (
        f"`{model.encoder}`, {_depths(model)} layers of {model.d_model}, for "
        f"{', '.join(tasks) or 'retrieval'}. {manifest.num_rows:,} rows of "
        f"{manifest.num_users:,} users, trained on rows before {split.t_val}. The whole "
        "configuration is `config.yaml` under Artifacts."
    )


def comparison_run(
    settings: TrackingConfig,
    models: Sequence[str],
    compared: Mapping[str, str | None],
    folder: Path,
) -> Run:
    """A run that holds the files of a comparison, and names the runs that it compares."""
    import mlflow

    client = mlflow_client()
    lines = [f"- {name}: run `{run_id}`" for name, run_id in compared.items()]
    tags = {
        "kind": "comparison",
        "mlflow.note.content": "\n".join(lines),
        **provenance_tags(),
    }
    for name, run_id in compared.items():
        tags[f"compared.{allowed_name(name)}"] = run_id or ""
    with one_message():
        found = client.create_run(
            _experiment(client, settings.experiment), run_name=" | ".join(models), tags=tags
        )
        run = Run(mlflow.get_tracking_uri(), found.info.run_id)
        with run:
            run.log_artifacts(folder)
    return run


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


def _experiment(client: "MlflowClient", name: str, tasks: Sequence[str] = ()) -> str:
    """Id of an experiment, which opens on MLflow's view of trainings, not on that of agents.

    With `tasks` it gets the list of runs with columns for them.
    """
    kind, ours = EXPERIMENT_KIND
    tags = {kind: ours}
    if tasks:
        tags[VIEW_TAG] = view_state(tasks)

    found = client.get_experiment_by_name(name)
    if found is None:
        return client.create_experiment(name, tags=tags)
    for key, value in tags.items():
        if found.tags.get(key) != value:
            client.set_experiment_tag(found.experiment_id, key, value)
    return found.experiment_id


def list_url(settings: TrackingConfig, server: str) -> str:
    """Address of the experiment's list of runs with columns that tell them apart; that of the
    server where there is none yet.
    """
    with one_message():
        found = mlflow_client().get_experiment_by_name(settings.experiment)
    if found is None or VIEW_TAG not in found.tags:
        return server
    return view_url(server, found.experiment_id)


def _log_params(client: "MlflowClient", run_id: str, flat: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(allowed_name(key), str(value)[:LONGEST_PARAM]) for key, value in flat.items()]
    for start in range(0, len(params), PARAMS_PER_REQUEST):
        client.log_batch(run_id, params=params[start : start + PARAMS_PER_REQUEST])


def run_settings(client: "MlflowClient", run_id: str) -> dict[str, Any]:
    """The flattened configuration of a run. A setting that its version did not have stood at its
    default there.

    Raises:
        UserError: the run's configuration is gone.
    """
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            path = client.download_artifacts(run_id, CONFIG, folder)
        except MlflowException as error:
            raise UserError(f"run {run_id} has no {CONFIG} any more: {error}") from error
        saved = yaml.safe_load(Path(path).read_text())
    return config.flatten(config.to_dict(RunConfig())) | config.flatten(saved)


def link_model(run: Run, model_id: str) -> None:
    """Show MLflow's "logged model" as what came out of the run."""
    from mlflow.entities import LoggedModelOutput

    mlflow_client().log_outputs(run.run_id, [LoggedModelOutput(model_id, step=0)])


def allowed_name(key: str) -> str:
    """MLflow takes letters, digits and `_-.: /` in names, which must also be plain paths; a user's
    column may hold more.
    """
    usable = re.sub(r"[^\w\-.: /]", "_", key)
    parts = [part for part in usable.split("/") if part not in ("", ".", "..")]
    return "/".join(parts)


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
