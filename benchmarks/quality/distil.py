"""An ensemble distilled into one model: what several seeds think of the training rows takes part in
the labels of another training.

    model of one seed → `score_training` → <teacher>.parquet ┐
                      … of all seeds → `Teacher`, their mean ┴→ `TaughtLoader` → `loop.train`

The log loss is linear in the label, so that a mix of label and teacher in its place is the mix of
both losses (Hinton et al., arXiv:1503.02531, at a temperature of 1). The teachers have seen the
rows and their labels themselves: what they add is what seeds agree on.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.events import ranges
from pipeline.batches.features import FeatureMaps
from pipeline.batches.loader import Share, TrainLoader
from pipeline.batches.steps import StepPlan
from pipeline.config import RunConfig, UserError
from pipeline.files import staged_file
from pipeline.model.ranker import RankingModel


def candidate_places(share: Share) -> tuple[np.ndarray, np.ndarray]:
    """User id and number in the user's whole sequence of each candidate, int64 [C] each: together
    they name a row.
    """
    examples, users = share.examples, share.users
    rows, offsets = ranges(examples.target_begin, examples.target_end)
    user = np.repeat(examples.user, np.diff(offsets))
    return users.user_id[user], users.events.position[rows]


@torch.no_grad()
def score_training(
    model: RankingModel, loader: TrainLoader, tasks: Sequence[str], device: str
) -> pa.Table:
    """What a trained model, in evaluation mode, thinks of every training candidate as its passes
    show it: `user_id`, `position`, and per task `score.<task>` in 0..1; by user and position.
    """
    users, positions, scores = [], [], []
    for share in loader.epoch_shares(0):
        batch = loader.share_batch(share).to(device)
        user, position = candidate_places(share)
        users.append(user)
        positions.append(position)
        scores.append(model(batch).sigmoid().float().cpu().numpy())

    user, position, score = map(np.concatenate, (users, positions, scores))
    order = np.lexsort((position, user))
    columns = {"user_id": user[order], "position": position[order]}
    for i, task in enumerate(tasks):
        columns[f"score.{task}"] = score[order, i]
    return pa.table(columns)


def write_scores(table: pa.Table, path: Path) -> None:
    """Write a teacher's scores; the file is there whole or not at all."""
    with staged_file(path) as stage:
        pq.write_table(table, stage)


@dataclass(frozen=True)
class Teacher:
    """Mean scores of the training rows. A row's key is its user's place in `user_id`, times
    `width`, and its position.
    """

    user_id: np.ndarray  # int64 [users], ascending
    width: int  # above every position
    keys: np.ndarray  # int64 [rows], ascending
    scores: np.ndarray  # float32 [rows, tasks]

    @staticmethod
    def of(paths: Sequence[Path], tasks: Sequence[str]) -> "Teacher":
        """The mean of several teachers' probabilities.

        Raises:
            UserError: they scored other rows.
        """
        total = None
        for path in paths:
            table = pq.read_table(path)
            user, position = table["user_id"].to_numpy(), table["position"].to_numpy()
            score = np.stack([table[f"score.{task}"].to_numpy() for task in tasks], axis=1)
            if total is None:
                first_user, first_position = user, position
                total = np.zeros(score.shape)
            same = np.array_equal(user, first_user) and np.array_equal(position, first_position)
            if not same:
                raise UserError(f"teacher {path}: it scored other rows than {paths[0]}")
            total += score

        if total is None:
            raise UserError("teachers: none to take a mean of")
        known, place = np.unique(first_user, return_inverse=True)
        width = int(first_position.max(initial=0)) + 1
        mean = (total / len(paths)).astype(np.float32)
        return Teacher(known, width, place * width + first_position, mean)

    def scores_of(self, user_id: np.ndarray, position: np.ndarray) -> np.ndarray:
        """float32 [n, tasks] of these rows.

        Raises:
            UserError: a row is not among the teacher's.
        """
        user = np.searchsorted(self.user_id, user_id).clip(0, len(self.user_id) - 1)
        key = user * self.width + position
        row = np.searchsorted(self.keys, key).clip(0, len(self.keys) - 1)

        found = (self.user_id[user] == user_id) & (self.keys[row] == key) & (position < self.width)
        if not found.all():
            raise UserError(
                f"teacher: {(~found).sum()} of {len(found)} training rows were not scored by it: "
                "it needs the same sequences, split and history_label_weight"
            )
        return self.scores[row]


class TaughtLoader(TrainLoader):
    """A loader whose labels are (1 - weight) · label + weight · teacher. Of rows whose label is not
    known the teacher's is taken whole, and counts `unknown` times a known one; 0 leaves them out.

    label      1    0    ?
    teacher   .6   .2   .3      weight 0.5, unknown 0.25
    taught    .8   .1   .3
    counts     1    1  .25
    """

    def __init__(
        self,
        cfg: RunConfig,
        maps: FeatureMaps,
        plan: StepPlan,
        teacher: Teacher,
        weight: float,
        unknown: float = 0.0,
    ) -> None:
        super().__init__(cfg, maps, plan)
        self.teacher, self.weight, self.unknown = teacher, weight, unknown

    def __reduce__(self) -> tuple:
        cfg, maps, plan, *_ = self._made_of
        return TaughtLoader, (cfg, maps, plan, self.teacher, self.weight, self.unknown)

    def share_batch(self, share: Share) -> SequenceBatch:
        batch = super().share_batch(share)
        assert batch.labels is not None and batch.label_weight is not None
        scores = torch.from_numpy(self.teacher.scores_of(*candidate_places(share)))
        taught = torch.lerp(batch.labels, scores, self.weight)
        if share.idle or self.unknown == 0:
            return replace(batch, labels=taught)

        is_unknown = batch.label_weight == 0
        return replace(
            batch,
            labels=torch.where(is_unknown, scores, taught),
            label_weight=torch.where(is_unknown, self.unknown, batch.label_weight),
        )
