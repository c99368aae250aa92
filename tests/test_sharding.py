"""Sharded embedding tables: placement, the same losses as without, the same rows whatever the
number of ranks.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.config import ConfigError, RunConfig
from pipeline.train import loop, sharding
from pipeline.train.checkpoint import CheckpointFolder, Saved, read_tensors
from pipeline.train.placement import Placement, describe_tables, place_tables
from pipeline.train.sharding import TableMaker, draw_rows
from pipeline.train.trainee import Trainee
from tests.support.ranks import run_ranks
from tests.worlds.model import joined, labelled_batch, make_config, make_maps
from tests.worlds.training import rows_told_and_found

STEPS = 24
PARTS = 6  # of a step, shared by 1, 2 or 3 ranks
VOCAB = {"item_id": 30, "item.tag": 5, "user.age": 4, "user.city": 6, "request.tab": 4}


class Loader:
    def __init__(self, rank: int = 0, world_size: int = 1, steps: int = STEPS) -> None:
        self.rank, self.world_size, self.steps_per_epoch = rank, world_size, steps

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        for step in range(first_step, self.steps_per_epoch):
            parts = [labelled_batch(10 * step + part) for part in range(PARTS)]
            share = PARTS // self.world_size
            yield joined(parts[self.rank * share : (self.rank + 1) * share])


def train_config(**train: object) -> RunConfig:
    cfg = make_config()
    settings = {"epochs": 1, "log_every": 1, "checkpoint_every": 20, "warmup_steps": 5, "lr": 0.01}
    return replace(cfg, train=replace(cfg.train, **settings | train))  # pyright: ignore[reportArgumentType]


def placed(cfg: RunConfig, vocab_sizes: dict[str, int], world_size: int) -> dict[str, Placement]:
    return place_tables(cfg.features, cfg.model, cfg.train, vocab_sizes, world_size)


SHARDED = {"default": "sharded"}
HALF = {"bf16_tables": ("item_id", "item.tag"), "host_state_tables": ("item_id",)}


def train(
    cfg: RunConfig,
    folder: Path,
    rank: int = 0,
    world_size: int = 1,
    resume: Saved | None = None,
    steps: int = STEPS,
) -> dict:
    """Losses, what the last checkpoint holds, read as tables that are not sharded, and the messages
    of the last step.
    """
    losses: list[float] = []
    messages = Messages()

    def log(step: int, values: dict[str, float]) -> None:
        losses.append(values["train/loss"])
        messages.end_step()

    checkpoints = CheckpointFolder(folder, 3, rank, world_size)
    loop.train(
        cfg,
        make_maps(),
        Loader(rank, world_size, steps),
        "data",
        rank=rank,
        world_size=world_size,
        resume=resume,
        checkpoints=checkpoints,
        log=log,
    )
    messages.close()
    tensors = Trainee(train_config(), make_maps(), "cpu", 0, 1).tensors()
    read_tensors(checkpoints.folders()[-1], tensors)
    return {"losses": losses, "tensors": tensors, "messages": messages.of_step}


class Messages:
    """The names of the collectives that this rank takes part in, in order, step by step."""

    names = "all_reduce", "all_to_all_single", "all_gather", "broadcast", "reduce_scatter"

    def __init__(self) -> None:
        self.since: list[str] = []
        self.of_step: list[str] = []
        self.kept = {name: getattr(dist, name) for name in self.names}
        for name, call in self.kept.items():
            setattr(dist, name, partial(self._count, name, call))

    def _count(self, name: str, call: Callable, *args: Any, **options: Any) -> Any:
        self.since.append(name)
        return call(*args, **options)

    def end_step(self) -> None:
        self.of_step, self.since = self.since, []

    def close(self) -> None:
        for name, call in self.kept.items():
            setattr(dist, name, call)


def one_of_many(rank: int, world_size: int, folder: str, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    for number, settings in enumerate(json.loads(Path(folder, "cfgs.json").read_text())):
        cfg = config.from_dict(settings)
        torch.save(
            train(cfg, Path(folder, f"checkpoints_{number}"), rank, world_size, steps=steps),
            f"{folder}/{number}_{rank}.pt",
        )
    dist.destroy_process_group()


def train_on_ranks(
    cfgs: list[RunConfig], world_size: int, folder: Path, steps: int = STEPS
) -> list[list[dict]]:
    """Of each configuration what every rank found."""
    (folder / "cfgs.json").write_text(json.dumps([config.to_dict(cfg) for cfg in cfgs]))
    run_ranks(one_of_many, (world_size, str(folder), steps), world_size)
    ranks = range(world_size)
    return [
        [torch.load(folder / f"{i}_{rank}.pt", weights_only=True) for rank in ranks]
        for i in range(len(cfgs))
    ]


# Training


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(train_config(), tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def sharded_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def sharded(sharded_folder: Path) -> dict:
    return train(train_config(tables=SHARDED), sharded_folder)


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return train(train_config(**HALF), tmp_path_factory.mktemp("half"))


@pytest.mark.parametrize("world_size", [2, 3])
def test_sharded_tables_train_like_whole_ones(
    world_size: int, plain: dict, half: dict, tmp_path: Path
) -> None:
    """With three ranks the last one has none of the four ages."""
    ranks, halves = train_on_ranks(
        [train_config(tables=SHARDED), train_config(**HALF)], world_size, tmp_path
    )
    # Chance rounds a row alike whoever holds it: only where sums differ in their last bit may the
    # rows differ.
    assert halves[0]["losses"] == pytest.approx(half["losses"], abs=1e-4)
    name = "model.encoder.content.item_id.weight"
    assert (halves[0]["tensors"][name] != half["tensors"][name]).float().mean() < 0.1
    assert len(plain["losses"]) == STEPS
    assert plain["losses"][-1] < plain["losses"][0]
    for one in ranks:
        assert one["losses"] == ranks[0]["losses"]
    assert ranks[0]["losses"] == pytest.approx(plain["losses"], abs=1e-5)
    for name, tensor in plain["tensors"].items():
        torch.testing.assert_close(
            ranks[0]["tensors"][name], tensor, rtol=1e-3, atol=1e-5, msg=name
        )


SMALL_PART = 4 * 200 / 2**20  # MiB: 200 numbers


def test_a_step_has_few_messages_however_tables_and_gradients_go_over_the_ranks(
    tmp_path: Path,
) -> None:
    """And the same results to the last bit: of two ranks' sums the order does not matter."""
    cfgs = []
    for settings in ({}, {"tables": SHARDED}, {"gradient_part_mb": SMALL_PART}):
        cfg = train_config(**settings)
        features = replace(cfg.features, item_id_dropout=0.3)
        cfgs.append(replace(cfg, features=features, model=replace(cfg.model, dropout=0.2)))
    whole, sharded, parts = (ranks[0] for ranks in train_on_ranks(cfgs, 2, tmp_path, steps=8))

    # the touched rows; the gradients; those of touched rows with all sums
    assert whole["messages"] == ["all_reduce"] * 3
    # Row numbers and rows; the same of positions and times; gradients of sharded rows. The counts
    # came with the step before.
    assert sharded["messages"] == [
        *["all_to_all_single"] * 2,
        *["all_reduce"] * 3,
        "all_to_all_single",
    ]
    assert parts["messages"] == ["all_reduce"] * len(parts["messages"])
    assert 5 < len(parts["messages"]) < 15

    for other in (sharded, parts):
        assert other["losses"] == whole["losses"]
        for name, tensor in whole["tensors"].items():
            assert torch.equal(other["tensors"][name], tensor), name


