"""The driver's side of a training: one job a name, room for the workers, and an end on request."""

import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pipeline.config import ConfigError, RayConfig, TrainConfig, UserError
from pipeline.train import supervision
from pipeline.train.checkpoint import CheckpointFolder
from pipeline.train.interruption import WishWatcher, ask_to_stop, forget_wishes
from pipeline.train.one_at_a_time import only_training
from pipeline.train.supervision import (
    missing_resources,
    refuse_impossible_size,
    run_attempt,
)
from tests.worlds.tiny import tiny_config
from tests.worlds.training import run, train_config

# a job as `python -m jobs.NAME` runs it, and what it has loaded by its end
LOADED_WHEN_REFUSED = """
import runpy, sys
name = sys.argv[1]
sys.argv = [name, *sys.argv[2:]]
try:
    runpy.run_module(f"jobs.{name}", run_name="__main__", alter_sys=False)
finally:
    print("loaded:", [one for one in ("ray", "torch", "mlflow") if one in sys.modules])
"""


def test_a_second_training_of_a_name_is_refused_and_names_the_first(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path)
    refused = pytest.raises(UserError, match=r"run 'tiny' is being trained by .*process \d+ on ")
    first = only_training(cfg.runs_dir, cfg.name)
    with first, refused, only_training(cfg.runs_dir, cfg.name, timeout_s=0):
        raise AssertionError("two at once")
    with only_training(cfg.runs_dir, cfg.name), only_training(cfg.runs_dir, "other", timeout_s=0):
        assert not cfg.run_dir.exists(), "the lock is no part of the run, which --fresh removes"
        (note,) = Path(cfg.runs_dir).glob(".tiny.training")
        assert note.read_text().count("process") == 1, "the holder alone, not those before it"


