"""What the NE of a point is made of, user by user: with it a bootstrap over users needs no
predictions, and a point can be carried from another machine as a few kilobytes.

users.json     rows, positives and loss of each user, beside point.json
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from pipeline.evaluate.metrics import log_loss
from pipeline.files import json_text, write_atomically

USERS = "users.json"
DIGITS = 6  # of a loss, behind the point


@dataclass(frozen=True, slots=True)
class UserSums:
    """By user in the order of their ids, float64 [U] each."""

    rows: np.ndarray
    positives: np.ndarray
    loss: np.ndarray  # nats, summed over the user's rows

    def entropies(self, weights: np.ndarray) -> np.ndarray:
        """NE with each user as often as `weights`, float64 [S, U], says: float64 [S]."""
        rows = weights @ self.rows
        rate = weights @ self.positives / rows
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy = -(rate * np.log(rate) + (1 - rate) * np.log1p(-rate))
        return weights @ self.loss / rows / entropy

    def has_same_rows(self, other: "UserSums") -> bool:
        """True where both are of the same users, rows and labels."""
        same_rows = np.array_equal(self.rows, other.rows)
        return same_rows and np.array_equal(self.positives, other.positives)


def user_sums(predictions: pa.Table, task: str) -> UserSums:
    """Of the rows whose label is known."""
    known = predictions.filter(predictions[f"label.{task}"].is_valid())
    labels = known[f"label.{task}"].to_numpy() > 0
    losses = log_loss(known[f"logit.{task}"].to_numpy().astype(np.float64), labels)
    ids = known["user_id"].combine_chunks().dictionary_encode()
    _, user = np.unique(ids.dictionary.to_numpy(zero_copy_only=False), return_inverse=True)
    user = user[ids.indices.to_numpy()]
    return UserSums(
        np.bincount(user).astype(float), np.bincount(user, labels), np.bincount(user, losses)
    )


def write_users(folder: Path, sums: UserSums) -> None:
    facts = {
        "rows": sums.rows.astype(int).tolist(),
        "positives": sums.positives.astype(int).tolist(),
        "loss": sums.loss.round(DIGITS).tolist(),
    }
    write_atomically(folder / USERS, json_text(facts))


def read_users(folder: Path) -> UserSums:
    facts = json.loads((folder / USERS).read_text())
    return UserSums(*(np.array(facts[key], float) for key in ("rows", "positives", "loss")))
