"""The model registry: versions, and the alias `champion`.

    evaluated model, its run → model version → gate → champion → server

All of it is called inside a session, but for `fetch_model`. Nothing that the registry
holds is ever executed: a version is safetensors and JSON, checked against the sha256 of its tags
before it is read.
"""

import hashlib
import json
import logging
import math
import shutil
import tempfile
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from pipeline.config import RunConfig, TrackingConfig, UserError
from pipeline.files import folder_digests, publish_folder_once, sha256_of
from pipeline.tracking.evaluation import split_counts
from pipeline.tracking.gate import (
    BASELINE_PREFIX,
    NE_PREFIX,
    REFIT,
    ROWS,
    Decision,
    ScoredAnew,
    baseline_ne,
    judge_version,
    learned_until,
    row_differences,
    validation_ne,
)
from pipeline.tracking.model_card import render_card
from pipeline.tracking.runs import Run, find_active, link_model, run_settings, start_run
from pipeline.tracking.server import is_absent, mlflow_client, one_message, tracking_uri
from pipeline.version import package_version

if typing.TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

    from pipeline.sequences.store import Manifest

logger = logging.getLogger(__name__)

CHAMPION = "champion"
SHA256_PREFIX = "sha256."  # of tags
SOFTWARE = "software_version"  # of this project, that registered the version
VALIDATED_BY = "validated_by"  # tag: the version that stands for one that was trained with refit
WARNING = "promotion_warning"  # tag: what the gate warned of
WARNING_HEAD = "\n\n**Warning of the gate:** "  # at the end of a description, and what follows
TRAINED_AS = "trained_as"  # tag: the name of the run that trained it
# what --validated-by must have in common ...
FROZEN = ("tasks", "source", "features", "model", "train", "split")
NOT_FROZEN = (  # ... but for these
    "split.refit",
    "source.path",
    "train.epochs",
    "train.validate_every",
    "train.validate_requests",
    "train.best_metric",
    "train.publish",
    "train.patience",
    "train.num_workers",
    "train.log_every",
)


@dataclass(frozen=True, slots=True)
class PinnedModel:
    """A registry version by number, with what its files must hash to: all replicas load the same
    thing.
    """

    uri: str
    name: str
    version: int
    sha256: dict[str, str]  # file name -> hex digest
    trained_as: str = ""  # the name of the run that trained it

    @property
    def folder_name(self) -> str:
        """Name of its folder in a cache, by content: a version of another registry, or of one that
        began anew, may bear the same number.
        """
        content = json.dumps(self.sha256, sort_keys=True)
        return f"{self.name}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


@dataclass(frozen=True, slots=True)
class RowsAtHand:
    """Validation rows that the gate can score a version on, where its figures are of others."""

    tags: Mapping[str, str]  # as `gate.ROWS`: which rows these are
    score: Callable[[Path], Mapping[str, float]]  # model folder -> NE by task


@dataclass(frozen=True, slots=True)
class VersionScorer:
    """Scores registered versions on the rows at hand."""

    rows: RowsAtHand
    cache: Path  # where the versions' files are kept

    def score_version(self, version: "ModelVersion") -> Mapping[str, float]:
        """NE by task.

        Raises:
            UserError: the version cannot be scored on these rows.
        """
        return self.rows.score(fetch_model(pinned_model(version), self.cache))


