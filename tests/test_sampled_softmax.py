"""Sampled softmax against its definition in float64: values, gradients, collisions, repeats, and
the full softmax.
"""

import math

import pytest
import torch
from torch import Tensor

from kernels.sampled_softmax import half_launch, torch_chunked, triton_launch
from kernels.sampled_softmax.op import SampledSoftmax, draw_negatives, sampled_softmax
from kernels.sampled_softmax.reference import normalise
from tests.support.accuracy import assert_as_accurate

CASES = {  # positions, items, negatives, width
    "one": (1, 1, 1, 1),
    "odd": (7, 13, 9, 5),
    "few items, so collisions and repeats": (9, 3, 20, 8),
    "no negatives": (3, 4, 0, 6),
    "items in parts": (40, 2, 11, 4),
    "no positions": (0, 5, 3, 4),
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_chunked, "CHUNK", 300)
    monkeypatch.setattr(triton_launch, "TILE", 32)
    monkeypatch.setattr(triton_launch, "LONGEST_PART", 50)
    monkeypatch.setattr(half_launch, "TILE", 32)
    monkeypatch.setattr(half_launch, "LONGEST_PART", 50)
    # new tensors start as NaN, so that what is not written shows
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def make_case(name: str) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    num_positions, num_items, num_negatives, dim = CASES[name]
    generator = torch.Generator().manual_seed(0)
    users, items = (torch.randn(n, dim, generator=generator) for n in (num_positions, num_items))
    users[:1] *= 1e-9  # below the norm's bound
    items[-1:] *= 1e-8
    positives = torch.randint(num_items, (num_positions,), generator=generator)
    negatives = draw_negatives(num_items, num_positions, num_negatives, generator=generator)
    weights = torch.rand(num_positions, generator=generator)
    weights[2:3] = 0
    return users, items, positives, negatives, weights


def loss_and_grads(
    form, users: Tensor, items: Tensor, *rest: Tensor, log_rates: Tensor | None = None
) -> list[Tensor]:
    leaves = users.clone().requires_grad_(), items.clone().requires_grad_()
    if form == "reference":
        *ids, weights = rest
        loss = sampled_softmax(
            *leaves,
            *ids,
            weights=weights.to(users.dtype),
            log_rates=log_rates,
            backend="reference",
        )
    else:
        loss = SampledSoftmax.apply(*leaves, *rest, 0.05, form, log_rates)
    return [loss.detach(), *torch.autograd.grad(3 * loss, leaves)]


@pytest.mark.parametrize("rated", [False, True])
@pytest.mark.parametrize("name", [name for name in CASES if name != "no positions"])
def test_loss_and_gradients(name: str, rated: bool) -> None:
    users, items, positives, negatives, weights = make_case(name)
    rest = positives, negatives, weights
    rates = torch.linspace(-3, 5, len(items)) if rated else None
    wide = None if rates is None else rates.double()
    truth = loss_and_grads("reference", users.double(), items.double(), *rest, log_rates=wide)
    plain = loss_and_grads("reference", users, items, *rest, log_rates=rates)
    for form in (torch_chunked, triton_launch):
        fast, again = (loss_and_grads(form, users, items, *rest, log_rates=rates) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)), form.__name__
        assert_as_accurate(fast, plain, truth, num_terms=negatives.numel() + len(positives))


# positions, items and negatives, pairs that one program adds, the largest key of 16 bits
IN_FLOAT16 = {
    "one item a key": (7, 13, 9, 50, 13),
    "two items a key": (7, 13, 40, 50, 7),
    "keys of 32 bits": (7, 13, 9, 50, 6),
    "two items a key, in parts": (12, 3, 7, 20, 2),
    "one item a key, in parts": (12, 3, 7, 9, 3),
}