def test_one_rank_needs_no_messages_and_equals_plain_tables(plain: dict, sharded: dict) -> None:
    """The block is the whole table; only the order of sums over the batch differs."""
    assert sharded["losses"] == pytest.approx(plain["losses"], abs=1e-6)


def test_placement_may_change_between_attempts(
    plain: dict, sharded: dict, sharded_folder: Path, tmp_path: Path
) -> None:
    checkpoints = CheckpointFolder(sharded_folder, 3)
    resumed = train(train_config(), tmp_path, resume=checkpoints.read(checkpoints.at(20)))
    assert resumed["losses"] == pytest.approx(plain["losses"][20:], abs=1e-6)


def test_bf16_rows_train_almost_like_float32(sharded: dict, half: dict) -> None:
    # as whole float32 tables read them
    rows = half["tensors"]["model.encoder.content.item_id.weight"]
    assert torch.equal(rows, rows.bfloat16().float())
    assert half["losses"] != sharded["losses"]
    assert half["losses"] == pytest.approx(sharded["losses"], rel=0.01)


def test_moments_on_the_host_change_nothing(sharded: dict, tmp_path: Path) -> None:
    host = train(train_config(tables=SHARDED, host_state_tables=("item_id",)), tmp_path)
    assert host["losses"] == sharded["losses"]
    assert all(
        torch.equal(tensor, host["tensors"][name]) for name, tensor in sharded["tensors"].items()
    )