def register_model(cfg: RunConfig, run: Run, model_dir: Path, *, same_as: int | None = None) -> int:
    """Make the evaluated model in `model_dir` a new version; returns its number.

    Its metrics.json goes into the run as well. The index of its items is built now, and is part of
    the version.

    Args:
        same_as: a version of the very model, which was validated on other rows perhaps than the
            run has read: what the gate reads of that one holds for the new one too.

    Raises:
        UserError: the model has not been evaluated, or its items cannot be indexed.
    """
    from pipeline.batches.stored import StoredUsers
    from pipeline.index.folder import build_index

    metrics = _read_metrics(model_dir)
    if cfg.index.enabled:
        stored = StoredUsers(cfg.sequence_dir, cfg.source, cfg.features)
        build_index(cfg.index, stored, cfg.split.train_end_ms, model_dir)
    client, name = mlflow_client(), cfg.model_name
    with one_message(), tempfile.TemporaryDirectory() as staging:
        # the files, with a card
        folder = Path(shutil.copytree(model_dir, Path(staging) / "model"))
        card = render_card(cfg, folder, metrics, run.run_id)
        (folder / "README.md").write_text(card)

        made_by = client.get_run(run.run_id)
        tags = _version_tags(folder, metrics) | {
            "manifest": made_by.data.tags["manifest"],
            TRAINED_AS: cfg.name,
        }
        if same_as is not None:
            tags |= _validation_tags(_version(client, name, same_as))

        # into the run, as MLflow's "logged model"
        model = client.create_logged_model(made_by.info.experiment_id, cfg.name, run.run_id)
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")
        link_model(run, model.model_id)
        numbers, _ = split_counts(metrics)
        run.log_metrics(numbers, _last_step(folder), model.model_id)

        # and into the registry
        _ensure_registered(client, name)
        version = client.create_model_version(
            name,
            f"models:/{model.model_id}",
            run.run_id,
            tags,
            description=card,
            model_id=model.model_id,
            await_creation_for=0,  # it is there when the server answers
        )
    return int(version.version)


def _version_tags(folder: Path, metrics: Mapping[str, float]) -> dict[str, str]:
    """Digests of the files and our version as tags, and the figures that the gate judges."""
    digests = folder_digests(folder)
    tags = {f"{SHA256_PREFIX}{name}": digest for name, digest in digests.items()}
    tags[SOFTWARE] = package_version()
    split = json.loads((folder / "config.json").read_text())["split"]
    tags |= {"split.t_val": str(split["t_val"]), "split.t_test": str(split["t_test"])}
    if trained_on_validation(folder):
        # its validation NE is of rows that it has learned: nothing to judge by
        return tags | {REFIT: "true"}

    for key, value in metrics.items():
        if key.startswith((NE_PREFIX, BASELINE_PREFIX)):
            tags[key] = repr(value)
    return tags


def _validation_tags(version: "ModelVersion") -> dict[str, str]:
    """Who trained the version, and what its validation showed on which rows."""
    named = (*ROWS, REFIT, VALIDATED_BY, TRAINED_AS)
    found = {}
    for key, value in version.tags.items():
        if key in named or key.startswith((NE_PREFIX, BASELINE_PREFIX)):
            found[key] = value
    return found


def _last_step(folder: Path) -> int:
    """The optimizer step that the model is of: where its metrics stand beside the losses."""
    from pipeline.model.artifact import INDEX

    return int(json.loads((folder / INDEX).read_text())["extra"].get("steps", 0))


def require_evaluated(model_dir: Path) -> None:
    """Go on only if the model in `model_dir` could be registered.

    Raises:
        UserError: there is none, it is not whole, or it has not been evaluated.
    """
    from pipeline.model.artifact import verified

    verified(model_dir, "model")
    _read_metrics(model_dir)


def register_trained(cfg: RunConfig) -> int:
    """The version of the model that the run of `cfg` trained and evaluated, registered unless it is
    already.

    Raises:
        UserError: there is no whole, evaluated model.
    """
    from pipeline.model.artifact import INDEX, verified
    from pipeline.sequences.store import read_manifest

    run_id = verified(cfg.model_dir, "model")["extra"].get("mlflow_run_id")
    tag, digest = f"{SHA256_PREFIX}{INDEX}", sha256_of(cfg.model_dir / INDEX)
    with one_message():
        for found in mlflow_client().search_model_versions(f"name = '{cfg.model_name}'"):
            if found.tags.get(tag) == digest:
                return int(found.version)
    if run_id is not None:
        import mlflow

        if find_active(mlflow_client(), run_id) is not None:
            return register_model(cfg, Run(mlflow.get_tracking_uri(), run_id), cfg.model_dir)
        logger.warning(
            "the model's MLflow run %s is not on this server: it is registered with a new one",
            run_id,
        )
    # it was trained without tracking, or its run is gone
    with start_run(cfg, read_manifest(cfg.sequence_dir)) as run:
        return register_model(cfg, run, cfg.model_dir)


