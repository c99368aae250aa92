"""Batches from a process of their own: the same ones, errors with their message, and an end."""

import os
import signal
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch

from pipeline.batches import collate
from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.packing import Packed
from pipeline.batches.steps import step_plan
from pipeline.config import UserError
from pipeline.model.flops import Flops
from pipeline.model.work import count_work
from pipeline.train.loader_process import LoaderProcess, messages
from pipeline.train.loop import remaining_batches
from tests.worlds.model import make_batch
from tests.worlds.tiny import publish_sequences, tiny_config


def assert_same(one: SequenceBatch, other: SequenceBatch) -> None:
    for field in fields(SequenceBatch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        if field.name == "packed":
            continue  # where the tensors lie
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), field.name
        else:
            assert a == b, field.name


def test_a_batch_is_itself_as_views_of_one_buffer() -> None:
    for batch in (make_batch([5, 0, 3], [2, 1, 0]), make_batch([0], [0])):
        packed = batch.pack()
        assert_same(packed, batch)
        assert packed.packed is not None and packed.packed.holds(packed.tensors)
        base = packed.packed.buffer.data_ptr()
        for tensor in packed.tensors.values():
            assert tensor.numel() == 0 or (tensor.data_ptr() - base) % 64 == 0

        # with another column it is no longer the buffer
        changed = replace(packed, seq_offsets=packed.seq_offsets + 1)
        assert not packed.packed.holds(changed.tensors)


def test_one_buffer_goes_to_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the batch was packed before; changed columns are taken, not those packed."""
    copied = []

    def copy(packed: Packed, device: torch.device) -> Packed:
        copied.append(packed)
        return Packed(packed.columns, packed.buffer.clone())

    monkeypatch.setattr(collate, "copy_packed", copy)
    batch = make_batch([5, 0, 3], [2, 1, 0])
    packed = batch.pack()
    changed = replace(packed, position=packed.position + 1)
    for given in (batch, packed, changed):
        there = given.to("meta")  # a device that is not the CPU
        assert there.host is given and there.on_host is given
        assert_same(replace(there, host=None), given)
    assert copied[1] is packed.packed
    assert len(copied) == 3


def test_the_process_makes_what_the_trainer_would_from_any_step_on(tmp_path: Path) -> None:
    cfg = tiny_config(tmp_path / "runs", train={"epochs": 2, "batch_users": 5})
    publish_sequences(cfg)
    maps, plan = fit_features(cfg), step_plan(cfg)
    used = TrainLoader(cfg, maps, plan, 1, 2)
    first = next(used.batches(0))  # its threads do not cross
    count = partial(count_work, cfg=cfg, num_items=9)
    make_batches = partial(remaining_batches, used, cfg.train.epochs, count)

    here = list(make_batches(0, 2))
    with LoaderProcess(make_batches, 0, 2) as process:
        there = list(process.batches())
    assert process.process.exitcode == 0
    assert len(there) == len(here) == 2 * plan.steps_per_epoch - 2
    for (batch, work), (expected, counted) in zip(there, here, strict=True):
        assert_same(batch, expected)
        assert work == counted
    assert first.num_tokens > 0


def broken_batches(epoch: int, step: int) -> Iterator[tuple[SequenceBatch, Flops]]:
    yield make_batch([3], [1]), Flops()
    raise UserError("sequences: bucket 3 is gone")


class Unsendable(Exception):
    def __init__(self, place: str, reason: str) -> None:
        super().__init__(f"{place}: {reason}")


def test_an_error_arrives_with_its_message() -> None:
    found = [header for header, _ in messages(broken_batches, 0, 0)]
    assert [header.end for header in found] == [False, False]
    error = found[1].error
    assert type(error) is UserError and str(error) == "sequences: bucket 3 is gone"

    def raises(epoch: int, step: int) -> Iterator[tuple[SequenceBatch, Flops]]:
        raise Unsendable("bucket 3", "gone")
        yield

    ((header, _),) = messages(raises, 0, 0)
    assert type(header.error) is RuntimeError
    assert str(header.error) == "Unsendable: bucket 3: gone"


def endless_batches(epoch: int, step: int) -> Iterator[tuple[SequenceBatch, Flops]]:
    while True:
        yield make_batch([300] * 20, [9] * 20), Flops()


def test_the_process_ends_with_the_block_and_its_death_is_told() -> None:
    with LoaderProcess(endless_batches, 0, 0) as process:
        batches = process.batches()
        next(batches)
    assert process.process.exitcode == 0, "it saw that nobody reads any more"

    with LoaderProcess(broken_batches, 0, 0) as process:
        batches = process.batches()
        next(batches)
        with pytest.raises(UserError, match="bucket 3 is gone"):
            next(batches)

    with LoaderProcess(endless_batches, 0, 0) as process:
        header = process._read_header()
        process._num_buffer = 1 << 30  # more than can be on its way: it dies within the batch
        assert process.process.pid is not None
        os.kill(process.process.pid, signal.SIGKILL)
        with pytest.raises(RuntimeError, match="exit code -9: killed"):
            process._read_batch(header)
        with pytest.raises(RuntimeError, match="exit code -9: killed"):
            list(process.batches())  # nothing is on its way: it died between two
