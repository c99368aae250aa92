"""LARES's second stage: its loss against plain loops, what a start and equal rewards do to it, and
a run that goes on.
"""

import math
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pipeline.batches.collate import SequenceBatch
from pipeline.batches.features import FeatureMaps, fit_features
from pipeline.batches.loader import TrainLoader
from pipeline.batches.steps import step_plan
from pipeline.config import ConfigError, RetrievalConfig, RunConfig, UserError
from pipeline.model.artifact import load_model
from pipeline.model.ranker import RankingModel
from pipeline.train import loop, reinforcement
from pipeline.train.checkpoint import CheckpointFolder
from pipeline.train.reinforcement import (
    StochasticPass,
    group_advantages,
    item_places,
    place_rewards,
    step_log_shares,
)
from pipeline.train.trainee import Trainee
from pipeline.train.warm_start import load_start, start_from
from tests.worlds.tiny import publish_sequences, save_tiny_model, tiny_config
from tests.worlds.training import rows_told_and_found

MODEL = {
    "encoder": "lares",
    "d_model": 16,
    "d_qk": 8,
    "d_v": 8,
    "num_layers": 1,
    "dropout": 0.1,
    "attention": {"window": None, "scaling_seq_len": 16},
    "loop": {"pre_layers": 1, "steps": 2},
}
FIRST = {"enabled": True, "dim": 8, "temperature": 0.2, "align_steps": 0.1}
SECOND = {"enabled": True, "dim": 8, "temperature": 0.2, "reinforce": "ndcg_10"}
TRAIN = {"init": "champion", "replay_share": 1.0, "max_targets_per_sequence": 6}


def stage(folder: Path, retrieval: dict, **sections: dict) -> RunConfig:
    given = {
        "features": {"request": {"tab": {"dim": 2}}},
        "model": MODEL,
        "tasks": [],
        "train": TRAIN,
        "retrieval": retrieval,
    }
    return tiny_config(folder, **given | sections)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With sequences, and a model of the first stage."""
    folder = tmp_path_factory.mktemp("reinforcement")
    cfg = stage(folder, FIRST)
    publish_sequences(cfg)
    save_tiny_model(cfg, cfg.model_dir)
    return folder


@pytest.fixture(scope="module")
def maps(folder: Path) -> FeatureMaps:
    return load_model(stage(folder, FIRST).model_dir).maps


@pytest.fixture(scope="module")
def batch(folder: Path, maps: FeatureMaps) -> SequenceBatch:
    cfg = stage(folder, SECOND)
    return next(TrainLoader(cfg, maps, step_plan(cfg)).batches(0))


def started(cfg: RunConfig, maps: FeatureMaps) -> Trainee:
    """At the model of the first stage."""
    trainee = Trainee(cfg, maps, "cpu", 0, 1)
    load_start(trainee, start_from(cfg, cfg.model_dir), maps, cfg.features)
    trainee.keep_start()
    trainee.model.train()
    return trainee


def gradients(trainee: Trainee, loss: Tensor) -> list[Tensor]:
    weights = [*trainee.model.parameters()]
    found = torch.autograd.grad(loss, weights, allow_unused=True, retain_graph=True)
    return [grad.to_dense() for grad in found if grad is not None]


def noisy_start(folder: Path, maps: FeatureMaps, **retrieval: object) -> Trainee:
    """At the first stage's weights with noise: no longer where its loss holds it."""
    trainee = started(stage(folder, SECOND | retrieval), maps)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in trainee.model.parameters():
            weight.add_(torch.randn_like(weight) * 0.05)
    return trainee


def losses_of(
    trainee: Trainee, batch: SequenceBatch
) -> tuple[list[StochasticPass], Tensor, Tensor]:
    """The passes that the generators give next, and the sums of their losses and weights."""
    assert trainee.reinforcement is not None and trainee.next_item is not None
    passes = trainee.reinforcement.read_passes(trainee.model, batch)
    codes = trainee.next_item.read_codes()
    return passes, *trainee.reinforcement(trainee.model, passes, batch, codes)


