"""A run's milestones: the checkpoints that it saves, and what Ray Train is told of them.

Every rank passes a milestone at the same step, since a checkpoint is whole only with the part of
each, and since Ray Train's `report` waits for all of them. That is also why lines of metrics go to
`metrics.jsonl` and not there: Ray Train takes a report each time it looks at its workers, twice a
second, and a training that has more to say waits for it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.train.checkpoint import CheckpointFolder, TrainState
from pipeline.train.trainee import Trainee

# values of the present step, and the checkpoint's folder where one was saved
Report = Callable[[dict[str, float], Path | None], None]


class Milestones:
    """Saves checkpoints of the trainee where there is a folder for them, and tells `report`."""

    def __init__(
        self,
        trainee: Trainee,
        state: TrainState,
        identity: dict[str, Any],
        checkpoints: CheckpointFolder | None,
        report: Report | None,
    ) -> None:
        self.trainee, self.state, self.identity = trainee, state, identity
        self.checkpoints, self.report = checkpoints, report

    def pass_one(self, values: dict[str, float], *, save: bool) -> None:
        """Save the present step, if asked to, and tell its `values`."""
        folder = None
        if save and self.checkpoints is not None:
            self.checkpoints.save(self.trainee.tensors(), self.state, self.identity)
            folder = self.checkpoints.at(self.state.step)

        if self.report is not None:
            epoch = self.state.step / max(self.state.steps_per_epoch, 1)
            self.report({"step": self.state.step, "epoch": epoch, **values}, folder)
