"""What ends a training early: steps that are not finite, divergence, validation that gets no
better.
"""

import gzip
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.batches.collate import SequenceBatch
from pipeline.config import (
    AttentionConfig,
    ChannelConfig,
    ConfigError,
    ModelConfig,
    TrainConfig,
)
from pipeline.train import loop
from pipeline.train.checkpoint import CheckpointFolder, TrainState
from pipeline.train.guards import (
    TrainingStopped,
    improved,
    silent_attention,
    watch_divergence,
)
from pipeline.train.trainee import Trainee
from tests.worlds.model import make_maps
from tests.worlds.training import Loader, run, train_config


def test_attention_that_starts_silent_is_told_with_its_two_settings() -> None:
    attention = AttentionConfig(scaling_seq_len=4096)
    cfg = ModelConfig(attention=attention, d_qk=32)
    assert silent_attention([3e-6, 5e-8], cfg) is None  # more than a fifth: 22 %
    assert silent_attention([], cfg) is None
    said = silent_attention([3e-6, 1e-8], cfg)
    assert said is not None
    assert "starts at 10.0% of its size: Var(A) 1.0e-08 is below norm_eps 1e-06" in said
    lower = "model.attention.scaling_seq_len (4096) or raise its attn_alpha (1 / d_qk = 0.03125)"
    assert said.endswith(f"Lower {lower}")

    attention = replace(attention, attn_alpha=0.5)
    mixture = replace(cfg, channels={"all": ChannelConfig(attention=attention)})
    said = silent_attention([0.0], mixture)
    assert said is not None and "starts at 0.0%" in said
    lower = "model.channels.all.attention.scaling_seq_len (4096) or raise its attn_alpha (0.5)"
    assert said.endswith(f"Lower {lower}")

    sharp = replace(attention, scaling_seq_len=16, attn_alpha=16.0)
    said = silent_attention([7e-15], replace(cfg, attention=sharp))
    assert said is not None and said.endswith(
        "scaling_seq_len (16) or its attn_alpha (16), whose scores may lie far below 0"
    )


class Broken(Loader):
    """Every label of some steps, counted from 0, is not a number."""

    def __init__(self, steps: set[int]) -> None:
        super().__init__()
        self.broken = steps

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        for step, batch in enumerate(super().batches(epoch, first_step), first_step):
            assert batch.labels is not None
            if epoch == 0 and step in self.broken:
                yield replace(batch, labels=torch.full_like(batch.labels, math.nan))
            else:
                yield batch


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    cfg = train_config()
    trainee = Trainee(cfg, make_maps(), "cpu", 0, 1)
    good, bad = (next(loader.batches(0)) for loader in (Loader(), Broken({0})))
    trainee.step(good, 0, 10)
    before = {name: tensor.clone() for name, tensor in trainee.tensors().items()}  # pyright: ignore
    losses, weights = trainee.step(bad, 1, 10)
    assert losses.tolist() == weights.tolist() == [0, 0]
    for name, tensor in trainee.tensors().items():
        assert torch.equal(tensor, before[name]), name  # pyright: ignore
    assert trainee.guard.take_bad_steps(2, 10) == 1
    assert trainee.guard.take_bad_steps(2, 10) == 0
    trainee.step(good, 2, 10)
    now = trainee.tensors()
    assert any(not torch.equal(now[name], tensor) for name, tensor in before.items())  # pyright: ignore


def test_bad_steps_are_counted_and_training_goes_on() -> None:
    lines = []
    loop.train(
        train_config(),
        make_maps(),
        Broken({1, 2}),
        "data",
        log=lambda _, values: lines.append(values),
    )
    assert [line["train/bad_steps"] for line in lines] == [1, 2, 2, 2, 2, 2]
    assert all(math.isfinite(line["train/loss"]) for line in lines)


def test_a_line_without_a_counted_step_has_no_loss() -> None:
    """A mean over nothing is no 0, which would be the best loss of all and move the median."""
    lines = []
    loop.train(
        train_config(max_loss_ratio=2.0),
        make_maps(),
        Broken({2, 3}),  # the second line of metrics, log_every 2
        "data",
        log=lambda _, values: lines.append(values),
    )
    empty = lines[1]
    assert empty["train/bad_steps"] == 2
    assert [name for name in empty if name.startswith("train/loss")] == []
    assert "train/loss" in lines[0]
    assert "train/loss" in lines[2]


