"""Users taken out of what models hold of them, their side features by id: in run folders, in the
cache of champions, in the registry. And what else MLflow holds of users is removed.

    features.safetensors without them → artifact.json → index/artifact.json → sha256 tags

A version goes on as the same one: its weights, its number and its alias stay, and the digests that
name the changed files are renewed together. Servers load it anew (`jobs.deploy`).
"""

import json
import tempfile
import typing
from pathlib import Path

import numpy as np

from pipeline.config import UserError
from pipeline.files import folder_digests, sha256_of
from pipeline.sequences.upkeep.readers import CONFIG, has_learned, run_folders
from pipeline.tracking.registry import SHA256_PREFIX, PinnedModel, pinned_model
from pipeline.tracking.runs import RUN_NAME
from pipeline.tracking.server import mlflow_client, one_message

if typing.TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

# Tag of a version while its files are exchanged: the digests that they are going to have. A killed
# job is run again, and takes files of these or of the old ones.
FORGETTING = "forgetting"
REPORT = "validation_report"


# Folders ---------------------------------------------------------------------


def forget_in_folders(run_dir: Path, users: np.ndarray) -> int:
    """Take the users, int64, out of the models and trainings of a run, and of those that were
    trained on its sequences; returns in how many places they were known.
    """
    from pipeline.model.forgetting import FEATURES, forget_in_model

    changed = 0
    for folder in run_folders(run_dir):
        for path in sorted(folder.rglob(FEATURES)):
            changed += forget_in_model(path.parent, users) > 0
    return changed


def forget_in_cache(cache: Path, run: str, users: np.ndarray) -> dict[str, PinnedModel]:
    """Take the users out of cached versions that learned from the sequences of the run.

    Returns, by the old name of a folder that knew them, what it holds now, under its new name.
    """
    from pipeline.model.forgetting import FEATURES, forget_in_model

    renamed = {}
    for path in sorted(cache.glob(f"*/{FEATURES}")):
        folder = path.parent
        if not has_learned(folder, run) or not forget_in_model(folder, users):
            continue

        name, _, _ = folder.name.rpartition("-")
        now = PinnedModel("", name, 0, folder_digests(folder))
        folder.rename(cache / now.folder_name)
        renamed[folder.name] = now
    return renamed


# MLflow ----------------------------------------------------------------------


def forget_in_versions(name: str, run: str, users: np.ndarray) -> list[int]:
    """Take the users out of the versions of a registered model that learned from the sequences of
    the run; returns the numbers of those that knew them.

    Raises:
        UserError: a file of a version is not what its registration recorded.
    """
    client = mlflow_client()
    changed = []
    with one_message():
        for version in client.search_model_versions(f"name = '{name}'"):
            if _forget_in_version(client, version, run, users):
                changed.append(int(version.version))
    return sorted(changed)


def _forget_in_version(
    client: "MlflowClient", version: "ModelVersion", run: str, users: np.ndarray
) -> bool:
    """True where the version knew one of them."""
    from pipeline.model.forgetting import REWRITTEN, knows_users, rewrite_features

    recorded = pinned_model(version).sha256
    assert version.source is not None, "a version that was registered has one"
    model_id = version.source.removeprefix("models:/")  # of MLflow's "logged model"
    intended = json.loads(version.tags.get(FORGETTING, "{}"))
    with tempfile.TemporaryDirectory() as staging:
        folder, place = Path(staging), client.get_logged_model(model_id).artifact_location
        _download(place, folder / "settings", [CONFIG])
        if not has_learned(folder / "settings", run):
            return False

        files = folder / "files"
        names = [one for one in REWRITTEN if one in recorded]
        _download(place, files, names)
        for one in names:
            if sha256_of(files / one) not in (recorded[one], intended.get(one)):
                raise UserError(
                    f"{version.name} version {version.version}: {one} does not have the sha256 "
                    "that its registration recorded; nothing of it was changed"
                )

        if not intended and not knows_users(files, users):
            return False
        rewrite_features(files, users)
        digests = {one: sha256_of(files / one) for one in names}

        number = version.version
        client.set_model_version_tag(version.name, number, FORGETTING, json.dumps(digests))
        client.log_model_artifacts(model_id, str(files))
    for one, digest in digests.items():
        client.set_model_version_tag(version.name, number, f"{SHA256_PREFIX}{one}", digest)
    client.delete_model_version_tag(version.name, number, FORGETTING)
    return True


def _download(artifacts: str, folder: Path, names: list[str]) -> None:
    from mlflow.artifacts import download_artifacts

    for name in names:
        parent = folder / Path(name).parent
        parent.mkdir(parents=True, exist_ok=True)
        download_artifacts(f"{artifacts}/{name}", dst_path=str(parent))


def remove_reports(uri: str, experiment: str, run: str) -> int:
    """Remove the uploaded reports on a run's sequences, which name users and show rows; returns how
    many there were.
    """
    from mlflow.entities import ViewType
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    client = mlflow_client(uri)
    removed = 0
    with one_message():
        found = client.get_experiment_by_name(experiment)
        token = "" if found is not None else None
        while found is not None and token is not None:
            page = client.search_runs(
                [found.experiment_id], "", ViewType.ALL, page_token=token or None
            )
            token = page.token
            for one in page:
                place = one.info.artifact_uri
                if place is None or one.data.tags.get(RUN_NAME) != run:
                    continue
                if client.list_artifacts(one.info.run_id, REPORT):
                    files = get_artifact_repository(place, tracking_uri=uri)
                    files.delete_artifacts(REPORT)
                    removed += 1
    return removed
