"""The driver's side of a training while its workers run: room for all of them, an end that loses
nothing.

    only_training → refuse_impossible_size → run_attempt: Ray Train's `fit` in a thread
"""

import logging
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import ray
import torch

from pipeline.cluster import is_private
from pipeline.config import RayConfig, TrainConfig, UserError
from pipeline.train.interruption import ask_to_stop, forget_wishes
from pipeline.train.worker import STOPPED, raise_reason, worker_resources

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 0.2
TELL_EVERY_S = 60.0
FIT_ENDS_S = 15.0  # of Ray Train's controller, after its workers have returned


def refuse_impossible_size(settings: RayConfig, train: TrainConfig) -> None:
    """Refuse workers that this machine can never hold. A cluster that others run may grow.

    Raises:
        UserError: a cluster of our own, with fewer CPUs or GPUs than workers.
    """
    if not is_private(settings):
        return
    fewest = train.fewest_workers
    name = "train.num_workers" if train.min_workers is None else "train.min_workers"
    if fewest > settings.num_cpus:
        raise UserError(f"{name} is {fewest}, ray.num_cpus only {settings.num_cpus}")
    gpus = torch.cuda.device_count()
    if train.use_gpu and fewest > gpus:
        raise UserError(
            f"train.use_gpu: {fewest} workers ({name}) need a GPU each, this machine has {gpus}"
        )


class Fits(Protocol):
    """Ray Train's trainer, as far as it is used here."""

    def fit(self) -> Any: ...


def run_attempt(trainer: Fits, train: TrainConfig, folder: Path) -> None:
    """Run Ray Train to its end; `folder` is the run's training folder.

    SIGTERM and Ctrl-C reach this thread, the main one: the workers are asked for a checkpoint
    before either goes on its way.

    Raises:
        TrainingStopped: it went wrong.
        UserError: a mistake that only a worker could see.
    """
    (folder / STOPPED).unlink(missing_ok=True)
    forget_wishes(folder)
    shortage = ShortageTeller(train)
    attempt = _Attempt(trainer)
    attempt.start()

    try:
        while attempt.is_alive():
            attempt.join(LOOK_EVERY_S)
            shortage.tell_missing()
    except (KeyboardInterrupt, SystemExit):
        _save_and_stop(folder, train.stop_timeout_s)
        attempt.join(FIT_ENDS_S)
        raise

    raise_reason(folder)
    if attempt.error is not None:
        raise attempt.error


class _Attempt(threading.Thread):
    """`fit` in a thread of its own, which no signal reaches."""

    def __init__(self, trainer: Fits) -> None:
        super().__init__(name="fit", daemon=True)
        self.trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:
            self.error = error


def _save_and_stop(folder: Path, timeout_s: float) -> None:
    logger.warning("asked to end: saving a checkpoint (at most %.0f s)", timeout_s)
    step = ask_to_stop(folder, timeout_s)
    if step is None:
        logger.warning("no step was under way: the run goes on from the checkpoint before")
    else:
        logger.warning("saved after step %d: the same command goes on from there", step)


class ShortageTeller:
    """Says once a minute what a cluster lacks of what the workers ask for."""

    def __init__(self, train: TrainConfig) -> None:
        self.asked = {}
        for name, amount in worker_resources(train).items():
            self.asked[name] = amount * train.fewest_workers
        self.told = time.monotonic() - TELL_EVERY_S / 2

    def tell_missing(self) -> None:
        if time.monotonic() - self.told < TELL_EVERY_S:
            return
        self.told = time.monotonic()
        missing = missing_resources(self.asked, ray.cluster_resources())
        if missing:
            logger.warning(
                "training waits: it asks for %s, and the whole cluster lacks %s of that",
                in_words(self.asked),
                in_words(missing),
            )


def missing_resources(asked: Mapping[str, float], there: Mapping[str, float]) -> dict[str, float]:
    """How much of each resource a cluster lacks, whether it is in use or not.

    asked     CPU 8, GPU 8
    there     CPU 48, GPU 4, memory …
    missing   GPU 4
    """
    missing = {}
    for name, amount in asked.items():
        lacking = amount - there.get(name, 0)
        if lacking > 0:
            missing[name] = lacking
    return missing


def in_words(resources: Mapping[str, float]) -> str:
    """`8 CPU, 8 GPU`"""
    return ", ".join(f"{amount:g} {name}" for name, amount in resources.items())