def log_shares(model: RankingModel, row: Tensor, codes: Tensor, temperature: float) -> Tensor:
    """[items], of one row of the encoder."""
    assert model.retrieval is not None
    user = torch.nn.functional.normalize(model.retrieval.user(row), dim=0)
    items = torch.nn.functional.normalize(model.retrieval.item_vectors(codes), dim=1)
    return (items @ user / temperature).log_softmax(0)


def plain_reward(shares: Tensor, item: int) -> float:
    ahead = 0
    for other, share in enumerate(shares.tolist()):
        ahead += other != item and share >= shares[item].item()
    return 1 / math.log2(ahead + 2) if ahead < 10 else 0.0


def slow_loss(
    trainee: Trainee, passes: list[StochasticPass], batch: SequenceBatch, cfg: RetrievalConfig
) -> tuple[Tensor, float]:
    """A sum with the gradient of the loss, and the value of the loss: row by row, pass by pass,
    step by step.
    """
    assert trainee.next_item is not None and trainee.reinforcement is not None
    assert batch.next_code is not None and batch.next_weight is not None
    model, start_model = trainee.model, trainee.reinforcement.start
    codes = trainee.next_item.item_codes
    total, value = torch.zeros(()), 0.0

    for row, item in enumerate((batch.next_code - 1).tolist()):
        weight = float(batch.next_weight[row]) / len(passes)
        rewards = []
        for one in passes:
            assert one.encoded.every_step is not None
            last = one.encoded.every_step[-1][row]
            rewards.append(plain_reward(log_shares(model, last, codes, cfg.temperature), item))

        for reward, one in zip(rewards, passes, strict=True):
            assert one.encoded.every_step is not None and one.start.every_step is not None
            advantage = (reward - statistics.mean(rewards)) / (statistics.stdev(rewards) + 1e-4)
            value += weight * (1 - reward)

            steps = list(zip(one.encoded.every_step, one.start.every_step, strict=True))
            for now, then in steps:
                share = log_shares(model, now[row], codes, cfg.temperature)[item]
                start = log_shares(start_model, then[row], codes, cfg.temperature)[item]
                apart = start - share
                drift = cfg.reinforce_kl * (apart.exp() - apart - 1)
                total = total + weight / len(steps) * (drift - advantage * share)
                value += weight / len(steps) * drift.item()
    return total, value


def test_the_loss_and_its_gradients_against_plain_loops(
    folder: Path, maps: FeatureMaps, batch: SequenceBatch
) -> None:
    trainee = noisy_start(folder, maps, reinforce_kl=0.7, reinforce_passes=3)
    cfg = stage(folder, SECOND | {"reinforce_kl": 0.7}).retrieval
    passes, loss, weight = losses_of(trainee, batch)
    lengths = {len(one.encoded.every_step or ()) for one in passes}
    assert len(lengths) > 1, "passes of several lengths"

    expected, value = slow_loss(trainee, passes, batch, cfg)
    assert batch.next_weight is not None
    torch.testing.assert_close(weight, batch.next_weight.sum().view(1))
    torch.testing.assert_close(loss.item(), value, rtol=1e-4, atol=1e-4)
    found, plain = gradients(trainee, loss), gradients(trainee, expected)
    for grad, other in zip(found, plain, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-3, atol=1e-4 * largest(plain))


def largest(grads: list[Tensor]) -> float:
    sizes = [grad.abs().max().item() for grad in grads]
    assert max(sizes) > 1e-3
    return max(sizes)


