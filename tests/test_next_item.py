"""Losses of a next item against samples of items, and the memory of earlier steps."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.full_softmax.torch_chunked import chunked_log_partition
from pipeline.config import ConfigError, RetrievalConfig
from pipeline.train.alignment import contrast, partners
from pipeline.train.memory import EPS, CrossBatchMemory, MomentFilter, move_moments
from pipeline.train.next_item import NextItemLoss, draw_by_share
from tests.worlds.model import make_maps

NUM_ITEMS, DIM = 12, 5


class FixedHead:
    """Vectors of items that are given, in the place of a trained head."""

    def __init__(self, vectors: Tensor) -> None:
        self.vectors = vectors
        self.score_scale = 1 / 0.5

    def item_vectors(self, codes: Tensor) -> Tensor:
        return self.vectors[codes[:, 0].long() - 1]


def unit_vectors(num: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num, DIM, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=1)


def make_loss(**settings: object) -> NextItemLoss:
    """A loss over 12 items of which item i is a next item i + 1 times; one more was never seen."""
    section = RetrievalConfig(enabled=True, temperature=0.5, dim=DIM, **settings)  # pyright: ignore[reportArgumentType]
    codes = np.zeros((NUM_ITEMS + 2, 2), np.int32)
    codes[1 : NUM_ITEMS + 1, 0] = np.arange(1, NUM_ITEMS + 1)
    counts = np.concatenate([[0], np.arange(1, NUM_ITEMS + 1), [0]])
    maps = replace(make_maps(), item_codes=codes, next_count=counts)
    return NextItemLoss(section, maps, "cpu")


@pytest.mark.parametrize("memory", [False, True])
def test_in_batch_negatives_are_the_other_next_items(memory: bool) -> None:
    loss = make_loss(loss="in_batch", memory="xbm" if memory else "none", memory_size=3)
    head, users = FixedHead(unit_vectors(NUM_ITEMS, 1)), unit_vectors(4, 2)
    item = torch.tensor([3, 7, 3, 0])
    entries = [(head.vectors[i], i) for i in item.tolist()]
    if memory:
        assert loss.memory is not None
        kept = unit_vectors(2, 3)
        loss.memory.keep_vectors(kept, torch.tensor([7, 5]), torch.tensor([1, 1]))
        loss.memory.vectors = loss.memory.vectors.double()
        entries += [(kept[0], 7), (kept[1], 5)]

    share = torch.arange(1.0, NUM_ITEMS + 1, dtype=torch.float64) / 78
    found = loss._in_batch(head, users, item)  # pyright: ignore[reportArgumentType]
    for user, own, value in zip(users, item.tolist(), found, strict=True):
        score = float(user @ head.vectors[own] / 0.5)
        weights = [
            math.exp(float(user @ vector) / 0.5) / (len(entries) * float(share[code]))
            for vector, code in entries
            if code != own
        ]
        expected = math.log(math.exp(score) + sum(weights)) - score
        assert value.item() == pytest.approx(expected, rel=1e-5)

    if memory:  # the newest three, in the order in which they came
        assert loss.memory is not None
        assert loss.memory.codes.tolist() == [0, 3, 7]


def test_a_memory_of_the_steps_own_vectors_changes_neither_loss_nor_gradients() -> None:
    """It stands for the same items, though its vectors take no gradient."""
    item = torch.tensor([3, 7, 3, 0])
    loss = make_loss(loss="in_batch", memory="xbm", memory_size=6, memory_warmup=1)

    found, kept = [], []
    for _ in range(4):
        assert loss.memory is not None
        kept.append(len(loss.memory.codes))
        vectors, users = unit_vectors(NUM_ITEMS, 1).requires_grad_(), unit_vectors(4, 2)
        users.requires_grad_()
        value = loss._in_batch(FixedHead(vectors), users, item).sum()  # pyright: ignore[reportArgumentType]
        found.append((value, *torch.autograd.grad(value, (vectors, users))))

    assert kept == [0, 0, 3, 6]  # the first step is the warm-up
    for later in found[1:]:
        # the memory is float32
        torch.testing.assert_close(later, found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("settings", [{"loss": "popularity"}, {"loss": "in_batch"}])
def test_the_correction_makes_a_sample_stand_for_all_items(settings: dict) -> None:
    """With as many draws as one likes the loss is the full softmax's."""
    loss = make_loss(negatives=200_000, **settings)
    head, user = FixedHead(unit_vectors(NUM_ITEMS, 1)), unit_vectors(1, 2)
    truth = torch.nn.functional.cross_entropy(user @ head.vectors.T / 0.5, torch.tensor([4]))

    torch.manual_seed(0)
    if settings["loss"] == "popularity":
        found = loss._sampled(head, user, torch.tensor([4]), torch.ones(1))  # pyright: ignore[reportArgumentType]
    else:
        assert loss.popularity is not None
        others = draw_by_share(loss.popularity, (200_000, 1))[:, 0]
        item = torch.cat([torch.tensor([4]), others])
        found = loss._in_batch(head, user.expand(len(item), DIM), item)[0]  # pyright: ignore[reportArgumentType]
    assert found.item() == pytest.approx(truth.item(), abs=0.02)


