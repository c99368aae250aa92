"""Users taken out of models: what is known of them by id in `features.safetensors`, and the digests
of the files that name it.

    features.safetensors   rows of user_ids and user_codes removed
    artifact.json          its digest of features.safetensors
    index/artifact.json    its digest of artifact.json

To the model such a user is one that it has never seen: code 0 of every side feature. Its weights
stay as they are.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from pipeline.files import hidden_beside, publish_file, sha256_of, staged_folder, write_atomically
from pipeline.model.artifact import INDEX

FEATURES = "features.safetensors"
OF_INDEX = f"index/{INDEX}"
REWRITTEN = (FEATURES, INDEX, OF_INDEX)  # the files of a model that may change


def knows_users(folder: Path, users: np.ndarray) -> int:
    """How many of the users, int64, the feature maps in a folder know."""
    known = load_file(folder / FEATURES)["user_ids"]
    return int(np.isin(known, users).sum())


def forget_in_model(folder: Path, users: np.ndarray, target: Path | None = None) -> int:
    """Take the users out of the model at `folder`, in one step; returns how many it knew.

    With `target` the model gets that name, and the one at `folder` is gone.
    """
    known = knows_users(folder, users)
    if not known:
        return 0

    target = target or folder
    with staged_folder(target) as stage:
        shutil.copytree(folder, stage, copy_function=_link_or_copy, dirs_exist_ok=True)
        rewrite_features(stage, users)
    if target != folder:
        shutil.rmtree(folder)
    return known


def rewrite_features(folder: Path, users: np.ndarray) -> None:
    """Take the users out of the feature maps in a folder, and renew the digests that name the file.

    A folder of a training has no digests.
    """
    arrays = load_file(folder / FEATURES)
    kept = ~np.isin(arrays["user_ids"], users)
    arrays["user_ids"] = arrays["user_ids"][kept]
    # row 0 is that of users who are not known
    codes = arrays["user_codes"]
    arrays["user_codes"] = np.concatenate([codes[:1], codes[1:][kept]])
    with hidden_beside(folder / FEATURES) as stage:
        save_file(arrays, stage)
        publish_file(stage, folder / FEATURES)

    if not (folder / INDEX).exists():
        return
    facts = json.loads((folder / INDEX).read_text())
    facts["files"][FEATURES] = sha256_of(folder / FEATURES)
    write_atomically(folder / INDEX, json.dumps(facts, indent=2))

    if not (folder / OF_INDEX).exists():
        return
    facts = json.loads((folder / OF_INDEX).read_text())
    facts["extra"]["model"] = sha256_of(folder / INDEX)
    write_atomically(folder / OF_INDEX, json.dumps(facts, indent=2))


def _link_or_copy(source: str, target: str) -> None:
    """A second name for the same bytes, where the file system has such; files are replaced and
    never written to.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