def test_at_its_start_nothing_holds_the_model(
    folder: Path, maps: FeatureMaps, batch: SequenceBatch
) -> None:
    """The start reads with the draws of the pass, dropout too, so that both agree to the bit."""
    found = []
    for kl in (0.0, 100.0):
        trainee = started(stage(folder, SECOND | {"reinforce_kl": kl}), maps)
        torch.manual_seed(3)
        passes, loss, _ = losses_of(trainee, batch)
        for one in passes:
            assert one.encoded.every_step is not None and one.start.every_step is not None
            for now, then in zip(one.encoded.every_step, one.start.every_step, strict=True):
                assert torch.equal(now, then)
        found.append(gradients(trainee, loss))

    assert largest(found[0]) > 0
    for grad, held in zip(*found, strict=True):
        torch.testing.assert_close(grad, held, rtol=1e-4, atol=1e-5 * largest(found[0]))


def test_equal_rewards_have_no_gradient_but_that_of_the_start(
    folder: Path, maps: FeatureMaps, batch: SequenceBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reinforcement, "place_rewards", lambda place, kind: torch.ones(len(place)))
    free = noisy_start(folder, maps, reinforce_kl=0.0)
    _, loss, _ = losses_of(free, batch)
    assert loss.item() == 0
    assert all((grad == 0).all() for grad in gradients(free, loss))

    _, loss, _ = losses_of(noisy_start(folder, maps, reinforce_kl=1.0), batch)
    assert loss.item() > 0


def test_places_rewards_and_advantages_by_hand() -> None:
    items = torch.tensor([[3.0], [1.0], [2.0], [2.0]])
    users = torch.ones(4, 1)
    places = item_places(users, items, torch.tensor([0, 1, 2, 3]))
    assert places.tolist() == [1, 4, 3, 3], "the last of those with its score"

    place = torch.tensor([1, 2, 3, 10, 11])
    assert place_rewards(place, "recall_10").tolist() == [1, 1, 1, 1, 0]
    gains = [1, 1 / math.log2(3), 1 / 2, 1 / math.log2(11), 0]
    torch.testing.assert_close(place_rewards(place, "ndcg_10"), torch.tensor(gains))

    advantage = group_advantages(torch.tensor([[1.0, 0.5], [0, 0.5], [0, 0.5], [0, 0.5]]))
    expected = torch.tensor([[1.5, 0], [-0.5, 0], [-0.5, 0], [-0.5, 0]])
    torch.testing.assert_close(advantage, expected, rtol=1e-3, atol=0)


def test_a_step_makes_the_better_passes_likelier(
    folder: Path, maps: FeatureMaps, batch: SequenceBatch
) -> None:
    """With the same draws before and after, held against the worse ones of each history."""
    trainee = started(stage(folder, SECOND), maps)

    def weighed(grad: bool) -> Tensor:
        torch.manual_seed(4)
        passes, loss, _ = losses_of(trainee, batch)
        if grad:
            loss.sum().backward()
        head, next_item = trainee.model.retrieval, trainee.next_item
        assert head is not None and next_item is not None
        items = head.item_vectors(next_item.item_codes)
        shares = []
        for one in passes:
            shares.append(step_log_shares(head, one.encoded, items, batch.next_code - 1).mean(0))
        return torch.stack(shares).detach()

    before = weighed(True)
    advantage = pass_advantages(trainee, batch)
    with torch.no_grad():
        for weight in trainee.model.parameters():
            if weight.grad is not None:
                weight.sub_(1e-4 * weight.grad.to_dense())
    rise = weighed(False) - before
    assert (rise * advantage).mean() > 0


def pass_advantages(trainee: Trainee, batch: SequenceBatch) -> Tensor:
    """[G, P], of the passes that the seed 4 gives."""
    torch.manual_seed(4)
    passes, _, _ = losses_of(trainee, batch)
    head, next_item = trainee.model.retrieval, trainee.next_item
    assert head is not None and next_item is not None and batch.next_code is not None
    items = head.item_vectors(next_item.item_codes)
    rewards = []
    for one in passes:
        assert one.encoded.next_rows is not None
        place = item_places(head.user_vectors(one.encoded.next_rows), items, batch.next_code - 1)
        rewards.append(place_rewards(place, "ndcg_10"))
    return group_advantages(torch.stack(rewards))