@pytest.mark.parametrize("setting", ["bf16", "interleaved"])
def test_tables_give_the_same_rows_under_other_settings(setting: str) -> None:
    scores = []
    for tables in ({}, SHARDED):
        cfg = train_config(tables=tables, precision="bf16" if setting == "bf16" else "fp32")
        # every item is looked up for a token of its own, position and time for two
        if setting == "interleaved":
            attention = replace(cfg.model.attention, window=None, full_rows=0)
            cfg = replace(cfg, model=replace(cfg.model, encoder="hstu", attention=attention))
        torch.manual_seed(0)
        trainee = Trainee(cfg, make_maps(), "cpu", 0, 1)
        for step in range(2):
            trainee.step(labelled_batch(step), step, 2)
        scores.append(trainee.model(labelled_batch(2)))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-4, atol=1e-5)


ENCODERS = {
    "ultra_hstu": {},
    "hstu": {"encoder": "hstu", "attention": {"window": None, "full_rows": 0}},
}


@pytest.mark.parametrize("name", ENCODERS)
def test_the_ranks_are_told_of_every_row_that_gets_a_gradient(name: str) -> None:
    cfg = train_config()
    settings = dict(ENCODERS[name])
    attention = replace(cfg.model.attention, **settings.pop("attention", {}))
    cfg = replace(cfg, model=replace(cfg.model, attention=attention, **settings))
    trainee = Trainee(cfg, make_maps(), "cpu", 0, 2)
    told, found = rows_told_and_found(trainee, labelled_batch(0))
    assert torch.equal(told, found)


def test_codes_that_are_read_beside_the_device_are_kept_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever asked drops them at once; a stream that is behind would read what comes after."""
    trainee = Trainee(train_config(tables=SHARDED), make_maps(), "cpu", 0, 1)
    assert trainee.sharded is not None
    kept: list[int] = []

    def beside(reads: list[torch.Tensor]) -> AbstractContextManager[None]:
        kept.extend(codes.data_ptr() for codes in reads)
        return nullcontext()

    monkeypatch.setattr(trainee.numbers, "beside", beside)
    codes = trainee.model.encoder.table_codes(labelled_batch(0))
    trainee.sharded.ask_counts(codes)
    assert kept == [codes[name].data_ptr() for name in trainee.sharded.tables]


# Rows


def test_rows_of_a_large_table_do_not_depend_on_who_draws_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sharding, "CHUNK_ROWS", 8)
    whole = draw_rows("item_id", (0, 30), 4, torch.float32, "cpu", seed=1)
    parts = [
        draw_rows("item_id", (first, min(first + 11, 30)), 4, torch.float32, "cpu", seed=1)
        for first in (0, 11, 22)
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert whole[0].eq(0).all() and whole[1:].ne(0).all()
    assert whole.std().item() == pytest.approx(0.02, rel=0.2)
    assert len(whole.unique(dim=0)) == 30  # no chunk is drawn from the seed of another
    for other in (
        draw_rows("item.tag", (0, 30), 4, torch.float32, "cpu", 1),
        draw_rows("item_id", (0, 30), 4, torch.float32, "cpu", 2),
    ):
        assert not torch.equal(other, whole)


@pytest.mark.parametrize("placement", ["replicated", "sharded"])
def test_a_large_table_is_drawn_on_its_device(
    placement: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never whole where it is sharded, and with the same rows."""
    monkeypatch.setattr(sharding, "LARGE", 100)
    cfg = train_config(tables={"item_id": placement})
    plan = placed(cfg, VOCAB, world_size=3)
    blocks = [
        TableMaker(plan, rank, "cpu", seed=5)("item_id", 30, 4).weight.detach() for rank in range(3)
    ]
    whole = draw_rows("item_id", (0, 30), 4, torch.float32, "cpu", 5)
    if placement == "sharded":
        assert [len(block) for block in blocks] == [10, 10, 10]
        assert torch.equal(torch.cat(blocks), whole)
    else:
        assert all(torch.equal(block, whole) for block in blocks)


