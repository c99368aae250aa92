"""Tracking of runs, and the gate before a model version is promoted."""

import re
from dataclasses import dataclass

from pipeline.config.errors import refuse_secrets, require
from pipeline.config.setting import check_ranges, setting


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where runs and versions are kept, and what a version must show to become the champion."""

    uri: str | None = setting(
        None,
        doc="Address of an MLflow server. Null: start one over runs_dir/mlflow on a free port for "
        "the job's time.",
    )
    start_timeout_s: float = setting(
        300.0, above=0, doc="Longest wait for a server of the job's own to start, in seconds."
    )
    experiment: str = setting("ultra-hstu", doc="MLflow experiment that the runs belong to.")
    model_name: str | None = setting(
        None,
        doc="Name of the registered model. Null: one for each source of data, made of its kind and "
        "path; --dry-run shows it.",
    )
    log_predictions: bool = setting(
        False, doc="Upload the predictions of an evaluation, a row per candidate, into its run."
    )
    usage_every_s: float = setting(
        10.0,
        at_least=0,
        doc="Seconds between two samples of what a training worker takes of its machine: CPU, "
        "memory, GPU; more with over 8 workers. 0: none.",
    )
    gate_max_ne: dict[str, float] = setting(
        {}, doc="Task: highest validation NE (normalised entropy) that may be promoted."
    )
    gate_max_regression: float = setting(
        0.002,
        doc="By how much the validation NE, as a mean over tasks, may exceed the champion's.",
    )

    def __post_init__(self) -> None:
        check_ranges(self, "tracking")

        refuse_secrets("tracking.uri", self.uri)
        is_address = self.uri is None or self.uri.startswith(("http://", "https://"))
        require(is_address, "tracking.uri", self.uri, "http://… or https://…, or null")
        named = self.experiment.strip() != ""
        require(named, "tracking.experiment", self.experiment, "a name")
        self._refuse_name_that_mlflow_refuses()

    def _refuse_name_that_mlflow_refuses(self) -> None:
        """MLflow would say so after the training."""
        name = self.model_name
        allowed = name is None or re.fullmatch(r"[\w.-][\w. -]*", name) is not None
        rule = "letters, digits, '.', '_', '-' and spaces, or null"
        require(allowed, "tracking.model_name", name, rule)
