"""Ray Tune over the trials of a search: as many at once as the cluster has room for, the worse ones
ended early by ASHA (arXiv:1810.05934).

Tune's own state is thrown away with each start: its scheduler would come back without what it had
seen. The trials' files say where each stands, and reporting from them fills the scheduler again.
"""

import logging
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray import tune
from ray.tune.schedulers import ASHAScheduler

from pipeline import config
from pipeline.batches.features import fit_features
from pipeline.cluster import ray_cluster
from pipeline.config import RunConfig, TrainConfig, UserError
from pipeline.model.encoders import check_run
from pipeline.search.begun import hold_to_beginning
from pipeline.search.page import write_search_page
from pipeline.search.results import TrialResult, read_results, write_figures, write_preset
from pipeline.search.space import SearchConfig, SearchSpace, Trial, search_config, search_name
from pipeline.search.trial import (
    ENDED_EARLY,
    FINISHED,
    objective,
    read_outcome,
    shares_features,
    train_trial,
    write_outcome,
)
from pipeline.sequences import store
from pipeline.tracking import Run
from pipeline.train.periods import check_periods
from pipeline.train.supervision import refuse_impossible_size

logger = logging.getLogger(__name__)

VALUE, EPOCHS = "value", "epochs"  # of a result
SEARCH, PRESET = "search.json", "best.yaml"  # in the search's folder
FILES = ("search.html", "scatter.png", "parallel_coordinates.png", "trials.json", PRESET)
# in the search's record: what trials are made of
RECORDED = ("seed", "source", "split", "tasks", "examples", "features", "model", "retrieval")


def check_search(base: RunConfig, trials: Sequence[Trial]) -> None:
    """Tell what would end all trials, or one of them, before any of them starts.

    Raises:
        UserError: no sequences, no validation to search by, a setting that an encoder does not
        know, or no room for a trial.
    """
    if base.split.refit:
        raise UserError("split.refit leaves no validation period to search by")
    if not base.tasks:
        raise UserError("tasks: []: a search goes by the validation of tasks, and there are none")
    if base.train.init == "champion":
        raise UserError("train.init: a search begins with random weights, got champion")

    for trial in trials:
        own = trial.cfg
        try:
            check_run(own.model, own.train, retrieval=own.retrieval.enabled)
        except UserError as error:
            raise UserError(f"space: {trial.settings} is refused: {error}") from None
    refuse_impossible_size(base.ray, replace(base.train, num_workers=1))
    store.read_manifest(trials[0].cfg.sequence_dir)


def trial_resources(train: TrainConfig, trials_per_gpu: int = 1) -> dict[str, float]:
    """CPUs and GPUs that Ray Tune keeps for each trial.

        threads_per_worker 2, use_gpu, 4 trials a GPU      cpu 2, gpu 0.25

    Raises:
        UserError: trials cannot share a GPU so.
    """
    if trials_per_gpu < 1:
        raise UserError(f"--trials-per-gpu must be 1 or more, got {trials_per_gpu}")
    if trials_per_gpu > 1 and not train.use_gpu:
        raise UserError(
            f"--trials-per-gpu {trials_per_gpu}: trials train without a GPU, set train.use_gpu=true"
        )
    gpus = 1 / trials_per_gpu if train.use_gpu else 0.0
    return {"cpu": float(train.threads_per_worker), "gpu": gpus}


def open_search(base: RunConfig, space: SearchSpace, trials: Sequence[Trial]) -> None:
    """Make the search's folder, or hold what an earlier start left there against this one.

    Raises:
        UserError: the search of this name began with another space, other settings or sequences.
    """
    settings = config.to_dict(base)
    facts = {"sequences": store.read_manifest(trials[0].cfg.sequence_dir).digest}
    facts |= config.flatten(space.as_figures())
    facts |= config.flatten({key: settings[key] for key in RECORDED})

    whole = f"the search {search_name(base.name)}"
    own = search_config(base)
    hold_to_beginning(own.run_dir / SEARCH, facts, whole, str(own.sequences.from_run))


def forget_search(folder: Path) -> None:
    """Remove the search's folder, and those of its trials beside it."""
    for path in folder.parent.glob(f"{folder.name}-[0-9]*"):
        shutil.rmtree(path)
    shutil.rmtree(folder, ignore_errors=True)


def run_search(
    base: RunConfig,
    space: SearchSpace,
    trials: Sequence[Trial],
    resources: Mapping[str, float],
    callbacks: Sequence[tune.Callback] = (),
) -> list[TrialResult]:
    """Run what is left of the trials, on the cluster of `ray`, each with its `resources`; their
    results, best first.

    The search's folder gets its page, figures, and the best as a preset where there is one.

    Raises:
        UserError: nothing to train on, or no validation rows.
        Outage: no cluster.
    """
    failed: dict[str, str] = {}
    if any(read_outcome(trial.cfg.run_dir) is None for trial in trials):
        with ray_cluster(base.ray, runs_dir=base.runs_dir):
            failed = run_trials(base, space.search, trials, resources, callbacks)

    folder = search_config(base).run_dir
    found = read_results(trials, failed)
    write_figures(found, folder / "trials.json")
    write_search_page(folder, folder.name, space.draws, found)
    if found[0].status == FINISHED:
        write_preset(found[0], folder / PRESET, base.runs_dir, base.train.num_workers)
    return found


