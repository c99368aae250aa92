"""Trials of a search as child runs of the tracker, fed by the driver from the trials' files.

    Tune → on_trial_… → queue → a thread → tracker
                                         → the end of the block: what it missed

Tune waits for none of it, and a tracker that is gone stops no trial.
"""

import logging
import queue
import threading
from collections.abc import Sequence
from typing import Any

from ray import tune

from pipeline.config import Outage
from pipeline.files import json_text, write_atomically
from pipeline.search.space import Trial
from pipeline.search.trial import DIVERGED, ENDED_EARLY, FINISHED, REFUSED, read_outcome
from pipeline.sequences.store import Manifest
from pipeline.tracking import Run, Tracker
from pipeline.train.metrics import MetricsFeed

logger = logging.getLogger(__name__)

CLOSE_TIMEOUT_S = 60.0
STATUS = "trial_status"  # tag
TRACKED = "tracked.json"  # in a trial's folder: its run has everything, and is ended
# a trial that is none of these goes on, or is tried again
RUN_STATUS = {
    FINISHED: "FINISHED",
    ENDED_EARLY: "FINISHED",
    DIVERGED: "FAILED",
    REFUSED: "FAILED",
}


class TrialRuns(tune.Callback):
    """Opens a run for each trial that starts, sends its metrics after each validation, and ends it,
    while the block runs.
    """

    def __init__(
        self, tracker: Tracker, manifest: Manifest, parent: Run, trials: Sequence[Trial]
    ) -> None:
        self.tracker, self.manifest, self.parent = tracker, manifest, parent
        self.trials = {trial.name: trial for trial in trials}
        self.runs: dict[str, Run] = {}
        self.events: queue.Queue[str | None] = queue.Queue()  # names; None ends the thread
        self.thread = threading.Thread(target=self._follow, name="trial runs", daemon=True)

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: Tune writes its callbacks down, for a restore that nobody makes."""
        return {}

    def note_trial(self, name: str) -> None:
        """Have a trial's run brought up to its files, in the background."""
        self.events.put(name)

    def on_trial_start(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.note_trial(trial.config["trial"]["name"])

    def on_trial_result(
        self, iteration: int, trials: list, trial: Any, result: dict, **info: Any
    ) -> None:
        self.note_trial(trial.config["trial"]["name"])

    def on_trial_complete(self, iteration: int, trials: list, trial: Any, **info: Any) -> None:
        self.note_trial(trial.config["trial"]["name"])

    def _follow(self) -> None:
        told = False
        while (name := self.events.get()) is not None:
            try:
                self.send_trial(self.trials[name])
                told = False
            except Outage as error:
                if not told:
                    logger.warning("trials are in their files, and tracked later: %s", error)
                told = True
            except Exception:  # a thread of its own: no fault of tracking may end a search
                logger.exception("trials are in their files, and tracked at the end")
                return

    def send_trial(self, trial: Trial) -> None:
        """Bring one trial's run up to its files, and end it where the trial has.

        Raises:
            Outage: the tracker does not answer.
        """
        if (trial.cfg.run_dir / TRACKED).exists():
            return
        run = self.runs.get(trial.name)
        if run is None:
            run = self.tracker.trial_run(trial.cfg, self.manifest, self.parent, trial.settings)
            self.runs[trial.name] = run
        # anew each time: a trial that begins once more has written its file anew
        MetricsFeed(trial.cfg.train_dir, run.run_id, run.log_history).send_rest()

        outcome = read_outcome(trial.cfg.run_dir)
        if outcome is not None:
            run.set_tags({STATUS: f"{outcome['status']} {outcome['why']}".strip()})
            run.end(RUN_STATUS[outcome["status"]])
            write_atomically(trial.cfg.run_dir / TRACKED, json_text({"run_id": run.run_id}))

    def __enter__(self) -> "TrialRuns":
        self.thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Send what is missing. Trials that are not at their end FAILED, or were KILLED.

        Raises:
            Outage: the tracker does not answer; the same command sends the rest.
        """
        self.events.put(None)
        self.thread.join(CLOSE_TIMEOUT_S)
        try:
            for trial in self.trials.values():
                if trial.name not in self.runs and read_outcome(trial.cfg.run_dir) is None:
                    continue
                self.send_trial(trial)
                if read_outcome(trial.cfg.run_dir) is None:
                    self.runs[trial.name].end("FAILED" if kind is None else "KILLED")
        except Outage as error:
            if kind is None:
                raise
            logger.warning("trials are in their files, and tracked another time: %s", error)