def trained_on_validation(model_dir: Path) -> bool:
    return json.loads((model_dir / "config.json").read_text())["split"]["refit"]


def promote_version(
    settings: TrackingConfig,
    name: str,
    tasks: Sequence[str],
    version: int | None = None,
    validated_by: int | None = None,
    *,
    scorer: VersionScorer | None = None,
    force_first: bool = False,
) -> Decision:
    """Move the alias `champion` to `version` (None: the newest) if its validation NE passes the
    gate; say why.

    The reason stays on the version as a tag. What the gate warns of is logged, and stands in a tag
    and at the end of the version's description.

    Args:
        validated_by: for a version trained with `split.refit`, one of the same settings trained
            without it: its validation NE is judged, and stays with `version` for the challengers to
            come.
        scorer: scores the champion, and the challenger too where the rows at hand are not its
            own, if the figures of the two are of different rows.
        force_first: a first champion need not beat the item's smoothed rate.

    Raises:
        UserError: no such version, or `validated_by` cannot stand for it.
    """
    client = mlflow_client()
    with one_message():
        challenger = _version(client, name, version)
        champion = _champion(client, name)
        if champion is not None and champion.version == challenger.version:
            return Decision(True, f"version {challenger.version} is the champion already")

        if validated_by is not None:
            challenger = _validated(client, challenger, _version(client, name, validated_by))
        decision = _judged(settings, tasks, challenger, champion, scorer, force_first)

        # scoring takes minutes, in which somebody else may promote or roll back
        while decision.promoted and not _is_same(now := _champion(client, name), champion):
            logger.info("the champion has changed meanwhile: the gate looks once more")
            champion = now
            decision = _judged(settings, tasks, challenger, champion, scorer, force_first)

        client.set_model_version_tag(name, challenger.version, "promotion", decision.reason)
        _show_warning(client, name, challenger.version, decision.warning)
        if decision.promoted:
            previous = "" if champion is None else champion.version
            client.set_model_version_tag(name, challenger.version, "previous_champion", previous)
            client.set_registered_model_alias(name, CHAMPION, challenger.version)
    return decision


def _show_warning(client: "MlflowClient", name: str, version: str, warning: str) -> None:
    """Log it, and leave it with the version for whoever looks there; "" takes away an older one."""
    found = client.get_model_version(name, version)
    if not warning and WARNING not in found.tags:
        return

    card, _, _ = (found.description or "").partition(WARNING_HEAD)
    if warning:
        logger.warning("version %s: %s", version, warning)
        card += f"{WARNING_HEAD}{warning}.\n"
    client.set_model_version_tag(name, version, WARNING, warning)
    client.update_model_version(name, version, card)


def _is_same(one: "ModelVersion | None", other: "ModelVersion | None") -> bool:
    """True of two looks at one version, or at none."""
    if one is None or other is None:
        return one is other
    return one.version == other.version


