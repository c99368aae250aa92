"""The log of the summed exponentials over all items, kernel and chunks, against float64."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.full_softmax import op, torch_chunked
from kernels.full_softmax.op import log_partition
from pipeline.config import RetrievalConfig
from pipeline.train import next_item
from pipeline.train.next_item import NextItemLoss
from tests.support.accuracy import assert_as_accurate
from tests.worlds.model import make_config, make_maps

SIZES = {  # users, items, width
    "one": (1, 1, 1),
    "odd": (7, 13, 5),
    "several blocks of either": (70, 150, 24),
    "narrower blocks": (20, 35, 300),
}


@pytest.fixture(autouse=True)
def fill_with_nan():
    # new tensors start as NaN, so that what is not written shows
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw_case(users: int, items: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Vectors whose scores are large, and the gradient of each user's result, one of them 0.

    Their numbers are eighths, which float16 holds exactly.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = (users, dim), (items, dim), (users,)
    user, item, factor = (torch.randn(shape, generator=generator) for shape in shapes)
    factor[1:2] = 0
    return (24 * user).round() / 8, (8 * item).round() / 8, factor


def total_and_gradients(
    backend: Backend, users: Tensor, items: Tensor, factor: Tensor
) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (users, items)]
    total = log_partition(*leaves, tf32=True, backend=backend)
    return [total.detach(), *torch.autograd.grad(total, leaves, factor)]


def true_results(users: Tensor, items: Tensor, factor: Tensor) -> list[Tensor]:
    return total_and_gradients("reference", users.double(), items.double(), factor.double())


def assert_of_11_bits(got: list[Tensor], truth: list[Tensor]) -> None:
    """Scores are exact, and shares have 11 bits."""
    torch.testing.assert_close(got[0].double(), truth[0], rtol=1e-5, atol=1e-5)
    for found, expected in zip(got[1:], truth[1:], strict=True):
        assert (found - expected).norm() <= 2**-10 * expected.norm()


@pytest.mark.parametrize("name", SIZES)
def test_totals_and_gradients(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_chunked, "MOST_SCORES", 300)
    users, items, factor = draw_case(*SIZES[name])
    truth = true_results(users, items, factor)
    plain = total_and_gradients("reference", users, items, factor)

    for backend in ("triton", "torch"):
        fast, again = (total_and_gradients(backend, users, items, factor) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(fast, again, strict=True)), backend
        if backend == "triton":
            assert_of_11_bits(fast, truth)
        else:
            assert_as_accurate(fast, plain, truth, num_terms=len(users) + len(items))

    wide = total_and_gradients("torch", users.double(), items.double(), factor.double())
    torch.testing.assert_close(wide, truth)


@pytest.mark.parametrize(
    ("of_users", "of_items", "of_factor"),
    [(2.0**20, 2.0**-20, 1.0), (2.0**-40, 2.0**-30, 1.0), (1.0, 1.0, 2.0**-40)],
)
def test_numbers_beyond_the_range_of_float16(
    of_users: float, of_items: float, of_factor: float
) -> None:
    """Its numbers end at 65,504, and below 2**-14 they have ever fewer bits."""
    users, items, factor = draw_case(9, 20, 8)
    case = users * of_users, items * of_items, factor * of_factor
    assert_of_11_bits(total_and_gradients("triton", *case), true_results(*case))


def test_a_large_user_leaves_small_ones_their_bits() -> None:
    users, items, factor = draw_case(9, 20, 8)
    users[0] *= 2**10
    got = total_and_gradients("triton", users, items, factor)
    truth = true_results(users, items, factor)
    assert_of_11_bits([x[1:] for x in got[:2]], [x[1:] for x in truth[:2]])


def test_shares_below_the_range_of_float16() -> None:
    """300 items with a share of 1.5e-8 each, where float16 rounds what is below 3e-8 to 0."""
    users, items = torch.tensor([[18.0, 0.0]]), torch.tensor([[0.0, 8.0]]).repeat(301, 1)
    items[0] = torch.tensor([1.0, 0.0])
    case = users, items, torch.ones(1)
    got, truth = total_and_gradients("triton", *case), true_results(*case)
    for found, expected in zip(got[1:], truth[1:], strict=True):
        torch.testing.assert_close(found.double(), expected, rtol=2**-9, atol=0)


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_no_users_and_no_items(backend: Backend) -> None:
    users, items, factor = draw_case(3, 4, 6)
    total, of_users, of_items = total_and_gradients(backend, users[:0], items, factor[:0])
    assert total.shape == (0,) and of_users.shape == (0, 6)
    assert torch.equal(of_items, torch.zeros(4, 6))

    total, of_users, of_items = total_and_gradients(backend, users, items[:0], factor)
    assert torch.equal(total, torch.full((3,), -torch.inf))
    assert torch.equal(of_users, torch.zeros(3, 6)) and of_items.shape == (0, 6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_user_that_is_not_finite_leaves_others_alone(bad: float) -> None:
    users, items, factor = draw_case(70, 20, 5)
    clean = total_and_gradients("triton", users, items, factor)
    users[3, 2] = bad
    spoilt = total_and_gradients("triton", users, items, factor)

    others = torch.arange(70) != 3
    for got, expected in zip(spoilt[:2], clean[:2], strict=True):
        assert torch.equal(got[others], expected[others])
        assert not got[3].isfinite().all()
    # every item was scored for that user
    assert not spoilt[2].isfinite().all(dim=1).any()


def test_vectors_and_gradients_that_are_not_contiguous() -> None:
    users, items, _ = draw_case(5, 9, 8)
    apart = torch.stack([items, items], dim=1)[:, 0]
    alike = torch.ones(1).expand(5)
    assert not apart.is_contiguous() and not alike.is_contiguous()
    got = total_and_gradients("triton", users, apart, alike)
    expected = total_and_gradients("triton", users, items, torch.ones(5))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize(
    ("tf32", "width", "dtype", "expected"),
    [
        (True, 8, torch.float32, "kernel"),
        (True, 513, torch.float32, "chunks"),
        (True, 8, torch.float64, "chunks"),
        (False, 8, torch.float32, "chunks"),
        (None, 8, torch.float32, "chunks"),  # PyTorch's default allows no TF32
    ],
)
def test_the_kernel_runs_on_a_gpu_where_tf32_is_allowed(
    tf32: bool | None,
    width: int,
    dtype: torch.dtype,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(op, "choose_backend", lambda *_: "triton")  # as for CUDA tensors
    chosen: list[str] = []
    monkeypatch.setattr(op.LogPartition, "apply", lambda *_: chosen.append("kernel"))
    monkeypatch.setattr(op, "chunked_log_partition", lambda *_: chosen.append("chunks"))
    log_partition(torch.ones(2, width, dtype=dtype), torch.ones(3, width, dtype=dtype), tf32=tf32)
    assert chosen == [expected]


@pytest.mark.parametrize(("precision", "expected"), [("bf16", True), ("fp32", None)])
def test_a_run_in_bfloat16_allows_tf32(
    precision: str, expected: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch's loss asks the op for what the run's precision allows."""
    cfg = replace(make_config(), retrieval=RetrievalConfig(enabled=True, loss="full", dim=4))
    maps = replace(make_maps(), item_codes=np.array([[0, 0], [1, 0], [2, 0]], np.int32))
    loss = NextItemLoss(cfg.retrieval, maps, "cpu", precision=precision)

    asked: list[bool | None] = []

    def note(users: Tensor, items: Tensor, *, tf32: bool | None) -> Tensor:
        asked.append(tf32)
        return log_partition(users, items, tf32=tf32)

    monkeypatch.setattr(next_item, "log_partition", note)
    head = SimpleNamespace(score_scale=2.0, item_vectors=lambda codes: torch.eye(2, 4))
    found = loss._full(head, torch.ones(3, 4), torch.tensor([0, 1, 1]))  # pyright: ignore[reportArgumentType]
    torch.testing.assert_close(found, torch.full((3,), math.log(2)))
    assert asked == [expected]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"users_PD": torch.ones(2, 3)}, r"users must be \[P, D\] and items \[N, D\]"),
        ({"items_ND": torch.ones(5, 4).double()}, "one float type, got torch.float32 and"),
        ({"backend": "triton", "tf32": False}, "which tf32=False does not allow"),
        ({"backend": "triton", "tf32": None}, "which tf32=False does not allow"),
        (
            {"backend": "triton", "users_PD": torch.ones(2, 513), "items_ND": torch.ones(5, 513)},
            "up to 512 numbers, got 513",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    fitting = {"users_PD": torch.ones(2, 4), "items_ND": torch.ones(5, 4), "tf32": True}
    with pytest.raises(ValueError, match=message):
        log_partition(**{**fitting, **change})
