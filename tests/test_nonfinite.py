"""A number that is not finite stays with its user: whatever one user's rows hold, all other users'
outputs and gradients are the same bits.

A tile of a kernel reaches past the end of a sequence into the next one, and 0 times NaN is NaN.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from kernels.backend import Backend
from kernels.jagged.op import concatenate_sequences, split_sequences, truncate_tail
from kernels.position_time import triton_launch as position_time_launch
from kernels.position_time.op import add_position_time
from kernels.sampled_softmax.op import sampled_softmax
from kernels.semi_local_attention import tile_table, triton_launch
from kernels.semi_local_attention.op import cached_attention, semi_local_attention, triton_plan
from kernels.semi_local_attention.tile_table import AttentionTile
from kernels.semi_local_attention.types import RelativeBias
from kernels.stu.triton_launch import FusedLayer
from kernels.stu.types import Sequences, STUShape, STUWeights

BROKEN = 1  # the user whose rows are not finite: it stands between two others
LENGTHS, TARGETS = [9, 7, 18, 3], [2, 2, 0, 1]
BAD = {"nan": float("nan"), "inf": float("inf")}

# NumPy, in which kernels are interpreted, warns where it computes with such numbers
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide)")

MASKS = {
    "causal": {},
    "visible lengths": {"window": 3, "full_rows": 2},
    "a prefix": {"window": 2, "full_rows": 0, "prefix": 3},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles that cross the ends of sequences; new tensors begin as NaN."""
    monkeypatch.setattr(tile_table, "tile_sizes", lambda *_, **__: AttentionTile(16, 16, 4, 1))
    # a program past the end of its list costs the interpreter as much as any other
    monkeypatch.setattr(tile_table, "SPLIT_PROGRAMS", 1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def offsets_of(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def others_of(lengths: list[int]) -> Tensor:
    """Where the rows of all users but the broken one lie."""
    users = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return users != BROKEN


def spoil(x: Tensor, lengths: list[int], bad: float) -> Tensor:
    """`x` with a `bad` number in every row of the broken user."""
    spoilt = x.clone()
    rows = (~others_of(lengths)).nonzero()[:, 0]
    spoilt.view(len(x), -1)[rows, rows % x[0].numel()] = bad
    return spoilt


def assert_contained(
    run: Callable[..., list[Tensor]], given: list[Tensor], lengths: list[list[int]], bad: float
) -> None:
    """`run(*given)` are rows of the users; `lengths` are those of each input.

    Outputs have the lengths of the first input, or LENGTHS.
    """
    clean = run(*given)
    spoilt = run(*[spoil(x, of, bad) for x, of in zip(given, lengths, strict=True)])

    for got, expected in zip(spoilt, clean, strict=True):
        rows = others_of(LENGTHS if len(got) == sum(LENGTHS) else lengths[0])
        assert torch.equal(got[rows], expected[rows])
        assert not got[~rows].isfinite().all()


def attend(
    q: Tensor, k: Tensor, v: Tensor, grad: Tensor, *, backend: Backend, visible: bool, **mask: int
) -> list[Tensor]:
    """Output and gradients."""
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    seen, seen_from, more_full = None, None, None
    if visible:
        seen = torch.tensor([3, 7, 0, 5, 1], dtype=torch.int32)
        seen_from = torch.tensor([1, 2, 0, 3, 0], dtype=torch.int32)
        more_full = torch.tensor([1, 0, 2, 0], dtype=torch.int32)
    out = semi_local_attention(
        *leaves,
        offsets_of(LENGTHS),
        max_seq_len=max(LENGTHS),
        num_targets=torch.tensor(TARGETS, dtype=torch.int32),
        target_visible=seen,
        target_from=seen_from,
        extra_full_rows=more_full,
        attn_alpha=0.5,
        scaling_seq_len=7,
        backend=backend,
        **mask,
    )
    out.backward(grad)
    return [out.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]


@pytest.mark.parametrize(
    ("form", "name"),
    [
        *[(form, name) for form in ("pointers", "torch") for name in MASKS],
        ("descriptors", "causal"),
    ],
)
def test_attention(form: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "descriptors":
        monkeypatch.setattr(triton_launch, "_is_hopper", lambda device: True)
    backend: Backend = "torch" if form == "torch" else "triton"
    bad = BAD["inf" if name == "causal" else "nan"]
    given = [draw(sum(LENGTHS), 1, 16, seed=i) for i in range(4)]

    def run(*tensors: Tensor) -> list[Tensor]:
        return attend(*tensors, backend=backend, visible="visible" in name, **MASKS[name])

    assert_contained(run, given, [LENGTHS] * 4, bad)


def test_attention_with_a_bias() -> None:
    """Its tables belong to all users: their gradients show what broke."""
    given = [draw(sum(LENGTHS), 1, 16, seed=i) for i in range(4)]
    time_T = torch.arange(sum(LENGTHS)) * 40_000

    def run(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (q, k, v, draw(6), draw(9))]
        out = semi_local_attention(
            *leaves[:3],
            offsets_of(LENGTHS),
            max_seq_len=max(LENGTHS),
            bias=RelativeBias(*leaves[3:], time_T),
            attn_alpha=0.5,
            scaling_seq_len=7,
            backend="triton",
        )
        out.backward(grad)
        of_tables = [leaf.grad for leaf in leaves[3:] if leaf.grad is not None]
        assert len({bool(x.isfinite().all()) for x in (q, *of_tables)}) == 1
        return [out.detach(), *[leaf.grad for leaf in leaves[:3] if leaf.grad is not None]]

    assert_contained(run, given, [LENGTHS] * 4, BAD["nan"])
    only_q = run(spoil(given[0], LENGTHS, BAD["inf"]), *given[1:])
    assert only_q[0][others_of(LENGTHS)].isfinite().all()


@pytest.mark.parametrize("form", ["pointers", "descriptors", "torch"])
def test_cached_attention(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if form == "descriptors":
        monkeypatch.setattr(triton_launch, "_is_hopper", lambda device: True)
    rows = [5, 3, 17, 1]
    widths = [rows, rows, rows, LENGTHS, LENGTHS]
    given = [draw(sum(lengths), 1, 16, seed=i) for i, lengths in enumerate(widths)]

    def run(q: Tensor, own_k: Tensor, own_v: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
        # as in a graph's room: behind the last history lies what an earlier one left
        k, v = (torch.cat([x, torch.full((20, 1, 16), torch.nan)]) for x in (k, v))
        out = cached_attention(
            q,
            own_k,
            own_v,
            offsets_of(rows),
            k,
            v,
            offsets_of(LENGTHS),
            attn_alpha=0.5,
            scaling_seq_len=7,
            backend="torch" if form == "torch" else "triton",
        )
        return [out]

    assert_contained(run, given, widths, BAD["nan"])


def test_layer() -> None:
    """All of a fused layer: the norms, both products, the gate, attention."""
    shape = STUShape(
        num_heads=1, d_qk=16, d_v=16, norm_eps=1e-6, attn_alpha=0.25, scaling_seq_len=16, window=4,
        full_rows=3, prefix=1,
    )  # fmt: skip
    weights = STUWeights(
        draw(24), draw(24), draw(64, 24), draw(64), draw(16), draw(16), draw(24, 16), draw(24)
    )
    sequences = Sequences(
        offsets_of(LENGTHS), max(LENGTHS), torch.tensor(TARGETS, dtype=torch.int32)
    )

    def run(x: Tensor, grad: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        mask = sequences.mask_tensors, shape.window, shape.full_rows, shape.prefix
        plan = triton_plan(len(x), sequences.seq_offsets, sequences.max_seq_len, *mask)
        out = FusedLayer.apply(leaf, *weights, shape, plan, 0.0, None)
        out.backward(grad)
        assert leaf.grad is not None
        return [out.detach(), leaf.grad]

    given = [draw(sum(LENGTHS), 24, seed=i) for i in range(2)]
    assert_contained(run, given, [LENGTHS] * 2, BAD["nan"])


def test_copies_of_rows() -> None:
    """Context before the tokens, the tokens apart again, and their tails."""
    context = [2] * len(LENGTHS)
    together = [n + 2 for n in LENGTHS]
    left, right = offsets_of(context), offsets_of(LENGTHS)
    tail = torch.tensor([6] * len(LENGTHS))
    kept = [min(n, 6 + 2) for n in together]

    def run(x: Tensor) -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        whole = concatenate_sequences(draw(8, 5), left, leaf, right, backend="triton")
        short, _ = truncate_tail(
            whole, left + right, tail, num_context=2, num_rows=sum(kept), backend="triton"
        )
        _, again = split_sequences(whole, left, right, num_left=8, backend="triton")
        assert torch.equal(short.detach().isfinite(), expected_finite(x))
        (again * again).sum().backward()
        assert leaf.grad is not None
        return [again.detach(), leaf.grad]

    def expected_finite(x: Tensor) -> Tensor:
        parts = [
            torch.cat([torch.ones(2, 5, dtype=torch.bool), rows[-6:]])
            for rows in x.isfinite().split(LENGTHS)
        ]
        return torch.cat(parts)

    assert_contained(run, [draw(sum(LENGTHS), 5)], [LENGTHS], BAD["nan"])


@pytest.mark.parametrize("bad", BAD)
def test_rows_of_position_and_time(bad: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Table rows that the broken user does not share keep their gradients."""
    monkeypatch.setattr(position_time_launch, "SUMMED", {4: (16, 16)})
    tables = draw(27, 16), draw(9, 16, seed=1)
    # the broken user's rows: positions from 20 on, gaps that nobody else has
    others = others_of(LENGTHS)
    number = torch.arange(sum(LENGTHS))
    position = torch.where(others, number % 20, 20 + number % 7)
    gap = torch.where(others, 1000, 10**12)

    def grads(grad: Tensor) -> list[Tensor]:
        leaves = [table.clone().requires_grad_() for table in tables]
        x = draw(sum(LENGTHS), 16).requires_grad_()
        out = add_position_time(x, *leaves, position, gap, backend="triton")
        out.backward(grad)
        return [leaf.grad.to_dense() for leaf in leaves if leaf.grad is not None]

    grad = draw(sum(LENGTHS), 16, seed=2)
    clean, spoilt = grads(grad), grads(spoil(grad, LENGTHS, BAD[bad]))
    for got, expected, its_rows in zip(spoilt, clean, (range(20, 27), [8]), strict=True):
        rows = torch.ones(len(got), dtype=torch.bool)
        rows[torch.tensor(list(its_rows))] = False
        assert torch.equal(got[rows], expected[rows])
        assert not got[~rows].isfinite().all()


def test_sampled_softmax() -> None:
    """The gradients of other users' vectors, and of items that only they drew."""
    lengths = [4, 3, 5]
    others, number = others_of(lengths), torch.arange(12)
    # users 0 and 2 draw of items 0 to 5, the broken one of 6 to 11
    first = torch.where(others, 0, 6)
    positives = first + number % 3
    negatives = torch.stack([first + 3 + number % 3, first + (number + 1) % 3], 1)

    def run(users: Tensor) -> list[Tensor]:
        leaves = users.clone().requires_grad_(), draw(12, 8).requires_grad_()
        sampled_softmax(*leaves, positives, negatives, backend="triton").backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    vectors = draw(12, 16)[:, :8].contiguous()
    clean, spoilt = run(vectors), run(spoil(vectors, lengths, BAD["nan"]))
    for got, expected, its_own in zip(spoilt, clean, (others, number < 6), strict=True):
        assert torch.equal(got[its_own], expected[its_own])
        assert not got[~its_own].isfinite().all()