def _judged(
    settings: TrackingConfig,
    tasks: Sequence[str],
    challenger: "ModelVersion",
    champion: "ModelVersion | None",
    scorer: VersionScorer | None,
    force_first: bool,
) -> Decision:
    """The gate's decision. Where the figures of the two are of different rows, the champion is
    scored on the challenger's rows, or both on the rows at hand.
    """
    anew = None
    differences = "" if champion is None else row_differences(challenger, champion)
    if champion is not None and differences and scorer is not None:
        rows = scorer.rows
        are_challengers = all(rows.tags[tag] == challenger.tags.get(tag) for tag in ROWS)
        if not are_challengers:
            refusal = _refuse_learned(challenger, rows)
            if refusal is not None:
                return Decision(False, f"refused: {differences}; {refusal}")

        try:
            anew = ScoredAnew(scorer.score_version(champion))
        except UserError as error:
            whose = f"champion {champion.version}, trained as {_trained_as(champion)}"
            return Decision(
                False,
                f"refused: {whose}, cannot be scored on the rows of version "
                f"{challenger.version}: {error}",
            )
        if not are_challengers:
            anew = replace(anew, challenger=scorer.score_version(challenger))

    return judge_version(
        settings,
        tasks,
        challenger,
        champion,
        anew=anew,
        force_first=force_first,
    )


def _refuse_learned(challenger: "ModelVersion", rows: RowsAtHand) -> str | None:
    """Why the rows at hand, which are not those that the challenger was validated on, cannot judge
    it; None where they can: it has learned none of them.
    """
    if not rows.tags["manifest"]:
        return "there are no sequences at hand to score both on"

    until, begin = learned_until(challenger), rows.tags["split.t_val"]
    if until is None or until > datetime.fromisoformat(begin):
        return (
            f"and those at hand, from split.t_val {begin} on, may be among those that version "
            f"{challenger.version} has learned: set split.t_val to the end of its training or later"
        )
    return None


def _trained_as(version: "ModelVersion") -> str:
    return version.tags.get(TRAINED_AS, "another run")


def _validated(
    client: "MlflowClient", refit: "ModelVersion", other: "ModelVersion"
) -> "ModelVersion":
    """`refit` with the validation NE of `other`, as tags."""
    if REFIT not in refit.tags or REFIT in other.tags:
        raise UserError(
            "--validated-by takes a version trained without split.refit, for one trained with "
            f"it: got {other.version} for {refit.version}"
        )
    one, two = (run_settings(client, str(version.run_id)) for version in (refit, other))
    for key in sorted(one.keys() | two.keys()):
        compared = key.split(".")[0] in FROZEN and key not in NOT_FROZEN
        if compared and one.get(key) != two.get(key):
            raise UserError(
                f"--validated-by {other.version}: it was trained with {key} = {two.get(key)}, "
                f"version {refit.version} with {one.get(key)}"
            )

    name, number = refit.name, refit.version
    figures = {NE_PREFIX: validation_ne(other), BASELINE_PREFIX: baseline_ne(other)}
    for prefix, by_task in figures.items():
        for task, value in by_task.items():
            client.set_model_version_tag(name, number, f"{prefix}{task}", repr(value))
    client.set_model_version_tag(name, number, VALIDATED_BY, other.version)
    return client.get_model_version(name, number)


def roll_back(name: str) -> int:
    """Move `champion` back to the version that it stood on before; returns its number.

    Raises:
        UserError: there is no champion, none before it, or that one was deleted.
    """
    client = mlflow_client()
    with one_message():
        champion = _require_champion(client, name)
        previous = champion.tags.get("previous_champion")
        if not previous:
            raise UserError(
                f"{name} version {champion.version} is the first champion: nothing to roll back to"
            )
        _version(client, name, int(previous))  # it may have been deleted meanwhile
        client.set_registered_model_alias(name, CHAMPION, previous)
        client.set_model_version_tag(
            name, champion.version, "promotion", f"rolled back to version {previous}"
        )
    return int(previous)


def find_champion(name: str) -> PinnedModel:
    """The alias, resolved to a number once: from here on nothing moves under the caller's feet.

    Raises:
        UserError: no version is the champion.
    """
    with one_message():
        return pinned_model(_require_champion(mlflow_client(), name))


def find_version(name: str, version: int) -> PinnedModel:
    """A registered version by its number.

    Raises:
        UserError: there is none of that number.
    """
    with one_message():
        return pinned_model(_version(mlflow_client(), name, version))