def test_too_many_in_a_row_stop_it_with_step_and_tensors(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 3)
    cfg = train_config(max_bad_steps=3, checkpoint_every=1)
    with pytest.raises(
        TrainingStopped,
        match=r"3 steps in a row up to step 5 .* the loss of is_click.*max_bad_steps 3",
    ):
        run(cfg, Broken({2, 3, 4}), checkpoints=folder)
    newest = folder.newest()
    assert newest is not None
    assert newest.state.step == 4, "what was saved before is whole"
    run(cfg, Broken({1, 2, 4, 5}))  # never three in a row


def test_divergence_is_a_loss_far_above_its_median_line_after_line() -> None:
    cfg, state = TrainConfig(max_loss_ratio=3.0), TrainState(step=7)
    for loss in (0.9, 0.7, 0.6, 0.5, 0.5, 5.0, 5.0, 0.5, 4.0, 4.0):
        watch_divergence(state, loss, cfg)
    assert state.recent_losses == [0.9, 0.7, 0.6, 0.5, 0.5, 0.5], (
        "what is far above does not move the median"
    )
    with pytest.raises(
        TrainingStopped, match=r"at step 7 the loss is 4, for 3 lines .* 3 times .* median of 0\.55"
    ):
        watch_divergence(state, 4.0, cfg)
    off, state = TrainConfig(max_loss_ratio=None), TrainState()
    for loss in (*[0.5] * 9, *[50.0] * 9):
        watch_divergence(state, loss, off)


@pytest.mark.parametrize(
    ("metric", "values"), [("ne", [0.9, 0.8, 0.85, 0.8]), ("auc", [0.6, 0.7, 0.65, 0.7])]
)
def test_best_is_lowest_ne_or_highest_auc_and_the_first_of_equals(
    metric: str, values: list[float]
) -> None:
    cfg, state = TrainConfig(best_metric=metric), TrainState()  # pyright: ignore[reportArgumentType]
    found = []
    for state.step, value in enumerate([math.nan, *values]):
        found.append(improved(state, value, cfg))
    assert found == [False, True, True, False, False]
    assert (state.best, state.best_step, state.not_better) == (values[1], 2, 2)


def validation(values: list[float]) -> Callable[[object], dict[str, float]]:
    left = iter(values)
    return lambda _: {"val_sample/ne": next(left)}


def test_early_stop_keeps_the_best_and_the_last(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 1)
    cfg = train_config(validate_every=2, patience=2, checkpoint_every=100)
    lines, _ = run(cfg, checkpoints=folder, validate=validation([0.9, 0.8, 0.85, 0.81]))
    assert [path.name for path in folder.folders()] == ["step_00000004", "step_00000008"]
    newest = folder.newest()
    assert newest is not None
    assert newest.state.finished
    assert (newest.state.best, newest.state.best_step) == (0.8, 4)
    assert lines[-1]["step"] == 8
    assert run(cfg, resume=newest)[0] == [], "finished is finished"


def test_validation_changes_no_weight(tmp_path: Path) -> None:
    _, plain = run(train_config())
    _, validated = run(train_config(validate_every=1), validate=validation([0.5] * 12))
    assert all(torch.equal(tensor, validated[name]) for name, tensor in plain.items())


def test_a_trace_of_the_steps_asked_for(tmp_path: Path) -> None:
    run(train_config(profile_steps=(3, 4)), profile_dir=tmp_path)
    (path,) = tmp_path.iterdir()
    assert path.name == "steps_3_to_4.json.gz"
    names = {
        event.get("name") for event in json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    }
    assert {"step 3", "step 4"} <= names
    assert "step 2" not in names


@pytest.mark.parametrize(
    "setting",
    [
        {"patience": 2},
        {"publish": "best"},
        {"profile_steps": (4, 3)},
        {"profile_steps": (4,)},
        {"max_loss_ratio": 1.0},
    ],
)
def test_settings_that_say_nothing_are_refused(setting: dict) -> None:
    with pytest.raises(ConfigError, match=next(iter(setting))):
        TrainConfig(**setting)
