"""The fused row-wise AdamW against plain PyTorch in float64: repeated ids, runs over many chunks,
several steps.
"""

import pytest
import torch
from torch import Tensor

from kernels.rowwise_adamw import triton_launch
from kernels.rowwise_adamw.op import rowwise_adamw
from kernels.rowwise_adamw.triton_launch import rowwise_adamw_triton
from kernels.rowwise_adamw.types import Hyper
from tests.support.accuracy import assert_as_accurate

IDS = {
    "distinct": [5, 2, 9, 0, 11],
    "one row": [3] * 40,
    "repeats": [1, 0, 1, 7, 7, 1, 0, 11, 7, 2, 2],
    "runs over chunks": [4] * 9 + [2] * 4 + [7] * 3 + [1, 4, 8, 8, 8, 2] + [0] * 30 + [10, 9],
    "nothing": [],
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(triton_launch, "LONGEST", 4)
    monkeypatch.setattr(triton_launch, "PARTIAL_TILE", 32)
    # new tensors start as NaN, so that what is not written shows
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def state(dim: int, momentum: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor | None, Tensor]:
    generator = torch.Generator().manual_seed(dim)
    weight = torch.randn(12, dim, generator=generator)
    return (
        weight.to(dtype),
        torch.zeros(12, dim, dtype=dtype) if momentum else None,
        torch.zeros(12, dtype=dtype),
    )


@pytest.mark.parametrize(("dim", "momentum"), [(1, True), (7, False), (32, True)])
@pytest.mark.parametrize("name", IDS)
def test_interpreted_kernels_equal_plain_pytorch(name: str, dim: int, momentum: bool) -> None:
    ids = torch.tensor(IDS[name], dtype=torch.int64)
    fast, again = state(dim, momentum, torch.float32), state(dim, momentum, torch.float32)
    truth, plain = state(dim, momentum, torch.float64), state(dim, momentum, torch.float32)
    truth = truth[0].copy_(fast[0]), *truth[1:]
    scale = torch.tensor(0.7)
    for step in range(1, 3):
        grads = torch.randn(len(ids), dim, generator=torch.Generator().manual_seed(step))
        hyper = Hyper(step, 0.1, (0.9 if momentum else 0.0, 0.99), 1e-8, 0.05)
        rowwise_adamw_triton(*fast, ids, grads, scale, hyper)
        rowwise_adamw_triton(*again, ids, grads, scale, hyper)
        rowwise_adamw(*plain, ids, grads, hyper, grad_scale=scale)
        rowwise_adamw(*truth, ids, grads.double(), hyper, grad_scale=scale.double())
    for got, repeat, there, expected in zip(fast, again, plain, truth, strict=True):
        if got is None:
            assert expected is None
            continue
        assert repeat is not None and there is not None and expected is not None
        assert torch.equal(got, repeat)
        assert_as_accurate([got], [there], [expected], num_terms=max(1, len(ids)))
    untouched = [row for row in range(12) if row not in IDS[name]]
    assert torch.equal(fast[0][untouched], state(dim, momentum, torch.float32)[0][untouched])


@pytest.mark.parametrize("fused", [False, True])
def test_an_infinite_scale_leaves_the_step_out(fused: bool) -> None:
    ids, infinite = torch.tensor(IDS["runs over chunks"]), torch.tensor(torch.inf)
    tensors, before = state(7, True, torch.float32), state(7, True, torch.float32)
    hyper = Hyper(1, 0.1, (0.9, 0.99), 1e-8, 0.05)
    grads = torch.full((len(ids), 7), torch.nan)
    if fused:
        rowwise_adamw_triton(*tensors, ids, grads, infinite, hyper)
    else:
        rowwise_adamw(*tensors, ids, grads, hyper, grad_scale=infinite)
    for now, then in zip(tensors, before, strict=True):
        assert now is not None and then is not None
        assert torch.equal(now, then)


def test_bfloat16_rows_take_steps_smaller_than_their_last_bit() -> None:
    """Downwards from 1, where the next bfloat16 is 1/256 away, in steps of 1/5000."""
    plain, fast = (torch.ones(12, 32, dtype=torch.bfloat16) for _ in range(2))
    v, fast_v = torch.zeros(12), torch.zeros(12)
    ids, grads = torch.arange(8), torch.ones(8, 32)
    for step in range(1, 101):
        hyper = Hyper(step, 2e-4, (0.0, 0.99), 1e-8, 0.0)
        rowwise_adamw(plain, None, v, ids, grads, hyper)
        if step <= 10:
            rowwise_adamw_triton(fast, None, fast_v, ids, grads, torch.tensor(1.0), hyper)
            assert torch.equal(fast, plain)
    assert plain[:8].float().mean().item() == pytest.approx(1 - 100 * 2e-4, abs=1e-3)
    assert torch.equal(plain[8:], torch.ones(4, 32, dtype=torch.bfloat16))


def test_a_block_of_bfloat16_rows_is_rounded_as_in_the_whole_table() -> None:
    whole, v, grads = torch.ones(12, 32, dtype=torch.bfloat16), torch.zeros(12), torch.ones(12, 32)
    hyper = Hyper(3, 2e-4, (0.0, 0.99), 1e-8, 0.0)
    blocks = [
        (whole[first : first + 5].clone(), torch.zeros(len(whole[first : first + 5])), first)
        for first in (0, 5, 10)
    ]
    fast = [(block.clone(), v.clone(), first) for block, v, first in blocks]
    rowwise_adamw(whole, None, v, torch.arange(12), grads, hyper)
    for block, of_rows, first in blocks:
        rowwise_adamw(
            block,
            None,
            of_rows,
            torch.arange(len(block)),
            grads[: len(block)],
            hyper,
            first_row=first,
        )
    for block, of_rows, first in fast:
        ids, scale = torch.arange(len(block)), torch.tensor(1.0)
        rowwise_adamw_triton(block, None, of_rows, ids, grads[: len(block)], scale, hyper, first)
    assert not torch.equal(whole[:5], whole[5:10])  # chance differs from row to row
    assert torch.equal(torch.cat([block for block, _, _ in blocks]), whole)
    assert torch.equal(torch.cat([block for block, _, _ in fast]), whole)


def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, m, v = state(4, True, torch.float32)
    ids, grads = torch.tensor([1, 1]), torch.ones(2, 4)
    hyper = Hyper(1, 0.1, (0.9, 0.99), 1e-8, 0.0)
    rowwise_adamw(weight, m, v, ids, grads, hyper)
    with pytest.raises(ValueError, match=r"grads must be \[2, 4\], got \(2, 3\)"):
        rowwise_adamw(weight, m, v, ids, grads[:, :3], hyper)
    with pytest.raises(ValueError, match="m is there where β1 is not 0"):
        rowwise_adamw(weight, None, v, ids, grads, hyper)
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    with pytest.raises(ValueError, match="needs CUDA"):
        rowwise_adamw(weight, m, v, ids, grads, hyper, backend="triton")