# Placement


def test_auto_shards_what_is_large_when_there_are_several_workers() -> None:
    cfg = train_config(shard_above_mb=0, tables={"item.tag": "replicated"})
    sharded = lambda plan: [name for name, table in plan.items() if table.sharded]
    assert sharded(placed(cfg, VOCAB, 1)) == []
    assert sharded(placed(cfg, VOCAB, 2)) == [
        "item_id",
        "request.tab",
        "user.age",
        "user.city",
    ]
    assert sharded(placed(train_config(), VOCAB, 2)) == []
    assert sharded(placed(train_config(bf16_tables=("item.tag",)), VOCAB, 1)) == ["item.tag"]


def test_the_plan_says_who_holds_which_rows_and_how_much_it_takes() -> None:
    cfg = train_config(
        tables={"item_id": "sharded"}, bf16_tables=("item_id",), host_state_tables=("item_id",)
    )
    described = describe_tables(placed(cfg, VOCAB | {"item_id": 31}, 3))
    assert described["tables"]["item_id"] == {
        "rows": 31,
        "width": 4,
        "dtype": "bfloat16",
        "placement": "sharded",
        "rows_of_ranks": "0-10 | 11-21 | 22-30",
        "weight_bytes": 11 * 4 * 2,
        "state_bytes": 11 * 5 * 4,
        "state_on": "host",
    }
    assert described["tables"]["user.age"]["rows_of_ranks"] == "all"
    model = Trainee(train_config(), make_maps(), "cpu", 0, 1)
    assert set(described["tables"]) == set(model.table_paths)
    whole = describe_tables(placed(train_config(), VOCAB, 1))["total"]
    assert whole["table_weights"] == sum(table.nbytes for table in model.tables.values())
    moments = *model.rowwise.m.values(), *model.rowwise.v.values()
    assert whole["table_state"] == sum(moment.nbytes for moment in moments)
    assert whole["table_state_on_host"] == 0


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (
            {"tables": {"video_id": "sharded"}},
            r"train\.tables must be default or one of the tables .*'video_id'",
        ),
        ({"tables": {"position": "sharded"}}, r"train\.tables .*'position'"),
        ({"bf16_tables": ("item_ids",)}, r"train\.bf16_tables .*'item_ids'"),
        ({"host_state_tables": ("tab",)}, r"train\.host_state_tables .*'tab'"),
        (
            {"tables": {"default": "replicated"}, "bf16_tables": ("item_id",)},
            r"train\.tables\.item_id .*'replicated'",
        ),
    ],
)
def test_a_wrong_placement_is_named(train: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        train_config(**train)


def test_a_table_that_nobody_placed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = train_config()
    plan = placed(cfg, VOCAB, 2)
    with pytest.raises(ValueError, match=r"'user\.shoe_size' of 7 x 3"):
        TableMaker(plan, 0, "cpu", 0)("user.shoe_size", 7, 3)
    with pytest.raises(ValueError, match="'item_id' of 31 x 4"):
        TableMaker(plan, 0, "cpu", 0)("item_id", 31, 4)
    model = torch.nn.ModuleDict({"brand": nn.Embedding(5, 2)})
    with pytest.raises(ValueError, match="table brand is not placed"):
        TableMaker(plan, 0, "cpu", 0).check_tables(model)