def test_a_large_catalogue_gives_the_same_loss_from_the_used_vectors() -> None:
    """Few draws look up only their own items."""
    loss = make_loss(loss="popularity", negatives=2)
    head, users = FixedHead(unit_vectors(NUM_ITEMS, 1)), unit_vectors(3, 2)
    looked_up: list[int] = []
    head.item_vectors = lambda codes: (
        looked_up.append(len(codes))
        or head.vectors[  # type: ignore[method-assign]
            codes[:, 0].long() - 1
        ]
    )
    values = []
    for chunk in (1, 100):  # 100 users draw more than there are items
        torch.manual_seed(3)
        many = users[:1].expand(chunk, DIM)
        item = torch.full((chunk,), 4)
        values.append(loss._sampled(head, many, item, torch.ones(chunk)))  # pyright: ignore[reportArgumentType]
    assert looked_up[0] <= 3 and looked_up[1] == NUM_ITEMS
    assert all(value.isfinite() for value in values)


def test_draws_follow_their_shares() -> None:
    torch.manual_seed(0)
    share = torch.tensor([0.5, 0.0, 0.2, 0.3])
    counts = torch.bincount(draw_by_share(share, (1000, 100)).flatten(), minlength=4)
    torch.testing.assert_close(counts / counts.sum(), share, atol=0.01, rtol=0)
    assert counts[1] == 0


def test_a_sum_over_nothing_has_no_gradient() -> None:
    users, items = unit_vectors(2, 1).requires_grad_(), unit_vectors(1, 2).requires_grad_()
    codes, own = torch.tensor([6]), torch.tensor([6, 5])
    total = chunked_log_partition(users, items, None, codes, own)
    assert total[0] == -torch.inf
    torch.testing.assert_close(total[1], users[1] @ items[0])

    (torch.logaddexp(torch.zeros(2), total)).sum().backward()
    assert users.grad is not None and torch.equal(users.grad[0], torch.zeros(DIM).double())


def test_moved_vectors_have_the_moments_of_the_step() -> None:
    memory = CrossBatchMemory(
        RetrievalConfig(memory="xbn", loss="in_batch", score="dot", dim=DIM), "cpu"
    )
    ids = torch.arange(6)
    memory.keep_vectors(3 * unit_vectors(6, 1) + 1, ids, ids)
    step = unit_vectors(40, 2)
    memory.match_moments(step)
    torch.testing.assert_close(memory.vectors.mean(0), step.mean(0))
    spread = memory.vectors.std(0, correction=0)
    torch.testing.assert_close(spread, step.std(0, correction=0), rtol=10 * EPS, atol=10 * EPS)


def test_the_gain_converges_to_its_limit() -> None:
    q, r = 0.02, 1 / 25
    followed = MomentFilter(q)
    for _ in range(200):
        followed.update(torch.zeros(2), torch.ones(2), 25)
    assert followed.gain == pytest.approx((-q + math.sqrt(q * q + 4 * q * r)) / (2 * r))


def test_no_noise_gives_the_running_average_and_much_noise_the_step() -> None:
    steps = [unit_vectors(8, seed) for seed in range(5)]
    average, newest = MomentFilter(0.0), MomentFilter(1e12)
    for step in steps:
        moments = step.mean(0), step.std(0, correction=0)
        average.update(*moments, len(step))
        newest.update(*moments, len(step))

    assert average.mean is not None and newest.mean is not None and average.spread is not None
    torch.testing.assert_close(average.mean, torch.stack(steps).mean(1).mean(0))
    torch.testing.assert_close(average.spread, torch.stack(steps).std(1, correction=0).mean(0))
    torch.testing.assert_close(newest.mean, steps[-1].mean(0))
    moved = move_moments(steps[0], *moments)
    torch.testing.assert_close(moved.mean(0), steps[-1].mean(0))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "uniform", "score": "dot"}, "retrieval.score must be cosine where"),
        ({"loss": "uniform", "label_smoothing": 0.1}, "retrieval.label_smoothing must be 0 where"),
        ({"memory": "xbm"}, "retrieval.memory must be none where retrieval.loss is full"),
    ],
)
def test_settings_of_another_loss_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RetrievalConfig(**settings)


def test_partners_are_other_places_with_the_same_item() -> None:
    item = torch.tensor([7, 5, 7, 5, 9, 7])
    assert partners(item).tolist() == [2, 3, 5, 1, 4, 0]


def test_aligned_rows_lose_less_and_a_place_with_the_same_item_is_no_negative() -> None:
    a = unit_vectors(6, 1)
    item = torch.tensor([1, 2, 3, 4, 5, 5])
    near, far = contrast(a, a, item, 0.1), contrast(a, unit_vectors(6, 2), item, 0.1)
    assert near < far

    scores = a @ a.T / 0.1
    scores[4, 5] = scores[5, 4] = -torch.inf
    expected = torch.nn.functional.cross_entropy(scores, torch.arange(6))
    torch.testing.assert_close(near, expected)  # symmetric: both directions are alike