def run_trials(
    base: RunConfig,
    search: SearchConfig,
    trials: Sequence[Trial],
    resources: Mapping[str, float],
    callbacks: Sequence[tune.Callback] = (),
) -> dict[str, str]:
    """Run the trials to their ends; inside `ray_cluster`. Returns the error of each that failed, by
    its name.

    Raises:
        UserError: nothing to train on, or no validation rows.
    """
    folder = search_config(base).run_dir
    first = trials[0].cfg
    check_periods(first.sequence_dir, first.split, first.tasks, validates=True)
    if any(shares_features(trial.cfg, base) for trial in trials):
        fit_features(first).save(folder)

    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # Ctrl-C is the job's to handle
    shutil.rmtree(folder / "ray", ignore_errors=True)

    absolute = replace(base, runs_dir=str(base.run_dir.parent))
    common = {"base": config.to_dict(absolute), "folder": str(folder)}
    runnable = tune.with_resources(tune.with_parameters(_run_trial, common=common), dict(resources))
    tuner = tune.Tuner(
        runnable,
        param_space={"trial": tune.grid_search([_as_config(trial) for trial in trials])},
        tune_config=tune.TuneConfig(
            scheduler=make_scheduler(base.train.best_metric, search, trials),
            trial_name_creator=_trial_name,
            trial_dirname_creator=_trial_name,
        ),
        run_config=tune.RunConfig(
            name="ray",
            storage_path=str(folder),
            callbacks=[NoteEnds(trials), *callbacks],
            failure_config=tune.FailureConfig(max_failures=base.train.max_failures),
            verbose=0,
        ),
    )

    failed = {}
    for result in tuner.fit():
        if result.error is not None and result.config is not None:
            failed[result.config["trial"]["name"]] = _last_line(result.error)
    return failed


def make_scheduler(
    best_metric: str, search: SearchConfig, trials: Sequence[Trial]
) -> ASHAScheduler:
    """ASHA in epochs: trials may differ in their steps."""
    epochs = max(trial.cfg.train.epochs for trial in trials)
    return ASHAScheduler(
        time_attr=EPOCHS,
        metric=VALUE,
        mode="min" if best_metric == "ne" else "max",
        max_t=epochs,
        grace_period=search.first_share * epochs,  # pyright: ignore[reportArgumentType]
        reduction_factor=search.keep_one_in,
        stop_last_trials=False,  # the last step is followed by a checkpoint and the model
    )


def _as_config(trial: Trial) -> dict[str, Any]:
    return {"name": trial.name, "settings": trial.settings, "cfg": config.to_dict(trial.cfg)}


def _trial_name(trial: Any) -> str:
    return trial.config["trial"]["name"]


def _run_trial(drawn: dict[str, Any], common: dict[str, Any]) -> None:
    """One trial, in a process of its own, which ends here where the scheduler ends it."""
    name = drawn["trial"]["name"]
    form = f"%(asctime)s {name} %(message)s"
    logging.basicConfig(level=logging.INFO, format=form, datefmt="%H:%M:%S")
    base = config.from_dict(common["base"])
    cfg = replace(config.from_dict(drawn["trial"]["cfg"]), runs_dir=base.runs_dir)
    shared = Path(common["folder"]) if shares_features(cfg, base) else None

    def report(epochs: float, value: float) -> None:
        tune.report({EPOCHS: epochs, VALUE: value, "metric": objective(cfg.train.best_metric)})

    train_trial(cfg, drawn["trial"]["settings"], report, shared)


def log_search(parent: Run, results: Sequence[TrialResult], folder: Path) -> None:
    """The search's files into its own run, with what the best trial came to."""
    best = results[0]
    if math.isfinite(best.value):
        parent.log_metrics({f"best/{objective(best.trial.cfg.train.best_metric)}": best.value}, 0)
    counts = Counter(result.status for result in results)
    tags = {f"trials.{status}": str(count) for status, count in counts.items()}
    parent.set_tags(tags | {"best_trial": best.trial.name, "kind": "search"})
    for name in FILES:
        if (folder / name).exists():
            parent.log_artifacts(folder / name)


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


class NoteEnds(tune.Callback):
    """Notes in a trial's files that the scheduler has ended it: it will not go on."""

    def __init__(self, trials: Sequence[Trial]) -> None:
        self.trials = {trial.name: trial for trial in trials}

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        cfg = self.trials[_trial_name(trial)].cfg
        if read_outcome(cfg.run_dir) is None:
            write_outcome(cfg.run_dir, ENDED_EARLY)
