"""Users whose rows are taken in no more, in whatever logs they come: a list of keyed hashes in the
store.

The key lies beside the hashes, so the list does not read as ids and does not match that of another
store, but who has it can try ids one by one: it is as confidential as the store.
"""

import json
import secrets
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.logs.cleaning import mix
from pipeline.sequences import store


@dataclass(frozen=True)
class Forgotten:
    """The users who were forgotten. Nobody, where the store has no list."""

    key: tuple[int, int] = (0, 0)
    hashes: tuple[int, ...] = ()  # ascending

    def has_users(self, user_id: np.ndarray) -> np.ndarray:
        """bool [n]: the ids that are on the list."""
        return np.isin(self._hash(user_id), np.array(self.hashes, np.uint64))

    def _hash(self, user_id: np.ndarray) -> np.ndarray:
        first, second = map(np.uint64, self.key)
        return mix(mix(user_id.astype(np.uint64) ^ first) + second)


def read_forgotten(folder: Path) -> Forgotten:
    """The list of the store in `folder`; nobody, where it has none."""
    try:
        raw = json.loads((folder / store.FORGOTTEN).read_text())
    except FileNotFoundError:
        return Forgotten()
    return Forgotten(tuple(raw["key"]), tuple(raw["hashes"]))


def add_forgotten(folder: Path, user_id: np.ndarray) -> Forgotten:
    """Put these users on the list; the key is drawn with the first of them."""
    old = read_forgotten(folder)
    key = old.key if old.hashes else (secrets.randbits(64), secrets.randbits(64))

    new = Forgotten(key)._hash(user_id).tolist()
    found = Forgotten(key, tuple(sorted({*old.hashes, *new})))
    if found != old:
        store.write_json(folder / store.FORGOTTEN, {"key": found.key, "hashes": found.hashes})
    return found