class Repeated:
    """The same batch in every step."""

    steps_per_epoch = 6

    def __init__(self, batch: SequenceBatch) -> None:
        self.batch = batch

    def batches(self, epoch: int, first_step: int = 0):
        for _ in range(first_step, self.steps_per_epoch):
            yield self.batch


def test_a_run_that_goes_on_ends_alike(
    folder: Path, maps: FeatureMaps, batch: SequenceBatch, tmp_path: Path
) -> None:
    """The checkpoint knows the start that the loss holds the model near."""
    train = TRAIN | {"epochs": 1, "log_every": 3, "checkpoint_every": 3}
    cfg = stage(folder, SECOND, train=train)

    def begin_with(trainee: Trainee) -> None:
        load_start(trainee, start_from(cfg, cfg.model_dir), maps, cfg.features)

    checkpoints = CheckpointFolder(tmp_path, keep=5)
    lines: list[dict[str, float]] = []
    whole = loop.train(
        cfg,
        maps,
        Repeated(batch),
        "data",
        checkpoints=checkpoints,
        log=lambda step, values: lines.append(values),
        begin_with=begin_with,
    )
    first, last = (lines[i]["train/loss/next_item"] for i in (0, -1))
    assert last != first

    saved = checkpoints.read(checkpoints.at(3))
    rest = loop.train(cfg, maps, Repeated(batch), "data", resume=saved, begin_with=begin_with)
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, rest.state_dict()[name]), name


def test_the_ranks_are_told_of_the_rows_of_every_pass(
    folder: Path, maps: FeatureMaps, batch: SequenceBatch
) -> None:
    trainee = Trainee(stage(folder, SECOND), maps, "cpu", 0, 2)
    told, found = rows_told_and_found(trainee, batch)
    assert torch.equal(told, found)


def test_a_table_that_its_size_shards_is_refused(folder: Path) -> None:
    """The start is whole on each rank."""
    user = {"user": {"city": {"dim": 4}}, "user_tokens": {"place": ["city"]}}
    tables = {"item_id": "replicated", "request.tab": "replicated"}
    train = TRAIN | {"num_workers": 2, "shard_above_mb": 0, "tables": tables}
    features = {"request": {"tab": {"dim": 2}}} | user
    cfg = stage(folder, SECOND, features=features, train=train)
    with pytest.raises(UserError, match=r"user\.city is sharded .* and retrieval\.reinforce"):
        Trainee(cfg, fit_features(cfg), "cpu", 0, 2)


def test_it_starts_from_a_first_stage_with_other_settings_of_the_loss(folder: Path) -> None:
    cfg = stage(folder, SECOND)
    start_from(cfg, cfg.model_dir)
    other = stage(folder, SECOND | {"temperature": 0.3})
    with pytest.raises(UserError, match=r"retrieval\.temperature"):
        start_from(other, cfg.model_dir)


@pytest.mark.parametrize(
    ("retrieval", "sections", "message"),
    [
        ({"loss": "in_batch"}, {}, "retrieval.loss must be full"),
        ({"label_smoothing": 0.1}, {}, "retrieval.label_smoothing must be 0"),
        ({"align_steps": 0.1}, {}, "retrieval.align_steps must be 0"),
        ({"enabled": False}, {"tasks": ["is_click"]}, "retrieval.enabled must be true"),
        ({}, {"train": TRAIN | {"init": "random"}}, "train.init must be champion"),
        ({}, {"model": MODEL | {"encoder": "hstu"}}, "model.encoder must be lares"),
        ({}, {"model": MODEL | {"loop": {"noise": 0}}}, "model.loop.noise must be above 0"),
    ],
)
def test_what_it_cannot_go_with_is_refused_by_name(
    tmp_path: Path, retrieval: dict, sections: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        stage(tmp_path, SECOND | retrieval, **sections)
