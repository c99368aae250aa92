"""Checkpoints: whole or not there, the right ones kept, and the same at any number of ranks."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file

from pipeline.config import UserError
from pipeline.train import checkpoint
from pipeline.train.checkpoint import (
    Block,
    CheckpointFolder,
    TrainState,
    check_identity,
    copy_tensors,
    only_writer,
    read_tensors,
    run_identity,
)
from tests.support.ranks import run_ranks
from tests.worlds.model import make_config

ROWS = {"long": 7, "short": 2}  # fewer rows than ranks: one rank holds none


def whole(name: str) -> torch.Tensor:
    return torch.arange(ROWS[name] * 3.0).view(-1, 3) + ROWS[name]


def blocks(rank: int, world_size: int) -> dict[str, Block]:
    found = {}
    for name in ROWS:
        size = -(-ROWS[name] // world_size)  # torch.chunk's rule
        first = min(rank * size, ROWS[name])
        found[name] = Block(whole(name)[first : first + size].clone(), first, ROWS[name])
    return found


def save_as_rank(rank: int, folder: str, world_size: int) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world_size
    )
    shared = {"dense": torch.arange(5.0), "step": torch.tensor(3.0)}
    checkpoints = CheckpointFolder(Path(folder, "saved"), 2, rank, world_size)
    checkpoints.save(shared | blocks(rank, world_size), TrainState(step=3), {"name": "blocks"})
    newest = checkpoints.newest()
    assert newest is not None
    assert newest.state.step == 3
    dist.destroy_process_group()


def test_blocks_of_three_ranks_load_at_any_number(tmp_path: Path) -> None:
    run_ranks(save_as_rank, (str(tmp_path), 3), 3)
    saved = CheckpointFolder(tmp_path / "saved", 2).newest()
    assert saved is not None
    assert saved.identity == {"name": "blocks"}
    shards = [path for path in saved.folder.iterdir() if path.name.startswith("shard-")]
    assert len(shards) == 3, "every rank writes what it holds"
    assert {path.suffix for path in saved.folder.iterdir()} == {".safetensors", ".json"}
    for world_size in (1, 2, 4):
        for rank in range(world_size):
            into = blocks(rank, world_size)
            expected = {name: block.local.clone() for name, block in into.items()}
            for block in into.values():
                block.local.fill_(-1)
            dense, step = torch.zeros(5), torch.tensor(0.0)
            read_tensors(saved.folder, into | {"dense": dense, "step": step})
            assert dense.tolist() == [0, 1, 2, 3, 4]
            assert step == 3
            for name, block in into.items():
                assert torch.equal(block.local, expected[name]), (world_size, rank, name)
    plain = {name: torch.zeros_like(whole(name)) for name in ROWS}
    read_tensors(saved.folder, plain)
    assert all(torch.equal(plain[name], whole(name)) for name in ROWS)


def test_large_tensors_are_copied_block_by_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "COPY_BYTES", 40)  # three rows of a table
    saved = {
        "model.table": torch.randn(7, 3).bfloat16(),  # read as the float32 that the model has
        "model.weight": torch.randn(2, 2),
        "model.count": torch.tensor(5),
        "adamw.exp_avg.weight": torch.randn(2, 2),
    }
    checkpoints = CheckpointFolder(tmp_path / "saved", 2)
    checkpoints.save(saved, TrainState(step=3), {})
    with torch.device("meta"):
        like = {"count": torch.tensor(0), "table": torch.empty(7, 3), "weight": torch.empty(2, 2)}
    copy_tensors(checkpoints.at(3), like, tmp_path / "model.safetensors", "model.")
    copied = load_file(tmp_path / "model.safetensors")
    assert copied.keys() == like.keys()
    for name, tensor in copied.items():
        assert tensor.dtype == like[name].dtype
        assert torch.equal(tensor, saved[f"model.{name}"].to(tensor.dtype)), name
    with pytest.raises(UserError, match="does not fit this model"):
        copy_tensors(
            checkpoints.at(3),
            {"table": torch.empty(8, 3)},
            tmp_path / "other.safetensors",
            "model.",
        )


def test_another_model_is_one_message(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, 2)
    save(folder, 1)
    with pytest.raises(UserError, match="does not fit this model"):
        read_tensors(folder.at(1), {"weight": torch.zeros(9, 2)})
    with pytest.raises(UserError, match=r"does not fit this model.*other"):
        read_tensors(folder.at(1), {"other": torch.zeros(3, 2)})


def save(folder: CheckpointFolder, step: int, best_step: int | None = None) -> None:
    folder.save(
        {"weight": torch.full((3, 2), float(step))}, TrainState(step=step, best_step=best_step), {}
    )


@pytest.fixture
def checkpoints(tmp_path: Path) -> CheckpointFolder:
    folder = CheckpointFolder(tmp_path / "checkpoints", keep=2)
    for step in (3, 6, 9, 12):
        save(folder, step)
    return folder


def test_the_newest_and_the_best_are_kept(checkpoints: CheckpointFolder) -> None:
    def steps() -> list[int]:
        return [int(folder.name.removeprefix("step_")) for folder in checkpoints.folders()]

    assert steps() == [9, 12]
    save(checkpoints, 15, best_step=15)
    save(checkpoints, 18, best_step=15)
    save(checkpoints, 21, best_step=15)
    assert steps() == [15, 18, 21]
    save(checkpoints, 24, best_step=24)
    assert steps() == [21, 24]
    assert len(list(checkpoints.root.iterdir())) == 2, "nothing staged is left behind"


@pytest.mark.parametrize(
    "damage", ["cut", "altered", "missing", "no index", "broken index", "altered state"]
)
def test_a_damaged_checkpoint_is_skipped_and_said_so(
    checkpoints: CheckpointFolder, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    newest = checkpoints.folders()[-1]
    (weights,) = newest.glob("*.safetensors")
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif damage == "altered":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    elif damage == "no index":
        (newest / "artifact.json").unlink()
    elif damage == "broken index":
        (newest / "artifact.json").write_text('{"files": ')
    else:
        (newest / "state.json").write_text(
            (newest / "state.json").read_text().replace('"step": 12', '"step": 13')
        )
    found = checkpoints.newest()
    assert found is not None
    assert found.state.step == 9
    assert "skipped" in caplog.text
    assert newest.name in caplog.text


def test_a_save_cut_off_is_no_checkpoint_and_its_rest_goes(checkpoints: CheckpointFolder) -> None:
    torn = checkpoints.root / ".step_00000015.partial"
    torn.mkdir()
    (torn / "state.json").write_text(json.dumps({"state": {"step": 15}, "identity": {}}))
    found = checkpoints.newest()
    assert found is not None
    assert found.state.step == 12
    save(checkpoints, 15)
    assert not torn.exists()
    found = checkpoints.newest()
    assert found is not None
    assert found.state.step == 15


def test_no_checkpoint_and_none_whole(checkpoints: CheckpointFolder, tmp_path: Path) -> None:
    assert CheckpointFolder(tmp_path / "nothing", 2).newest() is None
    for folder in checkpoints.folders():
        (folder / "artifact.json").unlink()
    with pytest.raises(UserError, match="none of the 2 checkpoints"):
        checkpoints.newest()


def test_one_run_is_trained_by_one_process_at_a_time(tmp_path: Path) -> None:
    with (
        only_writer(tmp_path),
        pytest.raises(UserError, match="another process is training"),
        only_writer(tmp_path, timeout_s=0),
    ):
        raise AssertionError("two at once")
    with only_writer(tmp_path, timeout_s=0):
        assert tmp_path.exists()


def test_a_setting_that_a_checkpoint_does_not_know_stood_at_its_default() -> None:
    cfg = make_config()
    identity = run_identity(cfg, "data")
    older = {key: value for key, value in identity.items() if key != "train.lr"}
    check_identity(older, identity, "run")

    faster = run_identity(replace(cfg, train=replace(cfg.train, lr=0.5)), "data")
    with pytest.raises(UserError, match=r"began with train.lr = 0.002 and would go on with 0.5"):
        check_identity(older, faster, "run")
    with pytest.raises(UserError, match=r"began with train.gone = 1 and would go on with None"):
        check_identity(older | {"train.gone": 1}, identity, "run")
