"""Optimizers, the loop without Ray, checkpoints and exact resumption."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from kernels.rowwise_adamw.reference import rows_and_sums
from pipeline import config
from pipeline.batches.collate import SequenceBatch
from pipeline.config import RunConfig, UserError
from pipeline.model.flops import Flops
from pipeline.model.work import count_work
from pipeline.train import loop
from pipeline.train.average import snapshot_number
from pipeline.train.checkpoint import CheckpointFolder
from pipeline.train.gradients import GradientBuffer
from pipeline.train.meter import prefetch_batches
from pipeline.train.optim import DenseAdamW, RowwiseAdamW, learning_rate_factor
from pipeline.train.trainee import Trainee
from tests.support.ranks import run_ranks
from tests.worlds.model import joined, labelled_batch, make_maps
from tests.worlds.training import STEPS, Loader, run, train_config


class OneEpoch(Loader):
    """The same batches in every epoch: something to learn by heart."""

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        return super().batches(0, first_step)


# Optimizers


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_rowwise_adamw_is_adamw_where_rows_have_one_number(weight_decay: float) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(7, 1))
    plain = nn.Parameter(weight.detach().clone())
    ours = RowwiseAdamW({"w": weight}, weight_decay=weight_decay)
    theirs = torch.optim.AdamW([plain], lr=0.01, weight_decay=weight_decay)
    for _ in range(20):
        grad = torch.randn(7, 1)
        ours.step({"w": (torch.arange(7), grad)}, lr=0.01)
        plain.grad = grad
        theirs.step()
    torch.testing.assert_close(weight, plain)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
def test_rowwise_adamw_by_hand_and_untouched_rows_stay(beta1: float) -> None:
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(4, 3))
    before = weight.detach().clone()
    optimizer = RowwiseAdamW({"w": weight}, betas=(beta1, 0.99), eps=1e-8, weight_decay=0.1)
    m, v = torch.zeros(3), torch.tensor(0.0)
    expected = before[2].clone()
    for step in range(1, 4):
        grad = torch.randn(3)
        optimizer.step({"w": (torch.tensor([2]), grad[None])}, lr=0.1)
        m, v = beta1 * m + (1 - beta1) * grad, 0.99 * v + 0.01 * grad.square().mean()
        update = (m / (1 - beta1**step)) / ((v / (1 - 0.99**step)).sqrt() + 1e-8)
        expected = expected - 0.1 * (update + 0.1 * expected)
    torch.testing.assert_close(weight[2].detach(), expected)
    untouched = torch.tensor([0, 1, 3])
    assert torch.equal(weight[untouched], before[untouched])
    assert ("w" in optimizer.m) == (beta1 > 0)


def test_tables_of_one_width_share_a_store_and_train_as_alone() -> None:
    torch.manual_seed(0)
    names = {"age": (5, 3), "tag": (4, 3), "item": (6, 2)}
    tables = {name: nn.Parameter(torch.randn(shape)) for name, shape in names.items()}
    copies = {name: nn.Parameter(table.detach().clone()) for name, table in tables.items()}
    ours = RowwiseAdamW(tables, weight_decay=0.1)
    alone = {name: RowwiseAdamW({name: table}, weight_decay=0.1) for name, table in copies.items()}
    assert list(ours.stores) == ["width 3", "item"]

    for _ in range(3):
        grads = {}
        for name, (rows, width) in names.items():
            grads[name] = torch.randint(0, rows, (7,)), torch.randn(7, width)
        ours.step(ours.join_rows(grads), 0.1, torch.tensor(2.0))
        for name, each in alone.items():
            each.step({name: grads[name]}, 0.1, torch.tensor(2.0))
    for name, each in alone.items():
        assert torch.equal(tables[name], copies[name]), name
        assert torch.equal(ours.m[name], each.m[name])
        assert torch.equal(ours.v[name], each.v[name])


def test_flat_buffers_train_as_parameters_by_themselves() -> None:
    torch.manual_seed(0)
    layer, plain = nn.Linear(3, 5), nn.Linear(3, 5)
    plain.load_state_dict(layer.state_dict())
    parameters = dict(layer.named_parameters())
    ours = DenseAdamW(parameters, lr=0.1, weight_decay=0.1)
    theirs = torch.optim.AdamW(plain.parameters(), lr=0.1, weight_decay=0.1, fused=True)

    for step in range(4):
        x, total = torch.randn(2, 3), torch.tensor(3.0)
        ours.buffer.clear()
        layer(x).square().sum().backward()
        ours.buffer.collect()
        norms, whole = ours.divide_and_clip(total, 0.5)
        skip = torch.tensor(step == 2)
        ours.step(0.05, skip)
        theirs.zero_grad()
        plain(x).square().sum().backward()
        for parameter in plain.parameters():
            assert parameter.grad is not None
            parameter.grad /= total
        expected = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None])
        assert torch.equal(norms, expected)
        assert torch.equal(whole, nn.utils.clip_grad_norm_(plain.parameters(), 0.5))
        theirs.param_groups[0]["lr"] = 0.05
        if not skip:
            theirs.step()
    for name, parameter in plain.named_parameters():
        assert torch.equal(parameters[name], parameter)
        assert torch.equal(ours.state[name]["exp_avg"], theirs.state[parameter]["exp_avg"])
    assert ours.step_count == 3


def test_gradients_are_those_of_the_last_backward_and_zero_without_one() -> None:
    """Of two backward passes the second leaves out a parameter, and adds nothing to the other."""
    parameters = {name: torch.nn.Parameter(torch.ones(3)) for name in ("a", "b")}
    buffer = GradientBuffer(parameters)
    for weights in ({"a": 2.0, "b": 5.0}, {"a": 3.0}):
        buffer.clear()
        sum(weight * parameters[name].sum() for name, weight in weights.items()).backward()
        buffer.collect()

    assert [view.tolist() for view in buffer.views] == [[3.0] * 3, [0.0] * 3]
    assert parameters["a"].grad is buffer.views[0]
    assert buffer.flat[buffer.places["a"]].tolist() == [3.0] * 3


def test_rows_and_sums_adds_repeated_rows() -> None:
    rows, sums = rows_and_sums(
        torch.tensor([5, 2, 5, 0]), torch.tensor([[1.0], [2.0], [3.0], [4.0]])
    )
    assert rows.tolist() == [0, 2, 5]
    assert sums.flatten().tolist() == [4.0, 2.0, 4.0]


def test_schedule() -> None:
    factors = [learning_rate_factor(step, 4, 20) for step in range(21)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[12] == pytest.approx(0.5)
    assert factors[20] == 0.0


# The loop


def test_training_lowers_the_loss() -> None:
    cfg = train_config(epochs=20, lr=0.02)
    lines, _ = run(replace(cfg, model=replace(cfg.model, dropout=0.0)), OneEpoch())
    assert lines[-1]["train/loss"] < 0.6 * lines[0]["train/loss"]


def test_bf16_follows_fp32() -> None:
    losses = [
        run(train_config(precision=precision))[0][-1]["train/loss"]
        for precision in ("fp32", "bf16")
    ]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_the_work_of_an_example_is_told_with_its_steps() -> None:
    lines = []
    loop.train(
        train_config(), make_maps(), Loader(), "data", log=lambda _, values: lines.append(values)
    )
    work = Flops()
    for step in range(2):  # log_every
        work.add(
            count_work(
                joined([labelled_batch(10 * step + part) for part in range(2)]), train_config()
            )
        )
    assert lines[0]["train/gflop_per_example"] == pytest.approx(3 * work.flops / 20 / 1e9)


@pytest.mark.parametrize("average_from", [None, 0.5])
@pytest.mark.parametrize("stopped_at", [5, 10, 12])
def test_a_resumed_run_ends_like_an_unbroken_one(
    stopped_at: int, average_from: float | None, tmp_path: Path
) -> None:
    """From a checkpoint inside an epoch, between two lines of metrics, and from the last one;
    through the files.
    """
    cfg = train_config(checkpoint_every=5, average_from=average_from, average_every=2)
    folder = CheckpointFolder(tmp_path, keep=3)
    lines, weights = run(cfg, checkpoints=folder)
    assert [path.name for path in folder.folders()] == [
        "step_00000005",
        "step_00000010",
        "step_00000012",
    ]
    resumed, resumed_weights = run(cfg, resume=folder.read(folder.at(stopped_at)))
    assert resumed == [line for line in lines if line["step"] > stopped_at]
    for name, tensor in weights.items():
        assert torch.equal(tensor, resumed_weights[name]), name


def test_checkpoints_and_validations_are_reported_once_and_in_order(tmp_path: Path) -> None:
    """With the newest line of metrics; lines alone are not, since every rank waits for a report."""
    told = []

    def report(values: dict[str, float], folder: Path | None) -> None:
        assert folder is None or (folder / "artifact.json").exists()
        name = None if folder is None else folder.name
        told.append((values["step"], name, values.get("val_sample/ne"), "train/loss" in values))

    cfg = train_config(checkpoint_every=4, validate_every=6)
    folder = CheckpointFolder(tmp_path, keep=3)
    found = iter([0.9, 0.95])
    run(cfg, checkpoints=folder, validate=lambda _: {"val_sample/ne": next(found)}, report=report)
    assert told == [
        (4, "step_00000004", None, True),
        (6, "step_00000006", 0.9, True),  # the best so far
        (8, "step_00000008", 0.9, True),
        (12, "step_00000012", 0.95, True),
    ]


def test_averaged_weights_are_the_mean_of_snapshots(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=20)
    lines, last = run(train_config(checkpoint_every=1), checkpoints=folder)
    averaged_lines, averaged = run(train_config(average_from=0.5, average_every=2))
    assert averaged_lines == lines  # the run itself goes its own way
    snapshots = []
    for step in (6, 8, 10, 12):
        trainee = Trainee(train_config(), make_maps(), "cpu", 0, 1)
        trainee.load_checkpoint(folder.read(folder.at(step)))
        snapshots.append(trainee.model.state_dict())
    for name, tensor in averaged.items():
        torch.testing.assert_close(
            tensor, torch.stack([weights[name] for weights in snapshots]).mean(0)
        )
        assert not torch.equal(tensor, last[name]), name


@pytest.mark.parametrize(
    ("total", "begin", "every"), [(10, 0.9, 1), (9, 0.0, 3), (7, 0.5, 2), (3, 0.99, 50)]
)
def test_snapshots_are_numbered_from_one_and_end_with_the_run(
    total: int, begin: float, every: int
) -> None:
    numbers = [snapshot_number(step, total, begin, every) for step in range(1, total + 1)]
    taken = [number for number in numbers if number is not None]
    assert taken == list(range(1, len(taken) + 1))
    assert numbers[-1] == len(taken)
    assert all(
        step >= begin * total for step, number in enumerate(numbers, 1) if number is not None
    )


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=3)
    run(train_config(), checkpoints=folder)
    saved = folder.read(folder.at(4))
    with pytest.raises(UserError, match=r"train\.lr = 0\.01 .* 0\.02"):
        run(train_config(lr=0.02), resume=saved)
    run(train_config(log_every=3), resume=saved)  # how a run is carried out may change
    longer = Loader()
    longer.steps_per_epoch = STEPS + 1
    with pytest.raises(UserError, match=r"6 steps an epoch .* 7"):
        run(train_config(), longer, resume=saved)


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, Path, list[dict]]:
    """An unbroken run of two ranks, its folder of checkpoints, and what both ranks say."""
    cfg = train_config(grad_clip=1e6)
    cfg = replace(cfg, model=replace(cfg.model, dropout=0.0))
    folder = tmp_path_factory.mktemp("two")
    return cfg, folder / "checkpoints", on_two_ranks(cfg, folder)


def on_two_ranks(cfg: RunConfig, folder: Path, killed_at: int | None = None) -> list[dict]:
    """Both ranks' losses by step, and weights; from the newest checkpoint in the folder where there
    is one. The second is killed when it would begin the step `killed_at`.
    """
    (folder / "cfg.json").write_text(json.dumps(config.to_dict(cfg)))
    run_ranks(one_of_two, (str(folder), killed_at), 2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


class DyingLoader(Loader):
    """One whose process is killed in the place of a batch."""

    def __init__(self, rank: int, killed_at: int) -> None:
        super().__init__(rank, 2)
        self.killed_at = killed_at

    def batches(self, epoch: int, first_step: int = 0) -> Iterator[SequenceBatch]:
        for step, batch in enumerate(super().batches(epoch, first_step), first_step):
            if epoch * STEPS + step == self.killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch


def one_of_two(rank: int, folder: str, killed_at: int | None) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    cfg = config.from_dict(json.loads(Path(folder, "cfg.json").read_text()))
    checkpoints = CheckpointFolder(Path(folder, "checkpoints"), 3, rank, 2)
    options = {
        "rank": rank,
        "world_size": 2,
        "resume": checkpoints.newest(),
        "checkpoints": checkpoints,
    }
    dies = killed_at is not None and rank == 1
    loader = DyingLoader(rank, killed_at) if dies else Loader(rank, 2)
    lines, weights = run(cfg, loader, **options)
    torch.save(
        {"weights": weights, "losses": {line["step"]: line["train/loss"] for line in lines}},
        f"{folder}/{rank}.pt",
    )
    dist.destroy_process_group()


def test_two_ranks_equal_one_with_both_halves(
    two_ranks: tuple[RunConfig, Path, list[dict]],
) -> None:
    cfg, _, results = two_ranks
    lines, weights = run(cfg)
    for name, tensor in weights.items():
        assert torch.equal(results[0]["weights"][name], results[1]["weights"][name]), name
        torch.testing.assert_close(
            results[0]["weights"][name], tensor, rtol=1e-4, atol=1e-6, msg=name
        )
    assert results[0]["losses"] == pytest.approx(
        {line["step"]: line["train/loss"] for line in lines}, abs=1e-6
    )


def test_from_two_ranks_to_one_and_back(
    two_ranks: tuple[RunConfig, Path, list[dict]], tmp_path: Path
) -> None:
    """Two ranks to step 4, one to step 8, two to the end: the losses of the unbroken run."""
    cfg, unbroken, expected = two_ranks
    folder = CheckpointFolder(tmp_path / "checkpoints", 3)
    shutil.copytree(unbroken / "step_00000004", folder.at(4))
    lines, _ = run(cfg, resume=folder.newest(), checkpoints=folder)
    shutil.rmtree(folder.at(12))
    (result, _) = on_two_ranks(cfg, tmp_path)
    found = {line["step"]: line["train/loss"] for line in lines if line["step"] <= 8} | result[
        "losses"
    ]
    assert sorted(found) == [6, 8, 10, 12]
    for step, loss in found.items():
        assert loss == pytest.approx(expected[0]["losses"][step], rel=1e-5), step
    for name, tensor in result["weights"].items():
        torch.testing.assert_close(
            tensor, expected[0]["weights"][name], rtol=1e-4, atol=1e-6, msg=name
        )


def test_one_rank_goes_on_where_two_were_when_one_of_them_was_killed(
    two_ranks: tuple[RunConfig, Path, list[dict]], tmp_path: Path
) -> None:
    cfg, _, expected = two_ranks
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):  # pyright: ignore[reportPrivateImportUsage]
        on_two_ranks(cfg, tmp_path, killed_at=10)

    # that of step 8, or where the killed rank had not yet written its part of it, of step 4
    folder = CheckpointFolder(tmp_path / "checkpoints", 3)
    saved = folder.newest()
    assert saved is not None and saved.state.step in (4, 8)
    lines, weights = run(cfg, resume=saved, checkpoints=folder)
    assert lines[-1]["step"] == 12
    for line in lines:
        assert line["train/loss"] == pytest.approx(expected[0]["losses"][line["step"]], rel=1e-5)
    for name, tensor in weights.items():
        torch.testing.assert_close(
            tensor, expected[0]["weights"][name], rtol=1e-4, atol=1e-6, msg=name
        )


def test_an_error_of_the_loader_is_seen() -> None:
    def broken() -> Iterator[SequenceBatch]:
        yield labelled_batch(0)
        raise UserError("bucket 3 cannot be read")

    with pytest.raises(UserError, match="bucket 3"):
        list(prefetch_batches(broken()))