def pinned_model(found: "ModelVersion") -> PinnedModel:
    """A version as all servers load it."""
    import mlflow

    sha256 = {}
    for key, value in found.tags.items():
        if key.startswith(SHA256_PREFIX):
            sha256[key.removeprefix(SHA256_PREFIX)] = value
    uri, number = mlflow.get_tracking_uri(), int(found.version)
    return PinnedModel(uri, found.name, number, sha256, _trained_as(found))


def fetch_model(model: PinnedModel, cache: Path) -> Path:
    """The files of a pinned version, from `cache` or the registry, each equal to its sha256.

    Raises:
        UserError: a file is missing, changed or not listed.
    """
    folder = cache / model.folder_name
    if not folder.exists():
        from mlflow.artifacts import download_artifacts

        cache.mkdir(parents=True, exist_ok=True)
        with (
            tracking_uri(model.uri),
            one_message(),
            tempfile.TemporaryDirectory(dir=cache) as staging,
        ):
            found = Path(
                download_artifacts(f"models:/{model.name}/{model.version}", dst_path=staging)
            )
            # MLflow's own note beside the files
            (found / "registered_model_meta").unlink(missing_ok=True)
            _check(found, model)
            publish_folder_once(found, folder)  # another replica may be faster
    _check(folder, model)
    return folder


def require_fit(folder: Path, model: PinnedModel, manifest: "Manifest") -> None:
    """Refuse the version at `folder` where it reads events of another kind than the sequences hold.

    Raises:
        UserError: names whose version it is, and what differs.
    """
    source = json.loads((folder / "config.json").read_text())["source"]
    wanted = {
        "source.actions": list(manifest.actions),
        "source.request_columns": list(manifest.request_columns),
    }
    for key, here in wanted.items():
        there = list(source[key.removeprefix("source.")])
        if there != here:
            raise UserError(
                f"{model.name} version {model.version} is of runs/{model.trained_as or '?'} and "
                f"does not fit these sequences: its {key} are {there}, theirs {here}; "
                "tracking.model_name of another name keeps the two apart"
            )


def _check(folder: Path, model: PinnedModel) -> None:
    found = folder_digests(folder)
    wrong = sorted(
        name
        for name in found.keys() | model.sha256.keys()
        if found.get(name) != model.sha256.get(name)
    )
    if wrong or not model.sha256:
        raise UserError(
            f"{model.name} version {model.version}: {', '.join(wrong) or 'no file'} in {folder} "
            "does not have the "
            "sha256 that its registration recorded; nothing was loaded"
        )


def _read_metrics(model_dir: Path) -> dict[str, float]:
    try:
        found = json.loads((model_dir / "metrics.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise UserError(
            f"{model_dir} holds no metrics.json of an evaluation ({error}): run jobs.evaluate first"
        ) from None
    return {key: math.nan if value is None else value for key, value in found.items()}


def _ensure_registered(client: "MlflowClient", name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _version(client: "MlflowClient", name: str, version: int | None) -> "ModelVersion":
    from mlflow.exceptions import MlflowException

    if version is None:
        found = client.search_model_versions(f"name = '{name}'")
        if not found:
            raise UserError(f"no version of {name} is registered: train one first")
        version = max(int(entry.version) for entry in found)
    try:
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        if is_absent(error):
            raise UserError(f"{name} has no version {version}") from None
        raise


def _champion(client: "MlflowClient", name: str) -> "ModelVersion | None":
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version_by_alias(name, CHAMPION)
    except MlflowException as error:
        if is_absent(error):
            return None
        raise


def _require_champion(client: "MlflowClient", name: str) -> "ModelVersion":
    found = _champion(client, name)
    if found is None:
        raise UserError(
            f"no champion: no version of {name} has the alias {CHAMPION!r}; promote one first "
            "(jobs.promote)"
        )
    return found