@pytest.mark.parametrize("name", IN_FLOAT16)
def test_in_float16(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Vectors of length 1 that float16 holds exactly: scores are exact, and shares have 11 bits."""
    num_positions, num_items, num_negatives, longest, short_keys = IN_FLOAT16[name]
    monkeypatch.setattr(half_launch, "LONGEST_PART", longest)
    monkeypatch.setattr(half_launch, "SHORT_KEYS", short_keys)
    generator = torch.Generator().manual_seed(2)
    users, items = (
        torch.randint(2, (count, 4), generator=generator).float() - 0.5
        for count in (num_positions, num_items)
    )
    positives = torch.randint(num_items, (num_positions,), generator=generator)
    negatives = draw_negatives(num_items, num_positions, num_negatives, generator=generator)
    weights = torch.rand(num_positions, generator=generator)
    weights[2] = 0

    for rates in (None, torch.linspace(-3, 5, num_items)):
        rest = positives, negatives, weights
        wide = None if rates is None else rates.double()
        truth = loss_and_grads("reference", users.double(), items.double(), *rest, log_rates=wide)
        fast = loss_and_grads(half_launch, users, items, *rest, log_rates=rates)
        torch.testing.assert_close(fast[0].double(), truth[0], rtol=1e-5, atol=1e-6)
        for got, expected in zip(fast[1:], truth[1:], strict=True):
            assert (got - expected).norm() <= 2**-10 * expected.norm()
    again = loss_and_grads(half_launch, users, items, *rest, log_rates=rates)
    assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True))


def test_further_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(half_launch, "LONGEST_PART", 4)
    key, part = half_launch.further_parts(torch.tensor([0, 3, 12, 16, 28]), 5)
    assert (key.tolist(), part[:4].tolist()) == ([1, 1, 3, 3, 4], [1, 2, 1, 2])
    assert half_launch.further_parts(torch.tensor([0, 3]), 0)[0].tolist() == []


def test_float16_where_11_bits_are_allowed() -> None:
    users, items, positives, negatives, _ = make_case("odd")
    call = lambda dtype=torch.float32, tf32=None: sampled_softmax(
        users.to(dtype), items.to(dtype), positives, negatives, tf32=tf32, backend="triton"
    ).item()
    exact, few_bits = call(tf32=False), call(tf32=True)
    assert few_bits != exact
    assert few_bits == pytest.approx(exact, rel=1e-2)

    # by PyTorch's own setting, which is none of the argument's
    torch.set_float32_matmul_precision("high")
    try:
        assert (call(), call(tf32=False)) == (few_bits, exact)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert call() == exact
    # numbers of 8 bits need no more than 11
    assert call(torch.bfloat16, tf32=False) == call(torch.bfloat16, tf32=True)


def test_no_positions() -> None:
    users, items, positives, negatives, _ = make_case("no positions")
    for form in (torch_chunked, triton_launch, half_launch):
        losses, lse, grad = form.forward(users, items, positives, negatives, 0.05)
        assert (losses.shape, lse.shape, grad.shape) == ((0,), (0,), (0, 4))
        share = torch.zeros(0)
        grad = form.item_gradients(users, items, positives, negatives, losses, lse, share, 0.05)
        assert torch.equal(grad, torch.zeros(5, 4))


def test_all_other_items_once_is_the_full_softmax() -> None:
    generator = torch.Generator().manual_seed(1)
    users, items = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (5, 6))
    positives = torch.tensor([0, 5, 2, 2, 1])
    others = torch.stack(
        [torch.tensor([i for i in range(6) if i != p]) for p in positives.tolist()]
    )
    scores = normalise(users) @ normalise(items).T / 0.05
    expected = torch.nn.functional.cross_entropy(scores, positives)
    torch.testing.assert_close(sampled_softmax(users, items, positives, others), expected)


def test_a_negative_that_is_the_positive_counts_for_nothing() -> None:
    users, items = torch.ones(1, 2), torch.tensor([[1.0, 1.0], [1.0, 0.0]])
    loss = sampled_softmax(
        users, items, torch.tensor([0]), torch.tensor([[0, 0, 1]]), temperature=1.0
    )
    assert loss.item() == pytest.approx(math.log(1 + math.exp(math.sqrt(0.5) - 1)))


def test_gradients_in_float64() -> None:
    generator = torch.Generator().manual_seed(0)
    users, items = (
        torch.randn(n, 3, generator=generator, dtype=torch.float64).requires_grad_() for n in (4, 5)
    )
    positives, negatives = torch.tensor([0, 1, 4, 4]), draw_negatives(5, 4, 6, generator=generator)
    weights = torch.tensor([1.0, 0.0, 2.0, 0.5])
    call = lambda u, i: sampled_softmax(
        u, i, positives, negatives, weights=weights, temperature=0.5
    )
    assert torch.autograd.gradcheck(call, (users, items))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users_PD": torch.ones(2, 3)}, r"users must be \[P, D\] and items \[N, D\]"),
        ({"negatives": torch.zeros(3, 4, dtype=torch.int64)}, r"negatives \[2, R\]"),
        ({"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ({"weights": torch.ones(3)}, r"weights must be \[2\], got \(3,\)"),
        ({"log_rates": torch.ones(2)}, r"log_rates must be \[5\], got \(2,\)"),
        ({"backend": "triton"}, "needs CUDA"),
    ],
)
def test_what_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    fitting = {
        "users_PD": torch.ones(2, 4),
        "items_ND": torch.ones(5, 4),
        "positives": torch.tensor([0, 4]),
    }
    fitting |= {"negatives": torch.zeros(2, 4, dtype=torch.int64)}
    with pytest.raises(ValueError, match=message):
        sampled_softmax(**{**fitting, **change})
