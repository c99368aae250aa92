"""Jagged ops against their definition, one sequence at a time; the Triton kernels by the
interpreter.
"""

import pytest
import torch
from torch import Tensor

from kernels.jagged import triton_launch
from kernels.jagged.op import concatenate_sequences, split_sequences, truncate_tail

LENGTHS = {
    "one": ([1], [1]),
    "empty sides": ([63, 0, 130, 0], [0, 0, 7, 5]),
    "nothing left": ([0, 0], [3, 0]),
    "many": ([3, 1, 0, 2] * 20, [1, 0, 4, 2] * 20),
}


@pytest.fixture(autouse=True)
def poisoned():
    """New tensors start as NaN, so that what is not written shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def draw(*shape: int) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])
    ).requires_grad_()


def outputs_and_grads(outputs: tuple[Tensor, ...], inputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Of outputs weighted differently in each place."""
    total = sum((out * torch.arange(1.0, out.numel() + 1).view_as(out)).sum() for out in outputs)
    assert isinstance(total, Tensor)
    return [*(out.detach() for out in outputs), *torch.autograd.grad(total, inputs)]


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    for x, y in zip(got, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("width", [1, 5, 600])
@pytest.mark.parametrize("name", LENGTHS)
def test_concatenate_and_split(name: str, width: int) -> None:
    left_offsets, right_offsets = map(offsets_of, LENGTHS[name])
    left, right = draw(int(left_offsets[-1]), width), draw(int(right_offsets[-1]), width)
    whole = draw(len(left) + len(right), width)

    expected = outputs_and_grads(
        (concatenate_sequences(left, left_offsets, right, right_offsets, backend="reference"),),
        (left, right),
    )
    plain = concatenate_sequences(left, left_offsets, right, right_offsets)
    triton = triton_launch.Concatenate.apply(left, right, left_offsets, right_offsets)
    for out in (plain, triton):
        assert_same(outputs_and_grads((out,), (left, right)), expected)

    expected = outputs_and_grads(
        split_sequences(
            whole, left_offsets, right_offsets, num_left=len(left), backend="reference"
        ),
        (whole,),
    )
    plain = split_sequences(whole, left_offsets, right_offsets, num_left=len(left))
    triton = triton_launch.Split.apply(whole, len(left), left_offsets, right_offsets)
    for out in (plain, triton):
        assert_same(outputs_and_grads(out, (whole,)), expected)


@pytest.mark.parametrize("num_context", [0, 2])
@pytest.mark.parametrize(
    ("lengths", "tail"),
    [([9, 2, 0, 40], [3, 3, 3, 0]), ([1], [0]), ([4, 7, 5], [9, 5, 1]), ([3, 1] * 30, [2, 0] * 30)],
)
def test_truncate_tail(lengths: list[int], tail: list[int], num_context: int) -> None:
    offsets, tails = offsets_of(lengths), torch.tensor(tail, dtype=torch.int32)
    kept = [min(n, num_context + t) for n, t in zip(lengths, tail, strict=True)]
    x = draw(sum(lengths), 5)
    options = {"num_context": num_context, "num_rows": sum(kept)}
    truth, new_offsets = truncate_tail(x, offsets, tails, **options, backend="reference")
    assert new_offsets.diff().tolist() == kept
    expected = outputs_and_grads((truth,), (x,))
    plain, _ = truncate_tail(x, offsets, tails, **options)
    triton = triton_launch.TruncateTail.apply(x, offsets, new_offsets, num_context, sum(kept))
    for out in (plain, triton):
        assert_same(outputs_and_grads((out,), (x,)), expected)


def test_half_precision_rows_are_copied_bit_by_bit() -> None:
    offsets = offsets_of([3, 0, 2])
    x = torch.tensor([1.0, float("inf"), -0.0, float("nan"), 3.0]).bfloat16()[:, None]
    both = triton_launch.Concatenate.apply(x, x, offsets, offsets)
    assert torch.equal(both.view(torch.int16), x[[0, 1, 2, 0, 1, 2, 3, 4, 3, 4]].view(torch.int16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"right_TE": torch.ones(5, 3)}, "of one width"),
        ({"right_TE": torch.ones(5, 2).double()}, "one type"),
        ({"right_offsets": torch.tensor([0, 5])}, "as many sequences, got 2 and 1"),
        ({"left_offsets": torch.tensor([0, 1, 4], dtype=torch.int32)}, "int64"),
        ({"backend": "triton"}, "needs CUDA"),
        ({"backend": "cuda"}, "got 'cuda'"),
    ],
)
def test_what_does_not_fit_is_refused(
    monkeypatch: pytest.MonkeyPatch, change: dict, message: str
) -> None:
    monkeypatch.setattr("kernels.backend.INTERPRETED", False)
    fitting = {"left_TE": torch.ones(4, 2), "left_offsets": offsets_of([1, 3])}
    fitting |= {"right_TE": torch.ones(5, 2), "right_offsets": offsets_of([0, 5])}
    concatenate_sequences(**fitting)
    with pytest.raises(ValueError, match=message):
        concatenate_sequences(**{**fitting, **change})