def test_a_second_job_is_refused_before_ray_and_torch_are_loaded(tmp_path: Path) -> None:
    """Loading them takes most of a minute where another training has the processors."""
    preset = "configs/smoke.yaml"
    space = ["--space", "configs/spaces/demo.yaml"]
    waiting = {}
    with only_training(str(tmp_path), "smoke"), only_training(str(tmp_path), "smoke-tune"):
        for job, options in (("train", []), ("tune", space), ("pipeline", [])):
            argv = [job, "--config", preset, "--set", f"runs_dir={tmp_path}", *options]
            waiting[job] = subprocess.Popen(
                [sys.executable, "-c", LOADED_WHEN_REFUSED, *argv],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        for job, process in waiting.items():
            loaded, said = process.communicate()
            assert "is being trained by another job" in said, job
            assert (loaded, process.returncode) == ("loaded: []\n", 2), job


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (TrainConfig(num_workers=9), "train.num_workers is 9, ray.num_cpus only 4"),
        (TrainConfig(num_workers=2, use_gpu=True), "need a GPU each, this machine has 1"),
        (TrainConfig(num_workers=9, min_workers=5), "train.min_workers is 5, ray.num_cpus only 4"),
    ],
)
def test_more_workers_than_a_machine_holds_are_refused(
    train: TrainConfig, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(supervision, "is_private", lambda _: True)
    with pytest.raises(UserError, match=message):
        refuse_impossible_size(RayConfig(num_cpus=4), train)
    monkeypatch.setattr(supervision, "is_private", lambda _: False)
    refuse_impossible_size(RayConfig(num_cpus=4), train)  # others' clusters may grow


def test_a_run_begins_with_no_more_workers_than_it_may_have() -> None:
    assert TrainConfig(num_workers=4, min_workers=2).fewest_workers == 2
    assert TrainConfig(num_workers=4).fewest_workers == 4
    with pytest.raises(
        ConfigError, match=r"train\.min_workers must be at most train\.num_workers, 2"
    ):
        TrainConfig(num_workers=2, min_workers=3)


def test_what_a_cluster_lacks() -> None:
    asked = {"CPU": 8.0, "GPU": 8.0}
    assert missing_resources(asked, {"CPU": 48.0, "GPU": 5.0, "memory": 1e9}) == {"GPU": 3.0}
    assert missing_resources(asked, {"CPU": 8.0, "GPU": 8.0}) == {}


class Wisher:
    """Asks for something at one of its steps."""

    def __init__(self, at: int, save: bool = False, stop: bool = False) -> None:
        self.left, self.wish = at, (save, stop)
        self.stopped_at = None

    def take_wishes(self) -> tuple[bool, bool]:
        self.left -= 1
        return self.wish if self.left == 0 else (False, False)

    def tell_stopped(self, step: int) -> None:
        self.stopped_at = step


def test_a_run_that_was_asked_to_stop_goes_on_from_there(tmp_path: Path) -> None:
    cfg = train_config(checkpoint_every=100)
    lines, weights = run(cfg)
    folder = CheckpointFolder(tmp_path, 3)
    wisher = Wisher(at=5, stop=True)
    begun, _ = run(cfg, checkpoints=folder, wishes=wisher)
    assert wisher.stopped_at == 5
    saved = folder.newest()
    assert saved is not None
    assert (saved.state.step, saved.state.finished) == (5, False)

    rest, resumed = run(cfg, resume=saved)
    assert [*begun, *rest] == lines
    assert all(torch.equal(tensor, weights[name]) for name, tensor in resumed.items())


def test_a_run_saves_on_notice_and_goes_on(tmp_path: Path) -> None:
    cfg = train_config(checkpoint_every=100)
    folder = CheckpointFolder(tmp_path, 3)
    _, weights = run(cfg, checkpoints=folder, wishes=Wisher(at=7, save=True))
    assert [path.name for path in folder.folders()] == ["step_00000007", "step_00000012"]
    _, plain = run(cfg)
    assert all(torch.equal(tensor, plain[name]) for name, tensor in weights.items())


def test_the_drivers_wish_reaches_the_first_rank(tmp_path: Path) -> None:
    forget_wishes(tmp_path)
    assert ask_to_stop(tmp_path, 10) is None, "nothing is under way"

    def rank() -> None:
        while not watcher.take_wishes()[1]:
            watcher.ended.wait(0.01)
        watcher.tell_stopped(42)
        watcher.__exit__()

    forget_wishes(tmp_path)
    watcher = WishWatcher(tmp_path, 0)
    with watcher:
        threading.Thread(target=rank, daemon=True).start()
        assert ask_to_stop(tmp_path, 60) == 42


class EndedFromOutside:
    """A trainer during whose `fit` the job gets SIGTERM."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, threading.Event()

    def fit(self) -> None:
        with WishWatcher(self.folder, 0) as watcher:
            self.asked.set()
            while not watcher.take_wishes()[1]:
                watcher.ended.wait(0.01)
            watcher.tell_stopped(7)


def test_a_job_that_is_ended_waits_for_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = EndedFromOutside(tmp_path)

    class Ended:
        """In the place of what looks after the workers: the signal's SystemExit comes here."""

        def __init__(self, _: TrainConfig) -> None:
            pass

        def tell_missing(self) -> None:
            trainer.asked.wait(60)
            raise SystemExit(143)

    monkeypatch.setattr(supervision, "ShortageTeller", Ended)
    with pytest.raises(SystemExit):
        run_attempt(trainer, TrainConfig(stop_timeout_s=60), tmp_path)
    assert "saved after step 7" in caplog.text


def test_ray_train_complains_once_a_second_of_nothing() -> None:
    """Its cleaner of placement groups, which asks for a dashboard, is there and left out of ours:
    training on ML-1M printed its complaint in 69 lines of 101.
    """
    from ray.train import ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipeline.train.trainer import QuietTrainer

    kinds = []
    for trainer in (TorchTrainer, QuietTrainer):
        made = trainer(lambda: None, scaling_config=ScalingConfig(num_workers=1))
        kinds.append({type(one).__name__ for one in made._create_default_callbacks()})
    theirs, ours = kinds
    assert theirs - ours == {"PlacementGroupCleanerCallback"}
